"""Gradients of what is computed from a chain, against finite differences and against the dense matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

import tensornet as tn
from tensornet.testing import strategies

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
    constants = [core.detach() for core in cores]
    torch.testing.assert_close(torch.func.grad(value, places)(*constants), expected)
    if not dtype.is_complex:
        torch.testing.assert_close(torch.func.jacrev(value, places)(*constants), expected)


@pytest.mark.parametrize("reading", [name for name in READINGS if not name.startswith("canonical")])
def test_transforms_that_would_be_wrong_are_refused(reading: str) -> None:
    cores = tuple(core.detach() for core in chain_cores())
    batches = [core.expand(2, *core.shape) for core in cores]

    def value(*cores: Tensor) -> Tensor:
        return READINGS[reading](tn.MPO(cores)).sum()

    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(value, cores, cores)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.hessian(value)(*cores)
    with pytest.raises(RuntimeError, match=r"do not support torch\.func\.vmap"):
        torch.func.vmap(value)(*batches)


def test_algebra_can_be_vectorized() -> None:
    batches = [torch.stack([core, 1e70 * core]).detach() for core in chain_cores()]

    def value(*cores: Tensor) -> Tensor:
        operator = tn.MPO(cores)
        return (2 * operator - operator.hadamard(operator)).inner(operator)

    expected = torch.stack([value(*(batch[k] for batch in batches)) for k in range(2)])
    torch.testing.assert_close(torch.func.vmap(value)(*batches), expected)


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


@given(matrix=strategies.matrices(dtype=torch.float64))
def test_decompositions_carry_no_gradient(matrix: Tensor) -> None:
    matrix.requires_grad_()
    factors = tn.truncated_svd(matrix, max_rank=2)
    operator = tn.MPO.from_matrix(matrix, max_bond=2)
    assert not any(x.requires_grad for x in (*operator.cores, factors.U, factors.S, factors.Vh))


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
