"""Layers whose weight the code of a model reads: put back dense, and said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from reader_models import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.checkpoint import read_checkpoint


class Reader(nn.Module):
    """Multiplies by one weight, passes one on, asks one for its shape, one for its dtype, and calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied, self.passed, self.measured, self.asked, self.called = (
            nn.Linear(24, 24) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = (self.multiplied.weight @ x.unsqueeze(-1)).squeeze(-1)
        y = F.linear(y, self.passed.weight.t())
        y = self.measured(y) / self.measured.weight.shape[0]
        if isinstance(self.asked.weight, Tensor):
            y = self.asked(y.to(self.asked.weight.dtype).to(self.asked.weight))
        return self.called(y)


def config(targets: str | list[str] | None, **options: Any) -> tn.CompressionConfig:
    return tn.CompressionConfig(
        target_modules=targets, param_ratio=0.5, topology="low_rank", **{"objective": "weight", **options}
    )


X = torch.randn(3, 24)
READ = r"0\.multiplied, 0\.passed"


@pytest.mark.parametrize("targets", ["all", None])
def test_layers_whose_weight_is_read_are_put_back_dense(targets: str | None) -> None:
    model = nn.Sequential(Reader(), nn.Linear(24, 24)).eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=READ):
        report = tn.compress(model, config(targets), calibration=[X], progress=False)
    assert list(report.put_back) == ["0.multiplied", "0.passed"]
    assert report.coverage.unknown["Linear (weight read past the layer)"] == 2 * 24 * 24
    assert {name for name, x in model.named_modules() if isinstance(x, tn.nn.module.NetworkModule)} == {
        *("0.measured", "0.asked", "0.called", "1")
    }
    assert torch.equal(model[0].multiplied.weight, state["0.multiplied.weight"])
    assert model(X).shape == (3, 24)


class InTraining(nn.Module):
    """Writes into a weight in training mode alone, and counts its runs in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(24, 24), nn.Linear(24, 24), nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.first.weight.data.clamp_(-1.0, 1.0)
        return self.norm(self.second(self.first(x)))


def test_code_of_training_is_run_too_and_changes_nothing() -> None:
    model = InTraining().eval()
    before, state = copy.deepcopy(dict(model.named_buffers())), torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="first"):
        report = tn.compress(model, config(None), calibration=[X], progress=False)
    assert list(report.put_back) == ["first"]
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training


#: Layers that are put back dense in each model; the numbers of the blocks are left out.
DENSE = {
    "modernbert": set(),
    "modernbert_decoder": set(),
    "whisper": set(),
    "deberta_v2": {"deberta.encoder.rel_embeddings"},
    "clip": set(),
    "siglip": set(),
    "siglip2": {"vision_model.embeddings.position_embedding"},
    "gemma3n": {"model.layers.*.altup.prediction_coefs", "model.layers.*.altup.correction_coefs"},
    "wavlm": {f"encoder.layers.*.attention.{name}_proj" for name in ("q", "k", "v", "out")},
    "mamba": {"backbone.layers.*.mixer.dt_proj"},
}


def first_floats(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    values = model(**inputs).to_tuple()
    return next(x for x in values if isinstance(x, Tensor) and x.is_floating_point())


def numbers_left_out(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@pytest.mark.filterwarnings("ignore:Put back dense")
@pytest.mark.filterwarnings("ignore:Left dense")
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights(name: str, tmp_path: Path) -> None:
    """All layers at full rank: equal outputs, saved, loaded, trained for a step, and dense again."""
    make, inputs = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        dense = first_floats(model, inputs)
    full = tn.CompressionConfig(target_modules="all", topology="mpo", objective="weight")
    report = tn.compress(model, full, progress=False)
    assert {numbers_left_out(x) for x in report.put_back} == DENSE[name]
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(first_floats(model, inputs), dense, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(first_floats(loaded, inputs), first_floats(model, inputs), rtol=0, atol=0)
    loaded.train()
    first_floats(loaded, inputs).square().mean().backward()
    torch.optim.SGD([p for p in loaded.parameters() if p.grad is not None], lr=1e-3).step()
    with torch.no_grad():
        assert first_floats(loaded.eval(), inputs).isfinite().all()
        torch.testing.assert_close(first_floats(th.decompress(model), inputs), dense, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Put back dense")
def test_files_without_the_model_show_the_same(tmp_path: Path) -> None:
    """A model that is compressed from its files is never loaded; its readers are found all the same."""
    model = MODELS["gemma3n"][0]()
    model.save_pretrained(tmp_path / "dense")
    options = tn.CompressionConfig(max_bond=4, objective="weight")
    with pytest.warns(UserWarning, match="altup"):
        th.compress_checkpoint(tmp_path / "dense", tmp_path / "files", options)
    tn.compress(model, options, progress=False)
    names = set(read_checkpoint(tmp_path / "files").compression.layers)
    assert names == set(model.config.quantization_config.layers)
