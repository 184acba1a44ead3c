"""Gradients of what is computed from a chain, against finite differences and against the dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import tensornet as tn
from tensornet.errors import BudgetError
from tensornet.testing import laws, reference, strategies

SHAPES = [(1, 2, 2, 3), (3, 2, 3, 2), (2, 2, 2, 1)]


def chain_cores(
    dtype: torch.dtype = torch.float64, *, shapes: list[tuple[int, ...]] = SHAPES
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


READINGS: dict[str, Callable[[tn.MPO], Tensor]] = {
    "norm": lambda operator: operator.norm(),
    "log_norm": lambda operator: operator.log_norm(),
    "spectrum_0": lambda operator: operator.bond_spectrum(0)[:2],
    "spectrum_1": lambda operator: operator.bond_spectrum(1),
    "entropy_0": lambda operator: operator.bond_entropy(0),
    "entropy_1": lambda operator: operator.bond_entropy(1),
    **{
        f"canonical_{center}": lambda operator, center=center: torch.cat(
            [torch.view_as_real(c + 0j).flatten() for c in operator.canonicalize(center=center).cores]
        )
        for center in range(3)
    },
    "rounded": lambda operator: operator.round(max_bond=(2, 1)).to_matrix(),
    "rounded_cores": lambda operator: torch.cat(
        [torch.view_as_real(c + 0j).flatten() for c in operator.round(max_bond=(2, 1)).cores]
    ),
    # Bonds of a sum are larger than its ranks, where a QR has no gradient.
    "rounded_sum": lambda operator: (operator + 0.5 * operator).round(max_bond=2).to_matrix(),
    "rounded_exactly": lambda operator: (operator + 0.5 * operator).round().to_matrix(),
    "applied": lambda operator: operator.H.apply(operator, max_bond=(3, 2)).to_matrix(),
    "decomposed": lambda operator: tn.MPO.from_matrix(
        operator.to_matrix(), out_dims=(2, 2, 2), in_dims=(2, 3, 2), max_bond=(3, 1)
    ).to_matrix(),
    "entropies": lambda operator: operator.entropies(),
    "energy": lambda operator: operator.expectation(operator @ operator.H),
}


@pytest.mark.parametrize(
    ("dtype", "features"),
    [(torch.float64, {"out_features": 7, "in_features": 11}), (torch.complex128, {})],
)
@pytest.mark.parametrize("reading", READINGS)
def test_gradients_are_those_of_finite_differences(
    reading: str, features: dict[str, int], dtype: torch.dtype
) -> None:
    def value(*cores: Tensor) -> Tensor:
        return READINGS[reading](tn.MPO(cores, **features))

    assert torch.autograd.gradcheck(value, chain_cores(dtype), fast_mode=True)


def through_the_matrix(name: str, matrix: Tensor, dims: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """The dense truth: torch's own norm and singular values of the unfolding."""
    if name == "norm":
        return torch.linalg.vector_norm(matrix)
    sites = len(dims[0])
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    unfolded = matrix.reshape(*dims[0], *dims[1]).permute(order).reshape(dims[0][0] * dims[1][0], -1)
    values = torch.linalg.svdvals(unfolded)
    if name == "spectrum":
        return values[0]
    p = values.square() / values.square().sum()
    return torch.special.entr(p[p > 1e-24]).sum()


@pytest.mark.parametrize("name", ["norm", "spectrum", "entropy"])
@given(
    operator=strategies.mpos(
        dims=strategies.dims(min_sites=2, max_sites=3, max_dim=3), dtype=torch.float64, padded=False
    )
)
def test_gradients_exist_where_cores_have_dependent_columns(name: str, operator: tn.MPO) -> None:
    """A sum of a chain with itself has a rank below its bonds, where a QR has no gradient."""
    cores = [core.clone().requires_grad_() for core in operator.cores]
    chain = tn.MPO(cores) + tn.MPO(cores)
    value = {
        "norm": chain.norm,
        "spectrum": lambda: chain.bond_spectrum(0)[0],
        "entropy": lambda: chain.bond_entropy(0),
    }[name]()
    found = torch.autograd.grad(value, cores)
    again = [core.detach().clone().requires_grad_() for core in cores]
    truth = through_the_matrix(name, 2 * tn.MPO(again).to_matrix(), (operator.out_dims, operator.in_dims))
    expected = torch.autograd.grad(truth, again)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7 * (1 + float(other.abs().max())))


def test_gradient_of_the_zero_operator_is_zero() -> None:
    cores = [torch.zeros(1, 2, 2, 2).requires_grad_(), torch.zeros(2, 2, 2, 1).requires_grad_()]
    tn.MPO(cores).norm().backward()
    assert all(core.grad is not None and not core.grad.any() for core in cores)


@pytest.mark.parametrize("name", ["norm", "bond_spectrum", "round"])
def test_second_derivatives_are_refused_not_wrong(name: str) -> None:
    cores = chain_cores()
    operator = tn.MPO(cores)
    value = {
        "norm": operator.norm,
        "bond_spectrum": lambda: operator.bond_spectrum(0)[0],
        "round": lambda: operator.round(max_bond=1).cores[0].sum(),
    }[name]()
    first = torch.autograd.grad(value, cores, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(first[0].sum(), cores, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reading", READINGS)
def test_transforms_give_the_gradients_of_autograd(reading: str, dtype: torch.dtype) -> None:
    cores = chain_cores(dtype)

    def value(*cores: Tensor) -> Tensor:
        result = READINGS[reading](tn.MPO(cores))
        return torch.view_as_real(result + 0j).sin().sum()

    places = tuple(range(len(cores)))
    expected = torch.autograd.grad(value(*cores), cores)
    constants = tuple(core.detach() for core in cores)
    torch.testing.assert_close(torch.func.grad(value, places)(*constants), expected)

    # Forward mode: the derivative along a tangent is the real inner product with the gradient.
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(core.shape, generator=generator, dtype=dtype) for core in cores)
    along = sum((g.conj() * t).real.sum() for g, t in zip(expected, tangents, strict=True))
    same, found = torch.func.jvp(value, constants, tangents)
    torch.testing.assert_close((same, found), (value(*constants), along))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(core, t) for core, t in zip(constants, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(value(*duals)).tangent, along)
    if not dtype.is_complex:
        torch.testing.assert_close(torch.func.jacrev(value, places)(*constants), expected)
        torch.testing.assert_close(torch.func.jacfwd(value, places)(*constants), expected)


@pytest.mark.parametrize(
    "reading", [name for name in READINGS if name != "energy" and not name.startswith("canonical")]
)
def test_transforms_that_would_be_wrong_are_refused(reading: str) -> None:
    cores = tuple(core.detach() for core in chain_cores())
    batches = [core.expand(2, *core.shape) for core in cores]

    def value(*cores: Tensor) -> Tensor:
        return READINGS[reading](tn.MPO(cores)).sin().sum()

    def along(*cores: Tensor) -> Tensor:
        return torch.func.jvp(value, cores, tuple(core.detach() for core in cores))[1]

    places = tuple(range(len(cores)))
    for second in (
        torch.func.hessian(value, places),
        torch.func.jacrev(torch.func.grad(value, places), places),
    ):
        with pytest.raises(RuntimeError, match="second derivatives"):
            second(*cores)
    for derivative in (torch.func.grad(along), lambda *cores: torch.func.jvp(along, cores, cores)):
        with pytest.raises(RuntimeError, match="second derivatives"):
            derivative(*cores)
    with pytest.raises(RuntimeError, match=r"do not support torch\.func\.vmap"):
        torch.func.vmap(value)(*batches)


def test_mixed_second_derivatives_are_refused() -> None:
    """The gradient depends on a parameter that the chain does not depend on."""
    cores = tuple(core.detach() for core in chain_cores())

    def gradient(factor: Tensor) -> Tensor:
        return torch.func.grad(lambda core: factor * tn.MPO([core, *cores[1:]]).norm())(cores[0]).sum()

    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(gradient)(torch.tensor(2.0, dtype=torch.float64))


def test_decompositions_without_derivatives_refuse_transforms() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    for function in (
        lambda matrix: tn.truncated_svd(matrix).U.sum(),
        lambda matrix: tn.decompose(matrix, "tucker").network.cores[0].sum(),
        lambda matrix: tn.MPO.from_matrices(matrix[None], sites=2)[0].cores[0].sum(),
    ):
        for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
            with pytest.raises(RuntimeError, match="no derivatives"):
                transform(function)(matrix)


def test_entropies_of_degenerate_states_have_finite_gradients() -> None:
    ghz = tn.MPO.from_vector(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.float64))
    cores = [core.clone().requires_grad_() for core in ghz.cores]
    entropies = tn.MPO(cores).entropies()
    torch.testing.assert_close(entropies.detach(), torch.full((2,), 2.0, dtype=torch.float64).log())
    gradients = torch.autograd.grad(entropies.sum(), cores)
    for gradient in gradients:  # equal singular values maximize the entropy
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_algebra_can_be_vectorized() -> None:
    batches = [torch.stack([core, 1e70 * core]).detach() for core in chain_cores()]

    def value(*cores: Tensor) -> Tensor:
        operator = tn.MPO(cores)
        return (2 * operator - operator.hadamard(operator)).inner(operator)

    expected = torch.stack([value(*(batch[k] for batch in batches)) for k in range(2)])
    torch.testing.assert_close(torch.func.vmap(value)(*batches), expected)

    def applied(x: Tensor, *cores: Tensor) -> Tensor:
        return (tn.MPO(cores).T @ tn.MPO(cores)).apply(x)

    batches = [torch.stack([core, -1e20 * core]).detach() for core in chain_cores()]
    vectors = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([applied(vectors[k], *(batch[k] for batch in batches)) for k in range(2)])
    torch.testing.assert_close(torch.func.vmap(applied)(vectors, *batches), expected)


def test_gradients_know_no_scale() -> None:
    cores = chain_cores()
    plain = torch.autograd.grad(tn.MPO(cores).log_norm(), cores)
    scaled = [(core.detach() * 1e200).requires_grad_() for core in cores]
    for one, other in zip(plain, torch.autograd.grad(tn.MPO(scaled).log_norm(), scaled), strict=True):
        torch.testing.assert_close(other * 1e200, one)
    for each in (cores, scaled):
        each[0].grad = None
    tn.MPO(cores).round(max_bond=1).log_norm().backward()
    tn.MPO(scaled).round(max_bond=1).log_norm().backward()
    torch.testing.assert_close(scaled[0].grad * 1e200, cores[0].grad)


@given(
    matrix=strategies.matrices(max_size=8),
    limits=st.sampled_from(({}, {"max_bond": 2}, {"rel_error": 0.3}, {"param_ratio": 0.7})),
)
def test_differentiable_decompositions_keep_the_same_limits(matrix: Tensor, limits: dict[str, Any]) -> None:
    try:
        plain = tn.MPO.from_matrix(matrix, sites=2, **limits)
    except BudgetError:
        return
    found = tn.MPO.from_matrix(matrix.clone().requires_grad_(), sites=2, **limits)
    assert all(core.requires_grad for core in found.cores)
    assert (found.shape, found.bond_dims) == (plain.shape, plain.bond_dims)
    slack = laws.tolerance(matrix.dtype)
    assert found.error == pytest.approx(plain.error, rel=1e-2, abs=slack)
    assert reference.relative_error(matrix, found.to_matrix().detach()) <= found.error + slack


def test_decompositions_of_other_topologies_carry_no_gradient() -> None:
    matrix = torch.randn(4, 6, requires_grad=True)
    factors = tn.truncated_svd(matrix, max_rank=2)
    cores = tn.decompose(matrix, "tucker", max_bond=2).network.cores
    assert not any(x.requires_grad for x in (*cores, factors.U, factors.S, factors.Vh))


@given(
    operator=strategies.mpos(
        dims=strategies.dims(min_sites=2, max_sites=3, max_dim=3), dtype=torch.float64, max_bond=3
    )
)
def test_rounding_that_cuts_nothing_has_the_gradient_of_the_operator(operator: tn.MPO) -> None:
    cores = [core.clone().requires_grad_() for core in operator.cores]
    chain = tn.MPO(cores, out_features=operator.shape[0], in_features=operator.shape[1])
    pull = torch.randn(chain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((chain.to_matrix() * pull).sum(), cores)
    rounded = chain.round(rel_error=1e-12)
    assert rounded.error <= 1e-12
    found = torch.autograd.grad((rounded.to_matrix() * pull).sum(), cores)
    size = max(float(x.abs().max()) for x in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * size)
