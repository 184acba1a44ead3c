"""The loss of a compressed model is measured beside its prediction; a warning says where they disagree."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tensornet as tn
from tensornet.compression.measured_loss import TOKENS, DenseLosses, MeasuredRise, warn_of_loss
from tensornet.errors import CalibrationWarning

X = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(256) % 4
Batches = DataLoader[tuple[Tensor, ...]]


def loader() -> Batches:
    return DataLoader(TensorDataset(X, Y), 64)


def classifier(steps: int) -> nn.Sequential:
    """Model that is trained on random labels, which only learning by heart can fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(nn.functional.cross_entropy(model(X), Y))


@pytest.mark.parametrize("budget", [{"loss_increase": 0.02}, {"param_ratio": 0.2}], ids=str)
def test_a_model_that_fits_its_calibration_data_is_named(budget: dict[str, float]) -> None:
    model = classifier(300)
    before = loss(model)
    assert before < 1e-2
    with pytest.warns(
        CalibrationWarning, match=r"raised the loss by .*probably trained on these data"
    ) as seen:
        report = tn.compress(model, tn.CompressionConfig(**budget), calibration=loader(), progress=False)  # type: ignore[arg-type]
    assert ("loss_increase=0.02 allowed" in str(seen[0].message)) == ("loss_increase" in budget)
    assert report.measured is not None
    assert report.measured.value == pytest.approx(loss(model) - before, rel=1e-3)
    assert report.measured.value > 10 * report.plan.predicted_loss_increase  # type: ignore[operator]


def test_the_measured_rise_stands_beside_the_prediction() -> None:
    model = classifier(20)
    before = loss(model)
    report = tn.compress(
        model, tn.CompressionConfig(param_ratio=0.7), calibration=iter([*loader()]), progress=False
    )
    found = report.measured
    assert found is not None
    assert (found.losses, found.source) == (256, "calibration data")
    assert found.dense_loss == pytest.approx(before, rel=1e-4)
    assert found.value == pytest.approx(loss(model) - before, abs=1e-5)
    assert f"measured rise of the loss: {found.value:.4f} (standard error" in str(report)
    assert f"measured {found.value:.4f}" in report._repr_html_()
    assert json.loads(report.to_json())["measured"]["value"] == found.value


def test_a_loss_of_tokens_is_shown_as_perplexity() -> None:
    class Letters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(torch.tanh(self.layer(self.table(input_ids))))}

    ids = torch.randint(20, (8, 12), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # the model has no loss of its own
        report = tn.compress(
            Letters(), tn.CompressionConfig(param_ratio=0.8), calibration=[ids], progress=False
        )
    assert report.measured is not None
    before, after = (math.exp(report.measured.dense_loss + x) for x in (0, report.measured.value))
    assert f", perplexity {before:.4g} -> {after:.4g}\nwhole model: " in str(report)
    unknown = dataclasses.replace(report.measured, value=math.inf)
    assert "calibration data)\nwhole model: " in str(dataclasses.replace(report, measured=unknown))


def test_statistics_leave_nothing_to_measure_on() -> None:
    model = classifier(20)
    stats = tn.calibrate(model, loader())
    report = tn.compress(model, tn.CompressionConfig(param_ratio=0.7), calibration=stats, progress=False)
    assert report.measured is None
    assert json.loads(report.to_json())["measured"] is None
    assert "measured rise of the loss: none, without batches" in str(report)


def test_validation_data_are_what_its_forecast_is_compared_on() -> None:
    model = classifier(20)
    half = [(X[:128], Y[:128])]
    config = tn.CompressionConfig(param_ratio=0.5)
    report = tn.compress(model, config, calibration=loader(), validation=half, progress=False)
    assert report.measured is not None
    assert (report.measured.losses, report.measured.source) == (128, "validation data")


def test_outputs_without_labels_are_compared_with_the_dense_ones() -> None:
    model = classifier(20)
    dense = copy.deepcopy(model)
    config = tn.CompressionConfig(param_ratio=0.7)
    report = tn.compress(model, config, calibration=[X[:64], X[64:]], progress=False)
    with torch.no_grad():
        gap = (model(X) - dense(X)).square().sum(1) / dense(X).square().sum(1)
    assert report.measured is not None
    assert report.measured.value == pytest.approx(float(gap.mean()) / 2, rel=1e-3)


def test_the_work_is_bounded() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    seen = 0

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal seen
        seen += args[0].numel()

    model[0].register_forward_hook(count)
    ids = torch.randint(50, (64, 100))
    before = DenseLosses.measure(model, [(ids, ids)] * 100)
    assert before is not None
    assert TOKENS / 2 < before.rise(model).losses <= 1.1 * TOKENS
    assert seen < 4 * TOKENS  # dense, compressed, and a look at the first batch


def test_models_without_a_loss_are_not_measured() -> None:
    class Whole(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if len(input) != 4096:
                raise ValueError("takes batches of 4,096 rows")
            return super().forward(input)

    assert DenseLosses.measure(Whole(2, 2), [torch.randn(4096, 2)]) is None
    assert DenseLosses.measure(nn.Linear(2, 2), [(torch.randn(8, 2), torch.arange(5))]) is None
    assert DenseLosses.measure(nn.Linear(2, 2), []) is None


def test_when_a_warning_is_given() -> None:
    def said(rise: MeasuredRise, predicted: float | None, allowed: float | None = None) -> str:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_of_loss(rise, predicted, allowed)
        return str(seen[0].message) if seen else ""

    def rise(value: float, error: float = 0.001, losses: int = 100) -> MeasuredRise:
        return MeasuredRise(value, error, 1.5, losses, "calibration data")

    assert not said(rise(0.05), 0.04)
    assert not said(rise(0.01), 1e-9)  # far above, but next to nothing
    assert not said(rise(0.5, error=0.2), 1e-3)  # noise
    assert not said(rise(0.5, losses=4), 1e-3)
    assert not said(rise(0.5), None)
    assert re.search("fits them.*or allow more bytes", said(rise(0.05), 0.01))
    assert re.search("loss_increase=0.04.*or set a budget of bytes", said(rise(0.05), 0.01, allowed=0.04))
    assert "fits them" in said(rise(math.nan, losses=4), 0.01)
    assert "predictions are too low" in said(rise(0.05), 0.03, allowed=0.04)
    assert not said(rise(0.05, error=0.01), 0.03, allowed=0.04)
