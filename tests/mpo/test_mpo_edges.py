"""Operators at the edges: other numbers, other devices, autocast, magnitudes far apart."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import tensornet as tn
from tensornet.errors import MemoryLimitError, NonFiniteError, ShapeError
from tensornet.testing import reference
from tensornet.topologies import Budget


def operator(rows: int = 7, columns: int = 11, **options: object) -> tn.MPO:
    """A random one; 7 and 11 are padded."""
    generator = torch.Generator().manual_seed(rows + columns)
    return tn.MPO.from_matrix(torch.randn(rows, columns, generator=generator), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "factor", [2, 2.0, Fraction(2), Decimal("2"), np.float32(2), torch.tensor(2.0), torch.tensor([2.0])]
)
def test_numbers_of_any_kind_are_factors(factor: float) -> None:
    chain = operator()
    for made in (chain * factor, factor * chain, chain / (1 / factor)):
        torch.testing.assert_close(made.to_matrix(), 2 * chain.to_matrix())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.float16, torch.int64])
def test_vectors_of_another_dtype_are_promoted(dtype: torch.dtype) -> None:
    chain = operator(8, 8)
    x = torch.arange(8).to(dtype)
    wide = torch.promote_types(torch.float32, dtype)
    for one in (chain, chain * 1j):
        expected = one.to_matrix().to(torch.promote_types(one.dtype, wide))
        found = one @ x
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected @ x.to(expected.dtype))
        torch.testing.assert_close(x @ one, x.to(expected.dtype) @ expected)


def test_error_of_one_truncation_is_told_beside_the_bound() -> None:
    chain = operator(64, 64, max_bond=8)
    assert chain.truncation_error == chain.error > 0.5
    square = chain @ chain
    cut = square.round(max_bond=8)
    assert (square.truncation_error, cut.error) == (0, math.inf)
    true = reference.relative_error(square.to_matrix(), cut.to_matrix())
    for same in (cut, cut * 2, cut.to(torch.float64), cut.canonicalize(center=0), cut.adjoint()):
        assert same.truncation_error == pytest.approx(true, rel=1e-4)


def test_results_larger_than_the_memory_are_refused_with_both_numbers() -> None:
    chain = tn.MPO.identity((2,) * 24)
    with pytest.raises(MemoryLimitError, match=r"needs 1,125,899\.9 GB, but only [\d,.]+ GB"):
        chain.to_matrix()
    with pytest.raises(MemoryError):
        np.asarray(chain)
    state = tn.MPO([torch.ones(1, 2, 1, 1)] * 45)  # a vector of 2^45 elements
    with pytest.raises(MemoryLimitError, match=r"Applying .* needs 140,737\.5 GB"):
        state.apply(torch.ones(1))


def test_overflow_is_not_blamed_on_a_checkpoint() -> None:
    single = tn.MPO([torch.full((1, 2, 2, 1), 1e30)])
    with pytest.raises(NonFiniteError, match=r"rescale the operators") as caught:
        (single @ single).round()
    assert "layer" not in str(caught.value)


@pytest.mark.parametrize("factor", [2 + 1j, torch.tensor(2 + 1j), np.complex64(2 + 1j)])
def test_half_times_a_complex_number_keeps_the_imaginary_part(factor: complex) -> None:
    half = tn.MPO([core.half() for core in operator().cores])
    matrix = (half * factor).to_matrix()
    assert matrix.dtype == torch.complex64
    torch.testing.assert_close(matrix, (2 + 1j) * half.to_matrix().float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("operation", ["__add__", "__sub__", "__matmul__", "inner"])
def test_operators_on_different_devices_are_refused(operation: str) -> None:
    chain = operator(8, 8, out_dims=(2, 4), in_dims=(2, 4))
    other = tn.MPO([core.to("meta") for core in chain.cores])
    with pytest.raises(ShapeError, match=r"cpu.*meta"):
        getattr(chain, operation)(other)


def test_algebra_keeps_its_precision_under_autocast() -> None:
    left = operator()
    right = operator(11, 5, out_dims=left.in_dims, in_dims=(1, 1, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product, norm, inner = left @ right, left.norm(), left.inner(left)
    assert product.cores[0].dtype == inner.dtype == torch.float32
    expected = reference.to_numpy(left.to_matrix()) @ reference.to_numpy(right.to_matrix())
    assert reference.relative_error(expected, product.to_matrix()) < 1e-5
    assert float(norm) == pytest.approx(float(torch.linalg.norm(left.to_matrix())), rel=1e-5)
    assert float(inner) == pytest.approx(float(norm) ** 2, rel=1e-5)


def test_inner_product_of_half_numbers_does_not_overflow() -> None:
    chain = tn.MPO([core.half() for core in operator(64, 64).cores]) * 16
    assert float(chain.inner(chain)) == pytest.approx(float(chain.norm()) ** 2, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_spectrum_of_what_is_not_finite_is_refused_by_name(value: float) -> None:
    chain = operator() * value
    for ask in (chain.bond_spectrum, chain.bond_entropy):
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            ask(0)


@pytest.mark.parametrize("budget", [{}, {"max_bond": 2}, {"rel_error": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_items_of_a_stack_may_differ_in_magnitude(budget: dict[str, float], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scales = torch.tensor([1e30, 1e-30, 1.0, 0.0], dtype=torch.float64)
    batch = torch.randn(4, 12, 10, dtype=torch.float64) * scales[:, None, None]
    for matrix, chain in zip(batch, tn.MPO.from_matrices(batch.to(dtype), **budget), strict=True):
        size = float(matrix.abs().max()) or 1.0
        found = reference.to_numpy(chain.to_matrix()) / size
        true = reference.relative_error(reference.to_numpy(matrix) / size, found)
        assert true <= chain.error * (1 + 1e-5) + 1e-5


# The dense family keeps the matrix itself, whose elements do fit.
@pytest.mark.parametrize("family", sorted({*tn.topologies.topology_names()} - {"dense"}))
def test_factors_that_no_single_number_holds_are_refused(family: str) -> None:
    """Elements that fit single precision, with a norm that does not: no infinity, and no certificate of 0."""
    matrix = torch.full((64, 64), 3e38)
    with pytest.raises(NonFiniteError, match="overflow"):
        tn.topologies.topology_family(family).decompose(matrix, Budget(max_bond=1))
    double = tn.topologies.topology_family(family).decompose(matrix.double(), Budget(max_bond=2))
    assert reference.relative_error(matrix.double(), double.network.to_matrix()) < 1e-7


def test_certificate_that_says_nothing_stays_one_where_nothing_is_cut() -> None:
    chain = operator(8, 8)
    unknown = tn.MPO(chain.cores, error=math.inf)
    for cut in (
        unknown.round(),
        unknown.round(max_bond=1),
        unknown + chain,
        unknown @ (chain * 0).transpose(),
    ):
        assert cut.error == math.inf
