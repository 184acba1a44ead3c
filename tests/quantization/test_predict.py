"""Predicted losses of rounding factors, and of errors that cost by another moment, against sampled errors."""

from __future__ import annotations

import pytest
import torch
from quantization.rounding_cases import moment, weight

from tensornet.errors import FormatError
from tensornet.linalg.weighted_svd import Weighting, damped, weighted_svd
from tensornet.quantization import NumberFormat, moments, predict_losses, round_product, round_weight
from tensornet.quantization.predict import predict_product_losses


def test_predicted_losses_of_factors_are_those_of_rounding() -> None:
    matrix = weight(96, 128, 3)
    weighting = Weighting(damped(moment(96, 1), 0.1), damped(moment(128, 2), 0.01))
    found = weighted_svd(matrix, weighting)
    int4 = NumberFormat.parse("int4:g32:float8")
    predicted = predict_product_losses(*found.factors(96), int4, [weighting])[0]
    assert (predicted.diff() > 0).all()
    for rank in (16, 48, 80):
        left, right = found.factors(rank)
        made = round_product(left, right, int4, int4, weighting)
        assert 0.5 < float(predicted[rank - 1]) / made.loss_increase < 2, rank


def test_eight_bits_cost_far_less_than_four() -> None:
    left, right = weight(40, 10, 1), weight(10, 64, 2)
    eight, four = (
        predict_product_losses(left, right, name, [Weighting()])[0, -1] for name in ("int8", "int4")
    )
    assert 100 < float(four / eight) < 500


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_also_cost_under_another_damping(bits: int) -> None:
    """More damping of gradients, no moments at all, and a diagonal one."""
    rows, columns = damped(moment(160, 1), 0.1), damped(moment(192, 2), 0.01)
    matrix = weight(160, 192, 3)
    # Each tolerance is the mean deviation over twelve seeds, and five of their standard deviations.
    seen = [
        (Weighting(rows, columns), 0.15),
        (Weighting(damped(rows, 1.0), columns), 0.35),
        (Weighting(rows.diagonal(), columns.diagonal()), 0.3),
        (Weighting(), 0.7),  # the Frobenius error is predicted too low by about half
    ]
    (predicted,) = predict_losses(matrix, [f"int{bits}"], [each for each, _ in seen], column_damping=0.0)
    kept = round_weight(
        matrix, f"int{bits}", rows=rows, columns=columns, row_damping=0.0, column_damping=0.0, refits=0
    )
    error = matrix - kept.dequantize(torch.float64)
    for value, (each, tolerance) in zip(predicted.tolist(), seen, strict=True):
        assert value == pytest.approx(each.cost(error), rel=tolerance)


def test_damping_to_round_does_not_cost() -> None:
    rows, columns, matrix = damped(moment(64, 1), 0.1), damped(moment(96, 2), 0.01), weight(64, 96, 3)
    seen = [Weighting(rows, columns), Weighting(rows / 2 + torch.eye(64).double(), columns)]
    (predicted,) = predict_losses(matrix, ["int5"], seen, row_damping=0.2, column_damping=0.3)
    kept = round_weight(
        matrix, "int5", rows=rows, columns=columns, row_damping=0.2, column_damping=0.3, refits=0
    )
    error = matrix - kept.dequantize(torch.float64)
    for value, each in zip(predicted.tolist(), seen, strict=True):
        assert value == pytest.approx(each.cost(error), rel=0.25)


@pytest.mark.parametrize("probed", [False, True])
def test_growth_is_that_of_the_inverse(monkeypatch: pytest.MonkeyPatch, probed: bool) -> None:
    """Of two moments; estimates from 128 probes have a standard error of at most an eighth."""
    if probed:
        monkeypatch.setattr(moments, "_PROBED_SIZE", 1)
    seen = moments.Moment(torch.stack([damped(moment(90, k), 0.01) for k in range(2)]))
    sizes = torch.linalg.inv(seen.values).diagonal(dim1=1, dim2=2).gather(1, seen.order)
    exact = seen.feedback[1] * sizes
    assert float(exact.max()) > 1.5
    tolerance = 0.5 if probed else 1e-9
    torch.testing.assert_close(seen.growth, exact, rtol=tolerance, atol=0)
    torch.testing.assert_close(seen.growth.mean(1), exact.mean(1), rtol=min(tolerance, 0.1), atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "int8:g32",
        "int5:g32",
        "int4:g32",
        "nl4:g32",
        "mxfp4",
        "nvfp4",
        "int4:g32:s6:min",
    ],
)
def test_a_sample_of_rows_predicts_one_sided_rounding(name: str) -> None:
    columns, matrix = damped(moment(256, 2), 0.01), weight(96, 256, 3)
    sample = torch.arange(0, 96, 2)
    predicted = predict_losses(
        matrix, [name], [Weighting(None, columns)], rounding="one_sided", sample=sample
    )
    made = round_weight(matrix, name, columns=columns, rounding="one_sided", refits=0)
    exact = Weighting(None, columns).cost(matrix - made.dequantize(torch.float64))
    assert float(predicted) == pytest.approx(exact, rel=0.1)


def test_a_codebook_is_refused() -> None:
    with pytest.raises(FormatError, match="round some rows"):
        predict_losses(torch.randn(3, 256), ["iq2_s"], [Weighting()])


def test_no_format_has_no_losses() -> None:
    assert predict_losses(torch.randn(3, 4), [], [Weighting()]).shape == (0, 1)
