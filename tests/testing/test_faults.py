"""Faults with one defect each: every one that breaks a stated law is caught, under the profile `ci` too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

import tensornet as tn
from tensornet.errors import NonFiniteError
from tensornet.testing import laws, strategies
from tensornet.topologies import Budget, topology_family

Outcome = laws.Outcome


def chain(matrix: Tensor, budget: Budget) -> Outcome:
    """Decompose honestly, into a chain."""
    return Outcome.of(topology_family("mpo").decompose(matrix, budget))


def svd(matrix: Tensor, budget: Budget) -> Outcome:
    """Decompose honestly, by a truncated SVD; parameters are not counted."""
    found = tn.truncated_svd(matrix, max_rank=budget.max_bond, rel_error=budget.rel_error, method="exact")
    product = (found.U * found.S.to(found.U.dtype)) @ found.Vh
    return Outcome(product, found.error, bonds=tuple(found.S.shape), tensors=(found.U, found.Vh))


def kept(matrix: Tensor, budget: Budget, select: Callable[[Tensor, int], Tensor]) -> Outcome:
    """Keep as many singular values as an honest SVD, chosen by `select(values, count)`; true certificate."""
    count = svd(matrix, budget).bonds[0]
    U, S, Vh = torch.linalg.svd(matrix.to(torch.complex128 if matrix.is_complex() else torch.float64), False)
    chosen = select(S, count)
    product = ((U[:, chosen] * S[chosen]) @ Vh[chosen]).to(matrix.dtype)
    size = float(S.square().sum())
    error = math.sqrt(max(0.0, 1 - float(S[chosen].square().sum()) / size)) if size else 0.0
    return Outcome(product, error, bonds=(count,))


def rank_one_less(matrix: Tensor, budget: Budget) -> Outcome:
    """Use one singular value fewer than the bond it reports."""
    return kept(matrix, budget, lambda S, count: torch.arange(max(1, count - 1)))


def changed(**fields: Any) -> Callable[[Tensor, Budget], Outcome]:
    """Decompose honestly, then change fields of the outcome: functions of the outcome."""

    def decompose(matrix: Tensor, budget: Budget) -> Outcome:
        found = chain(matrix, budget)
        return replace(found, **{name: change(found) for name, change in fields.items()})

    return decompose


def zero(matrix: Tensor, budget: Budget) -> Outcome:
    found = chain(matrix, budget)
    return replace(found, matrix=torch.zeros_like(found.matrix), error=1.0)


def zero_with_a_budget(matrix: Tensor, budget: Budget) -> Outcome:
    return chain(matrix, budget) if budget.unlimited else zero(matrix, budget)


def zero_without_bonds(matrix: Tensor, budget: Budget) -> Outcome:
    found = zero_with_a_budget(matrix, budget)
    return found if budget.unlimited else Outcome(found.matrix, 1.0)


def one_row_with_a_budget(matrix: Tensor, budget: Budget) -> Outcome:
    found = chain(matrix, budget)  # NumPy would broadcast the row
    return found if budget.unlimited else replace(found, matrix=found.matrix[:1])


def ignores(cap: str, value: Callable[[Any], Any]) -> Callable[[Tensor, Budget], Outcome]:
    """Decompose under another cap than the one asked for."""

    def decompose(matrix: Tensor, budget: Budget) -> Outcome:
        asked = getattr(budget, cap)
        return chain(matrix, budget if asked is None else replace(budget, **{cap: value(asked)}))

    return decompose


def inexact(matrix: Tensor, budget: Budget) -> Outcome:
    found = chain(matrix, budget)
    return replace(found, matrix=found.matrix * 0.999, error=found.error + 0.002)


def unsure(matrix: Tensor, budget: Budget) -> Outcome:
    found = chain(matrix, budget)
    return replace(found, error=0.5) if budget.unlimited else found


def zigzag(matrix: Tensor, budget: Budget) -> Outcome:
    cap = budget.max_bond
    return svd(matrix, replace(budget, max_bond=None if cap is None else max(1, cap - 3 * (cap % 2))))


def doubles_the_input(matrix: Tensor, budget: Budget) -> Outcome:
    found = chain(matrix, budget)
    matrix.mul_(2)
    return found


def returns_the_input(matrix: Tensor, budget: Budget) -> Outcome:
    return Outcome(matrix, 0.0) if budget.unlimited else chain(matrix, budget)


def stores_the_input(matrix: Tensor, budget: Budget) -> Outcome:
    return replace(chain(matrix, budget), tensors=(matrix[:1],))


def refuses_silently(matrix: Tensor, budget: Budget) -> Outcome:
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("")
    return chain(matrix, budget)


def pads_with_ones(matrix: Tensor, budget: Budget) -> Outcome:
    """Decompose the matrix padded by ones to even sizes; the certificate counts the whole."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, columns % 2, 0, rows % 2), value=1.0)
    found = chain(padded, budget)
    return replace(found, matrix=found.matrix[:rows, :columns], topology=None)


def underflows(matrix: Tensor, budget: Budget) -> Outcome:
    """Compute squares in half precision: small matrices vanish."""
    small = float(matrix.abs().amax()) ** 2 < 6e-8
    return chain(torch.zeros_like(matrix) if small else matrix, budget)


def only_real(matrix: Tensor, budget: Budget) -> Outcome:
    found = chain(matrix.real if matrix.is_complex() else matrix, budget)
    tensors = tuple(x.to(matrix.dtype) for x in found.tensors)
    return replace(found, matrix=found.matrix.to(matrix.dtype), tensors=tensors)


_CALLS = itertools.count()

FAULTS: dict[str, tuple[Callable[[Tensor, Budget], Outcome], str]] = {
    "the zero matrix": (zero, "test_quality"),
    "the zero matrix where there is a budget": (zero_with_a_budget, "test_quality"),
    "the zero matrix, no bonds told": (zero_without_bonds, "test_quality"),
    "the smallest singular values": (
        lambda m, b: kept(m, b, lambda S, count: torch.arange(len(S) - count, len(S))),
        "test_quality",
    ),
    "every other singular value": (
        lambda m, b: kept(m, b, lambda S, count: torch.arange(len(S)).roll(1)[:count]),
        "test_quality",
    ),
    "one rank less than its bond": (rank_one_less, "test_quality"),
    "scaled down, certified so": (inexact, "test_quality"),
    "not exact without a budget": (inexact, "test_exact"),
    "exact, not certified so": (unsure, "test_exact"),
    "certificate a tenth too small": (changed(error=lambda found: 0.9 * found.error), "test_certificate"),
    "certificate zero": (changed(error=lambda found: 0.0), "test_certificate"),
    "certificate negative": (changed(error=lambda found: -found.error - 1e-3), "test_certificate"),
    "certificate not a number": (changed(error=lambda found: math.nan), "test_certificate"),
    "certificate of the square": (changed(error=lambda found: found.error**2), "test_certificate"),
    "certificate three times too large": (changed(error=lambda found: 3 * found.error), "test_tight"),
    "certificate infinite": (changed(error=lambda found: found.error and math.inf), "test_tight"),
    "rel_error not kept": (ignores("rel_error", lambda x: min(0.99, 3 * x)), "test_certificate"),
    "max_bond not kept": (ignores("max_bond", lambda x: x + 1), "test_caps"),
    "param_ratio not kept": (ignores("param_ratio", lambda x: 2 * x), "test_caps"),
    "half of the parameters told": (changed(params=lambda found: found.params // 2), "test_caps"),
    "half of the parameters told, no topology": (
        changed(params=lambda found: found.params // 2, topology=lambda found: None),
        "test_caps",
    ),
    "half of the parameters told, no tensors": (
        changed(params=lambda found: found.params // 2, tensors=lambda found: ()),
        "test_caps",
    ),
    "worse with a larger cap": (zigzag, "test_monotone"),
    "changes its input": (doubles_the_input, "test_input_kept"),
    "returns its input": (returns_the_input, "test_input_kept"),
    "stores its input": (stores_the_input, "test_input_kept"),
    "doubles precision": (
        changed(tensors=lambda found: tuple(x.to(torch.complex128) for x in found.tensors)),
        "test_dtype_and_device",
    ),
    "drops imaginary parts": (
        changed(tensors=lambda found: tuple(x.to(x.real.dtype.to_complex()).real for x in found.tensors)),
        "test_dtype_and_device",
    ),
    "random tensors": (
        changed(tensors=lambda found: tuple(x + 1e-6 * torch.randn_like(x) for x in found.tensors)),
        "test_deterministic",
    ),
    "random matrix": (
        changed(matrix=lambda found: found.matrix * (1 + 1e-5 * torch.rand(()))),
        "test_deterministic",
    ),
    "random certificate": (changed(error=lambda found: float(torch.rand(()))), "test_deterministic"),
    "sometimes a tensor less": (
        changed(tensors=lambda found: found.tensors[: len(found.tensors) - next(_CALLS) % 2]),
        "test_deterministic",
    ),
    "accepts NaN and infinity": (
        lambda m, b: chain(torch.nan_to_num(m, posinf=0.0, neginf=0.0), b),
        "test_refuses_non_finite",
    ),
    "refuses without a word": (refuses_silently, "test_refuses_non_finite"),
    "one row only where there is a budget": (one_row_with_a_budget, "test_certificate"),
    "one row only": (changed(matrix=lambda found: found.matrix[:1]), "test_exact"),
    "transposed": (changed(matrix=lambda found: found.matrix.mT), "test_exact"),
    "conjugated": (changed(matrix=lambda found: found.matrix.conj()), "test_exact"),
    "real part only": (only_real, "test_exact"),
    "padded with ones": (pads_with_ones, "test_certificate"),
    "small matrices vanish": (underflows, "test_exact"),
}


def suite(decomposition: Callable[[Tensor, Budget], Outcome]) -> laws.DecompositionLaws:
    """Build the laws of a decomposition with the examples of `ci`; a failure is found, not made small."""
    before = settings.get_current_profile_name()
    settings.register_profile("ci without shrinking", settings.get_profile("ci"), phases=[Phase.generate])
    settings.load_profile("ci without shrinking")

    class Suite(laws.DecompositionLaws):
        matrices = strategies.matrices(max_size=8)

        def decompose(self, matrix: Tensor, budget: Budget) -> Outcome:
            return decomposition(matrix, budget)

    settings.load_profile(before)
    return Suite()


LAWS = list(laws.DecompositionLaws._laws())


@pytest.mark.parametrize("law", LAWS)
def test_an_honest_decomposition_keeps_every_law(law: str) -> None:
    getattr(suite(chain), law)()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_caught_by_its_law(fault: str) -> None:
    decomposition, law = FAULTS[fault]
    with pytest.raises(BaseException) as caught:  # a group of errors where it is broken in two ways
        getattr(suite(decomposition), law)()
    kinds = {type(error) for error in getattr(caught.value, "exceptions", [caught.value])}
    assert kinds == {AssertionError}
