"""Training of a model with integer cores in several processes; what each process does in the tests."""

from __future__ import annotations

from collections.abc import Callable

import distributed_tasks as tasks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import tensornet as tn
from tensornet.healing import trained_scales
from tensornet.nn.storage import Storage
from tensornet.quantization import NumberFormat
from tensornet.topologies import residual, topology_family

FEATURES, CLASSES, ROWS, STEPS = 64, 8, 24, 4
#: An integer matrix, integers plus a low rank in bfloat16, and integer factors.
FORMS = ("integers", "residual", "factors")
Trained = tuple[list[float], dict[str, Tensor]]


def model_of(form: str) -> nn.Sequential:
    """Two compressed layers, the same in every process."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Linear(FEATURES, CLASSES))
    config = tn.CompressionConfig(target_modules="all", formats=("int4",), method="nearest")
    plan = tn.plan(model, config)
    for layer in plan:
        rows, columns = layer.shape
        if form == "residual":
            topology = residual(out_features=rows, in_features=columns, rank=2)
            storage = Storage(number_format="bf16", core_formats={"base": "int2"})  # type: ignore[arg-type]
            plan = plan.replace_layer(layer.name, topology, storage)
        if form == "factors":
            topology = topology_family("low_rank").build(rows, columns, max_bond=4)
            plan = plan.replace_layer(layer.name, topology, Storage(number_format=NumberFormat.parse("int8")))
    tn.apply_plan(model, plan)
    return model.train()


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """The rows of one process in one step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    return x.chunk(ranks)[rank], y.chunk(ranks)[rank]


def train(model: nn.Module, loss_of: Callable[[int], float]) -> list[float]:
    """Steps of Adam over all parameters; `loss_of` runs forward and backward."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        losses.append(loss_of(step))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def single(form: str, ranks: int) -> Trained:
    """The truth: one process that accumulates the gradients of what the others would see."""
    model = model_of(form)

    def loss_of(step: int) -> float:
        parts = []
        for rank in range(ranks):
            x, y = batch(step, rank, ranks)
            loss = F.cross_entropy(model(x), y) / ranks
            loss.backward()
            parts.append(loss.item())
        return sum(parts)

    with trained_scales(model):
        losses = train(model, loss_of)
    return losses, model.state_dict()


def ddp(rank: int, ranks: int) -> dict[str, Trained]:
    """Each form under DistributedDataParallel."""
    found = {}
    for form in FORMS:
        model = model_of(form)
        with trained_scales(model):
            wrapped = nn.parallel.DistributedDataParallel(model)
            losses = train(model, lambda step, wrapped=wrapped: _step(wrapped, step, rank, ranks))  # type: ignore[misc]
        found[form] = losses, model.state_dict()
    return found


def fsdp(rank: int, ranks: int) -> dict[str, Trained]:
    """Each form under FSDP2, every layer a unit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    mesh = init_device_mesh("cpu", (ranks,))
    for form in FORMS:
        model = model_of(form)
        with trained_scales(model):
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            losses = train(model, lambda step, model=model: _step(model, step, rank, ranks))  # type: ignore[misc]
        found[form] = losses, {key: tasks.whole(x) for key, x in model.state_dict().items()}
    return found


def _step(model: nn.Module, step: int, rank: int, ranks: int) -> float:
    x, y = batch(step, rank, ranks)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / ranks
