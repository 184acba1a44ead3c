"""The algebra of matrix product operators against dense matrices, and TT-SVD against its bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from chains import close, dense
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tensornet as tn
from tensornet.errors import BudgetError, ShapeError
from tensornet.testing import laws, reference, strategies

operators = strategies.mpos()
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tn.MPO, tn.MPO]:
    """Two operators of equal shape and dims."""
    dims = draw(strategies.dims(max_sites=3, max_dim=3))
    dtype = draw(strategies.dtypes())
    first = draw(strategies.mpos(dims=st.just(dims), dtype=dtype))
    second = draw(strategies.mpos(dims=st.just(dims), dtype=dtype, padded=False))
    return first, tn.MPO(second.cores, out_features=first.shape[0], in_features=first.shape[1])


@st.composite
def factors(draw: st.DrawFn) -> tuple[tn.MPO, tn.MPO]:
    """Two operators that can be multiplied; the shared legs may carry padding full of numbers."""
    rows, middle = draw(strategies.dims(max_sites=3, max_dim=3))
    columns = draw(st.tuples(*[st.integers(1, 3)] * len(rows)))
    dtype = draw(strategies.dtypes())
    left = draw(strategies.mpos(dims=st.just((rows, middle)), dtype=dtype))
    right = draw(strategies.mpos(dims=st.just((middle, columns)), dtype=dtype))
    return left, tn.MPO(right.cores, out_features=left.shape[1], in_features=right.shape[1])


# --- algebra -------------------------------------------------------------------------------------


@given(operator=operators)
def test_matrix_is_the_chain_written_out(operator: tn.MPO) -> None:
    close(operator.to_matrix(), dense(operator))


@given(pair=pairs())
def test_sum_and_difference(pair: tuple[tn.MPO, tn.MPO]) -> None:
    a, b = pair
    close((a + b).to_matrix(), dense(a) + dense(b))
    close((a - b).to_matrix(), dense(a) - dense(b))
    inner = zip((a + b).bond_dims, a.bond_dims, b.bond_dims, strict=True)
    assert all(total == left + right for total, left, right in inner)


@given(pair=factors())
def test_product(pair: tuple[tn.MPO, tn.MPO]) -> None:
    a, b = pair
    close((a @ b).to_matrix(), dense(a) @ dense(b), factor=10)


@given(operator=operators, number=st.sampled_from((2, -0.5, 0, 1 + 2j)))
def test_multiples(operator: tn.MPO, number: complex) -> None:
    close((number * operator).to_matrix(), number * dense(operator), factor=3)
    close((-operator).to_matrix(), -dense(operator))
    if number:
        close((operator / number).to_matrix(), dense(operator) / number, factor=3)


@given(operator=operators)
def test_transpose_conjugate_and_adjoint(operator: tn.MPO) -> None:
    close(operator.transpose().to_matrix(), dense(operator).T)
    close(operator.conj().to_matrix(), dense(operator).conj())
    close(operator.adjoint().to_matrix(), dense(operator).conj().T)


@given(operator=operators)
def test_norm_is_that_of_the_true_block(operator: tn.MPO) -> None:
    norm = operator.norm()
    close(norm, np.array(np.linalg.norm(dense(operator))), factor=10)
    assert not norm.is_complex()


def test_norm_of_a_difference_keeps_its_digits() -> None:
    a = tn.MPO.from_matrix(torch.randn(12, 12, dtype=torch.float64))
    assert float((a - a).norm()) < 1e-13


@given(pair=pairs())
def test_inner_product(pair: tuple[tn.MPO, tn.MPO]) -> None:
    a, b = pair
    close(a.inner(b), np.array(np.vdot(dense(a), dense(b))), factor=100)


@given(operator=operators, data=st.data())
def test_canonical_form(operator: tn.MPO, data: st.DataObject) -> None:
    laws.check_canonical(operator, data.draw(st.integers(0, len(operator.cores) - 1)))


@given(operator=strategies.mpos(dims=strategies.dims(min_sites=2)), data=st.data())
def test_gauge_invariance(operator: tn.MPO, data: st.DataObject) -> None:
    bond = data.draw(st.integers(0, len(operator.cores) - 2))
    laws.check_gauge(operator, bond, seed=data.draw(st.integers(0, 100)))


@given(operator=strategies.mpos(dims=strategies.dims(min_sites=2, max_sites=3, max_dim=3), padded=False))
def test_bond_spectrum_is_that_of_the_unfolding(operator: tn.MPO) -> None:
    for bond in range(len(operator.cores) - 1):
        unfolded = reference.unfolding(operator.to_matrix(), operator.out_dims, operator.in_dims, bond)
        expected = np.linalg.svd(unfolded, compute_uv=False)
        found = operator.bond_spectrum(bond)
        size = min(len(expected), len(found))
        close(found[:size], expected[:size], factor=10)
        close(found[size:], np.zeros(len(found) - size), factor=10)


def test_entropy_of_known_states() -> None:
    product = tn.MPO([torch.randn(1, 2, 3, 1), torch.randn(1, 3, 2, 1)])
    assert float(product.bond_entropy(0)) == pytest.approx(0, abs=1e-6)
    one = tn.MPO([torch.ones(1, 1, 1, 1)] * 2)
    assert str(float(one.bond_entropy(0))) == "0.0"  # not -0.0
    eye = tn.MPO([torch.eye(4).reshape(1, 2, 2, 4), torch.eye(4).reshape(4, 2, 2, 1)])
    assert float(eye.bond_entropy(0)) == pytest.approx(math.log(4))


@given(operator=operators, data=st.data(), promise=st.sampled_from((None, 1e-3, 0.1, 0.5)))
def test_rounding_keeps_its_caps_and_its_promise(
    operator: tn.MPO, data: st.DataObject, promise: float | None
) -> None:
    rounding = 10 * laws.tolerance(operator.dtype)
    caps = data.draw(st.tuples(*[st.integers(1, 4)] * (len(operator) - 1)))
    for cap in (caps, max(caps, default=1)):
        try:
            rounded = operator.round(max_bond=cap, rel_error=promise)
        except tn.errors.BudgetError:
            continue
        assert promise is None or rounded.error <= promise + laws.tolerance(operator.dtype)
        each = caps if isinstance(cap, tuple) else [cap] * len(rounded.bond_dims)
        assert all(bond <= most for bond, most in zip(rounded.bond_dims, each, strict=True))
        assert reference.relative_error(dense(operator), rounded.to_matrix()) <= rounded.error + rounding
    if promise is not None:
        alone = operator.round(rel_error=promise)
        assert alone.error <= promise * (1 + 1e-9)
        assert reference.relative_error(dense(operator), alone.to_matrix()) <= promise + rounding


@pytest.mark.parametrize("limits", [{"max_bond": 2}, {"param_ratio": 0.3}])
def test_an_error_that_other_limits_do_not_allow(limits: dict[str, float]) -> None:
    matrix = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (name,) = limits
    for decompose in (
        lambda **more: tn.MPO.from_matrix(matrix, **more),
        *(partial(tn.decompose, matrix, family) for family in ("low_rank", "mpo", "tucker", "tensor_ring")),
    ):
        with pytest.raises(tn.errors.BudgetError, match=rf"rel_error=0\.01.*{name}"):
            decompose(rel_error=0.01, **limits)
    assert tn.MPO.from_matrix(matrix, rel_error=0.9, max_bond=16).error <= 0.9


def test_a_bond_that_does_not_allow_the_error_of_rounding() -> None:
    matrix = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    operator = tn.MPO.from_matrix(matrix)
    with pytest.raises(tn.errors.BudgetError, match=r"rel_error=0\.01.*max_bond=2"):
        operator.round(max_bond=2, rel_error=0.01)
    with pytest.raises(tn.errors.BudgetError, match=r"rel_error=0\.01.*max_rank=2"):
        tn.truncated_svd(matrix, max_rank=2, rel_error=0.01)


def test_rounding_undoes_a_sum() -> None:
    matrix = torch.randn(24, 30, dtype=torch.float64)
    a = tn.MPO.from_matrix(matrix, max_bond=3)
    twice = (a + a).round(rel_error=1e-10)
    assert twice.bond_dims == a.bond_dims
    torch.testing.assert_close(twice.to_matrix(), 2 * a.to_matrix())


def test_algebra_is_differentiable() -> None:
    cores = [torch.randn(1, 2, 2, 3, dtype=torch.float64), torch.randn(3, 2, 2, 1, dtype=torch.float64)]

    def value(first: Tensor, second: Tensor) -> Tensor:
        a = tn.MPO([first, second])
        return (2 * a @ a - a + a.transpose()).to_matrix().square().sum() + a.inner(a) + a.trace()

    assert torch.autograd.gradcheck(value, [core.requires_grad_() for core in cores])


# --- from matrices -------------------------------------------------------------------------------


def test_bonds_that_nothing_cuts_are_identities() -> None:
    """MPOE's base matrix, untruncated: the central core is the matrix, the others select."""
    matrix = torch.randn(768, 3072)
    operator = tn.MPO.from_matrix(matrix, out_dims=(3, 4, 4, 4, 4), in_dims=(4, 4, 8, 6, 4))
    assert operator.bond_dims == (12, 192, 384, 16)
    assert [core.numel() for core in operator.cores] == [144, 36864, 2359296, 147456, 256]
    assert operator.error == 0
    assert torch.equal(operator.to_matrix(), matrix)


@pytest.mark.parametrize("budget", [{"max_bond": 4}, {"rel_error": 0.3}, {"param_ratio": 0.4}, {}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_stack_agrees_with_one_by_one(budget: dict[str, float], dtype: torch.dtype) -> None:
    stack = torch.randn(3, 23, 30, dtype=dtype) * torch.tensor([1, 10, 0.1]).reshape(3, 1, 1)
    together = tn.MPO.from_matrices(stack, **budget)
    assert len({operator.bond_dims for operator in together}) == 1
    for matrix, operator in zip(stack, together, strict=True):
        alone = tn.MPO.from_matrix(matrix, **budget)
        error = reference.relative_error(matrix, operator.to_matrix())
        assert error <= operator.error + laws.tolerance(dtype)
        assert operator.error <= alone.error + 1e-6  # the bonds are the largest that one of them needs
        if "rel_error" not in budget:
            assert operator.error == pytest.approx(alone.error, rel=1e-5)


# --- bad input -----------------------------------------------------------------------------------


FLAT = tn.MPO.from_matrix(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
EYE = tn.MPO.identity((2, 2))


def core(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: FLAT + EYE, ShapeError, "can be added"),
        (lambda: FLAT.inner(EYE), ShapeError, "can be compared"),
        (lambda: FLAT.inner(3), ShapeError, "Only an MPO"),
        (lambda: FLAT @ FLAT, ShapeError, "Cannot multiply"),
        (lambda: EYE @ tn.MPO.identity((4,)), ShapeError, "number of sites"),
        (lambda: FLAT @ torch.ones(8), ShapeError, "must be 6"),
        (lambda: torch.ones(2, 6) @ FLAT, ShapeError, "must be 8"),
        (lambda: EYE @ np.array(1.0), ShapeError, "array of shape"),
        (lambda: FLAT * FLAT, TypeError, None),
        (lambda: FLAT @ 3, TypeError, None),
        (lambda: FLAT + 3, TypeError, None),
        (lambda: FLAT - torch.ones(8, 6), TypeError, None),
        (lambda: FLAT * torch.ones(4, 1), ShapeError, "one number"),  # would scale columns of the last core
        (lambda: FLAT.trace(), ShapeError, r"square.*trace"),
        (lambda: FLAT**2, ShapeError, r"square.*powers"),
        (lambda: EYE**-1, ValueError, "exponent"),
        (lambda: EYE**0.5, TypeError, None),
        (lambda: EYE.kron(tn.MPO.identity((2, 2), features=3)), ShapeError, "no padding"),
        (lambda: EYE.kron(torch.eye(2)), ShapeError, "an MPO, got Tensor"),
        (lambda: EYE.__array__(copy=False), ValueError, "copy=False"),
        (lambda: EYE.round(max_bond=[2, 2]), BudgetError, "2 entries"),
        (lambda: EYE.round(max_bond=(0,)), BudgetError, "got 0"),
        (lambda: FLAT.bond_spectrum(-1), ShapeError, "bonds 0 to 1"),
        (lambda: FLAT.bond_spectrum(2), ShapeError, "bonds 0 to 1"),
        (lambda: tn.MPO([core(1, 2, 2, 1)]).bond_spectrum(0), ShapeError, "has none"),
        (lambda: FLAT.canonicalize(center=3), ShapeError, "center=3"),
        (lambda: tn.MPO([core(1, 2, 2, 3), core(2, 2, 2, 1)]), ShapeError, "expected .* left=3"),
        (lambda: tn.MPO([core(1, 2, 2, 3)]), ShapeError, "last core"),
        (lambda: tn.MPO([core(1, 2, 0, 1)]), ShapeError, "size of 0"),
        (lambda: tn.MPO([core(1, 2, 2, 0), core(0, 2, 2, 1)]), ShapeError, "size of 0"),
        (lambda: tn.MPO([]), ShapeError, "one core"),
        (
            lambda: tn.MPO([core(1, 2, 2, 1), core(1, 2, 2, 1).double()]),
            ShapeError,
            "dtype and device",
        ),
        (lambda: tn.MPO([core(1, 2, 2, 1).tolist()]), ShapeError, "got list"),
        (lambda: tn.MPO(EYE.cores, out_features=7), ShapeError, "out_features=7 exceeds 4"),
        (lambda: tn.MPO(EYE.cores, in_features=0), ShapeError, r"in_features.*got 0"),
        (lambda: tn.MPO.identity((2, 2), features=5), ShapeError, "features=5 exceeds 4"),
        (lambda: tn.MPO.identity((2, 2), (4,)), ShapeError, "number of sites"),
        (lambda: tn.MPO.from_matrix(torch.zeros(2, 3, 4)), ShapeError, "matrix of shape"),
        (lambda: tn.MPO.from_matrices(torch.zeros(3, 4)), ShapeError, "stack of shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    call: Callable[[], object], error: type[Exception], word: str | None
) -> None:
    with pytest.raises(error, match=word):
        call()
