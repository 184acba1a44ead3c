"""Conversion to and from other libraries, each checked by what that library computes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tensornet as tn
from tensornet.errors import MissingDependencyError, ShapeError
from tensornet.testing import reference

CASES = {
    "square": ((2, 3), (2, 3)),
    "rectangular": ((2, 3, 4), (3, 1, 2)),
    "one site": ((3,), (4,)),
}
cases = pytest.mark.parametrize(("out_dims", "in_dims"), CASES.values(), ids=CASES)


def operator(out_dims: tuple[int, ...], in_dims: tuple[int, ...], dtype: torch.dtype) -> tn.MPO:
    matrix = torch.randn(int(np.prod(out_dims)), int(np.prod(in_dims)), dtype=dtype)
    return tn.MPO.from_matrix(matrix, out_dims=out_dims, in_dims=in_dims, max_bond=3)


def same(ours: tn.MPO, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(theirs, reference.to_numpy(ours.to_matrix()), rtol=0, atol=1e-12)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside quimb's dependencies at import
def test_quimb(out_dims: tuple[int, ...], in_dims: tuple[int, ...], dtype: torch.dtype) -> None:
    quimb = pytest.importorskip("quimb.tensor")
    ours = operator(out_dims, in_dims, dtype)
    theirs = ours.to_quimb()
    assert isinstance(theirs, quimb.MatrixProductOperator)
    sites = range(len(out_dims))
    same(ours, theirs.to_dense([f"k{k}" for k in sites], [f"b{k}" for k in sites]))
    back = tn.MPO.from_quimb(theirs)
    assert [core.shape for core in back.cores] == [core.shape for core in ours.cores]
    same(back, reference.to_numpy(ours.to_matrix()))


def test_quimb_operators_of_its_own() -> None:
    quimb = pytest.importorskip("quimb.tensor")
    theirs = quimb.MPO_rand(4, bond_dim=3, phys_dim=2, seed=0)
    same(tn.MPO.from_quimb(theirs), theirs.to_dense())
    summed = theirs + theirs  # quimb orders the indices of a sum differently
    same(tn.MPO.from_quimb(summed), summed.to_dense())
    identity = tn.MPO.from_quimb(quimb.MPO_identity(4))  # its sites share one array, which cannot be written
    identity.cores[0].zero_()
    assert torch.equal(identity.cores[1], tn.MPO.from_quimb(quimb.MPO_identity(4)).cores[1])


def test_exponent_of_quimb_is_part_of_the_operator() -> None:
    quimb = pytest.importorskip("quimb.tensor")
    theirs = quimb.MPO_rand(5, 4, seed=1) * 3.7
    before = theirs.to_dense()
    theirs.equalize_norms_(1.0)
    assert theirs.exponent != 0
    same(tn.MPO.from_quimb(theirs), before)
    theirs.exponent += 400  # no single core can hold this power of ten
    assert float(tn.MPO.from_quimb(theirs).log_norm()) == pytest.approx(np.log(3.7) + 400 * np.log(10))


def padded() -> tuple[tn.MPO, np.ndarray]:
    """An operator whose padding is not zero, and its matrix with zeros instead."""
    cores = [torch.randn(1, 4, 4, 3), torch.randn(3, 4, 4, 3), torch.randn(3, 4, 4, 1)]
    operator = tn.MPO([core.double() for core in cores], out_features=61, in_features=59)
    matrix = np.pad(reference.chain_matrix(operator.cores)[:61, :59], ((0, 3), (0, 5)))
    return operator, matrix


def test_quimb_gets_padding_of_zeros() -> None:
    pytest.importorskip("quimb.tensor")
    operator, matrix = padded()
    theirs = operator.to_quimb().to_dense()
    np.testing.assert_allclose(theirs, matrix, rtol=0, atol=1e-12 * np.linalg.norm(matrix))


def test_padding_of_zeros_does_not_enlarge_exported_bonds() -> None:
    pytest.importorskip("quimb.tensor")
    matrix = torch.exp(torch.linspace(0, 1, 61, dtype=torch.float64))[:, None] * torch.ones(61).double()
    operator = tn.MPO.from_matrix(matrix, out_dims=(4, 4, 4), in_dims=(4, 4, 4))
    back = tn.MPO.from_quimb(operator.to_quimb())
    assert [core.shape for core in back.cores] == [core.shape for core in operator.cores]


@pytest.fixture
def tensorly_on_torch() -> Iterator[None]:
    tensorly = pytest.importorskip("tensorly")
    with tensorly.backend_context("pytorch"):
        yield


@cases
@pytest.mark.usefixtures("tensorly_on_torch")
def test_tensorly(out_dims: tuple[int, ...], in_dims: tuple[int, ...]) -> None:
    ours = operator(out_dims, in_dims, torch.float64)
    theirs = ours.to_tensorly()
    same(ours, theirs.to_matrix().numpy())
    same(tn.MPO.from_tensorly(theirs), theirs.to_matrix().numpy())


@pytest.mark.usefixtures("tensorly_on_torch")
def test_tensorly_gets_padding_of_zeros() -> None:
    operator, matrix = padded()
    theirs = operator.to_tensorly().to_matrix().numpy()
    np.testing.assert_allclose(theirs, matrix, rtol=0, atol=1e-12 * np.linalg.norm(matrix))


@pytest.mark.usefixtures("tensorly_on_torch")
def test_tensorly_decomposition_of_its_own() -> None:
    from tensorly.decomposition import tensor_train_matrix

    tensor = torch.randn(2, 3, 3, 2, dtype=torch.float64)
    theirs = tensor_train_matrix(tensor, [1, 4, 1])
    same(tn.MPO.from_tensorly(theirs), theirs.to_matrix().numpy())


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensornet._util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"to_quimb needs quimb.*tensornet-torch\[interop\]"):
        operator((2, 3), (2, 3), torch.float64).to_quimb()


def test_quimb_gets_a_copy_in_a_dtype_that_numpy_has() -> None:
    cores = [core.bfloat16() for core in tn.MPO.from_matrix(torch.randn(6, 8), sites=2).cores]
    arrays = [tensor.data for tensor in tn.MPO(cores).to_quimb()]
    assert {array.dtype for array in arrays} == {np.dtype("float32")}
    operator = tn.MPO.from_matrix(torch.randn(6, 8), sites=2)
    before = operator.to_matrix()
    for tensor in operator.to_quimb():
        tensor.data[...] = 0
    assert torch.equal(operator.to_matrix(), before)


def test_factors_under_that_name_are_taken() -> None:
    """As in tltorch's BlockTT, which indexes like the matrix and not like the list of its factors."""
    operator = tn.MPO.from_matrix(torch.randn(6, 8), sites=2)
    assert torch.equal(
        tn.MPO.from_tensorly(SimpleNamespace(factors=operator.cores)).to_matrix(), operator.to_matrix()
    )


def test_what_is_no_open_chain_is_refused() -> None:
    for convert in (tn.MPO.from_quimb, tn.MPO.from_tensorly):
        for other in (torch.ones(3, 4), "cores", {"0": 1}, 3.0):
            with pytest.raises(ShapeError, match="Expected a"):
                convert(other)
    quimb = pytest.importorskip("quimb.tensor")
    with pytest.raises(ShapeError, match="tensor_ring"):
        tn.MPO.from_quimb(quimb.MPO_rand(4, bond_dim=3, phys_dim=2, cyclic=True, seed=0))
    arrays = [np.ones((2, 3, 3)), np.ones((2, 3, 3))]
    with pytest.raises(ShapeError, match="site 1"):
        tn.MPO.from_quimb(quimb.MatrixProductOperator(arrays, sites=[0, 2], L=3, shape="lrud"))


# --- states and other networks -------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(2, 2, 2, 2), (3, 2, 4), (5,)])
def test_states_of_quimb(dims: tuple[int, ...]) -> None:
    quimb = pytest.importorskip("quimb.tensor")
    state = tn.MPO.random(dims, 1, max_bond=3, dtype=torch.complex128)
    theirs = state.to_quimb()
    assert isinstance(theirs, quimb.MatrixProductState)
    same(state, theirs.to_dense())
    back = tn.MPO.from_quimb(theirs)
    assert (back.out_dims, back.in_dims) == (dims, (1,) * len(dims))
    same(back, theirs.to_dense())


def test_exponent_of_a_state_is_part_of_the_state() -> None:
    quimb = pytest.importorskip("quimb.tensor")
    theirs = quimb.MPS_rand_state(6, bond_dim=4, seed=3) * 2.5
    before = theirs.to_dense()
    theirs.equalize_norms_(1.0)
    assert theirs.exponent != 0
    same(tn.MPO.from_quimb(theirs), before)


@pytest.mark.slow  # quimb compiles
def test_ground_states_of_quimb_have_the_exact_energy() -> None:
    quimb = pytest.importorskip("quimb.tensor")
    sites = 12
    terms = [(-1, {k: "Z", k + 1: "Z"}) for k in range(sites - 1)] + [(-1, {k: "X"}) for k in range(sites)]
    ising = tn.MPO.from_terms(terms, [2] * sites, dtype=torch.float64)
    solver = quimb.DMRG2(ising.to_quimb(), bond_dims=[8, 16, 32], cutoffs=1e-12)
    solver.solve(tol=1e-10, verbosity=0)
    state = tn.MPO.from_quimb(solver.state)
    exact = 1 - 1 / np.sin(np.pi / (4 * sites + 2))  # free fermions, open ends
    assert float(state.expectation(ising)) == pytest.approx(exact, abs=1e-8)
    assert state.entropies().argmax() == sites // 2 - 1


@pytest.mark.parametrize("family", ["tucker", "tensor_ring", "block_tt", "kronecker"])
def test_networks_of_quimb(family: str) -> None:
    pytest.importorskip("quimb.tensor")
    network = tn.decompose(torch.randn(12, 8).double(), family, max_bond=3).network
    there = network.to_quimb()
    out_labels, in_labels = network.topology.out_labels, network.topology.in_labels
    matrix = reference.to_numpy(network.to_matrix())
    dense = there.contract(output_inds=(*out_labels, *in_labels)).to_dense(out_labels, in_labels)
    np.testing.assert_allclose(dense[:12, :8], matrix, atol=1e-12)
    there.exponent = 2.0
    back = tn.TensorNetwork.from_quimb(there, out_labels, in_labels)
    np.testing.assert_allclose(reference.to_numpy(back.to_matrix())[:12, :8], 100 * matrix, atol=1e-10)


def test_networks_of_quimb_can_be_states() -> None:
    quimb = pytest.importorskip("quimb.tensor")
    lattice = quimb.PEPS.rand(2, 3, bond_dim=2, seed=0)
    names = [lattice.site_ind((i, j)) for i in range(2) for j in range(3)]
    state = tn.TensorNetwork.from_quimb(lattice, names)
    assert state.shape == (64, 1)
    np.testing.assert_allclose(
        reference.to_numpy(state.to_matrix())[:, 0], lattice.to_dense(names), atol=1e-12
    )


def test_networks_without_legs_for_open_indices_are_refused() -> None:
    quimb = pytest.importorskip("quimb.tensor")
    lattice = quimb.MPS_rand_state(3, bond_dim=2, seed=0)
    with pytest.raises(ShapeError, match="no indices"):
        tn.TensorNetwork.from_quimb(lattice, ["k0", "k1", "k2", "k3"])
    with pytest.raises(ShapeError, match="open indices"):
        tn.TensorNetwork.from_quimb(lattice, ["k0", "k1"])
    with pytest.raises(ShapeError, match="Expected a quimb"):
        tn.TensorNetwork.from_quimb(torch.ones(2, 2), ["k0"])
    with pytest.raises(ShapeError, match="sum of networks"):
        tn.decompose(torch.randn(8, 8), "residual", max_bond=2).network.to_quimb()
