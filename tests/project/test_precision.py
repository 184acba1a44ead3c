"""Decomposing inside a caller's autocast gives what it gives outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tensornet as tn
from tensornet.linalg.weighted_svd import Weighting
from tensornet.topologies import Budget, Decomposition, topology_family, topology_names
from tensornet.topologies.low_rank import LowRankFamily


def cores_of(made: object) -> tuple[Tensor, ...]:
    if isinstance(made, tn.linalg.svd.TruncatedSVD):
        return (made.U, made.S, made.Vh)
    return tuple(made.cores if isinstance(made, tn.MPO) else made.network.cores)  # type: ignore[attr-defined]


def same(function: Callable[[], object]) -> None:
    outside = function()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function()
        assert torch.is_autocast_enabled("cpu")
    for a, b in zip(cores_of(outside), cores_of(inside), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert inside.error == outside.error  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", sorted({*topology_names()} - {"dense", "residual"}))
def test_families(family: str) -> None:
    matrix = torch.randn(24, 16)
    made = topology_family(family).decompose(matrix, Budget(param_ratio=0.6))
    same(lambda: topology_family(family).decompose(matrix, Budget(param_ratio=0.6)))
    same(lambda: topology_family(family).decompose_to(matrix, made.network.topology))


def test_families_of_others() -> None:
    class Other(LowRankFamily):
        def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
            return super().decompose(matrix @ torch.eye(16), budget, **options)

        def decompose_to(self, matrix: Tensor, topology: tn.Topology) -> Decomposition:
            return super().decompose_to(matrix @ torch.eye(16), topology)

    matrix, family = torch.randn(24, 16), Other()
    made = family.decompose(matrix, Budget(max_bond=4))
    same(lambda: family.decompose(matrix, Budget(max_bond=4)))
    same(lambda: family.decompose_to(matrix, made.network.topology))


def test_operators_and_their_rounding() -> None:
    matrix = torch.randn(24, 16)
    operator = tn.MPO.from_matrix(matrix, sites=3)
    same(lambda: tn.MPO.from_matrix(matrix, sites=3, max_bond=4))
    same(lambda: tn.MPO.from_matrices(torch.stack([matrix, matrix.flip(0)]), sites=3, max_bond=4)[1])
    same(lambda: operator.round(max_bond=3))


def test_truncated_svd() -> None:
    matrix = torch.randn(40, 30)
    same(lambda: tn.truncated_svd(matrix, max_rank=5))


@pytest.mark.parametrize("topology", ["mpo", "tucker", "low_rank"])
def test_weighted(topology: str) -> None:
    matrix, moment = torch.randn(24, 16), torch.diag(torch.arange(1.0, 17.0))
    built = topology_family(topology).build(24, 16, max_bond=3)
    same(lambda: topology_family(topology).fit(matrix, built, Weighting(None, moment.double())))
