"""Losses at few bits, of which some rows alone are rounded, against those of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from quantization.rounding_cases import moment, weight

from tensornet.compression import format_candidates
from tensornet.compression.format_candidates import format_losses, nearest_losses
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting, damped, weighted_svd
from tensornet.quantization import NumberFormat, predict_product_losses, product_loss
from tensornet.quantization.expected_loss import expected_losses
from tensornet.quantization.prediction import spaced_rows

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
        assert found.error == pytest.approx(exact.error, rel=0.15)


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


def test_predictions_of_some_rows_stand_for_all() -> None:
    """Losses, rows and columns of a sample scaled by ranges, against those of all rows."""
    matrix, sensitivity = case(300)
    matrix[7] *= 20  # the sample must hold the row that matters
    weightings = [sensitivity.choice, sensitivity.forecast, Weighting()]
    sample = spaced_rows(matrix, 64)
    assert sample is not None
    assert len(sample.unique()) == 64
    assert 7 in sample
    every = expected_losses(matrix, FORMATS, weightings)
    torch.testing.assert_close(
        expected_losses(matrix, FORMATS, weightings, sample=sample), every, rtol=0.1, atol=0
    )
    assert spaced_rows(matrix, 300) is None


def test_products_are_predicted_by_some_rows_of_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, sensitivity = case(160)
    found = weighted_svd(matrix, sensitivity.choice)
    weightings = [sensitivity.choice, sensitivity.forecast]
    exact = predict_product_losses(*found.factors(96), "int4:g32", weightings)
    monkeypatch.setattr(product_loss, "SAMPLED_ROWS", 48)
    sampled = predict_product_losses(*found.factors(96), "int4:g32", weightings)
    assert not torch.equal(sampled, exact)
    torch.testing.assert_close(sampled[:, 8:], exact[:, 8:], rtol=0.15, atol=0)


def test_nearest_is_estimated_from_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, sensitivity = case(400)
    flat = Weighting(sensitivity.forecast.rows.diagonal(), sensitivity.forecast.columns)  # type: ignore[union-attr]
    sampled = nearest_losses(matrix, flat, FORMATS)
    monkeypatch.setattr(format_candidates, "SAMPLED_ROWS", 400)
    exact = nearest_losses(matrix, flat, FORMATS)
    assert sampled != exact
    assert sampled == pytest.approx(exact, rel=0.2)


def test_whole_groups_of_columns_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_candidates, "SAMPLED_COLUMNS", 128)
    wide, formats = torch.zeros(2, 1000), [NumberFormat.parse("int3:g32"), NumberFormat.parse("int2:g64")]
    columns = format_candidates._spaced_columns(wide, formats)
    assert columns.tolist() == [*range(64), *range(896, 960)]
    rows = [NumberFormat.parse("int2:row")]
    assert len(format_candidates._spaced_columns(wide, rows)) == 1000
