"""Operators whose norm, or whose intermediate results, no number of the dtype holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.errors import NonFiniteError
from tensornet.testing import reference, strategies

SITES = 200


def uniform(factor: float = 1e4, dtype: torch.dtype = torch.float64, bond: int = 1) -> tn.MPO:
    """An operator of 200 sites with equal elements; at bond 1 its norm is `(2 factor)^200`."""
    shapes = [(1 if k == 0 else bond, 2, 2, 1 if k == SITES - 1 else bond) for k in range(SITES)]
    return tn.MPO([torch.full(shape, factor, dtype=dtype) for shape in shapes])


@pytest.mark.parametrize("factor", [1e4, 1e-4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_beyond_every_number_have_a_logarithm(factor: float, dtype: torch.dtype) -> None:
    operator = uniform(factor, dtype)
    factor = float(torch.tensor(factor, dtype=dtype))
    assert float(operator.log_norm()) == pytest.approx(SITES * math.log(2 * factor), rel=1e-12)
    assert float(operator.norm()) == (math.inf if 2 * factor > 1 else 0.0)
    assert float(operator.inner(operator)) == (math.inf if 2 * factor > 1 else 0.0)


def random_operator(dtype: torch.dtype = torch.float64) -> tn.MPO:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 2, 3), (3, 2, 2, 3), (3, 2, 2, 1)]
    cores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tn.MPO(cores).to(dtype)


def test_products_overflow_only_where_cores_must() -> None:
    operator = random_operator()
    true = operator.to_matrix().matrix_power(3)
    for factor in (1e150, 1e-150):  # the product has elements of about 1e450
        power = (operator * factor) ** 3
        assert all(bool(core.isfinite().all()) for core in power.cores)
        assert float(power.log_norm()) == pytest.approx(math.log(float(true.norm())) + 3 * math.log(factor))
        square = (operator * factor).hadamard(operator * factor) * (1 / factor) * (1 / factor)
        torch.testing.assert_close(square.to_matrix(), operator.to_matrix().square())


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float64, 1e200), (torch.float64, 1e-200), (torch.float32, 1e30), (torch.float16, 2e3)],
)
def test_multiples_lose_nothing_on_the_way(dtype: torch.dtype, factor: float) -> None:
    operator = random_operator(dtype)
    there = operator * factor * factor
    back = there * (1 / factor) * (1 / factor)
    truth = operator.to(torch.float64).to_matrix()
    assert reference.relative_error(truth, back.to(torch.float64).to_matrix()) < 4e-3
    expected = float(truth.norm().log()) + 2 * math.log(factor)
    assert float(there.log_norm()) == pytest.approx(expected, abs=1e-2)


def test_sum_of_chains_scaled_in_opposite_ways_has_both_terms() -> None:
    one, other = random_operator(), random_operator().transpose()
    first = tn.MPO([one.cores[0] * 1e200, one.cores[1], one.cores[2] * 1e-200])
    second = tn.MPO([other.cores[0] * 1e-200, other.cores[1], other.cores[2] * 1e200])
    total, truth = first + second, one.to_matrix() + other.to_matrix()
    assert float(total.norm()) == pytest.approx(float(truth.norm()))
    torch.testing.assert_close(total.round().to_matrix(), truth)


def test_inner_products_are_finite_where_they_can_be() -> None:
    large, small = random_operator() * 1e200, random_operator() * 1e-200
    assert float(large.inner(small)) == pytest.approx(float(random_operator().norm()) ** 2)
    assert float(large.inner(large)) == math.inf
    for other, sign in ((large, 1), (-large, -1), (large * 1j, 1j)):
        phase, log = large.log_inner(other)
        assert complex(phase) == pytest.approx(sign)
        assert float(log) == pytest.approx(2 * float(large.log_norm()))
    phase, log = large.log_inner(large * 0)
    assert (float(phase), float(log)) == (0, -math.inf)


@pytest.mark.parametrize("factor", [1e200, -1e-200, 3e150j])
def test_multiples_beyond_the_dtype_of_the_cores(factor: complex) -> None:
    operator = random_operator().to(torch.float32)
    sites = tn.MPO.identity([2] * 12)
    scaled = operator.kron(sites) * factor
    assert all(bool(core.isfinite().all()) for core in scaled.cores)
    expected = float(operator.kron(sites).log_norm()) + math.log(abs(factor))
    assert float(scaled.log_norm()) == pytest.approx(expected, abs=1e-4)
    ratio = scaled.to(torch.complex128)[0, 0] / operator.to(torch.complex128)[0, 0]
    assert complex(ratio) == pytest.approx(complex(factor), rel=1e-5)


@pytest.mark.parametrize("factor", [0.5, 1e4, 1e-4])
def test_rounding_finds_the_rank_of_what_has_no_norm(factor: float) -> None:
    operator = uniform(factor, bond=2)
    for cut in (operator.round(), operator.round(max_bond=1), operator.round(rel_error=1e-6)):
        assert cut.bond_dims == (1,) * (SITES - 1)
        assert cut.error < 1e-10
        assert float(cut.log_norm()) == pytest.approx(float(operator.log_norm()), rel=1e-12)


def test_certificates_know_no_scale() -> None:
    operator = uniform()
    total = tn.MPO(operator.cores, error=0.1) + tn.MPO(operator.cores, error=0.1)
    assert total.error == pytest.approx(
        1 / 8
    )  # of A + A: 2 e / (1 - e), relative to a sum that is 2 - 2 e / (1 - e)
    assert (tn.MPO(operator.cores, error=0.1) * 1e-5).error == 0.1


def test_canonical_form_keeps_an_operator_without_a_norm() -> None:
    operator = uniform(bond=2)
    moved = operator.canonicalize(center=100)
    assert float(moved.log_norm()) == pytest.approx(float(operator.log_norm()), rel=1e-12)
    block = moved.cores[3].flatten(0, 2)
    gram = block.mT @ block
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(block.shape[1], dtype=block.dtype))


def test_spectrum_that_no_number_holds_is_refused_and_the_entropy_is_not() -> None:
    for factor in (1e4, 1e-4):
        operator = uniform(factor)
        with pytest.raises(NonFiniteError, match="singular value"):
            operator.bond_spectrum(50)
        assert float(operator.bond_entropy(50)) == pytest.approx(0, abs=1e-12)


@given(
    operator=strategies.mpos(dims=strategies.dims(min_sites=2, max_sites=3, max_dim=3)),
    power=st.integers(-250, 250),
)
def test_nothing_depends_on_the_scale_of_cores(operator: tn.MPO, power: int) -> None:
    """Cores scaled against each other by powers of two: the same operator, the same results."""
    if operator.dtype.to_real() != torch.float64:
        power //= 8
    first, *middle, last = operator.cores
    turned = tn.MPO(
        [first * 2.0**power, *middle, last * 2.0**-power],
        out_features=operator.shape[0],
        in_features=operator.shape[1],
    )
    assert float(turned.norm()) == pytest.approx(float(operator.norm()), rel=1e-5)
    for one, other in zip(operator.round(max_bond=2).cores, turned.round(max_bond=2).cores, strict=True):
        assert one.shape == other.shape
    assert turned.round(max_bond=2).error == pytest.approx(
        operator.round(max_bond=2).error, rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize("size", [64, 400])
@pytest.mark.parametrize("decay", [2.2, 2.6, 3.0])
@pytest.mark.parametrize("cap", [16, 40])
def test_certificates_in_double_precision_hold_to_rounding(size: int, decay: float, cap: int) -> None:
    """A cut energy taken as a difference of sums has no digits left when it is small."""
    generator = torch.Generator().manual_seed(size)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for _ in range(2)
    )
    matrix = (left * torch.arange(1, size + 1).double() ** -decay) @ right.T
    operator = tn.MPO.from_matrix(matrix, out_dims=(size, 1), in_dims=(1, size), max_bond=cap)
    true = reference.relative_error(matrix, operator.to_matrix())
    assert true <= operator.error * (1 + 1e-9)
    assert operator.error <= true * (1 + 1e-6)
