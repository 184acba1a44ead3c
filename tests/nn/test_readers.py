"""Layers whose weight the code of a model reads: known ones stay dense, others are named by an error."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from reader_models import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.nn.extension import ProvidedData
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import unfused
from tensornet_hf.checkpoint import read_checkpoint
from tensornet_hf.extension import READ_REASON


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
        target_modules=targets, param_ratio=0.5, topology="low_rank", **{"method": "svd", **options}
    )


X = torch.randn(3, 24)


@pytest.mark.parametrize("given", ["config", "plan"])
def test_a_run_finds_all_layers_whose_weight_is_read(given: str) -> None:
    """The error restores the model, and names the layers of all blocks by patterns that exclude them."""
    model = nn.Sequential(Reader(), nn.Linear(24, 24), Reader()).eval()
    stock, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    options = config("all") if given == "config" else tn.plan(model, config("all"))
    with pytest.raises(tn.errors.TargetError) as caught:
        tn.compress(model, options, calibration=[X], progress=False)
    patterns = ["*.multiplied", "*.passed"]
    assert f"exclude_modules={patterns}" in str(caught.value)
    assert all(module is stock[name] for name, module in model.named_modules())
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    tn.compress(model, config("all", exclude_modules=patterns), calibration=[X], progress=False)
    assert {name for name, x in model.named_modules() if isinstance(x, tn.nn.module.NetworkModule)} == {
        *(f"{k}.{name}" for k in (0, 2) for name in ("measured", "asked", "called")),
        "1",
    }
    assert model(X).shape == (3, 24)


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["first"] + batch["second"]).square().sum(-1)


def pairs(model: nn.Module, batch: Any) -> Tensor:
    if len(batch["input"]) < 2:
        raise ValueError("a contrastive loss needs several rows")
    return model(batch["input"]).square().sum(-1)


@pytest.mark.parametrize(
    ("losses", "batch"),
    [(squares, {"first": X, "second": X}), (pairs, {"input": X})],
    ids=["batches for the loss alone", "several rows"],
)
def test_a_run_by_the_loss_function_finds_read_weights(losses: Any, batch: dict[str, Tensor]) -> None:
    model = nn.Sequential(Reader(), nn.Linear(24, 24)).eval()
    data = ProvidedData([batch], "vectors", loss_fn=losses)
    with pytest.raises(tn.errors.TargetError, match=r"multiplied.*passed"):
        tn.compress(model, config("all"), calibration=data, progress=False)


def test_a_model_that_fails_on_its_batches_is_not_compressed_unchecked() -> None:
    model = nn.Sequential(nn.Linear(24, 24))
    with pytest.raises(RuntimeError, match="shapes"):
        tn.compress(model, config("all"), calibration=[torch.randn(3, 25)], progress=False)
    assert type(model[0]) is nn.Linear


class Broken(nn.Module):
    """Fails once its layer was replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.layer, nn.Linear):
            raise RuntimeError("broken")
        return self.layer(x)


def test_another_error_of_the_compressed_model_restores_the_model() -> None:
    model = Broken()
    stock = model.layer
    with pytest.raises(RuntimeError, match="broken"):
        tn.compress(model, config("all"), calibration=[X], progress=False)
    assert model.layer is stock


def test_a_plan_cannot_replace_a_layer_that_an_extension_keeps_dense() -> None:
    model = MODELS["mamba"][0]()
    reads = "backbone.layers.0.mixer.dt_proj"
    with pytest.warns(UserWarning, match="Left dense"):
        plan = tn.plan(model, config("*.mixer.*"))
    assert reads not in [layer.name for layer in plan]
    layer = dataclasses.replace(plan.layers[0], name=reads, shape=(64, 2))
    with pytest.raises(tn.errors.TargetError, match="outside"):
        tn.apply_plan(model, dataclasses.replace(plan, layers=(layer,)))


#: Layers that stay dense in each model, since transformers reads their weights; blocks have no numbers.
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


@pytest.mark.filterwarnings("ignore:Left dense")
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights(name: str, tmp_path: Path) -> None:
    """All layers at full rank: equal outputs, saved, loaded, trained for a step, and dense again."""
    make, inputs = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        dense = first_floats(model, inputs)
    full = tn.CompressionConfig(target_modules="all", topology="mpo", method="svd")
    tn.compress(model, full, progress=False)
    with unfused(model):
        read = [x.name for x in list_weights(model) if x.skip == READ_REASON]
    assert {numbers_left_out(x) for x in read} == DENSE[name]
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(first_floats(model, inputs), dense, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            first_floats(loaded, inputs), first_floats(model, inputs), rtol=1e-4, atol=1e-4
        )
    loaded.train()
    first_floats(loaded, inputs).square().mean().backward()
    torch.optim.SGD([p for p in loaded.parameters() if p.grad is not None], lr=1e-3).step()
    with torch.no_grad():
        assert first_floats(loaded.eval(), inputs).isfinite().all()
        torch.testing.assert_close(first_floats(th.decompress(model), inputs), dense, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Left dense")
def test_files_without_the_model_show_the_same(tmp_path: Path) -> None:
    """A model that is compressed from its files is never loaded; its readers stay dense all the same."""
    model = MODELS["gemma3n"][0]()
    model.save_pretrained(tmp_path / "dense")
    options = tn.CompressionConfig(topology_options={"max_bond": 4}, method="svd")
    compress_files(tmp_path / "dense", tmp_path / "files", options)
    tn.compress(model, options, progress=False)
    names = set(read_checkpoint(tmp_path / "files").compression.layers)
    assert names == set(model.config.quantization_config.layers)
    assert not any("altup.prediction" in name or "altup.correction" in name for name in names)
