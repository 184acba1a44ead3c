"""Weighted networks: never dearer than their start, exact where they can be, against a dense solution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tensornet as tn
from tensornet.als import (
    _improve,
    _matrix,
    fit_network,
    fit_weighted,
    leg_moments,
    plan_grams,
)
from tensornet.compression.candidates import network_candidates
from tensornet.compression.config import CompressionConfig
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting, weighted_svd
from tensornet.network import random_cores
from tensornet.nn.storage import Storage
from tensornet.topologies import TopologyFamily, topology_family

CHAINS = [("mpo", {"sites": 2}), ("mpo", {"sites": 3}), ("low_rank", {})]
FAMILIES = [*CHAINS, ("tensor_ring", {}), ("tucker", {})]


def moment(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, 1.5, size).double()[torch.randperm(size, generator=generator)]
    sample = torch.randn(2 * size, size, generator=generator).double() * scales
    return sample.T @ sample / sample.shape[0]


def problem(shape: tuple[int, int] = (12, 16)) -> tuple[Tensor, Weighting]:
    return torch.randn(shape), Weighting(moment(shape[0]), moment(shape[1], seed=1))


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_fitting_never_costs_more_than_the_plain_decomposition(family: str, options: dict[str, int]) -> None:
    matrix, weighting = problem()
    topology = topology_family(family).build(*matrix.shape, max_bond=4, **options)
    plain = topology_family(family).decompose_to(matrix, topology).network
    plain_cost = weighting.cost(matrix - plain.to_matrix())
    result = TopologyFamily.fit(topology_family(family), matrix, topology, weighting)
    cost = weighting.cost(matrix - result.network.to_matrix())
    assert cost <= plain_cost
    assert cost < 0.9 * plain_cost or plain_cost == 0  # Tucker of this cap is exact
    assert result.network.topology == topology
    error = float((matrix - result.network.to_matrix()).norm() / matrix.norm())
    assert result.error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("identity", ["matrices", "diagonals", "scaled"])
@pytest.mark.parametrize(("family", "options"), [*FAMILIES, ("kronecker", {}), ("block_tt", {})])
def test_identities_give_the_plain_decomposition(family: str, options: dict[str, int], identity: str) -> None:
    matrix, _ = problem()
    topology = topology_family(family).build(*matrix.shape, max_bond=3, **options)
    plain = topology_family(family).decompose_to(matrix, topology).network
    rows, columns = (torch.ones(n).double() for n in matrix.shape)
    if identity != "diagonals":
        rows, columns = rows.diag(), columns.diag()
    weighting = Weighting(5 * rows if identity == "scaled" else rows, columns)
    decompose = topology_family(family)._network_of
    found = fit_weighted(decompose, matrix, topology, weighting, sweeps=0)
    torch.testing.assert_close(found.to_matrix(), plain.to_matrix(), rtol=1e-4, atol=1e-4)
    fitted = fit_weighted(decompose, matrix, topology, weighting, sweeps=3)
    gap, plain_gap = (float((matrix - x.to_matrix()).norm()) for x in (fitted, plain))
    assert gap <= plain_gap * (1 + 1e-5)


def test_low_rank_fit_reaches_the_closed_form() -> None:
    matrix, weighting = problem()
    topology = tn.topologies.low_rank(out_features=12, in_features=16, rank=5)
    start = topology_family("low_rank").decompose_to(matrix, topology).network
    fit = fit_network(matrix, start, weighting, sweeps=60, steps=30)
    best = float(weighted_svd(matrix, weighting).error[5])
    assert best * (1 - 1e-4) <= fit.cost <= best * 1.05
    assert fit.start > 1.5 * best


def test_cost_falls_with_every_sweep() -> None:
    matrix, weighting = problem()
    topology = topology_family("mpo").build(12, 16, max_bond=5, sites=3)
    start = topology_family("mpo").decompose_to(matrix, topology).network
    costs = [fit_network(matrix, start, weighting, sweeps=k, steps=4).cost for k in range(4)]
    assert costs[0] == pytest.approx(weighting.cost(matrix - start.to_matrix()), rel=1e-4)
    assert costs == sorted(costs, reverse=True)


def test_a_product_moment_is_found_again() -> None:
    legs = [moment(3), moment(4, seed=2)]
    legs = [leg / leg.diagonal().mean() for leg in legs]
    for found, leg in zip(leg_moments(torch.kron(*legs), (3, 4)), legs, strict=True):
        torch.testing.assert_close(found, leg)


def test_product_moments_make_the_start_optimal_for_two_sites() -> None:
    """With moments that are products over the legs the whitened chain is the best two-site chain."""
    matrix = torch.randn(12, 12)
    legs = [moment(3), moment(4, seed=1), moment(4, seed=2), moment(3, seed=3)]
    weighting = Weighting(torch.kron(legs[0], legs[1]), torch.kron(legs[2], legs[3]))
    topology = topology_family("mpo").build(12, 12, out_dims=(3, 4), in_dims=(4, 3), max_bond=4)
    start = fit_weighted(topology_family("mpo")._network_of, matrix, topology, weighting, sweeps=0)
    fitted = fit_network(matrix, start, weighting, sweeps=5, steps=20)
    plain = topology_family("mpo").decompose_to(matrix, topology).network
    cost = weighting.cost(matrix - start.to_matrix())
    assert cost <= weighting.cost(matrix - plain.to_matrix())
    assert fitted.cost == pytest.approx(cost, rel=0.02)  # legs are damped a little


def test_padded_legs() -> None:
    matrix, weighting = problem((11, 13))
    topology = topology_family("mpo").build(11, 13, max_bond=4, sites=2)
    assert topology.padded_shape != (11, 13)
    result = topology_family("mpo").fit(matrix, topology, weighting)
    plain = topology_family("mpo").decompose_to(matrix, topology).network
    assert weighting.cost(matrix - result.network.to_matrix()) < weighting.cost(matrix - plain.to_matrix())


def test_a_fit_costs_hardly_more_than_its_candidate_says() -> None:
    """A candidate has an estimated cost; near the full bond the fit may end at several times this cost."""
    matrix, weighting = problem()
    sensitivity, family = Sensitivity(weighting, weighting), topology_family("mpo")
    config = CompressionConfig(topology="mpo", topology_options={"sites": 2})
    *found, dense = network_candidates(matrix, sensitivity, Storage(pivoted=True), family, config)
    assert (dense.topology, dense.cost, dense.params) == (None, 0, matrix.numel())
    for each in found[::3]:
        assert each.topology is not None
        assert each.storage.num_params(each.topology) == each.params
        made = topology_family("mpo").fit(matrix, each.topology, weighting)
        cost = weighting.cost(matrix - made.network.to_matrix())
        assert cost <= each.cost * 1.1 + 0.01 * weighting.cost(matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    ("family", "options"),
    [*FAMILIES, ("kronecker", {}), ("block_tt", {"sites": 3}), ("tensor_ring", {"sites": 3})],
)
def test_one_step_solves_for_a_core_of_any_network(
    family: str, options: dict[str, int], dtype: torch.dtype
) -> None:
    """Without a weighting, against the explicit least-squares problem."""
    topology = topology_family(family).build(12, 18, max_bond=3, **options)
    cores = list(random_cores(topology, dtype=dtype))
    matrix = torch.randn(12, 18, dtype=dtype)
    for index, core in enumerate(cores):
        units = torch.eye(core.numel(), dtype=dtype)
        made = [
            _matrix(topology, [*cores[:index], x.reshape(core.shape), *cores[index + 1 :]]) for x in units
        ]
        design = torch.stack([x.reshape(-1) for x in made], dim=1)
        exact = torch.linalg.lstsq(design, matrix.reshape(-1), driver="gelsd").solution
        wanted = float((design @ exact - matrix.reshape(-1)).norm()) ** 2 / 2
        solved = list(cores)
        assert _improve(matrix, Weighting(), topology, solved, index, 1, math.inf) == pytest.approx(wanted)


def test_bonds_too_many_for_one_gram_matrix_are_solved_for_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a network without loops their Kronecker product is the whole one."""
    monkeypatch.setattr("tensornet.als._WHOLE", 1)
    plan_grams.cache_clear()
    test_one_step_solves_for_a_core_of_any_network("mpo", {"sites": 3}, torch.float64)
    test_one_step_solves_for_a_core_of_any_network("tucker", {}, torch.float64)
    plan_grams.cache_clear()
