"""Loading and training Hugging Face models in several processes; what each process does in the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet_moe.experimental import parallel

X = torch.arange(3, 15).reshape(2, 6)


def _load(rank: int, ranks: int, folder: str, **sizes: Any) -> Any:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def distributed_config(
    rank: int, ranks: int, folders: dict[str, str], sizes: dict[str, dict[str, Any]], saved: str
) -> dict[tuple[str, str], Any]:
    """Logits of every folder in every distribution, or the error."""
    found: dict[tuple[str, str], Any] = {}
    for name, folder in folders.items():
        for how, options in sizes.items():
            try:
                model = _load(rank, ranks, folder, **options).eval()
            except (TargetError, ValueError) as error:
                found[name, how] = str(error)
                continue
            with torch.no_grad():
                logits: Any = model(X).logits
            found[name, how] = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
            if how == "fsdp":
                model.save_pretrained(str(Path(saved) / name))
            dist.barrier()
    return found


def fsdp_steps(rank: int, ranks: int, folder: str, saved: str) -> list[float]:
    """Losses of some steps of SGD under FSDP2 by `DistributedConfig`, each process with rows of its own."""
    model = _load(rank, ranks, folder, fsdp_size=ranks).train()
    losses = _steps(model, X.chunk(ranks)[rank], lambda: None)
    model.save_pretrained(saved)
    return losses


def expert_steps(rank: int, ranks: int, folder: str, saved: str) -> list[float]:
    """The same with the experts spread by us, saved by one process once they are together again."""
    model = th.load(folder).train()
    parallel.shard_experts(model)
    losses = _steps(model, X.chunk(ranks)[rank], lambda: parallel.average_gradients(model))
    parallel.gather_experts(model)
    if rank == 0:
        model.save_pretrained(saved)
    dist.barrier()
    return losses


def _steps(model: Any, x: Tensor, before_step: Any) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        before_step()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses
