"""Dense models and compressed ones to heal."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from hf_models import gpt2
from torch import Tensor, nn
from torch.utils.data import Dataset

import tensornet as tn
from tensornet.healing.heal import compressed_layers, output_distance, trainable_cores

#: Options of `Trainer` for a few steps on the CPU.
TRAINING: dict[str, Any] = {
    "learning_rate": 3e-3,
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}
CONFIG = tn.CompressionConfig(param_ratio=0.5, method="svd", topology="low_rank")


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 100, (8, 12), generator=generator) for _ in range(count)]


class Examples(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(1, 100, (32, 12), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


def train_cores_alone(model: nn.Module) -> None:
    model.requires_grad_(False)
    for core in trainable_cores(compressed_layers(model)).values():
        core.requires_grad_(True)


@torch.no_grad()
def sharpened(model: nn.Module) -> nn.Module:
    """Scale the weights up: a random model says nearly the same of every input."""
    for name, parameter in model.named_parameters():
        if "wte" not in name:
            parameter.mul_(3)
    return model.eval()


@cache
def _pair(build: object) -> tuple[nn.Module, nn.Module]:
    teacher = sharpened(build())  # type: ignore[operator]
    student = copy.deepcopy(teacher)
    tn.compress(student, CONFIG, progress=False)
    return teacher, student


def pair(build: object = gpt2) -> tuple[nn.Module, nn.Module]:
    teacher, student = _pair(build)
    return teacher, copy.deepcopy(student)


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module) -> float:
    batch = {"input_ids": batches()[0]}
    return float(output_distance(student(**batch), teacher(**batch), batch))
