"""Operators against dense matrices: products, traces, powers, copies, NumPy, certificates."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from chains import dense
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tensornet as tn
from tensornet.errors import BudgetError, TopologyError
from tensornet.mpo_algebra import identity_chain
from tensornet.testing import laws, reference, strategies
from tensornet.topologies import topology_family

operators = strategies.mpos(dims=strategies.dims(max_sites=3, max_dim=3))


def close(actual: Tensor | np.ndarray, expected: np.ndarray, dtype: torch.dtype, factor: float = 10) -> None:
    found = reference.to_numpy(actual) if isinstance(actual, Tensor) else actual
    assert found.shape == expected.shape
    size = max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * laws.tolerance(dtype) * size * factor)


@st.composite
def square(draw: st.DrawFn, *, equal_dims: bool = False, max_bond: int = 3) -> tn.MPO:
    """A square operator; in-dims are often another factorization, or order, than out-dims."""
    rows, columns = draw(strategies.dims(max_sites=3, max_dim=3))
    columns = rows if equal_dims else columns
    operator = draw(strategies.mpos(dims=st.just((rows, columns)), max_bond=max_bond))
    size = min(operator.shape)
    return tn.MPO(operator.cores, out_features=size, in_features=size)


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, (), (2,), (2, 3)])
@given(operator=operators)
def test_products_with_vectors_and_matrices(operator: tn.MPO, batch: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = operator.shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=operator.dtype)

    right = draw(columns) if batch is None else draw(*batch, columns, 4)
    left = draw(rows) if batch is None else draw(*batch, 4, rows)
    matrix = dense(operator)
    close(operator @ right, matrix @ reference.to_numpy(right), operator.dtype)
    close(left @ operator, reference.to_numpy(left) @ matrix, operator.dtype)
    for array, product, expected in (
        (right.numpy(), operator @ right.numpy(), matrix @ right.numpy()),
        (left.numpy(), left.numpy() @ operator, left.numpy() @ matrix),
    ):
        assert isinstance(product, np.ndarray)
        assert product.dtype == array.dtype
        close(product, expected, operator.dtype)


@given(operator=operators)
def test_operators_are_numpy_arrays_when_asked(operator: tn.MPO) -> None:
    close(np.asarray(operator), dense(operator), operator.dtype)
    assert np.asarray(operator, dtype=np.complex128).dtype == np.complex128
    double = np.ones(operator.shape[1])
    assert operator.apply(double).dtype == np.promote_types(np.asarray(operator).dtype, np.float64)


def test_operators_are_made_of_numpy_arrays() -> None:
    array = np.random.default_rng(0).standard_normal((6, 8))
    operator = tn.MPO.from_matrix(array)
    np.testing.assert_allclose(np.asarray(operator), array)
    again = tn.MPO([core.numpy() for core in operator.cores])
    np.testing.assert_allclose(np.asarray(again), array)
    again.cores[0].zero_()
    np.testing.assert_allclose(np.asarray(operator), array)
    flipped = tn.MPO.from_matrices(np.stack([array, array])[:, ::-1])
    np.testing.assert_allclose(np.asarray(flipped[1]), array[::-1])


@st.composite
def factors_of_other_dims(draw: st.DrawFn) -> tuple[tn.MPO, tn.MPO]:
    left = draw(
        strategies.mpos(dims=strategies.dims(max_sites=3, max_dim=3), dtype=torch.float64, max_bond=2)
    )
    sites, shared = len(left), left.shape[1]
    rows = draw(st.tuples(*[st.integers(1, 4)] * sites).filter(lambda dims: math.prod(dims) >= shared))
    columns = draw(st.tuples(*[st.integers(1, 3)] * sites))
    right = draw(
        strategies.mpos(dims=st.just((rows, columns)), dtype=torch.float64, max_bond=2, padded=False)
    )
    return left, tn.MPO(right.cores, out_features=shared, in_features=math.prod(columns))


@given(pair=factors_of_other_dims())
def test_operators_of_other_dims_are_multiplied(pair: tuple[tn.MPO, tn.MPO]) -> None:
    left, right = pair
    close((left @ right).to_matrix(), dense(left) @ dense(right), torch.float64)


@given(operator=square(), power=st.integers(0, 4))
def test_powers(operator: tn.MPO, power: int) -> None:
    matrix = dense(operator)
    expected = np.linalg.matrix_power(matrix, power)
    size = max(1.0, float(np.linalg.norm(matrix)) ** power)
    found = reference.to_numpy((operator**power).to_matrix())
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * laws.tolerance(operator.dtype) * size)


@given(first=operators, second=strategies.mpos(dims=strategies.dims(max_sites=2, max_dim=3), padded=False))
def test_kronecker_product(first: tn.MPO, second: tn.MPO) -> None:
    product = first.kron(second)
    close(product.to_matrix(), np.kron(dense(first), dense(second)), torch.float32)
    assert len(product) == len(first) + len(second)


@given(operator=operators, seed=st.integers(0, 99))
def test_hadamard_product(operator: tn.MPO, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    other = tn.MPO(
        [torch.randn(core.shape, generator=generator, dtype=core.dtype) for core in operator.cores],
        out_features=operator.shape[0],
        in_features=operator.shape[1],
    )
    close(operator.hadamard(other).to_matrix(), dense(operator) * dense(other), operator.dtype)


@given(operator=square())
def test_trace(operator: tn.MPO) -> None:
    close(operator.trace(), np.array(np.trace(dense(operator))), operator.dtype)


@given(dims=strategies.dims(max_sites=4, max_dim=4), data=st.data())
def test_identity_of_any_dims(dims: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject) -> None:
    rows, columns = dims
    chain = identity_chain(rows, columns, like=torch.zeros((), dtype=torch.float64))
    expected = np.eye(math.prod(rows), math.prod(columns))
    np.testing.assert_array_equal(reference.chain_matrix(chain), expected)
    size = data.draw(st.integers(1, min(math.prod(rows), math.prod(columns))))
    operator = tn.MPO.identity(rows, columns, features=size, dtype=torch.float64)
    np.testing.assert_array_equal(np.asarray(operator), np.eye(size))
    assert tn.MPO.identity(rows).bond_dims == (1,) * (len(rows) - 1)


# --- copies, dtypes ---------------------------------------------------------------


def test_copies_share_what_they_should() -> None:
    operator = tn.MPO.from_matrix(torch.randn(8, 8), max_bond=2)
    for other, shared in (
        (copy.copy(operator), True),
        (copy.deepcopy(operator), False),
        (operator.clone(), False),
        (operator.detach(), True),
    ):
        assert (other.cores[0].data_ptr() == operator.cores[0].data_ptr()) is shared
        assert (other.error, other.absolute_error) == (operator.error, operator.absolute_error)
        assert torch.equal(other.to_matrix(), operator.to_matrix())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_operators_are_cast_and_moved(dtype: torch.dtype) -> None:
    operator = tn.MPO.from_matrix(torch.randn(8, 8), max_bond=2)
    cast = operator.to(dtype)
    assert (cast.dtype, cast.device, cast.error) == (dtype, torch.device("cpu"), operator.error)
    moved = operator.to("meta", dtype)
    assert (moved.dtype, moved.device.type) == (dtype, "meta")
    assert tn.MPO.identity((2, 2), dtype=dtype).dtype == dtype


# --- certificates --------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**16), cap=st.integers(1, 3), noise=st.sampled_from((0.01, 0.3, 3.0)))
def test_certificates_of_products_are_finite_and_kept(seed: int, cap: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    dims = {"out_dims": (2, 2, 2), "in_dims": (2, 2, 2)}

    def draw() -> Tensor:
        low = (
            torch.randn(8, 1, generator=generator).double() @ torch.randn(1, 8, generator=generator).double()
        )
        return low + noise * torch.randn(8, 8, generator=generator).double()

    wa, wb = draw(), draw()
    a, b = (tn.MPO.from_matrix(w, max_bond=cap, **dims) for w in (wa, wb))
    for result, truth in (
        (a + b, wa + wb),
        (a - b, wa - wb),
        (a - a, wa - wa),
        (a @ b, wa @ wb),
        (a**3, wa @ wa @ wa),
        (a.hadamard(b), wa * wb),
        (a.kron(b), torch.kron(wa, wb)),
        ((a @ b).round(max_bond=2) * -3, -3 * wa @ wb),
        ((a + b).transpose().round(), (wa + wb).T),
        ((a @ b - b @ a).clone() @ a, (wa @ wb - wb @ wa) @ wa),
    ):
        distance = float(torch.linalg.vector_norm(truth - result.to_matrix()))
        assert math.isfinite(result.absolute_error)
        assert distance <= result.absolute_error * (1 + 1e-9) + 1e-10
        size = float(torch.linalg.vector_norm(truth))
        if math.isfinite(result.error):
            assert distance <= result.error * size * (1 + 1e-9) + 1e-10
    assert math.isfinite(a.kron(b).error)


@given(
    operator=strategies.mpos(
        dims=strategies.dims(min_sites=2, max_sites=3), dtype=torch.float64, padded=False
    )
)
def test_absolute_error_of_rounding_is_what_was_cut(operator: tn.MPO) -> None:
    once = operator.round(max_bond=2)
    twice = once.round(max_bond=1)
    assert operator.absolute_error == 0
    target = operator.to_matrix()
    for rounded, truth in ((twice, target), (-3 * twice, -3 * target), (twice.transpose(), target.mT)):
        distance = float(torch.linalg.vector_norm(truth - rounded.to_matrix()))
        assert distance <= rounded.absolute_error * (1 + 1e-9) + 1e-9
    cut = float(torch.linalg.vector_norm(operator.to_matrix() - once.to_matrix()))
    assert once.absolute_error == pytest.approx(cut, rel=1e-6, abs=1e-9)


def test_certificates_are_finite_where_the_result_is_larger_than_its_bound() -> None:
    matrix = torch.eye(8).double() + 0.01 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    a = tn.MPO.from_matrix(matrix, out_dims=(2, 4), in_dims=(2, 4), max_bond=1)
    assert 0 < (a @ a).error < 1
    assert 0 < (a + a).error < 0.1
    assert (a - a).error == math.inf  # nothing excludes that the difference is zero


# --- caps and the default tolerance --------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "count"), [("mpo", 2), ("block_tt", 2), ("tensor_ring", 3), ("tucker", 6)]
)
@given(data=st.data())
def test_caps_may_differ_from_bond_to_bond(family: str, count: int, data: st.DataObject) -> None:
    matrix = torch.randn(12, 18, generator=torch.Generator().manual_seed(1)).double()
    caps = data.draw(st.tuples(*[st.integers(1, 4)] * count))
    dims = {"out_dims": (2, 2, 3), "in_dims": (3, 3, 2)}
    found = tn.decompose(matrix, family, max_bond=caps, **dims)
    built = topology_family(family).build(12, 18, max_bond=caps, **dims)
    for topology in (found.network.topology, built):
        bonds = list(topology.bond_dims.values())
        if family in ("mpo", "block_tt"):
            bonds = bonds[1:-1]
        if family == "tucker":
            bonds = list(topology.core_shapes["core"])
        assert all(bond <= cap for bond, cap in zip(bonds, caps, strict=True))
    error = reference.relative_error(matrix, found.network.to_matrix())
    assert error <= found.error * (1 + 1e-9) + 1e-12
    with pytest.raises(BudgetError, match=rf"{count + 1} entries"):
        tn.decompose(matrix, family, max_bond=(*caps, 1), **dims)
    with pytest.raises(TopologyError, match=rf"{count + 1} entries"):
        topology_family(family).build(12, 18, max_bond=(*caps, 1), **dims)


@pytest.mark.parametrize("family", ["low_rank", "kronecker"])
def test_one_bond_takes_one_cap(family: str) -> None:
    found = tn.decompose(torch.randn(12, 18), family, max_bond=(2,))
    assert 2 in found.network.topology.bond_dims.values()
    with pytest.raises(BudgetError, match="2 entries"):
        tn.decompose(torch.randn(12, 18), family, max_bond=(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("rate", [0.3, 5.0, 40.0])
def test_exponentials_have_rank_one_without_asking(dtype: torch.dtype, rate: float) -> None:
    x = torch.linspace(0, 1, 64, dtype=dtype.to_real()).to(dtype)
    matrix = torch.exp(-rate * x)[:, None] * torch.exp(rate * x / 2)
    operator = tn.MPO.from_matrix(matrix, out_dims=(4, 4, 4), in_dims=(4, 4, 4))
    assert operator.bond_dims == (1, 1)
    assert reference.relative_error(matrix, operator.to_matrix()) <= 2 * torch.finfo(dtype).eps ** 0.75
    assert [one.bond_dims for one in tn.MPO.from_matrices(torch.stack([matrix, 2 * matrix]), sites=3)] == [
        (1, 1)
    ] * 2
    exact = tn.MPO(
        [torch.cat([core, core], 3) if k == 0 else core for k, core in enumerate(operator.cores[:1])]
        + [torch.cat([operator.cores[1]] * 2, 0), operator.cores[2]]
    )
    assert exact.round().bond_dims == (1, 1)
