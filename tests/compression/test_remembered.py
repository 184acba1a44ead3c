"""Decompositions that candidates of one layer share, and that do not outlive it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

import tensornet as tn
from tensornet._util import remembered, remembering


@dataclass(frozen=True)
class Pair:
    first: Tensor
    second: Tensor


def counted() -> tuple[list[int], object]:
    calls: list[int] = []

    @remembered
    def total(pair: Pair, *, power: int = 1) -> Tensor:
        calls.append(power)
        return (pair.first + pair.second) ** power

    return calls, total


def test_the_same_tensors_are_computed_once() -> None:
    calls, total = counted()
    a, b = torch.ones(3), torch.ones(3)
    with remembering():
        first = total(Pair(a, b))  # type: ignore[operator]
        assert total(Pair(a, b)) is first  # type: ignore[operator]
        assert calls == [1]
        total(Pair(b, a))  # type: ignore[operator]
        total(Pair(a, b), power=2)  # type: ignore[operator]
        assert calls == [1, 1, 2]
        a.add_(1)
        assert torch.equal(total(Pair(a, b)), torch.full((3,), 3.0))  # type: ignore[operator]
    total(Pair(a, b))  # type: ignore[operator]
    assert calls == [1, 1, 2, 1, 1]


def test_nothing_outlives_the_block() -> None:
    _, total = counted()
    with remembering():
        result = weakref.ref(total(Pair(torch.ones(3), torch.ones(3))))  # type: ignore[operator]
        gc.collect()
        assert result() is not None
    gc.collect()
    assert result() is None


def test_arguments_that_are_gone_are_not_mistaken_for_new_ones() -> None:
    _, total = counted()
    with remembering():
        for value in range(50):  # freed tensors give their addresses to the next ones
            made = total(Pair(torch.full((3,), float(value)), torch.zeros(3)))  # type: ignore[operator]
            assert float(made[0]) == value


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
