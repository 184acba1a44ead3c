"""Dense models and compressed ones to heal."""

from __future__ import annotations

import copy
from functools import cache

import torch
from hf_models import gpt2
from torch import Tensor, nn

import tensornet as tn
from tensornet.healing.objective import output_distance

CONFIG = tn.CompressionConfig(param_ratio=0.5, objective="weight", topology="low_rank", pivoted=True)


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 100, (8, 12), generator=generator) for _ in range(count)]


@cache
def _pair(build: object) -> tuple[nn.Module, nn.Module]:
    teacher = build().eval()  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "wte" not in name:
                parameter.mul_(3)
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
