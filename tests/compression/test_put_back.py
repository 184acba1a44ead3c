"""Layers whose weight the code of a model reads are found by one run, and put back dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.nn.extension import ProvidedData

CONFIG = tn.CompressionConfig(max_bond=2, topology="low_rank", target_modules=["first", "read", "last"])


class WeightRead(tn.errors.TargetError):
    """As the placeholder of a weight raises it."""

    layer: nn.Module | None = None


class Reader(nn.Module):
    """Computes with the weight of one of its layers, in a way that no look at the dense model shows."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.first, self.read, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.error = error

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.read(self.first(input))
        if not isinstance(self.read, nn.Linear):
            error = self.error or WeightRead("norm was called on the weight of a compressed layer")
            if isinstance(error, WeightRead):
                error.layer = self.read
            raise error
        return self.last(x)


BATCHES = [(torch.randn(8, 16), torch.arange(8) % 4)]


@pytest.mark.parametrize("given", ["config", "plan"])
def test_a_layer_that_is_read_is_put_back_and_named(given: str) -> None:
    """A configuration spends its budget on the other layers; a plan keeps the layer, dense."""
    model = Reader()
    dense = model.read
    stats = tn.calibrate(model, BATCHES, config=CONFIG)
    data = ProvidedData(BATCHES, stats.source, statistics=stats)
    config = CONFIG if given == "config" else tn.plan(model, CONFIG, stats)
    with pytest.warns(UserWarning, match="Put back dense.*read"):
        report = tn.compress(model, config, calibration=data, progress=False)
    assert model.read is dense
    assert isinstance(model.first, tn.nn.TensorNetworkLinear)
    assert isinstance(model.last, tn.nn.TensorNetworkLinear)
    assert list(report.put_back) == ["read"]
    assert ("read" in str(report.plan)) == (given == "plan")
    if given == "plan":
        assert report.plan["read"].topology is None
    assert report.coverage.covered == 16 * 16 + 4 * 16
    assert "put back dense: read" in str(report)
    assert model(BATCHES[0][0]).shape == (8, 4)


def test_with_another_error_the_model_is_restored() -> None:
    model = Reader(RuntimeError("broken"))
    stock = [model.first, model.read, model.last]
    with pytest.raises(RuntimeError, match="broken"):
        tn.compress(model, CONFIG, calibration=BATCHES, progress=False)
    assert [model.first, model.read, model.last] == stock


def test_without_a_batch_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    report = tn.compress(model, tn.CompressionConfig(max_bond=2, objective="weight"), progress=False)
    assert not report.was_run
    assert "not run" in str(report)
