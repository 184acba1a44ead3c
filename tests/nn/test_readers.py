"""Layers whose weight somebody reads past them: left dense, and said; found by running the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_architectures import PAGE_ARCHITECTURES
from reader_models import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.nn.unfuse import unfused
from tensornet.nn.weight_readers import weight_readers
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
        target_modules=targets, param_ratio=0.5, topology="low_rank", **{"objective": "activation", **options}
    )


X = torch.randn(3, 24)
READ = r"0\.multiplied, 0\.passed"


@pytest.mark.parametrize("targets", ["all", None])
def test_a_weight_that_is_read_stays_dense_and_that_is_said(targets: str | None) -> None:
    model = nn.Sequential(Reader(), nn.Linear(24, 24))
    with pytest.warns(UserWarning, match=rf"Left dense.* {READ} \(weight read past"):
        report = tn.compress(model, config(targets), calibration=[X], progress=False)
    assert [layer.name for layer in report.layers] == ["0.measured", "0.asked", "0.called", "1"]
    assert model(X).shape == (3, 24)


def test_statistics_remember_what_running_has_shown(tmp_path: Path) -> None:
    model = nn.Sequential(Reader(), nn.Linear(24, 24))
    stats = tn.calibrate(model, [X], gradient_batches=0)
    stats.save(tmp_path / "stats")
    again = tn.CalibrationStats.load(tmp_path / "stats")
    assert again.readers == stats.readers == ("0.multiplied", "0.passed")
    with pytest.warns(UserWarning, match=READ):
        plan = tn.plan(model, config(None), again)
    assert [layer.name for layer in plan] == ["0.measured", "0.asked", "0.called", "1"]


def test_a_pattern_that_names_such_layers_alone_is_refused() -> None:
    model = nn.Sequential(Reader())
    with pytest.raises(
        tn.TargetError, match=r"'re:.*' names layers .*: 0\.multiplied, 0\.passed\..*Remove the"
    ):
        tn.compress(model, config(r"re:0\.(multiplied|passed)"), calibration=[X], progress=False)
    with pytest.raises(tn.TargetError, match=r"Pattern '0\.passed' names layers .*: 0\.passed\. "):
        tn.compress(model, config(["0.called", "0.passed"]), calibration=[X], progress=False)
    with pytest.warns(UserWarning, match=rf"Left dense.* {READ} "):  # the pattern names others too
        report = tn.compress(model, config("0.*"), calibration=[X], progress=False)
    assert [layer.name for layer in report.layers] == ["0.measured", "0.asked", "0.called"]


def test_a_layer_whose_shape_is_read_may_be_named() -> None:
    model = nn.Sequential(Reader())
    tn.compress(model, config(["0.measured", "0.asked"]), calibration=[X], progress=False)
    assert isinstance(model[0].measured, tn.nn.NetworkModule)
    assert model(X).shape == (3, 24)


@pytest.mark.parametrize("pattern", ["*.dt_proj", "dt_proj", "backbone.layers.0.mixer.dt_proj"])
def test_a_known_reader_is_refused_without_data(pattern: str) -> None:
    model = MODELS["mamba"][0]()
    with pytest.raises(
        tn.TargetError, match=r"names layers .* read past them: backbone\.layers\.0\.mixer\.dt"
    ):
        tn.compress(model, config(pattern, objective="weight"), progress=False)


class Indirect(nn.Module):
    """Reads weights in ways that no source of the owner shows, and writes into one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"first": nn.Linear(24, 24), "second": nn.Linear(24, 24)})
        self.plain, self.norm = nn.Linear(24, 24), nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        layers = dict(self.inner.items())
        if self.training:
            layers["first"].weight.data.clamp_(-0.01, 0.01)
        penalty = sum(getattr(layer, "weight").square().sum() for layer in [layers["second"]])  # noqa: B009
        return self.plain(self.norm(layers["first"](layers["second"](x)))) + penalty


def both_modes(run: Callable[[nn.Module], Any]) -> list[Callable[[nn.Module], Any]]:
    return [lambda twin: run(twin.train()), lambda twin: run(twin.eval())]


def test_a_run_shows_every_form_and_changes_nothing() -> None:
    model = Indirect().eval()
    calls: list[str] = []
    model.plain.register_forward_hook(lambda *_: calls.append("hook"))
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert weight_readers(model, both_modes(lambda twin: twin(X).sum().backward())) == {
        "inner.first",
        "inner.second",
    }
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not calls
    assert not model.training
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())


def test_a_run_that_fails_tells_what_it_saw() -> None:
    def run(twin: nn.Module) -> None:
        twin(X)
        raise ValueError("later")

    assert weight_readers(nn.Sequential(Reader()), [run]) == {"0.multiplied", "0.passed"}
    assert weight_readers(nn.Sequential(Reader()), [lambda twin: twin("nonsense")]) == frozenset()


class ReadsKernels(nn.Module):
    """Hands matrices of modules that own several to functions of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.conv1d(self.called(x), self.read.weight)
        return torch.nn.functional.linear(x.transpose(1, 2), self.attention.in_proj_weight)


def test_matrices_of_other_modules_are_read_as_well() -> None:
    model = nn.Sequential(ReadsKernels())
    with pytest.warns(UserWarning, match=r"Left dense.*0\.read\.matrix, 0\.attention\.q_proj"):
        report = tn.compress(model, config(None), calibration=[torch.randn(2, 8, 9)], progress=False)
    assert [layer.name for layer in report.layers] == ["0.called.matrix"]
    assert model(torch.randn(2, 8, 9)).shape == (2, 5, 24)


@pytest.mark.parametrize(
    ("name", "read"), [("DETR", "query_position_embeddings"), ("SAM", r"point_embed\.3")]
)
def test_models_of_images_of_any_size_and_of_places(name: str, read: str) -> None:
    """DETR reads its queries and names no size of images; SAM reads what stands for points and boxes."""
    architecture = PAGE_ARCHITECTURES[name]
    model = architecture.dense
    with pytest.warns(UserWarning, match=read):
        tn.compress(model, config("all", objective="weight"), progress=False)
    with torch.no_grad():
        model(**architecture.batch())


def test_an_unknown_subclass_of_a_stock_layer_is_named() -> None:
    class MyLinear(nn.Linear):
        pass

    with pytest.raises(tn.TargetError, match=r"types MyLinear here.*subclasses.*register_layer_kind"):
        tn.compress(nn.Sequential(MyLinear(24, 24)), config(None, objective="weight"), progress=False)


#: Layers that stay dense in each model; the numbers of the blocks are left out.
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


@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights(name: str, tmp_path: Path) -> None:
    """All layers at full rank: equal outputs, saved, loaded, trained for a step, and dense again."""
    make, inputs = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        dense = first_floats(model, inputs)
    assert {re_number(x) for x in weight_readers(model)} == DENSE[name]
    with unfused(model):
        read = weight_readers(model)  # of modules that own several matrices too
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tn.compress(
            model,
            tn.CompressionConfig(target_modules="all", topology="mpo", objective="weight"),
            progress=False,
        )
    assert any("read past the layer" in str(x.message) for x in caught) == bool(read)
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


def re_number(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def test_files_without_the_model_show_the_same(tmp_path: Path) -> None:
    """A model that is compressed from its files is never loaded; its readers are found all the same."""
    model = MODELS["gemma3n"][0]()
    model.save_pretrained(tmp_path / "dense")
    options = tn.CompressionConfig(max_bond=4, objective="weight")
    with pytest.warns(UserWarning, match=r"model.layers.0.altup.*read past"):
        th.compress_checkpoint(tmp_path / "dense", tmp_path / "files", options)
    with pytest.warns(UserWarning, match=r"model.layers.0.altup.*read past"):
        tn.compress(model, options, progress=False)
    names = set(read_checkpoint(tmp_path / "files").compression.layers)
    assert names == set(model.config.quantization_config.layers)
