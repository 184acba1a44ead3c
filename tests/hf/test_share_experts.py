"""Mixtures of transformers share cores where that pays, on the disk once, and tied when loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from folder_runs import compress_files, interrupted_in
from mixture_models import EXPERTS, FAMILIES, logits, mixture, planted, tokens
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.report import model_size
from tensornet.errors import TopologyError
from tensornet.nn.extension import ProvidedData
from tensornet.nn.targets import LayerSelection
from tensornet_hf.cli.main import run
from tensornet_moe.expert_sharing import experts_per_token
from tensornet_moe.shared_low_rank import PATTERNS

CONFIG = tn.CompressionConfig(target_modules="*experts*", param_ratio=0.6, share_experts=True)
BATCHES = [{"input_ids": tokens(8), "labels": tokens(8)}]


def compressed(family: str, **budget: object) -> tuple[PreTrainedModel, tn.CompressionReport]:
    model = planted(family)
    config = CONFIG
    if budget:
        config = tn.CompressionConfig("*experts*", share_experts=True, **budget)  # type: ignore[arg-type]
    return model, tn.compress(model, config, calibration=BATCHES, progress=False)


def shared_part(report: tn.CompressionReport, stack: tuple[str, ...]) -> str:
    shared = report.plan[stack[0]].shared_core
    assert shared is not None
    return f"core_{shared[0]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stack_chooses_and_never_grows(family: str) -> None:
    model, report = compressed(family)
    names = [name for stack in report.plan.stacks for name in stack]
    assert not any(".shared_expert." in name for name in names)  # nor the expert for every token
    shared = {stack[0]: report.plan[stack[0]].shared_core for stack in report.plan.stacks}
    assert (PATTERNS["in"],) in {core[:1] for x, core in shared.items() if "gate_up_proj" in x and core}
    assert all(len(stack) == EXPERTS for stack in report.plan.stacks)
    assert report.param_ratio <= 0.6
    saved = model_size(planted(family))[0] - model_size(model)[0]
    assert saved == sum(x.params_before - x.params_after for x in report.layers)
    alone = tn.compress(
        planted(family), replace(CONFIG, share_experts=False), calibration=BATCHES, progress=False
    )
    assert (report.plan.predicted_loss_increase or 1.0) < (alone.plan.predicted_loss_increase or 0.0)


def test_a_mixture_may_share_everything_and_another_nothing() -> None:
    model = planted("mixtral")
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    patterns = ["*layers.0*experts*", "*layers.1*experts.0.*"]
    config = tn.CompressionConfig(patterns, param_ratio=0.3, share_experts=True)
    report = tn.compress(model, config, calibration=BATCHES, progress=False)
    sharing = {name.split(".")[2] for stack in report.plan.stacks for name in stack}
    assert sharing == {"0"}
    assert {x.name.split(".")[2] for x in report.layers if x.shared_core is None} == {"1"}
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
    assert report.plan.stacks
    if family == "olmoe":
        assert any(x.storage.quantized for x in report.layers if x.shared_core)
    want = logits(model)
    th.save(model, tmp_path / "small")
    (file,) = (tmp_path / "small").glob("*.safetensors")
    assert sum(x.nbytes for x in load_file(file).values()) == model_size(model)[1]
    for again in (th.load(tmp_path / "small").eval(), type(model).from_pretrained(tmp_path / "small").eval()):
        torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)
        for stack in report.plan.stacks:
            first, *others = (again.get_submodule(name) for name in stack)
            part = shared_part(report, stack)
            assert all(getattr(x, part) is getattr(first, part) for x in others)
    assert run(["inspect", str(tmp_path / "small")]) == 0
    assert run(["decompress", str(tmp_path / "small"), str(tmp_path / "dense")]) == 0
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path / "dense").eval()), want, atol=1e-4)


def test_a_folder_with_shared_cores_has_the_sizes_of_its_report_and_its_plan_can_be_applied(
    tmp_path: Path,
) -> None:
    dense, small = planted("mixtral"), tmp_path / "small"
    dense.save_pretrained(tmp_path / "dense")
    options = th.CompressOptions(calibration=ProvidedData(BATCHES, "planted"))
    report = th.compress_folder(tmp_path / "dense", small, CONFIG, options)
    assert report.plan.stacks
    cut = sum(x.bytes_before - x.bytes_after for x in report.layers)
    assert report.model_bytes_before - report.model_bytes_after == cut
    loaded = th.load(small)
    assert report.model_bytes_after == model_size(loaded)[1]
    for stack in report.plan.stacks:
        first, *others = (loaded.get_submodule(name) for name in stack)
        part = shared_part(report, stack)
        assert all(getattr(x, part) is getattr(first, part) for x in others)
    again = tn.CompressionPlan.from_dict(report.plan.to_dict())
    assert again == report.plan
    applied = tn.compress(dense, again, calibration=BATCHES, progress=False)
    assert applied.plan.stacks == report.plan.stacks
    for name in (name for stack in again.stacks for name in stack):
        # In memory, calibration may multiply in another precision than from files.
        assert applied.plan[name].error == pytest.approx(report.plan[name].error, rel=0.02)
    with pytest.raises(TopologyError, match="shares core"):
        again.replace_layer(again.stacks[0][1], None)


@pytest.mark.slow
def test_an_interrupted_run_with_shared_cores_goes_on(tmp_path: Path) -> None:
    planted("mixtral").save_pretrained(tmp_path / "dense")
    run_it = partial(compress_files, tmp_path / "dense", config=CONFIG)
    given = ProvidedData(BATCHES, "planted")
    interrupted_in("model.layers.1", lambda: run_it(tmp_path / "out", calibration=given))
    run_it(tmp_path / "out", calibration=given)
    run_it(tmp_path / "fresh", calibration=given)
    (one,), (other,) = ((tmp_path / x).glob("*.safetensors") for x in ("out", "fresh"))
    assert one.read_bytes() == other.read_bytes()


def test_dense_files_are_made_of_shared_cores_too(tmp_path: Path) -> None:
    planted("mixtral").save_pretrained(tmp_path / "dense")
    options = th.CompressOptions(calibration=ProvidedData(BATCHES, "planted"), dtype="bfloat16")
    report = th.compress_folder(tmp_path / "dense", tmp_path / "small", CONFIG, options)
    model = tn.decompress(th.load(tmp_path / "small"))
    name = report.plan.stacks[0][0].rpartition(".experts.")[0]
    assert model.get_submodule(f"{name}.experts").gate_up_proj.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_shared_cores_train_as_one() -> None:
    model, report = compressed("mixtral")
    stack = report.plan.stacks[0]
    part = shared_part(report, stack)
    layers = [model.get_submodule(name) for name in stack]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=tokens(4), labels=tokens(4)).loss.backward()
    before = getattr(layers[0], part).detach().clone()
    optimizer.step()
    assert not torch.equal(getattr(layers[0], part), before)
    assert all(getattr(layer, part) is getattr(layers[0], part) for layer in layers)
