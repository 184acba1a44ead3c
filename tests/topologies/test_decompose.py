"""`tn.decompose`: one call for families by name, for their topologies, and for topologies of one's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.errors import NonFiniteError, ShapeError, TopologyError
from tensornet.network import random_cores
from tensornet.testing import laws, reference, strategies
from tensornet.topologies import Budget, CoreSpec, topology_family, topology_names


def tree(bond: int, out_features: int = 8, in_features: int = 9) -> tn.Topology:
    """A binary tree of my own: two leaves with an out- and an in-leg each, joined by a root with one more."""
    return tn.Topology(
        family="my_tree",
        cores=(
            CoreSpec("root", ("a", "b", "o2")),
            CoreSpec("left", ("o0", "i0", "a")),
            CoreSpec("right", ("o1", "i1", "b")),
        ),
        sizes=(("a", bond), ("b", bond), ("o0", 2), ("o1", 2), ("o2", 2), ("i0", 3), ("i1", 3)),
        out_labels=("o0", "o1", "o2"),
        in_labels=("i0", "i1"),
        out_features=out_features,
        in_features=in_features,
    )


@given(
    matrix=strategies.matrices(max_size=10), name=st.sampled_from(topology_names()), bond=st.integers(1, 4)
)
def test_families_decompose_as_they_do_themselves(matrix: torch.Tensor, name: str, bond: int) -> None:
    family = topology_family(name)
    named = tn.decompose(matrix, name, max_bond=bond) if name != "tensor_ring" else None
    if named is not None:
        expected = family.decompose(matrix, Budget(max_bond=bond))
        assert torch.equal(named.network.to_matrix(), expected.network.to_matrix())
        assert named.error == expected.error
    topology = family.build(*matrix.shape, max_bond=bond)
    found = tn.decompose(matrix, topology)
    assert found.network.topology == topology
    error = reference.relative_error(matrix, found.network.to_matrix())
    assert error <= found.error * (1 + 1e-5) + laws.tolerance(matrix.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_topologies_of_my_own_find_what_they_can_hold(dtype: torch.dtype, scale: float) -> None:
    topology = tree(2)
    generator = torch.Generator().manual_seed(3)
    matrix = tn.TensorNetwork(topology, random_cores(topology, generator=generator, dtype=dtype)).to_matrix()
    found = tn.decompose(matrix * scale, topology)
    assert found.network.topology == topology
    assert found.network.cores[0].dtype == dtype
    assert found.error < 1e-4
    assert reference.relative_error(matrix, found.network.to_matrix() / scale) < 1e-4
    again = tn.decompose(matrix * scale, topology)
    assert all(map(torch.equal, found.network.cores, again.network.cores))


@pytest.mark.parametrize("shape", [(8, 9), (7, 8)])
@pytest.mark.parametrize("bond", [1, 2, 3])
def test_error_of_my_own_topologies_is_measured(shape: tuple[int, int], bond: int) -> None:
    topology = tree(bond, *shape)
    matrix = torch.randn(topology.shape)
    before = matrix.clone()
    found = tn.decompose(matrix, topology)
    assert torch.equal(matrix, before)
    error = reference.relative_error(matrix, found.network.to_matrix())
    assert error == pytest.approx(found.error, rel=1e-4)
    assert found.error < 1
    assert found.iterations > 0


def test_zero_matrix_has_no_error() -> None:
    found = tn.decompose(torch.zeros(8, 9), tree(2))
    assert found.error == 0
    assert not found.network.to_matrix().any()


def test_what_decompose_cannot_take_is_refused() -> None:
    matrix = torch.randn(8, 9)
    with pytest.raises(TopologyError, match="max_bond, rel_error"):
        tn.decompose(matrix, tree(2), sites=2)
    with pytest.raises(TopologyError, match="fixes all"):
        tn.decompose(matrix, tree(2), max_bond=2)
    with pytest.raises(TopologyError, match="'mpoo'"):
        tn.decompose(matrix, "mpoo")
    with pytest.raises(TopologyError, match="flavour"):
        tn.decompose(matrix, "mpo", flavour="sweet")
    with pytest.raises(ShapeError, match=r"\(8, 9\), got \(9, 8\)"):
        tn.decompose(matrix.T, tree(2))
    with pytest.raises(ShapeError, match=r"\(out, in\)"):
        tn.decompose(matrix[0], tree(2))
    matrix[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="1 NaN"):
        tn.decompose(matrix, tree(2))


def test_law_of_caps_reads_one_cap_for_each_bond() -> None:
    matrix = strategies.matrix_with_spectrum((8, 8), "power", seed=0)

    def too_large(matrix: torch.Tensor, budget: Budget) -> laws.Outcome:
        return laws.Outcome.of(tn.decompose(matrix, "mpo", max_bond=(2, 3), sites=3))

    laws.check_caps(too_large, matrix, Budget(max_bond=(2, 3)))
    with pytest.raises(AssertionError, match="bonds"):
        laws.check_caps(too_large, matrix, Budget(max_bond=(3, 2)))


def laplacian(size: int) -> torch.Tensor:
    """The second difference: every bond of a chain has the rank 3."""
    one = torch.ones(size - 1, dtype=torch.float64)
    return 2 * torch.eye(size, dtype=torch.float64) - one.diag(1) - one.diag(-1)


def of_rank_two(size: int) -> torch.Tensor:
    rows = torch.arange(size, dtype=torch.float64)
    return 1 + rows[:, None] * (rows + 1)


EXACT_BONDS = {
    "mpo": (laplacian(64), [3, 3]),
    "tensor_ring": (laplacian(64), [3, 3]),
    "kronecker": (laplacian(64), [3]),
    "block_tt": (laplacian(64), [2]),
    "low_rank": (of_rank_two(64), [2]),
    "tucker": (torch.kron(of_rank_two(8), of_rank_two(8)), [2, 2, 2, 2]),
}


@pytest.mark.parametrize("budget", [{"max_bond": 7}, {"param_ratio": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", EXACT_BONDS)
def test_limit_alone_keeps_no_numerical_zeros(
    family: str, dtype: torch.dtype, budget: dict[str, float]
) -> None:
    matrix, bonds = EXACT_BONDS[family]
    found = tn.decompose(matrix.to(dtype), family, **budget)
    assert [size for size in found.network.topology.bond_dims.values() if size > 1] == bonds
    assert found.bound_by == "exact"
    true = reference.relative_error(matrix, found.network.to_matrix())
    assert max(true, found.error) <= 100 * torch.finfo(dtype).eps


def test_bond_of_low_rank_is_small_beside_bonds_that_are_cut() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 3).double(), torch.randn(3, 4096).double()  # the first bond has rank 3
    matrix = (left @ right).reshape(8, 8, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(512, 512)
    operator = tn.MPO.from_matrix(matrix, out_dims=(8, 8, 8), in_dims=(8, 8, 8), max_bond=20)
    assert operator.bond_dims == (3, 20)
    true = reference.relative_error(matrix, operator.to_matrix())
    assert operator.error * (1 - 1e-6) <= true <= operator.error * (1 + 1e-6)


def test_limits_that_cut_nothing_give_the_ranks_of_no_limit() -> None:
    for limits in ({}, {"max_bond": 7}, {"max_bond": 1000}, {"param_ratio": 100.0}):
        assert tn.MPO.from_matrix(laplacian(64), out_dims=(2,) * 6, in_dims=(2,) * 6, **limits).bond_dims == (
            (3,) * 5
        )
