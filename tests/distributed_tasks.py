"""Training of a small mixture in several processes; what each process does in the tests of distribution."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import tensornet_moe as tm
from tensornet.topologies import mpo
from tensornet_moe.experimental import parallel

#: Imported once, where processes are forked from (which does not find modules of the tests).
PRELOADED = ["tensornet_moe", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]
FEATURES, EXPERTS, LAYERS, CLASSES, ROWS = 12, 4, 2, 5, 24
TOPOLOGY = {"out_dims": (3, 4, 2), "in_dims": (2, 3, 2)}


def experts_of(number: int) -> tm.ExpertFFN:
    """Experts that share a center."""
    up = mpo(**TOPOLOGY)
    down = mpo(out_dims=TOPOLOGY["in_dims"], in_dims=TOPOLOGY["out_dims"])
    banks = {"up": tm.SharedCoreExperts(up, number), "down": tm.SharedCoreExperts(down, number)}
    return tm.ExpertFFN(banks, bias=True)


class Block(nn.Module):
    """A mixture with a residual connection."""

    def __init__(self, experts: tm.ExpertFFN | tm.ExpertPool | tm.PooledExperts) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.moe = tm.SharedCoreMoE(tm.TopKRouter(FEATURES, EXPERTS, top_k=2), experts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Two blocks and a head; blocks share `"nothing"`, the experts of a `"pool"`, or only a `"center"`."""

    def __init__(self, common: str = "nothing") -> None:
        super().__init__()
        torch.manual_seed(3)
        number = EXPERTS * (LAYERS if common == "center" else 1)
        self.pool = None if common == "nothing" else tm.ExpertPool(experts_of(number))
        self.blocks = nn.ModuleList()
        for layer in range(LAYERS):
            experts: Any = experts_of(EXPERTS) if self.pool is None else self.pool
            if common == "center":  # experts of its own for each layer
                experts = tm.PooledExperts(experts, range(layer * EXPERTS, (layer + 1) * EXPERTS))
            self.blocks.append(Block(experts))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass
class Record:
    """What a training did.

    Args:
        losses: of each step, averaged over processes.
        centers: checksum of the shared cores after each step.
        masked: which shared cores each step left alone.
        state: the whole model at the end, under the names of one process.
        outputs: of the trained model for one input.
    """

    losses: list[float] = field(default_factory=list)
    centers: list[str] = field(default_factory=list)
    masked: list[tuple[bool, ...]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """The rows of one process in one step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    return x.chunk(ranks)[rank], y.chunk(ranks)[rank]


def loss_of(model: nn.Module, step: int, rank: int, ranks: int) -> Tensor:
    x, y = batch(step, rank, ranks)
    loss = F.cross_entropy(model(x), y)
    return loss + tm.collect_aux_losses(model).total


def train(model: nn.Module, step_loss: Callable[[int], float], steps: int, p: float) -> Record:
    """Steps of SGD with momentum under a gradient mask; `step_loss` runs forward and backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    mask, record = tm.GradientMask(model, p=p, seed=5).attach(optimizer), Record()
    seen: list[tuple[bool, ...]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(tuple(x.grad is None for x in mask.parameters)))
    for step in range(steps):
        optimizer.zero_grad()
        record.losses.append(step_loss(step))
        optimizer.step()
        shared = [whole(x) for x in mask.parameters]
        record.centers.append(hashlib.sha256(b"".join(x.numpy().tobytes() for x in shared)).hexdigest())
    record.masked = seen
    return record


def whole(parameter: Tensor) -> Tensor:
    """The full value of a parameter that may be sharded."""
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def single(ranks: int, steps: int, *, p: float = 0.5, common: str = "nothing") -> Record:
    """The truth: one process that accumulates the gradients of what the others would see."""
    model = Model(common)

    def step_loss(step: int) -> float:
        losses = []
        for rank in range(ranks):
            loss = loss_of(model, step, rank, ranks) / ranks
            loss.backward()
            losses.append(float(loss.detach()))
        return sum(losses)

    record = train(model, step_loss, steps, p)
    return finish(record, model, model.state_dict())


@torch.no_grad()
def finish(record: Record, model: nn.Module, state: dict[str, Tensor]) -> Record:
    record.state = {key: whole(value).clone() for key, value in state.items()}
    record.outputs = model.eval()(batch(99, 0, 1)[0])
    return record


def ddp(rank: int, ranks: int, steps: int, common: str) -> Record:
    model = Model(common)
    wrapped = nn.parallel.DistributedDataParallel(model)
    record = train(model, lambda step: _step(wrapped, step, rank, ranks), steps, 0.5)
    return finish(record, model, model.state_dict())


def fsdp(rank: int, ranks: int, steps: int, common: str) -> Record:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Model(common), init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what several blocks use is the root's
    record = train(model, lambda step: _step(model, step, rank, ranks), steps, 0.5)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    fresh = Model(common)
    if rank == 0:
        fresh.load_state_dict(state)
    return finish(record, fresh, state if rank == 0 else fresh.state_dict())


def experts(rank: int, ranks: int, steps: int, common: str) -> Record:
    model = Model(common)
    parallel.shard_experts(model)

    def step_loss(step: int) -> float:
        loss = _step(model, step, rank, ranks)
        parallel.average_gradients(model)
        return loss

    record = train(model, step_loss, steps, 0.5)
    sharded = model.eval()(batch(99, 0, 1)[0]).detach()
    parallel.gather_experts(model)
    finish(record, model, model.state_dict())
    torch.testing.assert_close(record.outputs, sharded)
    return record


def experts_in_ddp(rank: int, ranks: int, steps: int, common: str) -> Record:
    model = Model(common)
    own = parallel.shard_experts(model)
    assert len(own) == LAYERS * 2 * (2 + 1)  # two banks with two private cores and a bias each
    wrapped = nn.parallel.DistributedDataParallel(model)
    record = train(model, lambda step: _step(wrapped, step, rank, ranks), steps, 0.5)
    parallel.gather_experts(model)
    return finish(record, model, model.state_dict())


def load_elsewhere(rank: int, ranks: int, path: str) -> Tensor:
    """Load one checkpoint on this number of processes, and run it with its experts spread."""
    model = Model()
    model.load_state_dict(torch.load(path, weights_only=True))
    parallel.shard_experts(model)
    return model.eval()(batch(99, 0, 1)[0]).detach()


def biases(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """The load of the tokens of this process, and the biases after a step of all."""
    torch.manual_seed(0)
    router = tm.SwitchRouter(FEATURES, EXPERTS, bias_rate=0.1)
    nn.init.normal_(router.weight)
    moe = tm.SharedCoreMoE(router, experts_of(EXPERTS))
    moe(batch(0, rank, ranks)[0][: 6 * (rank + 1)])
    load = moe.stats.load.float()
    tm.update_biases(moe)
    return load, router.bias_steps


def _step(model: nn.Module, step: int, rank: int, ranks: int) -> float:
    loss = loss_of(model, step, rank, ranks)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / ranks


def in_processes(function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """Run `function(rank, ranks, *arguments)` in so many processes of one group; their results by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = folder / f"store-{function.__name__}-{ranks}"
    processes = [
        context.Process(target=_in_group, args=(function, rank, ranks, str(store), arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks, f"exit codes {codes}"
    return [torch.load(f"{store}-{rank}", weights_only=False) for rank in range(ranks)]


def _in_group(
    function: Callable[..., Any], rank: int, ranks: int, store: str, arguments: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.save(function(rank, ranks, *arguments), f"{store}-{rank}")
    dist.destroy_process_group()
