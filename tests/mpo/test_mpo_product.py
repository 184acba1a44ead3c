"""Products that are rounded on the way, against dense products and the best possible truncation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from chains import dense
from hypothesis import given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.errors import BudgetError, ShapeError
from tensornet.testing import strategies


@st.composite
def factors(draw: st.DrawFn) -> tuple[tn.MPO, tn.MPO]:
    rows, middle = draw(strategies.dims(max_sites=4, max_dim=3))
    columns = draw(st.tuples(*[st.integers(1, 2)] * len(rows)))
    left = draw(strategies.mpos(dims=st.just((rows, middle)), dtype=strategies.dtypes()))
    right = draw(strategies.mpos(dims=st.just((middle, columns)), dtype=left.dtype))
    return left, tn.MPO(right.cores, out_features=left.shape[1], in_features=right.shape[1])


@given(pair=factors(), cap=st.integers(1, 6), promise=st.sampled_from((None, 1e-5, 0.1)))
def test_products_keep_their_limits_and_their_bound(
    pair: tuple[tn.MPO, tn.MPO], cap: int, promise: float | None
) -> None:
    left, right = pair
    truth = dense(left) @ dense(right)
    size = np.linalg.norm(truth)
    slack = 1e-3 if left.dtype in (torch.float32, torch.complex64) else 1e-9
    limited = left.apply(right, max_bond=cap)
    assert max(limited.bond_dims, default=1) <= cap
    error = np.linalg.norm(dense(limited) - truth)
    assert error <= (limited.error + slack) * size + slack
    best = (left @ right).round(max_bond=cap)
    at_best = np.linalg.norm(dense(best) - truth)
    assert error <= math.sqrt(len(left)) * at_best + (slack + 1e-6 * len(left)) * size + slack
    if promise is not None:
        rounded = left.apply(right, rel_error=promise)
        assert np.linalg.norm(dense(rounded) - truth) <= (promise + slack) * size + slack
        assert rounded.truncation_error <= promise


def test_exact_products_are_found_with_their_bonds() -> None:
    flips = tn.MPO.from_terms([(1, dict.fromkeys(range(30), "X"))], [2] * 30, dtype=torch.float64)
    state = tn.MPO.random([2] * 30, 1, max_bond=6, dtype=torch.float64)
    twice = (flips + flips).apply(state, max_bond=12)
    assert max(twice.bond_dims) <= 7
    assert float(twice.inner(flips @ state)) == pytest.approx(2)


def test_limits_on_bonds_keep_no_zeros() -> None:
    operator = tn.MPO.random([2] * 8, max_bond=5, dtype=torch.float64)
    state = tn.MPO.random([2] * 8, 1, max_bond=5, dtype=torch.float64)
    product = operator.apply(state, max_bond=6)
    assert product.bond_dims == (2, 4, 6, 6, 6, 4, 2)
    truth = dense(operator) @ dense(state)  # the errors of all bonds add up to the true error
    error = np.linalg.norm(dense(product) - truth) / np.linalg.norm(truth)
    assert product.truncation_error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize("columns", [1, 2])
def test_products_with_large_bonds_are_close_to_the_best(columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    legs, options = [2, 3, 2] * 4, {"generator": generator, "dtype": dtype}
    operator = tn.MPO.random(legs, max_bond=7, **options)
    state = tn.MPO.random(legs, [columns] * 12, max_bond=[2, 6, 9, 9, 9, 9, 9, 9, 9, 6, 2], **options)
    exact = operator.to(torch.complex128) @ state.to(torch.complex128)
    for cap in (4, 12):  # one is smaller than the product of a kept bond and the legs, the other is not
        found = operator.apply(state, max_bond=cap)
        assert max(found.bond_dims) == cap
        error = float((found.to(torch.complex128) - exact).norm() / exact.norm())
        assert found.truncation_error == pytest.approx(error, rel=1e-5)
        assert error <= 1.05 * exact.round(max_bond=cap).truncation_error


def test_products_of_norms_of_1e200_do_not_overflow() -> None:
    large = tn.MPO.random([2] * 8, max_bond=3, dtype=torch.float64) * 1e200
    state = tn.MPO.random([2] * 8, 1, max_bond=3, dtype=torch.float64) * 1e200
    product = large.apply(state, max_bond=9)
    assert float(product.log_norm()) == pytest.approx(float((large @ state).log_norm()), abs=1e-6)


def test_errors_of_the_factors_are_in_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(16).double() + 0.1 * torch.randn(16, 16, generator=generator).double()
    left = tn.MPO.from_matrix(matrix, sites=4, max_bond=2)
    vector = torch.ones(16).double() + 0.1 * torch.randn(16, generator=generator).double()
    right = tn.MPO.from_vector(vector, max_bond=1)
    product = left.apply(right, max_bond=1)
    distance = float(torch.linalg.vector_norm(product.to_matrix()[:, 0] - matrix @ vector))
    assert distance <= product.absolute_error
    assert product.absolute_error > product.truncation_error


def test_wrong_products_are_refused() -> None:
    operator = tn.MPO.random([2] * 4, max_bond=3, dtype=torch.float64)
    state = tn.MPO.random([2] * 4, 1, max_bond=3, dtype=torch.float64)
    with pytest.raises(BudgetError, match="max_bond"):
        operator.apply(state, max_bond=1, rel_error=1e-3)
    with pytest.raises(BudgetError, match="max_bond"):
        operator.apply(state, max_bond=0)
    with pytest.raises(ShapeError, match="sites"):
        operator.apply(tn.MPO.random([2] * 3, 1, max_bond=3))
    with pytest.raises(ShapeError, match="limits"):
        operator.apply(torch.ones(16).double(), max_bond=3)
