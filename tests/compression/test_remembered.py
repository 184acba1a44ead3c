"""Decompositions that candidates of one layer share, and that do not outlive it."""

from __future__ import annotations

import gc
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

import tensornet as tn
from tensornet._util import remembered, remembering


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_the_same_tensors_are_computed_once_and_nothing_outlives_the_block() -> None:
    calls: list[int] = []

    @remembered
    def total(pair: Pair, *, power: int = 1) -> Tensor:
        calls.append(power)
        return (pair.first + pair.second) ** power

    a, b = torch.ones(3), torch.ones(3)
    with remembering():
        first = total(Pair(a, b))
        assert total(Pair(a, b)) is first
        total(Pair(b, a))
        total(Pair(a, b), power=2)
        assert calls == [1, 1, 2]
        a.add_(1)
        assert torch.equal(total(Pair(a, b)), torch.full((3,), 3.0))
        kept = weakref.ref(total(Pair(torch.ones(3), torch.ones(3))))
        for value in range(50):  # freed tensors give their addresses to the next ones
            assert float(total(Pair(torch.full((3,), float(value)), torch.zeros(3)))[0]) == value
        assert kept() is not None
    gc.collect()
    assert kept() is None
    before = len(calls)
    total(Pair(a, b))
    assert len(calls) == before + 1


def test_plans_ask_for_one_decomposition_of_a_layer(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    stats = tn.calibrate(model, [torch.randn(256, 64)], progress=False)
    calls, original = [], torch.linalg.eigh

    def eigh(matrix: Tensor) -> object:
        calls.append(matrix.shape)
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    tn.plan(model, tn.CompressionConfig(bits_per_weight=4.25), stats, progress=False)
    assert len(calls) == 1
