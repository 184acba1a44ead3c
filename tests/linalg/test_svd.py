"""`truncated_svd` by every method against NumPy, and the routes that must notice what they cannot do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tensornet as tn
from tensornet.errors import BudgetError, NonFiniteError, ShapeError
from tensornet.linalg import svd
from tensornet.linalg.svd import METHODS, energy, iterated_basis, leading_basis
from tensornet.linalg.tt_svd import split_block
from tensornet.testing import laws, reference, strategies
from tensornet.topologies import Budget

methods = pytest.mark.parametrize("method", METHODS)


def svd_as_outcome(method: str, matrix: Tensor, budget: Budget) -> laws.Outcome:
    found = tn.truncated_svd(matrix, max_rank=budget.max_bond, rel_error=budget.rel_error, method=method)
    product = (found.U * found.S.to(found.U.dtype)) @ found.Vh
    return laws.Outcome(product, found.error, bonds=(found.S.numel(),), tensors=(found.U, found.Vh))


class _SVDLaws(laws.DecompositionLaws):
    method = "auto"
    budgets = st.builds(
        Budget,
        max_bond=st.none() | st.integers(1, 8),
        rel_error=st.none() | st.sampled_from((0.0, 1e-3, 0.1, 0.9)),
    )
    matrices = strategies.matrices(dtype=strategies.dtypes(half=True))

    def decompose(self, matrix: Tensor, budget: Budget) -> laws.Outcome:
        return svd_as_outcome(self.method, matrix, budget)


class TestAuto(_SVDLaws):
    method = "auto"


class TestExact(_SVDLaws):
    method = "exact"


class TestGram(_SVDLaws):
    method = "gram"


class TestRandomized(_SVDLaws):
    method = "randomized"


@methods
@given(matrix=strategies.matrices(), rank=st.integers(1, 6))
def test_is_the_best_approximation(method: str, matrix: Tensor, rank: int) -> None:
    found = tn.truncated_svd(matrix, max_rank=rank, method=method)
    best = reference.best_error(matrix, rank)
    assert found.error == pytest.approx(best, rel=2e-4, abs=laws.tolerance(matrix.dtype))


@methods
@given(matrix=strategies.matrices(scales=False), rank=st.integers(1, 6))
def test_factors_are_orthonormal_and_sorted(method: str, matrix: Tensor, rank: int) -> None:
    found = tn.truncated_svd(matrix, max_rank=rank, method=method)
    eye = torch.eye(found.S.numel(), dtype=found.U.dtype)
    # A Gram matrix in double precision resolves small singular values to 1e-10 only, as its docstring says.
    slack = laws.tolerance(matrix.dtype) if method == "exact" else max(1e-10, laws.tolerance(matrix.dtype))
    assert float((found.U.mH @ found.U - eye).abs().max()) < slack
    assert float((found.Vh @ found.Vh.mH - eye).abs().max()) < slack
    assert bool((found.S[1:] <= found.S[:-1]).all())


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_singular_values_are_numpys(method: str, dtype: torch.dtype) -> None:
    matrix = strategies.matrix_with_spectrum((40, 25), "power", seed=1).to(dtype)
    found = tn.truncated_svd(matrix, max_rank=10, method=method)
    expected = np.linalg.svd(reference.to_numpy(matrix), compute_uv=False)[:10]
    np.testing.assert_allclose(found.S.numpy(), expected, rtol=1e-5 if dtype != torch.float64 else 1e-8)


@methods
def test_signs_are_fixed(method: str) -> None:
    matrix = torch.randn(30, 20, dtype=torch.complex128)
    found = tn.truncated_svd(matrix, max_rank=5, method=method)
    pivots = found.U.gather(0, found.U.abs().argmax(0, keepdim=True))
    assert float(pivots.imag.abs().max()) < 1e-14
    assert float(pivots.real.min()) > 0


@methods
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_does_not_matter(method: str, scale: float) -> None:
    matrix = torch.randn(20, 12)
    plain = tn.truncated_svd(matrix, max_rank=4, method=method)
    scaled = tn.truncated_svd(matrix * scale, max_rank=4, method=method)
    assert scaled.error == pytest.approx(plain.error, rel=1e-5)
    np.testing.assert_allclose(scaled.S / scale, plain.S, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    matrix = torch.randn(20, 12, dtype=torch.float64) * scale
    found = tn.truncated_svd(matrix, max_rank=4)
    assert found.error == pytest.approx(reference.best_error(matrix / scale, 4), rel=1e-9)


# --- routes that hand over -----------------------------------------------------------------------


def graded(size: int, dtype: torch.dtype) -> Tensor:
    """Singular values from 1 to 1e-12: a Gram matrix knows none below 1e-8."""
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return ((U * torch.logspace(0, -12, size, dtype=torch.float64)) @ Vh).to(dtype)


def test_gram_that_cannot_resolve_is_redone_exactly() -> None:
    matrix = graded(24, torch.float64)
    found = tn.truncated_svd(matrix, max_rank=20, method="gram")
    assert found.method == "exact"
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)[:20]
    np.testing.assert_allclose(found.S.numpy(), expected, rtol=1e-3)
    assert tn.truncated_svd(torch.randn(24, 24).double(), max_rank=4, method="gram").method == "gram"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_keeps_a_small_promise(dtype: torch.dtype) -> None:
    found = tn.truncated_svd(graded(24, dtype), rel_error=1e-9, method="gram")
    assert found.error <= 1e-9


def test_iteration_that_does_not_settle_is_redone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "_MAX_ITERATIONS", 1)
    found = tn.truncated_svd(torch.randn(64, 64), max_rank=4, method="randomized")
    assert found.method == "exact"


def test_iteration_that_settles_is_kept() -> None:
    matrix = strategies.matrix_with_spectrum((300, 400), "exponential", seed=0).float()
    found = tn.truncated_svd(matrix, max_rank=8)
    assert found.method == "randomized"
    assert found.error == pytest.approx(reference.best_error(matrix, 8), rel=1e-3)


@pytest.mark.parametrize("spectrum", ["gaussian", "flat", "power"])
def test_large_matrix_is_best_by_auto(spectrum: str) -> None:
    matrix = strategies.matrix_with_spectrum((280, 320), spectrum, seed=2).float()
    found = tn.truncated_svd(matrix, max_rank=16)
    assert found.error <= reference.best_error(matrix, 16) * (1 + 1e-3)
    product = (found.U * found.S) @ found.Vh
    assert reference.relative_error(matrix, product) <= found.error * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(300, 300), (260, 700)])
def test_leading_singular_value_of_noise(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Next to a large rest the leading values may be far off while the rest hardly changes."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=dtype)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    for rank in (1, 20):
        found = tn.truncated_svd(matrix, max_rank=rank)
        np.testing.assert_allclose(found.S.numpy(), values[:rank], rtol=1e-4)


@pytest.mark.parametrize("method", ["auto", "randomized"])
def test_rest_too_small_to_iterate_on_is_cut_exactly(method: str) -> None:
    matrix = strategies.matrix_with_spectrum((300, 320), "exponential", seed=1)  # S[20] is 2e-9
    found = tn.truncated_svd(matrix, max_rank=20, method=method)
    assert found.error == pytest.approx(reference.best_error(matrix, 20), rel=1e-6)


def test_matrix_of_small_rank_needs_no_exact_svd() -> None:
    matrix = strategies.matrix_with_spectrum((300, 320), "gaussian", seed=1, rank=7)
    found = tn.truncated_svd(matrix, max_rank=20)
    assert found.method == "randomized"
    assert reference.relative_error(matrix, (found.U * found.S) @ found.Vh) <= 1e-13


@methods
def test_promise_is_kept_to_the_last_digit(method: str) -> None:
    """Cut after the first of 1, 0.1, 0.01, ... the error is 0.1 up to rounding, and must not round up."""
    for size in (10, 11):
        values = torch.logspace(0, 1 - size, size, dtype=torch.float64)
        for seed in (12, 103, 160):
            torch.manual_seed(seed)
            left, right = (torch.linalg.qr(torch.randn(30, size, dtype=torch.float64)).Q for _ in range(2))
            found = tn.truncated_svd((left * values) @ right.mT, rel_error=0.1, method=method)
            assert found.error <= 0.1


def test_randomized_keeps_a_promise_within_its_rank() -> None:
    matrix = strategies.matrix_with_spectrum((300, 300), "power", seed=0)
    best = reference.best_error(matrix, 20)
    found = tn.truncated_svd(matrix, max_rank=20, rel_error=best * (1 + 1e-9), method="randomized")
    assert found.error <= best * (1 + 1e-9)


def test_diverging_driver_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*args: object, **options: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    matrix = torch.randn(9, 7, dtype=torch.float64)
    expected = tn.truncated_svd(matrix, method="exact")
    monkeypatch.setattr(torch.linalg, "svd", diverge)
    found = tn.truncated_svd(matrix, method="exact")
    torch.testing.assert_close(found.S, expected.S)
    torch.testing.assert_close(found.U, expected.U)


# --- the step of TT-SVD --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("last", [False, True])
def test_split_measures_what_it_cuts(shape: tuple[int, int], dtype: torch.dtype, last: bool) -> None:
    blocks = torch.randn(3, *shape, dtype=dtype)
    split = split_block(blocks, energy(blocks), 6, None, single=True, last=last)
    left_over = energy(blocks.to(torch.complex128) - (split.left @ split.rest).to(torch.complex128))
    torch.testing.assert_close(split.discarded, left_over, rtol=1e-5, atol=0)
    frame = split.rest.mH if split.centered else split.left
    eye = torch.eye(6, dtype=dtype).expand(3, 6, 6)
    torch.testing.assert_close(frame.mH @ frame, eye, rtol=0, atol=1e-5)
    best = [reference.best_error(block, 6) for block in blocks]
    torch.testing.assert_close(
        (split.discarded / energy(blocks)).sqrt(), torch.tensor(best, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_split_goes_to_double_where_little_is_cut() -> None:
    """In single precision the Gram matrix cannot see singular values below 3e-4 of the largest."""
    block = graded(24, torch.float32)
    split = split_block(block, energy(block), 18, None, single=True)
    cut = math.sqrt(float(split.discarded) / float(energy(block)))
    assert split.left.dtype == torch.float64
    assert cut == pytest.approx(reference.best_error(block, 18), rel=1e-3)


def test_iterated_basis_of_a_stack() -> None:
    blocks = torch.stack([strategies.matrix_with_spectrum((60, 80), "power", seed=s) for s in range(3)])
    basis = iterated_basis(blocks, energy(blocks), 5, slack=1e-6)
    assert basis is not None
    kept = energy(basis.mH @ blocks)
    for block, inside in zip(blocks, kept, strict=True):
        outside = math.sqrt(1 - float(inside / energy(block)))
        assert outside == pytest.approx(reference.best_error(block, 5), rel=1e-4)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "options", "error", "word"),
    [
        (torch.zeros(3), {}, ShapeError, "got shape"),
        (torch.zeros(2, 3, 4), {}, ShapeError, "got shape"),
        (torch.zeros(0, 3), {}, ShapeError, "one element"),
        (torch.ones(3, 3, dtype=torch.int64), {}, ShapeError, r"torch\.int64"),
        (torch.ones(3, 3), {"method": "qr"}, ValueError, "'qr'"),
        (torch.ones(3, 3), {"max_rank": 0}, BudgetError, "max_rank must be"),
    ],
)
def test_bad_input(matrix: Tensor, options: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        tn.truncated_svd(matrix, **options)


def test_non_finite_elements_are_counted() -> None:
    matrix = torch.ones(3, 3, dtype=torch.complex64)
    matrix[0, 0] = complex(0, math.inf)
    matrix[1, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"2 NaN .*9"):
        tn.truncated_svd(matrix)


@pytest.mark.parametrize("method", ["auto", "randomized"])
def test_default_device_is_not_that_of_the_random_numbers(method: svd.Method) -> None:
    """They are drawn on the CPU wherever a caller makes new tensors, and moved to the matrix."""
    matrix = strategies.matrix_with_spectrum((300, 280), "power", seed=0)
    expected = tn.truncated_svd(matrix, max_rank=8, method=method)
    with torch.device("meta"):
        found = tn.truncated_svd(matrix, max_rank=8, method=method)
    assert torch.equal(found.S, expected.S)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (12, 30), (30, 12), (20, 20)])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.5, 4.0])  # singular values of 10^(-decay k)
@pytest.mark.parametrize(
    ("cap", "rel_error"), [(3, None), (None, 1e-5), (None, 1e-10), (9, 1e-12), (None, 0.0)]
)
def test_leading_basis_is_as_good_as_the_svd(
    shape: tuple[int, int], decay: float, cap: int | None, rel_error: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    size = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.complex128)).Q for n in shape
    )
    block = left * 10 ** (-decay * torch.arange(size, dtype=torch.float64)) @ right.mH
    total = float(torch.linalg.vector_norm(block)) ** 2
    allowed = None if rel_error is None else rel_error**2 * total
    U, rest, lost = leading_basis(block, total, cap, allowed)
    rank, noise = U.shape[1], 1e-14 * math.sqrt(total)
    torch.testing.assert_close(U.mH @ U, torch.eye(rank, dtype=U.dtype))
    torch.testing.assert_close(rest, U.mH @ block, rtol=0, atol=noise)
    distance = float(torch.linalg.vector_norm(block - U @ rest))
    best = float(torch.linalg.vector_norm(torch.linalg.svdvals(block)[rank:]))
    assert math.sqrt(lost) == pytest.approx(distance, rel=1e-6, abs=noise)
    assert distance <= 1.0001 * best + noise
    if rank < (cap or size):  # one value less would lose too much
        assert lost <= allowed
    if rank > 1 and rel_error and rel_error > 1e-11:
        assert float(torch.linalg.vector_norm(torch.linalg.svdvals(block)[rank - 1 :])) ** 2 > 0.999 * allowed
