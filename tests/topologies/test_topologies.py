"""Every registered family against the shipped laws, and what each family promises of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import tensornet as tn
from tensornet.errors import BudgetError, TopologyError
from tensornet.network import random_cores
from tensornet.testing import laws, reference, strategies
from tensornet.topologies import (
    Budget,
    block_tt,
    kronecker,
    mpo,
    tensor_ring,
    topology_family,
    tucker,
)

DIMS = {"out_dims": (3, 8), "in_dims": (4, 5)}
FAMILIES = ("block_tt", "kronecker", "low_rank", "mpo", "tensor_ring", "tucker")
small = strategies.matrices(max_size=12)


class TestMPO(laws.FamilyLaws):
    family = topology_family("mpo")
    matrices = small


class TestLowRank(laws.FamilyLaws):
    family = topology_family("low_rank")
    matrices = small


class TestDense(laws.FamilyLaws):
    family = topology_family("dense")
    matrices = small


class TestKronecker(laws.FamilyLaws):
    family = topology_family("kronecker")
    matrices = small


class TestBlockTT(laws.FamilyLaws):
    family = topology_family("block_tt")
    matrices = small


class TestTensorRing(laws.FamilyLaws):
    family = topology_family("tensor_ring")
    matrices = small


class TestTucker(laws.FamilyLaws):
    family = topology_family("tucker")
    matrices = small


class TestBlockTTOfThree(laws.FamilyLaws):
    family = topology_family("block_tt")
    matrices = small
    options = {"sites": 3}  # noqa: RUF012


class TestNetworks(laws.NetworkLaws):
    networks = strategies.networks(topology=strategies.topologies(families=FAMILIES))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("promise", [0.1, 0.5, 0.9])
def test_promise_is_kept_and_used(name: str, promise: float) -> None:
    matrix = torch.randn(24, 24, dtype=torch.float64)
    options = {} if name in ("low_rank", "kronecker") else {"sites": 3}
    result = topology_family(name).decompose(matrix, Budget(rel_error=promise), **options)
    assert result.error <= promise
    assert result.error > 0.4 or promise < 0.9, "an allowance that large must be used"
    assert reference.relative_error(matrix, result.network.to_matrix()) <= promise


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.complex128, 1e-200), (torch.float64, 1e200)],
)
def test_scale_does_not_matter(name: str, dtype: torch.dtype, scale: float) -> None:
    family, matrix = topology_family(name), torch.randn(24, 18, dtype=dtype)
    plain = family.decompose(matrix, Budget(max_bond=3))
    scaled = family.decompose(matrix * scale, Budget(max_bond=3))
    assert scaled.error == pytest.approx(plain.error, rel=1e-4)
    found = reference.relative_error(matrix, scaled.network.to_matrix() / scale)
    assert found == pytest.approx(plain.error, rel=1e-4, abs=1e-6)
    sizes = [float((core / core.abs().max()).norm() * core.abs().max()) for core in scaled.network.cores]
    assert max(sizes) <= 1e3 * min(sizes)  # balanced, so that one learning rate suits all


@pytest.mark.parametrize("name", FAMILIES)
def test_random_cores_give_the_variance_of_a_linear_layer(name: str) -> None:
    topology = topology_family(name).build(24, 20, max_bond=3)
    generator = torch.Generator().manual_seed(0)
    draws = [
        tn.TensorNetwork(topology, random_cores(topology, generator=generator)).to_matrix()
        for _ in range(300)
    ]
    matrices = torch.stack(draws)
    # Elements of one draw share cores, so the mean over draws, not over elements, sets the spread.
    per_draw = matrices.square().mean((1, 2)) * 20
    spread = float(per_draw.std()) / math.sqrt(len(draws))
    assert abs(float(per_draw.mean()) - 1) < 4 * spread
    assert spread < 0.12


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in FAMILIES), ("mpo", {"sites": 12})])
def test_sorted_json_keeps_the_order_of_cores_and_bonds(name: str, options: dict[str, int]) -> None:
    """transformers sorts the keys of config.json; core 10 must not come before core 2."""
    topology = topology_family(name).build(4096, 4096, max_bond=3, **options)
    again = tn.Topology.from_dict(json.loads(json.dumps(topology.to_dict(), sort_keys=True)))
    assert again.cores == topology.cores
    assert list(again.bond_dims.items()) == list(topology.bond_dims.items())
    assert again.size_of == topology.size_of


def test_an_order_that_names_not_everything_is_refused() -> None:
    data = topology_family("mpo").build(8, 8, sites=3).to_dict()
    for order in ({"cores": ["0", "1"], "sizes": list(data["sizes"])}, {"cores": ["0", "1", "9"]}):
        with pytest.raises(TopologyError, match="topology description"):
            tn.Topology.from_dict({**data, "order": order})


def decompose_ring(shape: tuple[int, int], max_bond: int | None = None, **options: object) -> object:
    return topology_family("tensor_ring").decompose(torch.randn(shape), Budget(max_bond), **options)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: mpo(**DIMS, bond_dims=(99,)), r"\(99,\).*\(12,\)"),
        (lambda: tensor_ring(**DIMS, bond_dims=(99, 2)), r"\(99, 2\).*\(24, 2\)"),
        (lambda: tensor_ring(**DIMS, bond_dims=(2, 99)), r"\(2, 99\).*\(2, 24\)"),
        (lambda: decompose_ring((24, 20), ring_bond=99, **DIMS), r"ring_bond.*\(12,\)"),
        (lambda: block_tt(**DIMS, bond_dims=(99,)), r"\(99,\).*\(3,\)"),
        (lambda: tucker(**DIMS, ranks=(3, 9, 4, 5)), r"ranks.*\(3, 8, 4, 5\)"),
        (lambda: kronecker(**DIMS, terms=99), r"terms.*\(12,\)"),
    ],
)
def test_bonds_beyond_the_maximum_are_clipped_and_that_is_said(
    build: Callable[[], tn.Topology], said: str
) -> None:
    with pytest.warns(UserWarning, match=said):
        build()


@pytest.mark.parametrize("name", FAMILIES)
def test_bad_input_of_every_family(name: str) -> None:
    family = topology_family(name)
    with pytest.raises(TopologyError, match=r"\(5, 4\)"):
        family.decompose_to(torch.randn(5, 4), family.build(4, 5, max_bond=2))
    with pytest.raises(BudgetError, match="param_ratio=1e-05"):
        family.decompose(torch.randn(16, 16), Budget(param_ratio=1e-5))
    for call in (family.build, lambda *shape, **x: family.decompose(torch.ones(shape), Budget(), **x)):
        with pytest.raises(TopologyError, match=f"{name!r}.*colour"):
            call(8, 8, colour="red")  # type: ignore[arg-type]
    if name != "low_rank":
        with pytest.raises(TopologyError, match="multiply to 6"):
            family.build(8, 6, out_dims=(2, 3), in_dims=(2, 3))


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: topology_family("mps"), TopologyError, "'mps'"),
        (lambda: kronecker(out_dims=(2, 2, 2), in_dims=(2, 2, 2)), TopologyError, "two factors"),
        (lambda: topology_family("kronecker").build(8, 8, sites=3), TopologyError, "got sites=3"),
        (lambda: tensor_ring(out_dims=(4,), in_dims=(4,)), TopologyError, "two sites"),
        (lambda: decompose_ring((4, 4), sites=1), TopologyError, "two sites"),
        (lambda: decompose_ring((12, 18), 3, ring_bond=5), BudgetError, "ring_bond=5"),
    ],
)
def test_bad_input_of_single_families(call: Callable[[], object], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        call()


def test_narrow_ring_keeps_the_closing_bond_asked_for() -> None:
    """Closed by more than the last core can tell apart: no use, but no reason to cut cores either."""
    matrix = torch.randn(8, 12, dtype=torch.float64)
    dims = {"out_dims": (4, 1, 2), "in_dims": (6, 2, 1)}
    found = topology_family("tensor_ring").decompose(matrix, Budget(param_ratio=1.5), **dims, ring_bond=4)
    assert list(found.network.topology.bond_dims.values())[-1] == 4
    assert reference.relative_error(matrix, found.network.to_matrix()) <= found.error + 1e-12


# --- one by one ----------------------------------------------------------------------------------


def test_kronecker_finds_a_kronecker_product() -> None:
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    matrix = torch.kron(a, b)
    result = topology_family("kronecker").decompose(
        matrix, Budget(max_bond=1), out_dims=(3, 5), in_dims=(4, 2)
    )
    assert result.error < 1e-7
    assert result.network.num_params == 12 + 10
    left, right = result.network.cores
    torch.testing.assert_close(torch.kron(left[0], right[0]), matrix)


def test_block_tt_of_bond_one_is_the_monarch_projection() -> None:
    """Each block of a Monarch matrix is the best rank-1 approximation of the block of the matrix."""
    matrix = torch.randn(6, 8, dtype=torch.float64)
    result = topology_family("block_tt").decompose(
        matrix, Budget(max_bond=1), out_dims=(2, 3), in_dims=(4, 2)
    )
    blocks = matrix.reshape(2, 3, 4, 2)
    cut = sum(
        np.sum(np.linalg.svd(blocks[:, o, i, :].numpy(), compute_uv=False)[1:] ** 2)
        for o in range(3)
        for i in range(4)
    )
    assert result.error == pytest.approx(math.sqrt(cut) / float(matrix.norm()), rel=1e-12)
    assert reference.relative_error(matrix, result.network.to_matrix()) == pytest.approx(result.error)


RING = {"out_dims": (3, 3, 3), "in_dims": (3, 3, 3)}


@pytest.fixture
def ring_matrix() -> torch.Tensor:
    """A matrix that is a ring of bonds 4, 4 and 2, and no small chain."""
    topology = tn.topologies.tensor_ring(bond_dims=(4, 4, 2), **RING)
    generator = torch.Generator().manual_seed(3)
    cores = random_cores(topology, generator=generator, dtype=torch.float64)
    return tn.TensorNetwork(topology, cores).to_matrix()


def test_least_squares_finds_the_ring_that_no_chain_is(ring_matrix: torch.Tensor) -> None:
    budget = Budget(max_bond=4)
    ring = topology_family("tensor_ring").decompose(ring_matrix, budget, ring_bond=2, sweeps=200, **RING)
    chain = topology_family("mpo").decompose(ring_matrix, budget, **RING)
    assert ring.error < 0.6 * chain.error  # in some minima of least squares a third is left
    assert ring.iterations > 1
    once = topology_family("tensor_ring").decompose(ring_matrix, budget, ring_bond=2, sweeps=1, **RING)
    assert (once.iterations, once.converged) == (1, False)
    true = reference.relative_error(ring_matrix, ring.network.to_matrix())
    assert true == pytest.approx(ring.error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_least_squares_never_raises_the_error(dtype: torch.dtype) -> None:
    matrix, family = torch.randn(23, 26, dtype=dtype), topology_family("tensor_ring")
    budget = Budget(max_bond=3)
    errors = [family.decompose(matrix, budget, ring_bond=2, sweeps=sweeps).error for sweeps in range(5)]
    assert all(later <= earlier for earlier, later in pairwise(errors))
    refined = family.decompose(matrix, budget, ring_bond=2, sweeps=4)
    true = reference.relative_error(matrix, refined.network.to_matrix())
    assert true <= refined.error + laws.tolerance(dtype)


def test_tucker_finds_its_own_ranks() -> None:
    topology = tn.topologies.tucker(out_dims=(4, 5), in_dims=(5, 4), ranks=(2, 3, 2, 3))
    matrix = tn.TensorNetwork(topology, random_cores(topology, dtype=torch.float64)).to_matrix()
    result = topology_family("tucker").decompose(
        matrix, Budget(rel_error=1e-7), out_dims=(4, 5), in_dims=(5, 4)
    )
    assert result.network.topology == topology
    assert result.bound_by == "rel_error"


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_drawing_names_every_core_and_size(name: str, tmp_path: Path) -> None:
    topology = topology_family(name).build(12, 10, max_bond=3)
    figure = tn.TensorNetwork(topology, random_cores(topology)).draw()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert set(topology.core_names) <= set(texts)
    assert {str(size) for _, size in topology.sizes if size > 1} <= set(texts)
    figure.savefig(tmp_path / "network.png")
    assert (tmp_path / "network.png").stat().st_size > 2000


@pytest.mark.parametrize("sites", [3, 4, 5, 6])
def test_legs_of_a_ring_do_not_lie_on_its_bonds(sites: int) -> None:
    topology = tn.topologies.tensor_ring(out_dims=(2,) * sites, in_dims=(3,) * sites, max_bond=3)
    cores = [torch.zeros(shape) for shape in topology.core_shapes.values()]
    drawn: dict[str, list[float]] = {}
    for line in tn.TensorNetwork(topology, cores).draw().axes[0].lines:
        (x, u), (y, v) = line.get_xdata(), line.get_ydata()  # type: ignore[misc]
        drawn.setdefault(str(line.get_color()), []).append(math.atan2(float(v - y), float(u - x)))
    out, inside, bonds = (drawn[color] for color in ("#b3541e", "#3a7d44", "#444444"))
    assert len(out) == len(inside) == sites
    assert min(abs(math.sin(leg - bond)) for leg in (*out, *inside) for bond in bonds) > 0.2


def test_rings_take_singular_vectors_in_order_where_the_first_cut_keeps_all() -> None:
    """In any other basis of the same space a larger bond was three times worse than a smaller one."""
    matrix = torch.randn(10, 5, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05])
    )
    matrix = matrix @ torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))).Q
    legs = {"out_dims": (1, 2, 5), "in_dims": (5, 1, 1)}
    family = topology_family("tensor_ring")
    errors = [
        family.decompose(matrix, Budget(max_bond=cap), ring_bond=2, **legs).error for cap in (2, 3, 4, 5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]
