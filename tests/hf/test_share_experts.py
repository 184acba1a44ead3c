"""Mixtures of transformers share cores where that pays, on the disk once, and tied when loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixture_models import EXPERTS, FAMILIES, logits, mixture, planted, tokens
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.compression.report import model_size
from tensornet.errors import TargetError
from tensornet.nn.extension import ProvidedData
from tensornet.nn.targets import LayerSelection
from tensornet_hf.cli.main import run
from tensornet_moe.expert_compression import experts_per_token
from tensornet_moe.shared_low_rank import PATTERNS

CONFIG = tn.CompressionConfig(target_modules="*experts*", param_ratio=0.6)
BATCHES = [{"input_ids": tokens(8), "labels": tokens(8)}]


def compressed(family: str, **budget: object) -> tuple[PreTrainedModel, tm.ExpertsReport]:
    model = planted(family)
    config = tn.CompressionConfig("*experts*", **budget) if budget else CONFIG  # type: ignore[arg-type]
    return model, tm.compress_experts(model, config, calibration=BATCHES, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stack_chooses_and_never_grows(family: str) -> None:
    model, report = compressed(family)
    names = [name for stack in report.stacks for name in stack.names]
    assert not any(".shared_expert." in name for name in names)  # nor the expert for every token
    first = [stack for stack in report.stacks if "gate_up_proj" in stack.names[0]]
    assert "in" in {stack.pattern for stack in first}
    assert all(len(stack.names) == EXPERTS for stack in report.stacks)
    assert report.param_ratio <= 0.6
    parts = (*report.stacks, *report.layers)
    saved = model_size(planted(family))[0] - model_size(model)[0]
    assert saved == sum(x.params_before - x.params_after for x in parts)
    alone = tn.compress(planted(family), CONFIG, calibration=BATCHES, progress=False)
    assert report.predicted_loss_increase < (alone.plan.predicted_loss_increase or 0.0)


def test_a_mixture_may_share_everything_and_another_nothing() -> None:
    model = planted("mixtral")
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    config = tn.CompressionConfig(["*layers.0*experts*", "*layers.1*experts.0.*"], param_ratio=0.3)
    report = tm.compress_experts(model, config, calibration=BATCHES, progress=False)
    sharing = {name.split(".")[2] for stack in report.stacks for name in stack.names}
    assert sharing == {"0"}
    assert {layer.name.split(".")[2] for layer in report.layers} == {"1"}
    assert report.model_bytes_after == model_size(model)[1]


@pytest.mark.parametrize("layers", ["all", "*experts*"])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_calibration_counts_the_experts_of_a_token(layers: str, top_k: int, tmp_path: Path) -> None:
    model = mixture("mixtral")
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = top_k
    mask = torch.ones(8, 11, dtype=torch.long)
    mask[3:, 7:] = 0  # padding reaches experts as well, and does not count
    batch = {"input_ids": tokens(8), "labels": tokens(8), "attention_mask": mask}
    stats = tn.calibrate(model, [batch], config=LayerSelection(target_modules=layers))
    stats.save(tmp_path / "stats.safetensors")
    stats = tn.CalibrationStats.load(tmp_path / "stats.safetensors")
    names = [name for name in stats.counts if "layers.1." in name and "gate_up_proj" in name]
    assert 1 <= len(names) <= EXPERTS
    # Where only experts are seen, the tokens that have a loss stand for all: the last ones have none.
    assert experts_per_token(names, stats) == pytest.approx(top_k, rel=0.0 if layers == "all" else 0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "budget"),
    [
        ("mixtral", {"param_ratio": 0.6}),
        ("qwen2_moe", {"bits_per_weight": 18.0, "formats": ("float", "int8")}),
        ("olmoe", {"bits_per_weight": 6.0}),
    ],
    ids=str,
)
def test_a_folder_stores_shared_cores_once(family: str, budget: dict[str, object], tmp_path: Path) -> None:
    model, report = compressed(family, **budget)
    assert report.stacks
    if family == "olmoe":
        assert any(x.storage.quantized for x in report.stacks)
    want = logits(model)
    th.save(model, tmp_path / "small")
    (file,) = (tmp_path / "small").glob("*.safetensors")
    assert sum(x.nbytes for x in load_file(file).values()) == model_size(model)[1]
    for again in (th.load(tmp_path / "small").eval(), type(model).from_pretrained(tmp_path / "small").eval()):
        torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)
        for stack in report.stacks:
            first, *others = (again.get_submodule(name) for name in stack.names)
            part = f"core_{PATTERNS[stack.pattern]}"
            assert all(getattr(x, part) is getattr(first, part) for x in others)
    assert run(["inspect", str(tmp_path / "small")]) == 0
    assert run(["decompress", str(tmp_path / "small"), str(tmp_path / "dense")]) == 0
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path / "dense").eval()), want, atol=1e-4)


def test_the_report_of_a_folder_counts_a_shared_core_once(tmp_path: Path) -> None:
    planted("mixtral").save_pretrained(tmp_path / "dense")
    options = th.CompressOptions(calibration=ProvidedData(BATCHES, "planted"), share_experts=True)
    report = th.compress_folder(tmp_path / "dense", tmp_path / "small", CONFIG, options)
    sharing = [x for x in report.layers if x.shared_cores]
    assert sharing
    cut = sum(x.bytes_before - x.bytes_after for x in report.layers)
    assert report.model_bytes_before - report.model_bytes_after == cut
    assert report.model_bytes_after == model_size(th.load(tmp_path / "small"))[1]
    again = tn.CompressionPlan.from_dict(report.plan.to_dict())
    assert again == report.plan
    with pytest.raises(TargetError, match="share cores"):
        tn.compress(th.load(tmp_path / "dense"), again, calibration=BATCHES, progress=False)


def test_shared_cores_train_as_one() -> None:
    model, report = compressed("mixtral")
    stack = report.stacks[0]
    part = f"core_{PATTERNS[stack.pattern]}"
    layers = [model.get_submodule(name) for name in stack.names]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=tokens(4), labels=tokens(4)).loss.backward()
    before = getattr(layers[0], part).detach().clone()
    optimizer.step()
    assert not torch.equal(getattr(layers[0], part), before)
    assert all(getattr(layer, part) is getattr(layers[0], part) for layer in layers)
