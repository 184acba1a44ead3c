"""Losses at few bits, of which some rows alone are rounded, against those of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from quantization.rounding_cases import moment, weight

from tensornet.compression import format_candidates
from tensornet.compression.format_candidates import format_losses
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting, damped
from tensornet.quantization import NumberFormat

FORMATS = [NumberFormat.parse(f"int{bits}") for bits in (4, 3, 2)]


def case(rows: int) -> tuple[torch.Tensor, Sensitivity]:
    left, right = damped(moment(rows, 1), 0.1), damped(moment(96, 2), 0.01)
    forecast = Weighting(damped(left, 1.0), right)
    return weight(rows, 96, 3), Sensitivity(Weighting(left, right), forecast)


def test_some_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, sensitivity = case(160)
    monkeypatch.setattr(format_candidates, "SAMPLED_ROWS", 64)
    sampled = format_losses(matrix, sensitivity, FORMATS)
    monkeypatch.setattr(format_candidates, "SAMPLED_ROWS", 160)
    for found, exact in zip(sampled, format_losses(matrix, sensitivity, FORMATS), strict=True):
        assert found.choice == pytest.approx(exact.choice, rel=0.25)
        assert found.forecast == pytest.approx(exact.forecast, rel=0.25)
        assert found.error == pytest.approx(exact.error, rel=0.1)


def test_a_small_matrix_is_measured_exactly() -> None:
    """Its losses at few bits are those of the stored matrix, not estimates."""
    matrix, sensitivity = case(40)
    found = format_losses(matrix, sensitivity, FORMATS)
    for each, number_format in zip(found[1:], FORMATS[1:], strict=True):
        exact = format_candidates._measured(matrix, sensitivity, number_format)
        assert each.choice == pytest.approx(exact.choice)
        assert each.forecast == pytest.approx(exact.forecast)


def test_without_moments_and_with_zeros() -> None:
    plain = Sensitivity(Weighting(), Weighting())
    for found in format_losses(torch.zeros(4, 64), plain, FORMATS):
        assert (found.choice, found.forecast, found.error) == (0.0, 0.0, 0.0)
    losses = [x.choice for x in format_losses(torch.randn(300, 64), plain, FORMATS)]
    assert losses == sorted(losses)
