"""The algebra of matrix product operators against dense matrices, and TT-SVD against its bounds."""

from __future__ import annotations

import math
import operator as op

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tensornet as tn
from tensornet.errors import ShapeError
from tensornet.mpo_algebra import leading_projector
from tensornet.testing import laws, reference, strategies

operators = strategies.mpos()
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def close(actual: Tensor, expected: np.ndarray, factor: float = 1.0) -> None:
    size = max(1.0, float(np.max(np.abs(expected), initial=0)))
    slack = 10 * laws.tolerance(actual.dtype) * size * factor
    np.testing.assert_allclose(reference.to_numpy(actual), expected, rtol=0, atol=slack)


def dense(operator: tn.MPO) -> np.ndarray:
    rows, columns = operator.shape
    return reference.chain_matrix(operator.cores)[:rows, :columns]


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


@given(operator=operators, cap=st.integers(1, 4))
def test_rounding_keeps_its_caps_and_its_word(operator: tn.MPO, cap: int) -> None:
    rounded = operator.round(max_bond=cap)
    assert max(rounded.bond_dims, default=1) <= cap
    error = reference.relative_error(dense(operator), rounded.to_matrix())
    assert error <= rounded.error + 10 * laws.tolerance(operator.cores[0].dtype)


@given(operator=operators, promise=st.sampled_from((1e-3, 0.1, 0.5)))
def test_rounding_keeps_a_promise(operator: tn.MPO, promise: float) -> None:
    rounded = operator.round(rel_error=promise)
    assert rounded.error <= promise * (1 + 1e-9)
    error = reference.relative_error(dense(operator), rounded.to_matrix())
    assert error <= promise + 10 * laws.tolerance(operator.cores[0].dtype)


def test_rounding_undoes_a_sum() -> None:
    matrix = torch.randn(24, 30, dtype=torch.float64)
    a = tn.MPO.from_matrix(matrix, max_bond=3)
    twice = (a + a).round(rel_error=1e-10)
    assert twice.bond_dims == a.bond_dims
    torch.testing.assert_close(twice.to_matrix(), 2 * a.to_matrix())


@pytest.mark.parametrize("features", range(1, 13))
def test_projector_keeps_the_leading_block(features: int) -> None:
    chain = leading_projector((2, 3, 2), features, like=torch.zeros(1, dtype=torch.float64))
    if features == 12:
        assert chain is None
        return
    assert chain is not None
    expected = np.diag((np.arange(12) < features).astype(float))
    np.testing.assert_array_equal(reference.chain_matrix(chain), expected)
    assert max(core.shape[3] for core in chain) <= 2


def test_algebra_is_differentiable() -> None:
    cores = [torch.randn(1, 2, 2, 3, dtype=torch.float64), torch.randn(3, 2, 2, 1, dtype=torch.float64)]

    def value(first: Tensor, second: Tensor) -> Tensor:
        a = tn.MPO([first, second])
        return (2 * a @ a - a + a.transpose()).to_matrix().square().sum() + a.inner(a)

    assert torch.autograd.gradcheck(value, [core.requires_grad_() for core in cores])


# --- from matrices -------------------------------------------------------------------------------


@given(dims=strategies.dims(min_sites=2, max_sites=4, max_dim=3), data=st.data())
def test_error_lies_between_the_bounds_of_tt_svd(
    dims: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    """No chain can beat its worst unfolding, and TT-SVD is within `sqrt(n - 1)` of the best chain."""
    shape = (math.prod(dims[0]), math.prod(dims[1]))
    matrix = data.draw(strategies.matrices(shape=shape, scales=False))
    cap = data.draw(st.integers(1, 4))
    operator = tn.MPO.from_matrix(matrix, out_dims=dims[0], in_dims=dims[1], max_bond=cap)
    best = [
        reference.best_error(reference.unfolding(matrix, *dims, bond), size)
        for bond, size in enumerate(operator.bond_dims)
    ]
    error, slack = reference.relative_error(matrix, operator.to_matrix()), laws.tolerance(matrix.dtype)
    assert max(best) <= error + slack
    assert operator.error <= math.sqrt(sum(e**2 for e in best)) + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
def test_scale_does_not_matter(dtype: torch.dtype, scale: float) -> None:
    matrix = torch.randn(24, 18, dtype=dtype)
    plain = tn.MPO.from_matrix(matrix, max_bond=3)
    scaled = tn.MPO.from_matrix(matrix * scale, max_bond=3)
    assert scaled.error == pytest.approx(plain.error, rel=1e-4)
    error = reference.relative_error(matrix * scale, scaled.to_matrix())
    assert error == pytest.approx(plain.error, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-200), (torch.complex128, 1e200)],
)
def test_algebra_knows_no_scale(dtype: torch.dtype, scale: float) -> None:
    """Squares that overflow or vanish would make a norm infinite and a certificate zero."""
    plain = tn.MPO.from_matrix(torch.randn(12, 18, dtype=dtype), out_dims=(3, 4), in_dims=(3, 6))
    scaled = plain * scale
    assert float(scaled.norm()) == pytest.approx(float(plain.norm()) * scale, rel=1e-5)
    assert float(scaled.bond_entropy(0)) == pytest.approx(float(plain.bond_entropy(0)), rel=1e-5)
    for caps in ({"max_bond": 3}, {"rel_error": 0.5}):
        cut, expected = scaled.round(**caps), plain.round(**caps)
        assert cut.bond_dims == expected.bond_dims
        assert cut.error == pytest.approx(expected.error, rel=1e-5)
        assert reference.relative_error(expected.to_matrix(), cut.to_matrix() / scale) <= 1e-5


@pytest.mark.parametrize("factor", [2j, torch.tensor(2j)])
def test_half_times_complex_can_be_computed_with(factor: complex | torch.Tensor) -> None:
    half = tn.MPO([core.half() for core in tn.MPO.from_matrix(torch.randn(12, 18)).cores])
    matrix = (half * factor).to_matrix()
    assert matrix.dtype == torch.complex64
    torch.testing.assert_close(matrix, 2j * half.to_matrix().float(), rtol=1e-2, atol=1e-2)


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


def test_apply_multiplies_by_the_matrix() -> None:
    operator = tn.MPO.from_matrix(torch.randn(23, 17, dtype=torch.float64), max_bond=4)
    for batch in ((), (0,), (5,), (2, 3)):
        x = torch.randn(*batch, 17, dtype=torch.float64)
        torch.testing.assert_close(operator.apply(x), x @ operator.to_matrix().T)


# --- bad input -----------------------------------------------------------------------------------


def test_operators_that_do_not_fit_are_refused() -> None:
    a, b = tn.MPO.from_matrix(torch.randn(8, 6)), tn.MPO.from_matrix(torch.randn(6, 8))
    with pytest.raises(ShapeError, match="can be added"):
        a + b
    with pytest.raises(ShapeError, match="can be compared"):
        a.inner(b)
    with pytest.raises(ShapeError, match=r"Cannot multiply \(8, 6\) by \(8, 6\)"):
        a @ a
    with pytest.raises(TypeError):
        a * b
    with pytest.raises(TypeError):
        a @ 3


@pytest.mark.parametrize("bond", [-1, 2])
def test_bonds_that_do_not_exist_are_refused(bond: int) -> None:
    with pytest.raises(ShapeError, match="3 cores have bonds 0 to 1"):
        tn.MPO.from_matrix(torch.randn(8, 8)).bond_spectrum(bond)


def test_center_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ShapeError, match="center=3 is not a site"):
        tn.MPO.from_matrix(torch.randn(8, 8)).canonicalize(center=3)


def test_cores_that_are_no_chain_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"Core 1 has shape \(2, 2, 2, 1\); expected .* left=3"):
        tn.MPO([torch.zeros(1, 2, 2, 3), torch.zeros(2, 2, 2, 1)])
    with pytest.raises(ShapeError, match="ends in a bond of 3"):
        tn.MPO([torch.zeros(1, 2, 2, 3)])
    with pytest.raises(ShapeError, match="at least one core"):
        tn.MPO([])


def test_operators_mix_with_numbers_and_operators_only() -> None:
    operator = tn.MPO.from_matrix(torch.randn(6, 8), out_dims=(2, 3), in_dims=(2, 4))
    for other in (3, torch.ones(6, 8)):
        for act in (op.add, op.sub):
            with pytest.raises(TypeError, match="unsupported operand"):
                act(operator, other)
        with pytest.raises(ShapeError, match="Only an MPO can be compared with an MPO, got"):
            operator.inner(other)  # type: ignore[arg-type]
    for tensor in (torch.ones(4, 1), torch.ones(3)):  # the first would scale the columns of the last core
        with pytest.raises(ShapeError, match="multiplied by one number, got a tensor of shape"):
            operator * tensor
    for factor in (2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor([2.0])):
        torch.testing.assert_close((factor * operator).to_matrix(), 2 * operator.to_matrix())
        torch.testing.assert_close((operator / factor).to_matrix(), operator.to_matrix() / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_features": 7}, r"out_features=7 is more than the legs \(2, 3\) of the cores hold"),
        ({"out_features": 0}, "out_features must be an integer of at least 1, got 0"),
        ({"in_features": -1}, "in_features must be an integer of at least 1, got -1"),
    ],
)
def test_features_that_the_cores_do_not_hold_are_refused(change: dict[str, int], message: str) -> None:
    cores = tn.MPO.from_matrix(torch.randn(6, 8), out_dims=(2, 3), in_dims=(2, 4)).cores
    with pytest.raises(ShapeError, match=message):
        tn.MPO(cores, **change)


def test_cores_that_differ_are_refused() -> None:
    first, last = tn.MPO.from_matrix(torch.randn(6, 8), sites=2).cores
    with pytest.raises(
        ShapeError, match=r"Core 1 is torch\.float64 on cpu, the first core is torch\.float32"
    ):
        tn.MPO([first, last.double()])
    with pytest.raises(ShapeError, match=r"Core 0 must be a torch\.Tensor, got list"):
        tn.MPO([first.tolist(), last])


def test_single_core_has_no_bond() -> None:
    with pytest.raises(ShapeError, match="Bond 0 does not exist; one core has none"):
        tn.MPO.from_matrix(torch.randn(6, 8), sites=1).bond_spectrum(0)


def test_stacks_and_matrices_are_told_apart() -> None:
    with pytest.raises(ShapeError, match=r"a matrix of shape \(out, in\)"):
        tn.MPO.from_matrix(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match=r"a stack of shape \(items, out, in\)"):
        tn.MPO.from_matrices(torch.zeros(3, 4))
