"""Compressing whole models: which layers, how far, tied weights, calibration data, bad input, and back."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hf_models import gpt2, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tensornet as tn
from tensornet.nn.targets import find_targets
from tensornet_hf.embedded import gpt2_path, heldout_text
from tensornet_hf.text import default_batches, load_tokenizer, token_ids

HALF = tn.CompressionConfig(param_ratio=0.5, method="svd")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Embedding, two blocks, a tied head, and things that must be left alone."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8, padding_idx=3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 30, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.arange(12).reshape(3, 4)


def names(model: nn.Module, **options: object) -> list[str]:
    config = tn.CompressionConfig(**options)  # type: ignore[arg-type]
    return [target.name for target in find_targets(model, config) if not target.skip]


# --- which layers --------------------------------------------------------------------------------


UPS, DOWNS = ["blocks.0.up", "blocks.1.up"], ["blocks.0.down", "blocks.1.down"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, UPS + DOWNS),  # linear layers but no head
        ({"target_modules": "up"}, UPS),
        ({"target_modules": "blocks.0.up"}, ["blocks.0.up"]),
        ({"target_modules": "blocks.0.*"}, ["blocks.0.up", "blocks.0.down"]),
        ({"target_modules": r"re:blocks\.\d\.down"}, DOWNS),
        ({"target_modules": ["head"]}, ["embed"]),  # a tied weight is found under any of its names
        ({"target_modules": ["up", "embed"]}, ["embed", *UPS]),
        ({"exclude_modules": "down"}, UPS),
        ({"target_modules": "blocks.0.*", "exclude_modules": ["up"]}, ["blocks.0.down"]),
    ],
)
def test_patterns(options: dict[str, object], expected: list[str]) -> None:
    assert sorted(names(Model(), **options)) == sorted(expected)


def test_heads_are_targets_on_request() -> None:
    assert sorted(names(Model(tied=False))) == sorted(UPS + DOWNS)
    assert "head" not in names(Model(), target_modules="all")  # it is the embedding's weight
    assert {"embed", "head"} <= set(names(Model(tied=False), target_modules="all"))


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_pattern_without_a_layer_is_an_error(option: str) -> None:
    with pytest.raises(tn.errors.TargetError, match=r"'c_fc' matches.*blocks\.0\.up"):
        names(Model(), **{option: "c_fc"})


def test_nothing_left() -> None:
    with pytest.raises(tn.errors.TargetError, match="Nothing to compress"):
        names(Model(), exclude_modules="blocks.*")
    with pytest.raises(tn.errors.TargetError, match=r"supported: nn\.Linear"):
        names(nn.Sequential(nn.ReLU()))


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["mpo", "low_rank"])
def test_without_a_budget_nothing_is_lost(topology: str) -> None:
    model = Model()
    expected = model(IDS)
    report = tn.compress(model, tn.CompressionConfig(target_modules="all", topology=topology), progress=False)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    assert max(layer.error for layer in report.layers) < 1e-5
    assert isinstance(model.embed, tn.nn.MPOEmbedding)
    assert isinstance(model.blocks[0].up, tn.nn.TensorNetworkLinear)


def test_the_share_is_kept_and_reported() -> None:
    model = Model()
    total = sum(p.numel() for p in model.parameters())
    report = tn.compress(model, HALF, progress=False)
    assert report.param_ratio <= 0.5
    assert all(layer.error <= layer.baseline_error + 1e-6 for layer in report.layers)
    assert report.model_params_before == total
    assert report.model_params_after == sum(p.numel() for p in model.parameters())
    saved = sum(layer.params_before - layer.params_after for layer in report.layers)
    assert report.model_params_before - report.model_params_after == saved
    data = json.loads(report.to_json())
    assert len(data["layers"]) == 8  # four of them projections of the attention
    assert "blocks.1.down" in str(report)


def test_an_error_cap_is_kept_or_the_layer_stays_dense() -> None:
    model = Model()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = tn.CompressionConfig(
        topology_options={"rel_error": 0.3}, method="svd", exclude_modules="attention"
    )
    report = tn.compress(model, config, progress=False)
    for layer in report.layers:
        assert layer.error <= 0.3
        module = model.get_submodule(layer.name)
        if layer.scheme == "dense":
            assert type(module) is nn.Linear
            continue
        weight = weights[f"{layer.name}.weight"]
        gap = float((module.to_matrix().detach() - weight).norm() / weight.norm())
        assert gap <= layer.error * (1 + 1e-4) + 1e-6


def test_ties_flags_and_biases_survive() -> None:
    model = Model()
    model.blocks[0].up.weight.requires_grad_(False)
    bias = model.blocks[0].up.bias
    model.eval()
    config = tn.CompressionConfig(target_modules="all", param_ratio=0.7, method="svd")
    tn.compress(model, config, progress=False)
    assert model.embed.core_0 is model.head.core_0
    assert model.blocks[0].up.bias is bias
    assert not model.blocks[0].up.core_0.requires_grad
    assert model.blocks[1].up.core_0.requires_grad
    assert not model.embed.training
    assert model.embed.padding_idx == 3


def test_a_module_used_twice_stays_one_module() -> None:
    shared = nn.Linear(12, 12)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(12, 12)})
    report = tn.compress(model, HALF, progress=False)
    assert model["a"] is model["b"]
    assert len(report.layers) == 2


def test_decompressing_gives_stock_layers_back() -> None:
    model = Model()
    expected = model(IDS)
    tn.compress(model, tn.CompressionConfig(target_modules="all", topology="mpo"), progress=False)
    assert tn.decompress(model) is model
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    assert {type(module) for module in model.modules()} == {type(module) for module in Model().modules()}
    assert model.head.weight is model.embed.weight
    assert model.embed.padding_idx == 3


def test_conv1d_comes_back_as_conv1d() -> None:
    model = gpt2().eval()
    expected = model(IDS).logits
    kind = type(model.transformer.h[0].mlp.c_fc)
    tn.compress(model, tn.CompressionConfig(topology="mpo"), progress=False)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    tn.decompress(model)
    assert type(model.transformer.h[0].mlp.c_fc) is kind
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_is_kept() -> None:
    model = Model().to(torch.bfloat16)
    tn.compress(model, HALF, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# --- calibration ---------------------------------------------------------------------------------


def test_batches_and_statistics_give_the_same_plan() -> None:
    batches = list(torch.randint(1, 100, (8, 10)).split(4))
    config = tn.CompressionConfig(param_ratio=0.6)
    first, second = (llama().eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    stats = tn.calibrate(second, batches)
    a = tn.compress(first, config, calibration=batches, progress=False)
    b = tn.compress(second, config, calibration=stats, progress=False)
    assert [x.scheme for x in a.plan] == [x.scheme for x in b.plan]
    assert a.plan.predicted_loss_increase == pytest.approx(b.plan.predicted_loss_increase, rel=1e-3)


def test_without_data_a_warning_says_what_to_pass() -> None:
    with pytest.warns(tn.errors.CalibrationWarning, match="calibration=batches"):
        report = tn.compress(Model(), tn.CompressionConfig(param_ratio=0.5), progress=False)
    assert report.plan.objective == "weight"


@pytest.mark.parametrize("option", [{"loss_increase": 0.1}, {"method": "gptq", "param_ratio": 0.5}])
def test_data_that_is_needed_is_asked_for(option: dict[str, object]) -> None:
    with pytest.raises(tn.errors.TargetError, match="calibrated"):
        tn.compress(Model(), tn.CompressionConfig(**option), progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "nearest", "formats": ("int4",)},
        {"method": "nearest", "bits_per_weight": 9},
        {"method": "svd"},
    ],
    ids=str,
)
def test_methods_without_data_do_not_read_the_packages_text(options: dict[str, object]) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2_path())
    config = tn.CompressionConfig("*.h.0.mlp.*", topology="low_rank", **options)  # type: ignore[arg-type]
    report = tn.compress(model, config, progress=False)
    assert (report.plan.objective, report.plan.calibration) == ("weight", None)


@pytest.mark.slow
def test_a_language_model_is_calibrated_on_the_packages_text() -> None:
    """And is then far better than by the error of its weights, on text that neither saw."""
    dense = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    ids = token_ids(load_tokenizer(gpt2_path()), heldout_text())[: 24 * 128].reshape(24, 128)
    models = [copy.deepcopy(dense) for _ in range(2)]
    options = {"param_ratio": 0.5}
    with pytest.warns(tn.errors.CalibrationWarning, match="package's text"):
        report = tn.compress(models[0], tn.CompressionConfig(**options), progress=False)  # type: ignore[arg-type]
    assert report.plan.calibration is not None
    assert "package's text" in report.plan.calibration
    tn.compress(models[1], tn.CompressionConfig(**options, method="svd"), progress=False)  # type: ignore[arg-type]
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for model in (dense, *models)]
    rise, plain = losses[1] - losses[0], losses[2] - losses[0]
    assert rise < 0.5 * plain
    assert report.plan.predicted_loss_increase == pytest.approx(rise, rel=1.0)


def test_a_model_of_the_hub_has_its_tokenizer_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2_path())
    model.name_or_path = "owner/tiny"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert default_batches(model) is None
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(gpt2_path(), repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    found = default_batches(model)
    assert found is not None
    assert "package's text" in found.source


@pytest.mark.parametrize("method", ["svd", "gptq", "auto"])
@pytest.mark.parametrize("limits", [{"topology_options": {"max_bond": 4}}, {"param_ratio": 0.2}])
def test_an_error_that_other_limits_do_not_allow(method: str, limits: dict[str, object]) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    options: dict[str, object] = {"topology_options": {}, **limits}
    options["topology_options"] = {"rel_error": 1e-3, **options["topology_options"]}  # type: ignore[dict-item]
    config = tn.CompressionConfig(method=method, **options)  # type: ignore[arg-type]
    with pytest.raises(tn.errors.BudgetError, match=r"rel_error=0\.001"):
        tn.compress(model, config, calibration=[(torch.randn(70, 64), torch.arange(70) % 64)], progress=False)
    assert type(model[0]) is nn.Linear


def test_a_lazy_layer_that_has_not_run() -> None:
    model = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(tn.errors.TargetError, match=r"'0\.weight'"):
        tn.compress(model, HALF, progress=False)
    with pytest.raises(tn.errors.TargetError, match="lazy"):
        tn.plan(model, HALF)
    model(torch.randn(2, 16))
    tn.compress(model, HALF, progress=False)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = Model()
    with torch.no_grad():
        model.blocks[1].up.weight[2, 3] = value
    with pytest.raises(tn.errors.NonFiniteError, match=r"blocks\.1\.up.*NaN"):
        tn.compress(model, HALF, progress=False)
    assert type(model.blocks[0].up) is nn.Linear  # nothing was replaced


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param_ratio": 0}, "param_ratio"),
        ({"topology_options": {"rel_error": 1.5}}, "rel_error"),
        ({"topology_options": {"max_bond": 0}}, "max_bond"),
        ({"topology_options": {"max_bond": (2, 3)}}, "max_bond"),
        ({"topology_options": {"rel_error": "0.1"}}, "rel_error"),
        ({"topology_options": {"sites": 3}}, "max_bond and rel_error"),
        ({"max_bytes": 0}, r"max_bytes.*above"),
        ({"loss_increase": -1.0}, r"loss_increase.*above"),
        ({"topology": "mobius"}, "Unknown topology 'mobius'"),
        ({"method": "luck"}, "Unknown method 'luck'"),
        ({"loss_increase": 0.1, "method": "svd"}, "loss_increase"),
        ({"formats": ("int4",), "method": "svd"}, "nearest"),
        ({"param_ratio": 0.5, "method": "nearest"}, "formats"),
        ({"max_bytes": "9"}, r"max_bytes.*'9'"),
        ({"loss_increase": True}, r"loss_increase.*True"),
        ({"topology": ["mpo"]}, r"topology.*family"),
        ({"target_modules": nn.Linear}, "target_modules"),
        ({"exclude_modules": ["up", 5]}, r"exclude_modules.*\['up', 5\]"),
        ({"bits_per_weight": 0}, "bits_per_weight"),
        ({"param_ratio": 50}, r"param_ratio=0\.5"),
        ({"formats": ("int9",)}, r"'int9'.*int8"),
        ({"formats": "int4"}, r"menu.*'int4'"),
        ({"formats": ()}, r"formats.*got \(\)"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tn.CompressionConfig(**options)  # type: ignore[arg-type]


def test_a_budget_no_network_can_meet_names_the_layer() -> None:
    with pytest.raises(tn.errors.BudgetError, match=r"blocks\.0\.up.*budget"):
        tn.compress(Model(), tn.CompressionConfig(param_ratio=0.001, method="svd"), progress=False)


def test_options_as_a_dictionary() -> None:
    config = tn.CompressionConfig(target_modules=("a", "b"), param_ratio=0.5)
    again = tn.CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="colour"):
        tn.CompressionConfig.from_dict({"colour": "red"})
