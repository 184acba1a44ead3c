"""Breaks that hide well: each was passed by the laws before, and by every other law still is."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import DeadlineExceeded
from torch import Tensor

import tensornet as tn
from tensornet.errors import NonFiniteError
from tensornet.testing import laws, strategies
from tensornet.topologies import Budget

MATRIX = strategies.matrix_with_spectrum((12, 10), "power", seed=0)


def honest(matrix: Tensor, budget: Budget) -> laws.Outcome:
    found = tn.truncated_svd(matrix, max_rank=budget.max_bond, rel_error=budget.rel_error)
    product = (found.U * found.S.to(found.U.dtype)) @ found.Vh
    return laws.Outcome(product, found.error, bonds=tuple(found.S.shape), tensors=(found.U, found.Vh))


def bad_at_four(matrix: Tensor, budget: Budget) -> laws.Outcome:
    return honest(matrix, replace(budget, max_bond=1 if budget.max_bond == 4 else budget.max_bond))


def lazy(matrix: Tensor, budget: Budget) -> laws.Outcome:
    """Hands the input itself back where nothing is to be done."""
    return laws.Outcome(matrix, 0.0) if budget.unlimited else honest(matrix, budget)


def moody_matrix(matrix: Tensor, budget: Budget) -> laws.Outcome:
    outcome = honest(matrix, budget)
    return replace(
        outcome, matrix=outcome.matrix * (1 + 1e-12 * torch.rand((), dtype=torch.float64)), tensors=()
    )


def moody_certificate(matrix: Tensor, budget: Budget) -> laws.Outcome:
    return replace(honest(matrix, budget), error=float(torch.rand(())))


class _Moods:
    calls = 0


def moody_count(matrix: Tensor, budget: Budget) -> laws.Outcome:
    _Moods.calls += 1
    outcome = honest(matrix, budget)
    return replace(outcome, tensors=outcome.tensors[: 1 + _Moods.calls % 2])


def flat(matrix: Tensor, budget: Budget) -> laws.Outcome:
    """Right in shape without a budget only; NumPy would broadcast the rest."""
    outcome = honest(matrix, budget)
    return outcome if budget.unlimited else replace(outcome, matrix=outcome.matrix[:1])


def test_every_cap_is_compared_with_its_neighbours() -> None:
    with pytest.raises(AssertionError, match=r"at max_bond=3, but .* at 4"):
        laws.check_monotone(bad_at_four, MATRIX)


def test_caps_of_the_suite_are_drawn() -> None:
    class Suite(laws.DecompositionLaws):
        def decompose(self, matrix: Tensor, budget: Budget) -> laws.Outcome:
            return bad_at_four(matrix, budget)

    with pytest.raises(AssertionError, match=r"but .* at 4"):
        Suite().test_monotone()


def test_input_handed_back_is_shared_memory() -> None:
    with pytest.raises(AssertionError, match="shares memory"):
        laws.check_input_kept(lazy, MATRIX, Budget())


def test_tensors_that_repeat_their_elements_share_nothing() -> None:
    def repeating(matrix: Tensor, budget: Budget) -> laws.Outcome:
        return replace(honest(matrix, budget), tensors=(torch.ones(1, dtype=matrix.dtype).expand(3),))

    laws.check_input_kept(repeating, MATRIX, Budget())


@pytest.mark.parametrize("moody", [moody_matrix, moody_certificate, moody_count])
def test_all_of_an_outcome_is_deterministic(moody: laws.Decompose) -> None:
    with pytest.raises(AssertionError, match="not reproducible"):
        laws.check_deterministic(moody, MATRIX, Budget(max_bond=2))


def test_outcomes_of_another_shape_are_caught_under_every_budget() -> None:
    with pytest.raises(AssertionError, match=r"got \(1, 10\) for \(12, 10\)"):
        laws.check_certificate(flat, MATRIX, Budget(max_bond=2))
    with pytest.raises(AssertionError, match=r"got \(1, 10\) for \(12, 10\)"):
        laws.check_monotone(flat, MATRIX)


def test_what_a_suite_switched_off_or_replaced_stays_so_in_its_subclasses() -> None:
    class Parent(laws.DecompositionLaws):
        test_monotone = None

        def test_caps(self) -> str:
            return "mine"

    class Child(Parent):
        matrices = strategies.matrices(spectrum="flat")

    assert Child.test_monotone is None
    assert Child().test_caps() == "mine"  # type: ignore[func-returns-value]
    assert Child.test_exact is not Parent.test_exact  # draws from the strategies of the child


@settings(max_examples=50)
@given(matrix=strategies.matrices(rank=2, shape=(6, 5), dtype=torch.float64, scales=False))
def test_rank_asked_for_leaves_out_spectra_with_a_rank_of_their_own(matrix: Tensor) -> None:
    assert int(torch.linalg.matrix_rank(matrix)) == 2


def test_certificates_above_one_are_allowed_and_negative_ones_are_not() -> None:
    for error in (1.5, float("inf")):
        laws.check_certificate(
            lambda matrix, budget, error=error: replace(honest(matrix, budget), error=error),
            MATRIX,
            Budget(max_bond=1),
        )
    for error in (-0.1, float("nan")):
        with pytest.raises(AssertionError, match=r"certificate|exceeds"):
            laws.check_certificate(
                lambda matrix, budget, error=error: replace(honest(matrix, budget), error=error),
                MATRIX,
                Budget(max_bond=1),
            )


def refusing(message: str) -> laws.Decompose:
    def decompose(matrix: Tensor, budget: Budget) -> laws.Outcome:
        raise NonFiniteError(message)

    return decompose


def test_refusals_of_third_parties_have_words_of_their_own() -> None:
    laws.check_refuses_non_finite(refusing("Bitte nur endliche Zahlen."), MATRIX, float("nan"))
    with pytest.raises(AssertionError, match="refused without a word"):
        laws.check_refuses_non_finite(refusing(" "), MATRIX, float("nan"))


def test_laws_have_a_deadline_that_a_subclass_moves() -> None:
    def slow(matrix: Tensor, budget: Budget) -> laws.Outcome:
        time.sleep(0.005)
        return honest(matrix, budget)

    class Patient(laws.DecompositionLaws):
        matrices = strategies.matrices(max_size=4)
        budgets = st.just(Budget())

        def decompose(self, matrix: Tensor, budget: Budget) -> laws.Outcome:
            return slow(matrix, budget)

    class Impatient(Patient):
        deadline = 1

    Patient().test_exact()
    with pytest.raises(DeadlineExceeded):
        Impatient().test_exact()


def test_unknown_spectrum_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match="Unknown spectrum 'flatt'; choose one of gaussian, flat"):
        strategies.matrix_with_spectrum((3, 3), "flatt", seed=0)


@pytest.mark.slow
def test_missing_hypothesis_names_the_extra() -> None:
    code = (
        "import tensornet as tn\n"
        "import tensornet._util as optional\n"
        "optional.find_spec = lambda name: None\n"
        "try:\n    tn.testing\n"
        "except tn.errors.MissingDependencyError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tensornet.testing needs hypothesis, not installed here" in done.stdout
    assert "pip install 'tensornet-torch[testing]'" in done.stdout


def test_centers_that_count_from_the_end_are_centers() -> None:
    operator = tn.MPO.from_matrix(MATRIX, max_bond=3)
    for center in range(-3, 3):
        laws.check_canonical(operator, center=center)
