"""Functions on grids and their operators against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.errors import ShapeError

DIMS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
numbers = st.floats(-2, 2).map(lambda x: round(x, 3))


def vector(state: tn.MPO) -> np.ndarray:
    assert set(state.in_dims) == {1}
    return np.asarray(state)[:, 0]


@given(dims=DIMS, rate=numbers, imaginary=st.booleans(), start=numbers, step=st.sampled_from((0.1, 0.01)))
def test_exponentials(dims: list[int], rate: float, imaginary: bool, start: float, step: float) -> None:
    x = start + step * np.arange(math.prod(dims))
    rate = 1j * rate if imaginary else rate
    dtype = torch.complex128 if imaginary else torch.float64
    found = tn.qtt.exponential(rate, dims, start=start, step=step, dtype=dtype)
    assert set(found.bond_dims) <= {1}
    np.testing.assert_allclose(vector(found), np.exp(rate * x), rtol=1e-12)


@given(dims=DIMS, frequency=numbers, phase=numbers, start=numbers)
def test_sines(dims: list[int], frequency: float, phase: float, start: float) -> None:
    x = start + 0.1 * np.arange(math.prod(dims))
    found = tn.qtt.sine(frequency, dims, phase=phase, start=start, step=0.1, dtype=torch.float64)
    assert set(found.bond_dims) <= {2}
    np.testing.assert_allclose(vector(found), np.sin(frequency * x + phase), atol=1e-13)


@example(dims=[4], coefficients=[-0.031, 1.0], start=0.0)  # not a sum of few powers of two
@given(dims=DIMS, coefficients=st.lists(numbers, min_size=1, max_size=5), start=numbers)
def test_polynomials(dims: list[int], coefficients: list[float], start: float) -> None:
    x = start + 0.01 * np.arange(math.prod(dims))
    found = tn.qtt.polynomial(coefficients, dims, start=start, step=0.01, dtype=torch.float64)
    assert max(found.bond_dims, default=1) <= len(coefficients)
    np.testing.assert_allclose(vector(found), np.polyval(coefficients[::-1], x), atol=1e-11)


@given(dims=DIMS, periodic=st.booleans())
def test_laplacians(dims: list[int], periodic: bool) -> None:
    size = math.prod(dims)
    expected = 2 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    if periodic:
        expected[0, -1] -= 1
        expected[-1, 0] -= 1
    found = tn.qtt.laplacian(dims, step=0.5, periodic=periodic, dtype=torch.float64)
    assert set(found.bond_dims) <= {3}
    np.testing.assert_allclose(np.asarray(found), expected / 0.25)


def test_a_sine_is_an_eigenvector_of_the_laplacian_of_a_million_points() -> None:
    dims, count = [2] * 20, 2**20
    angle = math.pi / (count + 1)
    state = tn.qtt.sine(angle, dims, start=1.0, dtype=torch.float64)
    operator = tn.qtt.laplacian(dims, dtype=torch.float64) * (count + 1) ** 2
    # The eigenvalue is the difference of numbers of order `count^2`, of which this many digits are left.
    assert float(state.expectation(operator)) == pytest.approx(math.pi**2, rel=1e-3)


@pytest.mark.parametrize(("sites", "base"), [(1, 2), (2, 2), (7, 2), (1, 5), (4, 3)])
@pytest.mark.parametrize("inverse", [False, True])
def test_fourier_transforms(sites: int, base: int, inverse: bool) -> None:
    size = base**sites
    found = np.asarray(tn.qtt.fourier(sites, base, inverse=inverse, dtype=torch.complex128))
    sign = 1 if inverse else -1
    expected = np.exp(sign * 2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size) / math.sqrt(size)
    reverse = np.arange(size).reshape((base,) * sites).transpose().ravel()  # digits in reverse order
    np.testing.assert_allclose(found, expected[reverse], atol=1e-10)


def test_fourier_transforms_have_small_bonds_in_each_precision() -> None:
    bonds = [max(tn.qtt.fourier(30, dtype=dtype).bond_dims) for dtype in (torch.complex64, torch.complex128)]
    assert bonds[0] < bonds[1] <= 12


def test_forth_and_back_is_the_identity() -> None:
    there = tn.qtt.fourier(6, dtype=torch.complex128)
    back = tn.qtt.fourier(6, inverse=True, dtype=torch.complex128)
    state = tn.MPO.random([2] * 6, 1, max_bond=3, dtype=torch.complex128)
    again = back @ (there @ state).reverse()
    np.testing.assert_allclose(vector(again.reverse()), vector(state), atol=1e-10)
    np.testing.assert_allclose(np.asarray(there.H @ there), np.eye(64), atol=1e-10)


def test_reversed_sites() -> None:
    operator = tn.MPO.random((2, 3), (3, 2), max_bond=4, dtype=torch.float64)
    there = np.asarray(operator).reshape(2, 3, 3, 2).transpose(1, 0, 3, 2).reshape(6, 6)
    np.testing.assert_allclose(np.asarray(operator.reverse()), there)
    with pytest.raises(ShapeError, match="padding"):
        tn.MPO(operator.cores, out_features=5).reverse()


def test_wrong_sizes_are_refused() -> None:
    for build in (lambda: tn.qtt.fourier(0), lambda: tn.qtt.fourier(3, 1), lambda: tn.qtt.laplacian([2, 0])):
        with pytest.raises(tn.TensorNetError, match="at least"):
            build()
    with pytest.raises(tn.TensorNetError, match="coefficients"):
        tn.qtt.polynomial([], [2, 2])
