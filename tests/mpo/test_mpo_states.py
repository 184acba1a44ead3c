"""States and entries against dense vectors and matrices: amplitudes, expectations, entropies, samples."""

from __future__ import annotations

import math
from functools import partial

import chains
import numpy as np
import pytest
import torch
from chains import dense
from hypothesis import given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.errors import ShapeError
from tensornet.testing import laws, strategies

operators = strategies.mpos(dims=strategies.dims(max_sites=3, max_dim=3))
UP, DOWN = torch.eye(2, dtype=torch.float64)
close = partial(chains.close, factor=10)


@st.composite
def states(draw: st.DrawFn, *, padded: bool = True, max_sites: int = 4) -> tn.MPO:
    rows, _ = draw(strategies.dims(max_sites=max_sites, max_dim=3))
    dims = st.just((rows, (1,) * len(rows)))
    return draw(strategies.mpos(dims=dims, dtype=strategies.dtypes(), padded=padded))


# --- entries and algebra -------------------------------------------------------------------------


@given(operator=operators, data=st.data())
def test_entries_are_those_of_the_matrix(operator: tn.MPO, data: st.DataObject) -> None:
    matrix = dense(operator)
    rows, columns = matrix.shape
    row = data.draw(st.integers(-rows, rows - 1))
    column = data.draw(st.integers(-columns, columns - 1))
    close(operator[row, column], matrix[row, column])
    every = operator[torch.arange(rows)[:, None], np.arange(-columns, 0)]
    close(every, matrix)
    close(operator[[0, rows - 1], column], matrix[[0, rows - 1], column])


def test_entries_of_operators_too_large_for_64_bits() -> None:
    large = 3 * tn.MPO.identity([2] * 200, dtype=torch.float64)
    assert (float(large[2**199 + 5, 2**199 + 5]), float(large[2**199, 5])) == (3.0, 0.0)
    assert float(large[-1, 2**200 - 1]) == 3.0
    tiny = tn.MPO([torch.full((1, 2, 2, 1), 1e-3, dtype=torch.float64)] * 200) * 1e200
    assert float((tiny * 1e300)[3, 4]) == pytest.approx(1e-100, rel=1e-3)  # no partial product underflows


def test_wrong_entries_are_refused() -> None:
    operator = tn.MPO.random((2, 3), (2, 2), max_bond=2)
    for entry in ((6, 0), (-7, 0), (0, 4), (torch.tensor([0, 6]), 0)):
        with pytest.raises(IndexError, match="out of range"):
            operator[entry]
    for entry in ((slice(None), 0), (0.5, 0), (0, torch.ones(2)), (0, True)):
        with pytest.raises(ShapeError, match="integer"):
            operator[entry]
    for entry in (0, slice(2), (0, 1, 2)):
        with pytest.raises(ShapeError, match=r"H\.cores\[k\]"):
            operator[entry]
    with pytest.raises(TypeError, match="iterable"):
        list(operator)


@given(operator=operators)
def test_transposes_sums_and_numbers(operator: tn.MPO) -> None:
    matrix = dense(operator)
    close(operator.T.to_matrix(), matrix.T)
    close(operator.H.to_matrix(), matrix.conj().T)
    close(sum([operator, operator, operator]).to_matrix(), 3 * matrix)
    close((operator * torch.tensor(2.0, dtype=torch.float64)).to_matrix(), 2 * matrix)
    close((-operator / 4).to_matrix(), -matrix / 4)
    with pytest.raises(TypeError):
        1 + operator


def test_certificates_follow_normalized_and_reversed_operators() -> None:
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double()
    cut = 3 * tn.MPO.from_matrix(matrix, sites=4, max_bond=3)
    norm = float(cut.norm())
    assert cut.error > 0
    assert (cut.normalize().error, cut.reverse().error) == (cut.error, cut.error)
    assert cut.reverse().absolute_error == cut.absolute_error
    assert cut.normalize().absolute_error == pytest.approx(cut.absolute_error / norm)


# --- constructors --------------------------------------------------------------------------------


@given(dims=strategies.dims(max_sites=4, max_dim=4))
def test_zeros_and_random_operators(dims: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rows, columns = dims
    np.testing.assert_array_equal(
        np.asarray(tn.MPO.zeros(rows, columns)), np.zeros((math.prod(rows), math.prod(columns)))
    )
    assert tn.MPO.zeros(rows, 1).shape == (math.prod(rows), 1)
    assert tn.MPO.zeros(rows).shape == (math.prod(rows), math.prod(rows))
    first, again, other = (
        tn.MPO.random(
            rows, columns, max_bond=3, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.to_matrix(), again.to_matrix())
    assert not torch.equal(first.to_matrix(), other.to_matrix())
    assert all(bond <= 3 for bond in first.bond_dims)
    close(first.norm(), 1.0)


@given(state=states(padded=False))
def test_states_from_vectors(state: tn.MPO) -> None:
    vector = dense(state)[:, 0]
    found = tn.MPO.from_vector(vector, dims=state.out_dims)
    close(found.to_matrix(), vector[:, None])
    assert set(found.in_dims) == {1}
    with pytest.raises(ShapeError, match="dims"):
        tn.MPO.from_vector(torch.ones(6))


@given(state=states(padded=False))
def test_product_states_are_kronecker_products(state: tn.MPO) -> None:
    vectors = [core[0, :, 0, 0] for core in state.cores]
    expected = np.ones(1)
    for vector in vectors:
        expected = np.kron(expected, vector.numpy())
    product = tn.MPO.product_state(vectors)
    close(product.to_matrix()[:, 0], expected)
    assert set(product.bond_dims) <= {1}


@given(bits=st.text("01", min_size=1, max_size=6))
def test_bit_strings_are_basis_states(bits: str) -> None:
    expected = np.zeros(2 ** len(bits))
    expected[int(bits, 2)] = 1
    np.testing.assert_array_equal(np.asarray(tn.MPO.product_state(bits))[:, 0], expected)


def test_wrong_states_are_refused() -> None:
    for bits in ("", "012", "up"):
        with pytest.raises(ShapeError, match="bits"):
            tn.MPO.product_state(bits)
    with pytest.raises(ShapeError, match="vector at site 1"):
        tn.MPO.product_state([torch.ones(2), torch.ones(2, 2)])
    with pytest.raises(ShapeError, match="dtype"):
        tn.MPO.product_state([torch.ones(2), torch.ones(2).double()])
    with pytest.raises(tn.TensorNetError, match="max_bond"):
        tn.MPO.random((2, 2), 1, max_bond=0)
    with pytest.raises(tn.TensorNetError, match="out_dims"):
        tn.MPO.zeros((2, -2))
    with pytest.raises(ShapeError, match="sites"):
        tn.MPO.random((2, 2), (2,), max_bond=2)


# --- expectation values, entropies, samples ------------------------------------------------------


@given(state=states(), seed=st.integers(0, 99))
def test_expectation_values(state: tn.MPO, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    operator = tn.MPO.random(state.out_dims, max_bond=3, generator=generator, dtype=torch.float64) * 5
    size = state.shape[0]
    operator = tn.MPO(operator.cores, out_features=size, in_features=size)
    vector = dense(state)[:, 0]
    expected = vector.conj() @ dense(operator) @ vector / np.vdot(vector, vector)
    value = state.expectation(operator)
    np.testing.assert_allclose(value.numpy(), expected, atol=1e4 * laws.tolerance(state.dtype))


def test_expectation_values_of_many_sites_do_not_overflow() -> None:
    sites = 400
    state = tn.MPO.product_state([torch.ones(2, dtype=torch.float64) * 1e5] * sites)
    assert float(state.log_norm()) > 400 * math.log(1e5)  # the norm itself is outside the range
    field = tn.MPO.from_terms([(1, {0: "X"}), (1, {sites - 1: "X"})], [2] * sites, dtype=torch.float64)
    assert float(state.expectation(field)) == pytest.approx(2)
    assert float(state.normalize().log_norm()) == pytest.approx(0, abs=1e-9)
    assert float(state.normalize().expectation(field)) == pytest.approx(2)


def test_expectation_values_are_differentiable() -> None:
    cores = [core.requires_grad_() for core in tn.MPO.random([2] * 4, 1, max_bond=2).to(torch.float64).cores]
    field = tn.MPO.from_terms([(1, {k: "Z", k + 1: "X"}) for k in range(3)], [2] * 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *cores: tn.MPO(cores).expectation(field), cores)


def test_legs_that_do_not_match_are_refused() -> None:
    state = tn.MPO.random([2] * 3, 1, max_bond=2)
    for operator in (
        tn.MPO.identity((2, 2)),
        tn.MPO.identity((2, 4)),
        tn.MPO.random((2, 2, 2), 1, max_bond=1),
    ):
        with pytest.raises(ShapeError, match="legs"):
            state.expectation(operator)
    with pytest.raises(ShapeError, match="in-legs"):
        tn.MPO.identity((2, 2)).sample(3)
    with pytest.raises(ShapeError, match="partial trace"):
        tn.MPO.random((2, 2), (2, 3), max_bond=1).partial_trace(0)
    for keep in ((), (0, 0), 3, (-1,)):
        with pytest.raises(ValueError, match="keep"):
            state.partial_trace(keep)
    with pytest.raises(ValueError, match="zero"):
        tn.MPO.zeros((2, 2), 1).sample(1)
    with pytest.raises(ValueError, match="zero"):
        tn.MPO.zeros((2, 2)).normalize()


@given(state=states(padded=False))
def test_entropies_are_those_of_every_bond(state: tn.MPO) -> None:
    vector = dense(state)[:, 0].astype(complex)
    expected = []
    for k in range(1, len(state)):
        values = np.linalg.svd(vector.reshape(math.prod(state.out_dims[:k]), -1), compute_uv=False)
        p = values**2 / np.sum(values**2)
        expected.append(-np.sum(p[p > 0] * np.log(p[p > 0])))
    np.testing.assert_allclose(state.entropies().numpy(), expected, atol=1e3 * laws.tolerance(state.dtype))


def test_entropies_of_the_zero_state_are_zero() -> None:
    assert tn.MPO.zeros((2, 2, 2), 1).entropies().tolist() == [0, 0]
    assert tn.MPO.zeros((2,), 1).entropies().shape == (0,)


def test_samples_follow_the_amplitudes() -> None:
    generator = torch.Generator().manual_seed(3)
    state = tn.MPO.random((2, 3, 2), 1, max_bond=3, generator=generator, dtype=torch.complex128) * 7
    state = tn.MPO(state.cores, out_features=11)  # the last amplitude is padding
    digits = state.sample(20_000, generator=generator)
    assert digits.shape == (20_000, 3)
    counts = np.bincount(np.ravel_multi_index(tuple(digits.T.numpy()), (2, 3, 2)), minlength=12)
    p = np.zeros(12)
    p[:11] = np.abs(dense(state)[:, 0]) ** 2
    p /= p.sum()
    assert counts[11] == 0
    assert np.all(np.abs(counts - 20_000 * p) <= 5 * np.sqrt(20_000 * p * (1 - p)) + 1)
    again = state.sample(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, state.sample(5, generator=torch.Generator().manual_seed(0)))


# --- partial traces ------------------------------------------------------------------------------


@given(state=states(), data=st.data())
def test_partial_traces(state: tn.MPO, data: st.DataObject) -> None:
    sites = len(state)
    keep = data.draw(st.sets(st.integers(0, sites - 1), min_size=1))
    full = np.zeros(math.prod(state.out_dims), dtype=complex)
    full[: state.shape[0]] = dense(state)[:, 0]
    amplitudes = full.reshape(state.out_dims)
    kept = sorted(keep)
    others = [k for k in range(sites) if k not in keep]
    unfolded = amplitudes.transpose(*kept, *others).reshape(math.prod(state.out_dims[k] for k in kept), -1)
    expected = unfolded @ unfolded.conj().T
    close(state.partial_trace(list(keep)).to_matrix(), expected, factor=100)
    density = state @ state.H
    if density.shape == (1, 1):
        return  # it is a state, too
    close(density.partial_trace(kept).to_matrix(), expected, factor=100)


# --- pictures ------------------------------------------------------------------------------------


def test_diagrams_show_legs_and_bonds(capsys: pytest.CaptureFixture[str]) -> None:
    tn.MPO([torch.ones(1, 2, 10, 3), torch.ones(3, 1, 2, 1)]).show()
    assert capsys.readouterr().out == "2\n│\n●──3─●\n│    │\n10   2\n"
    tn.MPO.random([2] * 100, 1, max_bond=2).show()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.count("●") for line in lines) == 100
    assert tn.MPO.identity((2, 2)).draw().axes
