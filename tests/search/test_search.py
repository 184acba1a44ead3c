"""The search finds planted structure, keeps its promises, and never loses to plain low rank."""

from __future__ import annotations

import math

import pytest
import torch

import tensornet as tn
from tensornet.contraction.cost import GPU, dense_seconds
from tensornet.contrib.search import search_topology
from tensornet.errors import BudgetError, NonFiniteError, ShapeError, TopologyError
from tensornet.network import TensorNetwork, random_cores
from tensornet.topologies import block_tt, low_rank, mpo, topology_family

PLANTED = {
    "mpo": mpo(out_dims=(4, 4, 4), in_dims=(4, 4, 4), bond_dims=(6, 6)),
    "low_rank": low_rank(out_features=64, in_features=64, rank=7),
    "block_tt": block_tt(out_dims=(8, 8), in_dims=(8, 8), max_bond=2),
}


@pytest.mark.parametrize("family", PLANTED)
def test_planted_structure_is_found(family: str) -> None:
    topology = PLANTED[family]
    matrix = TensorNetwork(topology, random_cores(topology, dtype=torch.float64)).to_matrix()
    found = search_topology(matrix, max_params=topology.num_params).best("error")
    assert found.topology.family == family
    assert found.params <= topology.num_params
    assert found.error < 1e-6


@pytest.mark.parametrize("shape", [(48, 32), (1, 9), (17, 23)])
def test_points_keep_their_promises(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    before = matrix.clone()
    found = search_topology(matrix, max_params=max(sum(shape), math.prod(shape) // 2), tokens=(1, 1000))
    assert torch.equal(matrix, before)
    plain = tn.truncated_svd(matrix, max_rank=found.max_params // sum(shape)).error
    assert found.best().error <= plain + 1e-9
    for point in found.points:
        assert point.params == point.topology.num_params <= found.max_params
        assert point.topology.shape == shape
        made = topology_family(point.topology.family).decompose_to(matrix, point.topology).network
        assert float((made.to_matrix() - matrix).norm() / matrix.norm()) <= point.error + 1e-9
    front = [(point.params, point.error, point.milliseconds) for point in found]
    for point in found.points:
        mine = (point.params, point.error, point.milliseconds)
        beaten = [other for other in front if all(a <= b for a, b in zip(other, mine, strict=True))]
        assert beaten == [mine] if mine in front else beaten
    assert all(point.form in str(found) for point in found)


def test_limits_of_best() -> None:
    found = search_topology(torch.randn(48, 32), param_ratio=0.6)
    assert found.best("params").params == min(point.params for point in found.points)
    assert found.best("time").error <= 1.25 * found.best("error").error
    promised = found.best("time", max_error=0.9)
    assert promised.error <= 0.9
    assert all(p.milliseconds >= promised.milliseconds for p in found.points if p.error <= 0.9)
    assert found.best("error", max_ms=promised.milliseconds).milliseconds <= promised.milliseconds
    with pytest.raises(BudgetError, match=r"meets max_error=1e-09"):
        found.best(max_error=1e-9)
    with pytest.raises(BudgetError, match=r"max_error must be a number"):
        found.best(max_error="0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown objective 'speed'"):
        found.best("speed")  # type: ignore[arg-type]


def test_times_are_geometric_means_for_the_machine() -> None:
    matrix, options = torch.randn(12, 12), {"param_ratio": 0.8, "families": "kronecker", "machine": GPU}
    one, many, both = (search_topology(matrix, tokens=t, **options) for t in (1, 1000, (1, 1000)))  # type: ignore[arg-type]
    assert {point.topology.family for point in both.points} == {"kronecker"}
    assert one.dense_milliseconds == pytest.approx(dense_seconds(12, 12, 1, GPU) * 1e3)
    assert both.dense_milliseconds**2 == pytest.approx(one.dense_milliseconds * many.dense_milliseconds)
    for a, b, c in zip(one.points, many.points, both.points, strict=True):
        assert c.milliseconds**2 == pytest.approx(a.milliseconds * b.milliseconds)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({}, BudgetError, "needs a budget"),
        ({"param_ratio": 0}, BudgetError, "param_ratio must be above 0"),
        ({"max_params": 0}, BudgetError, "max_params"),
        ({"max_params": 3}, BudgetError, "fits 3 parameters"),
        ({"param_ratio": 0.5, "families": ("forest",)}, TopologyError, "Unknown topology 'forest'"),
        ({"param_ratio": 0.5, "families": ()}, TopologyError, "families is empty"),
        ({"param_ratio": 0.5, "max_sites": 1}, ValueError, "max_sites"),
        ({"param_ratio": 0.5, "tokens": (8, 0)}, ValueError, "tokens"),
        ({"param_ratio": 0.5, "tokens": "many"}, ValueError, "tokens"),
        ({"param_ratio": 0.5, "tokens": ()}, ValueError, "tokens"),
        ({"param_ratio": 0.5, "machine": "cpu"}, TypeError, "measure_machine"),
        ({"param_ratio": 0.5, "matrix": torch.zeros(2, 2, 2)}, ShapeError, "shape"),
        ({"param_ratio": 0.5, "matrix": (4, 4)}, ShapeError, r"torch\.Tensor"),
        ({"param_ratio": 0.5, "matrix": torch.full((4, 4), math.nan)}, NonFiniteError, "The matrix"),
    ],
)
def test_bad_input(options: dict[str, object], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        search_topology(**{"matrix": torch.ones(4, 4), **options})  # type: ignore[arg-type]
