"""Losses at few bits, for which only some rows are rounded, against those of the whole matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from allocations import peak
from quantization.rounding_cases import moment, weight

import tensornet as tn
from tensornet.compression import candidates
from tensornet.compression.candidates import format_losses, layer_formats
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting, damped, weighted_svd
from tensornet.quantization import NumberFormat, Rounding, predict, predict_losses
from tensornet.quantization.codebooks import CODEBOOKS
from tensornet.quantization.menus import MENUS, Menu
from tensornet.quantization.predict import predict_product_losses, spaced_rows
from tensornet.quantization.rounding import ROUNDINGS
from tensornet.topologies.dense import round_dense

FORMATS = [NumberFormat.parse(f"int{bits}") for bits in (4, 3, 2)]


def case(rows: int) -> tuple[torch.Tensor, Sensitivity]:
    left, right = damped(moment(rows, 1), 0.1), damped(moment(96, 2), 0.01)
    forecast = Weighting(damped(left, 1.0), right)
    return weight(rows, 96, 3), Sensitivity(Weighting(left, right), forecast)


@pytest.mark.parametrize("gradients", ["full", "diagonal"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_some_rows_stand_for_all(rounding: Rounding, gradients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With feedback between rows, rows of the sample get less of it than in the whole matrix."""
    monkeypatch.setattr(candidates, "ROUNDED_ROWS", 96)
    matrix, known = case(300)
    matrix *= torch.linspace(0.3, 3, 300)[torch.randperm(300), None]  # rows of unequal size
    sensitivity = replace(known, rounding=rounding)
    if gradients == "diagonal":
        weighting, forecast = (
            Weighting(x.rows.diagonal(), x.columns)  # type: ignore[union-attr]
            for x in (known.weighting, known.forecast)
        )
        sensitivity = Sensitivity(weighting, forecast, rounding)
    for number_format, found in zip(FORMATS, format_losses(matrix, sensitivity, FORMATS), strict=True):
        made = round_dense(matrix, number_format, sensitivity.weighting, rounding=rounding).dequantize()
        assert found.cost == pytest.approx(sensitivity.weighting.cost(matrix - made), rel=0.2)
        assert found.predicted_loss == pytest.approx(sensitivity.forecast.cost(matrix - made), rel=0.2)
        assert found.error == pytest.approx(float((matrix - made).norm() / matrix.norm()), rel=0.2)


@pytest.mark.parametrize("name", ["iq3_xxs", "iq2_s"])
def test_some_rows_stand_for_all_with_codebooks(name: str) -> None:
    rows, columns = damped(moment(160, 1), 0.1), damped(moment(256, 2), 0.01)
    sensitivity = Sensitivity(Weighting(rows, columns), Weighting(damped(rows, 1.0), columns))
    matrix, number_format = weight(160, 256, 3), NumberFormat.parse(name)
    (found,) = format_losses(matrix, sensitivity, [number_format])
    error = matrix - round_dense(matrix, number_format, sensitivity.weighting).dequantize()
    assert found.cost == pytest.approx(sensitivity.weighting.cost(error), rel=0.25)
    assert found.predicted_loss == pytest.approx(sensitivity.forecast.cost(error), rel=0.25)


@pytest.mark.parametrize("rounding", ["one_sided", "two_sided"])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_few_rows_stand_for_all_with_codebooks(name: str, rounding: Rounding) -> None:
    """If only mean squares of gradients are known, nothing but these rows is rounded."""
    rows, columns = moment(300, 1).diagonal(), damped(moment(512, 2, tokens=2048), 0.01)
    sensitivity = Sensitivity(Weighting(rows, columns), Weighting(2 * rows, columns), rounding)
    matrix, number_format = weight(300, 512, 3), NumberFormat.parse(name)
    (found,) = format_losses(matrix, sensitivity, [number_format])
    made = round_dense(matrix, number_format, sensitivity.weighting, rounding=rounding).dequantize()
    exact = sensitivity.weighting.cost(matrix - made)
    assert found.cost == pytest.approx(exact, rel=0.2)
    assert found.predicted_loss == pytest.approx(2 * found.cost)
    assert found.error == pytest.approx(float((matrix - made).norm() / matrix.norm()), rel=0.2)


def test_a_small_matrix_is_measured_exactly() -> None:
    """Its losses at few bits are those of the stored matrix, not estimates."""
    matrix, sensitivity = case(40)
    found = format_losses(matrix, sensitivity, FORMATS)
    for each, number_format in zip(found[1:], FORMATS[1:], strict=True):
        error = matrix - round_dense(matrix, number_format, sensitivity.weighting).dequantize()
        assert each.cost == pytest.approx(sensitivity.weighting.cost(error))
        assert each.predicted_loss == pytest.approx(sensitivity.forecast.cost(error))


def test_without_moments_and_with_zeros() -> None:
    plain = Sensitivity(Weighting(), Weighting())
    for found in format_losses(torch.zeros(4, 64), plain, FORMATS):
        assert (found.cost, found.predicted_loss, found.error) == (0.0, 0.0, 0.0)
    losses = [x.cost for x in format_losses(torch.randn(300, 64), plain, FORMATS)]
    assert losses == sorted(losses)


def test_predictions_of_some_rows_stand_for_all() -> None:
    """Losses, rows and columns of a sample scaled by ranges, against those of all rows."""
    matrix, sensitivity = case(300)
    matrix[7] *= 20  # the sample must hold the row that matters
    weightings = [sensitivity.weighting, sensitivity.forecast, Weighting()]
    sample = spaced_rows(matrix, 64)
    assert sample is not None
    assert len(sample.unique()) == 64
    assert 7 in sample
    every = predict_losses(matrix, FORMATS, weightings)
    torch.testing.assert_close(
        predict_losses(matrix, FORMATS, weightings, sample=sample), every, rtol=0.1, atol=0
    )
    assert spaced_rows(matrix, 300) is None


def test_products_are_predicted_by_some_rows_of_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, sensitivity = case(160)
    found = weighted_svd(matrix, sensitivity.weighting)
    weightings = [sensitivity.weighting, sensitivity.forecast]
    exact = predict_product_losses(*found.factors(96), "int4:g32", weightings)
    monkeypatch.setattr(predict, "SAMPLED_ROWS", 48)
    sampled = predict_product_losses(*found.factors(96), "int4:g32", weightings)
    assert not torch.equal(sampled, exact)
    torch.testing.assert_close(sampled[:, 8:], exact[:, 8:], rtol=0.15, atol=0)


def test_predictions_know_the_damping_that_only_rounding_needs() -> None:
    matrix, sensitivity = case(96)
    number_format = NumberFormat.parse("int4:g32")
    (found,) = format_losses(matrix, sensitivity, [number_format])
    made = round_dense(matrix, number_format, sensitivity.weighting).dequantize()
    exact = sensitivity.weighting.cost(matrix - made)
    assert found.cost == pytest.approx(exact, rel=0.12)  # without it a sixth too low


@pytest.mark.parametrize("rounding", ["one_sided", "two_sided"])
def test_some_rows_are_rounded_if_a_few_correlated_inputs_are_huge(rounding: Rounding) -> None:
    """From moments alone, many times the loss would be predicted."""
    torch.manual_seed(0)
    inputs = torch.randn(2048, 96).double()
    inputs[:, :2] += 100 * torch.randn(2048, 1)
    ordinary, columns = damped(moment(96, 2), 0.01), inputs.T @ inputs / 2048
    rows, matrix = moment(200, 1).diagonal(), weight(200, 96, 3)
    formats = [NumberFormat.parse(name) for name in ("int4:g32", "int6:g32")]
    for seen, predictable in ((columns, False), (ordinary, True)):
        weighting = Weighting(rows, seen)
        sensitivity = Sensitivity(weighting, weighting, rounding)
        predicted = candidates._predicted(matrix, sensitivity, formats)
        found = format_losses(matrix, sensitivity, formats)
        assert (found == predicted) == predictable
        for number_format, loss, guess in zip(formats, found, predicted, strict=True):
            made = round_dense(matrix, number_format, weighting, rounding=rounding).dequantize()
            exact = weighting.cost(matrix - made)
            assert 1 / 1.5 < loss.cost / exact < 1.5
            assert predictable or guess.cost > 3 * exact


def test_formats_that_do_not_fit_a_matrix_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 320 or 576 weights have no whole number of super-blocks; such layers keep their format."""
    monkeypatch.setattr(MENUS, "_items", {"super": Menu(("float", "nl4:g32:s6", "int4:g128"))})
    formats = [NumberFormat.parse(name) for name in ("int3:g16:s6", "int3:g32")]
    layers = [(torch.randn(8, size), Sensitivity(Weighting(), Weighting())) for size in (256, 320, 576)]
    config = tn.CompressionConfig(bits_per_weight=4, formats=tuple(x.name for x in formats))
    chosen = [layer_formats([matrix], [seen], config) for matrix, seen in layers]
    assert chosen == [tuple(formats), *2 * [(NumberFormat(), formats[1])]]
    menu = tn.CompressionConfig(bits_per_weight=4, formats="super")
    assert NumberFormat.parse("nl4:g32:s6") in layer_formats([layers[0][0]], [layers[0][1]], menu)
    assert all(x.divides(320) for x in layer_formats([layers[1][0]], [layers[1][1]], menu))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_a_large_moment_is_copied_few_times() -> None:
    """Its damped values, their factor and one temporary matrix are in memory, all in single precision."""
    columns = damped(moment(1024, 2, tokens=4096), 0.01)
    seen = Weighting(moment(32, 1).diagonal(), columns)
    matrix, formats = weight(32, 1024, 3).float(), [NumberFormat.parse("int4")]
    most = peak(lambda: format_losses(matrix, Sensitivity(seen, seen, "one_sided"), formats))
    assert most <= 4 * columns.numel() * 4
