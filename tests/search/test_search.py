"""The search finds planted structure, keeps its promises, and never loses to plain low rank."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.contraction.cost import CPU, GPU, dense_seconds
from tensornet.contrib.search import SearchPoint, TopologySearch, search_topology
from tensornet.errors import BudgetError, NonFiniteError, ShapeError, TopologyError
from tensornet.linalg.tt_svd import CutSpectra
from tensornet.network import TensorNetwork, random_cores
from tensornet.topologies import block_tt, low_rank, mpo, topology_family


def true_error(matrix: torch.Tensor, point: SearchPoint) -> float:
    found = topology_family(point.topology.family).decompose_to(matrix, point.topology)
    difference = found.network.to_matrix().double() - matrix.double()
    return float(difference.norm() / matrix.double().norm())


PLANTED = {
    "mpo": mpo(out_dims=(4, 4, 4), in_dims=(4, 4, 4), bond_dims=(5, 6)),
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
    assert found.error is not None
    assert found.error < 1e-6
    assert true_error(matrix, found) < 1e-6


@pytest.mark.slow
@given(
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.floats(0.05, 1.2),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_points_keep_their_promises(
    shape: tuple[int, int], ratio: float, dtype: torch.dtype, seed: int
) -> None:
    matrix = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    limit = int(ratio * shape[0] * shape[1])
    try:
        found = search_topology(matrix, param_ratio=ratio, tokens=3)
    except BudgetError:
        assert limit < sum(shape)
        return
    assert found.points
    best = found.best("error")
    for point in found.points:
        assert point.params == point.topology.num_params <= limit
        assert point.topology.shape == shape
        assert point.error is not None
        assert point.milliseconds > 0
        assert point.error >= (best.error or 0) - 1e-12
        if point.error_bound is not None:
            assert point.error <= point.error_bound + 1e-5
    # Single precision leaves about the square root of its rounding where nothing is cut.
    allowed = 1e-3 if dtype == torch.float32 else 1e-6
    assert true_error(matrix, best) <= best.ranked_error + allowed


def test_never_worse_than_plain_low_rank() -> None:
    matrix = torch.randn(48, 32)
    for ratio in (0.2, 0.5):
        rank = int(ratio * matrix.numel()) // sum(matrix.shape)
        plain = tn.truncated_svd(matrix, max_rank=rank).error
        best = search_topology(matrix, param_ratio=ratio).best("error")
        assert best.error is not None
        assert best.error <= plain + 1e-5


def test_bounds_hold_for_chains() -> None:
    matrix = torch.randn(24, 36, dtype=torch.float64)
    for candidate in topology_family("mpo").proposals((24, 36), 400, CutSpectra(matrix), 4):
        found = topology_family("mpo").decompose_to(matrix, candidate.topology)
        difference = found.network.to_matrix() - matrix
        assert candidate.topology.num_params <= 400
        assert candidate.lower - 1e-9 <= float(difference.norm() / matrix.norm()) <= candidate.upper + 1e-9
        assert candidate.worst is not None
        assert candidate.upper <= candidate.worst + 1e-9


def test_pruning_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(32, 24, dtype=torch.float64)
    found = search_topology(matrix, param_ratio=0.4)
    assert found.pruned > 0
    monkeypatch.setattr("tensornet.contrib.search._beaten", lambda *_: False)
    everything = search_topology(matrix, param_ratio=0.4)
    assert everything.pruned == 0

    def coordinates(result: TopologySearch) -> set[tuple[int, float, float]]:
        return {(p.params, round(p.ranked_error, 9), round(p.milliseconds, 9)) for p in result}

    assert coordinates(found) == coordinates(everything)


def test_front_holds_no_beaten_point() -> None:
    found = search_topology(torch.randn(48, 32), param_ratio=0.5)
    front = [(point.params, point.ranked_error, point.milliseconds) for point in found]
    assert len(found) == len(front) > 1
    for point in found.points:
        mine = (point.params, point.ranked_error, point.milliseconds)
        assert any(all(a <= b for a, b in zip(other, mine, strict=True)) for other in front)
    for one in front:
        others = [other for other in front if other != one]
        assert not any(all(a <= b for a, b in zip(other, one, strict=True)) for other in others)


def test_shape_alone_ranks_by_the_worst_case() -> None:
    found = search_topology((48, 32), param_ratio=0.5)
    assert all(point.error is None for point in found.points)
    assert "error at most" in str(found)
    plain = next(point for point in found.points if point.topology.family == "low_rank")
    rank = max(plain.topology.bond_dims.values())
    assert plain.error_bound == pytest.approx(math.sqrt(1 - rank / 32))
    assert found.best("error").error_bound == min(point.ranked_error for point in found.points)


def test_limits_of_best() -> None:
    found = search_topology(torch.randn(48, 32), param_ratio=0.6)
    assert found.best("params").params == min(point.params for point in found.points)
    fast = found.best("time")
    assert fast.params >= 0.9 * max(point.params for point in found.points)
    promised = found.best("time", max_error=0.9)
    assert promised.ranked_error <= 0.9
    assert all(p.milliseconds >= promised.milliseconds for p in found.points if p.ranked_error <= 0.9)
    assert found.best("error", max_ms=fast.milliseconds).milliseconds <= fast.milliseconds
    with pytest.raises(BudgetError, match=r"meets max_error=1e-09"):
        found.best(max_error=1e-9)
    with pytest.raises(BudgetError, match=r"max_error must be a number, got '0\.1'"):
        found.best(max_error="0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown objective 'speed'; choose one of error, time, params"):
        found.best("speed")  # type: ignore[arg-type]


def test_other_families_and_machines() -> None:
    matrix = torch.randn(12, 12)
    found = search_topology(matrix, param_ratio=0.8, families=("kronecker", "low_rank"), machine=GPU)
    assert {point.topology.family for point in found.points} == {"kronecker", "low_rank"}
    assert found.dense_milliseconds == pytest.approx(dense_seconds(12, 12, 256, GPU) * 1e3)
    shapes = search_topology((12, 12), param_ratio=0.8, families=("kronecker",), machine=CPU)
    assert shapes.points[0].error_bound is None
    assert shapes.points[0].ranked_error == 1.0


def test_ranks_that_kernels_like_are_offered_too() -> None:
    found = search_topology((320, 320), max_params=100 * 640, tokens=512, families=("low_rank",))
    ranks = {max(point.topology.bond_dims.values()) for point in found.points}
    assert {100, 96} <= ranks
    assert found.best("time").topology == low_rank(out_features=320, in_features=320, rank=96)
    assert found.best("error").topology == low_rank(out_features=320, in_features=320, rank=100)


@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (100, 80)])
def test_low_rank_of_the_whole_budget_is_never_ruled_out(shape: tuple[int, int]) -> None:
    """Without a matrix a smaller chain may beat it by its bound and in time; who asks for speed wants it."""
    search = search_topology(shape, param_ratio=0.4, tokens=(1, 64))
    ranks = [p.topology.bond_dims["b1"] for p in search.points if p.topology.family == "low_rank"]
    largest = int(0.4 * shape[0] * shape[1]) // sum(shape)
    assert {largest, largest - largest % 16} <= set(ranks)
    fastest = search.best("time")
    assert all(
        point.milliseconds >= fastest.milliseconds
        for point in search.points
        if point.topology.family == "low_rank" and point.params >= 0.9 * max(p.params for p in search.points)
    )


def test_several_token_counts_weigh_the_same() -> None:
    one, many = (search_topology((48, 32), param_ratio=0.5, tokens=t) for t in (1, 1000))
    both = search_topology((48, 32), param_ratio=0.5, tokens=(1, 1000))
    assert both.tokens == (1, 1000)
    assert both.dense_milliseconds**2 == pytest.approx(one.dense_milliseconds * many.dense_milliseconds)
    times = [{p.topology: p.milliseconds for p in found.points} for found in (one, many, both)]
    shared = times[0].keys() & times[1].keys() & times[2].keys()
    assert shared
    for topology in shared:
        assert times[2][topology] ** 2 == pytest.approx(times[0][topology] * times[1][topology])


def test_the_input_is_not_changed() -> None:
    matrix = torch.randn(16, 12, requires_grad=True)
    before = matrix.detach().clone()
    search_topology(matrix, param_ratio=0.5)
    assert torch.equal(matrix, before)


def test_bad_input() -> None:
    with pytest.raises(BudgetError, match="needs a budget: param_ratio= or max_params="):
        search_topology((4, 4))
    with pytest.raises(BudgetError, match="param_ratio must be above 0, got 0"):
        search_topology((4, 4), param_ratio=0)
    with pytest.raises(BudgetError, match="max_params must be an integer of at least 1, got 0"):
        search_topology((4, 4), max_params=0)
    with pytest.raises(BudgetError, match=r"fits 3 parameters; raise the budget \(plain low rank needs 8"):
        search_topology((4, 4), max_params=3)
    with pytest.raises(ShapeError, match=r"got shape \(2, 2, 2\)"):
        search_topology(torch.zeros(2, 2, 2), param_ratio=0.5)
    with pytest.raises(ShapeError, match="out_features of the shape must be an integer of at least 1, got 0"):
        search_topology((0, 4), param_ratio=0.5)
    with pytest.raises(NonFiniteError, match="The matrix"):
        search_topology(torch.full((4, 4), math.nan), param_ratio=0.5)
    with pytest.raises(TopologyError, match="Unknown topology 'forest'"):
        search_topology((4, 4), param_ratio=0.5, families=("forest",))
    with pytest.raises(TopologyError, match="families is empty; name at least one of block_tt"):
        search_topology((4, 4), param_ratio=0.5, families=())
    with pytest.raises(TopologyError, match="families is empty; name at least one of block_tt"):
        search_topology((4, 4), param_ratio=0.5, families=None)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="or its shape, two integers; got 12"):
        search_topology(12, param_ratio=0.5)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"as a torch\.Tensor, .*; got ndarray"):
        search_topology(torch.ones(4, 4).numpy(), param_ratio=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_sites must be an integer of at least 2, got 1"):
        search_topology((4, 4), param_ratio=0.5, max_sites=1)
    for tokens in (1.5, "many", (8, 0)):
        with pytest.raises(ValueError, match="tokens must be an integer of at least 1"):
            search_topology((4, 4), param_ratio=0.5, tokens=tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1"):
        search_topology((4, 4), param_ratio=0.5, tokens=0)


def test_one_family_may_be_named_alone() -> None:
    found = search_topology((12, 18), param_ratio=0.6, families="low_rank")
    assert {point.topology.family for point in found.points} == {"low_rank"}


def test_points_and_searches_print_in_a_line() -> None:
    known = search_topology(torch.randn(12, 18), param_ratio=0.6, families="low_rank")
    counts = f"{len(known.front)} of {len(known.points)} points"
    assert repr(known) == f"<TopologySearch (12, 18): {counts} on the front>"
    assert re.fullmatch(r"low_rank 4: 120 parameters, error 0\.\d{5}, \d\.\d{4} ms", str(known.best()))
    bounded = search_topology((12, 18), param_ratio=0.6, families="low_rank").best()
    assert "error at most 0.81650" in str(bounded)
