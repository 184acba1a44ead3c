"""Experts that share a core, fitted stack by stack from the files of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_models import EXPERTS, logits, mixture, planted, tokens
from safetensors.torch import load_file
from sharded_folders import contents
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.report import model_size
from tensornet.errors import BudgetError, TargetError, TopologyError
from tensornet_hf.cli.main import run as run_command
from tensornet_hf.streaming.journal import Staging

BY_WEIGHT = tn.CompressionConfig(
    target_modules="*experts*", param_ratio=0.6, objective="weight", topology="low_rank", share_experts=True
)
INTEGERS = tn.CompressionConfig(target_modules="*experts*", bits_per_weight=6, share_experts=True)
SMALL = {"max_shard_bytes": 30_000}
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "gpt_oss")


def with_common_base(family: str) -> PreTrainedModel:
    """A mixture whose second stacks are small changes of one matrix."""
    model = planted(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj"):
                parameter.copy_(parameter[:1] + 0.1 * (parameter - parameter[:1]))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "dense"
    with_common_base(request.param).save_pretrained(folder, max_shard_size="15KB")
    return folder


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@cache
def statistics(source: Path) -> tn.CalibrationStats:
    return tn.calibrate(th.load(source), [{"input_ids": tokens(8), "labels": tokens(8)}])


def shared(report: th.CheckpointReport) -> set[str]:
    return {layer.shared_core for layer in report.compression.plan}


def compare(ours: Path, model: PreTrainedModel, reference: Path) -> None:
    """The folder is the one that the model in memory is saved to."""
    th.save_model(model, reference)
    assert (ours / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    for key in ("layers", "ties", "dtype", "other_dtypes", "format_version"):
        assert described(ours)[key] == described(reference)[key]
    torch.testing.assert_close(logits(th.load(ours).eval()), logits(model))


def test_by_weights_the_folder_is_that_of_the_model(source: Path, tmp_path: Path) -> None:
    report = th.compress_checkpoint(source, tmp_path / "ours", BY_WEIGHT)
    assert {"1", "base"} <= shared(report)
    model = th.load(source).eval()
    expected = tn.compress(model, BY_WEIGHT, progress=False)
    compare(tmp_path / "ours", model, tmp_path / "reference")
    assert [x.name for x in report.compression.layers] == [x.name for x in expected.layers]
    assert report.compression.model_params_after == model_size(model)[0]
    assert report.compression.plan.params_after == expected.plan.params_after
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert sum(x.numel() for x in stored.values()) == model_size(model)[0]


def test_integers_with_statistics_are_those_of_the_model(source: Path, tmp_path: Path) -> None:
    stats = statistics(source)
    report = th.compress_checkpoint(source, tmp_path / "ours", INTEGERS, stats=stats)
    plan = report.compression.plan
    assert any(x.shared_core and x.storage.quantized for x in plan)
    assert plan.bits_per_weight <= 6
    model = th.load(source).eval()
    made = tn.compress(model, INTEGERS, calibration=stats, progress=False)
    assert made.plan.bytes_after == plan.bytes_after
    compare(tmp_path / "ours", model, tmp_path / "reference")
    assert report.compression.model_bytes_after == model_size(model)[1]


def test_a_plan_with_shared_cores_is_carried_out(source: Path, tmp_path: Path) -> None:
    stats = statistics(source)
    plan = tn.plan(th.load(source), INTEGERS, stats)
    th.compress_checkpoint(
        source, tmp_path / "ours", dataclasses.replace(INTEGERS, share_experts=False), plan=plan, stats=stats
    )
    model = th.load(source).eval()
    tn.apply_plan(model, plan, stats)
    compare(tmp_path / "ours", model, tmp_path / "reference")


@pytest.mark.parametrize("lines", [1, 9])
def test_same_bytes_from_workers_and_after_interruptions(
    source: Path, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    th.compress_checkpoint(source, tmp_path / "reference", BY_WEIGHT, **SMALL)
    original, left = Staging.note, iter(range(lines))

    def note(self: Staging, entry: dict[str, Any]) -> None:
        original(self, entry)
        if next(left, None) == lines - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "note", note)
        with pytest.raises(KeyboardInterrupt):
            th.compress_checkpoint(source, tmp_path / "out", BY_WEIGHT, **SMALL)
    th.compress_checkpoint(source, tmp_path / "out", BY_WEIGHT, **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")
    if lines == 1:
        th.compress_checkpoint(source, tmp_path / "workers", BY_WEIGHT, workers=2, **SMALL)
        assert contents(tmp_path / "workers") == contents(tmp_path / "reference")


def test_the_command_shares_from_files(source: Path, tmp_path: Path) -> None:
    options = ["--target", "*experts*", "--share-experts", "--param-ratio", "0.6", "--objective", "weight"]
    assert run_command(["compress", str(source), str(tmp_path / "ours"), *options, "--workers", "1"]) == 0
    model = th.load(tmp_path / "ours").eval()
    experts = model.get_submodule("model.layers.0.mlp.experts")
    layers = [experts.get_submodule(f"{e}.down_proj") for e in range(EXPERTS)]
    assert len({id(layer.core_base) for layer in layers}) == 1


# --- bad input -----------------------------------------------------------------------------------


def test_a_model_without_stacks_is_refused(tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    config = dataclasses.replace(BY_WEIGHT, target_modules="*q_proj")
    with pytest.raises(TargetError, match="no stack of experts among the 2 targeted layers"):
        th.compress_checkpoint(tmp_path / "dense", tmp_path / "small", config)
    assert not (tmp_path / "small").exists()


def test_integers_without_statistics_are_refused(tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    with pytest.raises(BudgetError, match="share_experts weighs shared cores"):
        th.compress_checkpoint(
            tmp_path / "dense", tmp_path / "small", dataclasses.replace(INTEGERS, objective="weight")
        )


def test_a_part_of_a_stack_is_refused(source: Path, tmp_path: Path) -> None:
    plan = tn.plan(th.load(source), BY_WEIGHT)
    owner = next(x for x in plan if x.shared_with == x.name)
    part = dataclasses.replace(plan, layers=tuple(x for x in plan if x is not owner))
    with pytest.raises(TopologyError, match=r"shares core .* not planned alike.*plan again"):
        th.compress_checkpoint(source, tmp_path / "small", BY_WEIGHT, plan=part)
