"""Mixtures of transformers share cores where that pays, on the disk once, and tied when loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mixture_models import EXPERTS, FAMILIES, logits, mixture, planted, tokens
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.compression import CompressionReport
from tensornet.compression.report import model_size
from tensornet.compression.shared_stacks import experts_per_token
from tensornet.nn.targets import LayerSelection
from tensornet_hf.cli.main import run

CONFIG = tn.CompressionConfig(target_modules="*experts*", param_ratio=0.6, share_experts=True)


def compressed(family: str) -> tuple[PreTrainedModel, CompressionReport]:
    model = planted(family)
    batches = [{"input_ids": tokens(8), "labels": tokens(8)}]
    return model, tn.compress(model, CONFIG, calibration=batches, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stack_chooses_and_never_grows(family: str) -> None:
    model, report = compressed(family)
    first = [x for x in report.plan if "gate_up_proj" in x.name]
    assert len(first) == 2 * EXPERTS  # and none of the layers of the expert for every token
    assert not any(x.shared_core for x in report.plan if ".shared_expert." in x.name)
    assert "1" in {x.shared_core for x in first}  # one choice for each stack
    for layer in first:
        stack = {x.shared_core for x in first if x.name.rsplit(".", 2)[0] == layer.name.rsplit(".", 2)[0]}
        assert stack == {layer.shared_core}
    assert report.param_ratio <= 0.6
    size = model_size(planted(family))[0]
    assert size - model_size(model)[0] == report.plan.params_before - report.plan.params_after
    alone = tn.compress(
        planted(family),
        tn.CompressionConfig(target_modules="*experts*", param_ratio=0.6),
        calibration=[{"input_ids": tokens(8), "labels": tokens(8)}],
        progress=False,
    )
    rises = [x.plan.predicted_loss_increase or 0.0 for x in (report, alone)]
    assert rises[0] < rises[1]
    assert report.plan.params_after <= 0.6 * alone.plan.params_before


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
    # Where experts alone are seen, the tokens that have a loss stand for all: the last ones have none.
    assert experts_per_token(names, stats) == pytest.approx(top_k, rel=0.0 if layers == "all" else 0.2)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
def test_a_folder_holds_shared_cores_once(family: str, tmp_path: Path) -> None:
    model, _ = compressed(family)
    want = logits(model)
    th.save_model(model, tmp_path / "small")
    (file,) = (tmp_path / "small").glob("*.safetensors")
    assert sum(x.numel() for x in load_file(file).values()) == model_size(model)[0]
    plain = type(model).from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(plain), want)
    again = th.load(tmp_path / "small").eval()
    assert torch.equal(logits(again), want)
    experts = again.model.layers[0].mlp.experts
    layers = [experts.get_submodule(f"{e}.gate_up_proj") for e in range(EXPERTS)]
    assert len({id(layer.core_1) for layer in layers}) == 1
    tn.decompress(again)
    assert not any(isinstance(module, tn.nn.NetworkModule) for module in again.modules())
    assert torch.allclose(logits(again), want, atol=1e-4)


@pytest.mark.parametrize(("family", "bits"), [("olmoe", 22.0), ("qwen2_moe", 18.0)])
def test_bytes_are_spent_on_shared_cores_and_integers(family: str, bits: float, tmp_path: Path) -> None:
    dense, model = planted(family), planted(family)
    batches = [{"input_ids": tokens(8), "labels": tokens(8)}]
    budget = {"target_modules": "*experts*", "bits_per_weight": bits, "formats": ("float", "int8")}
    alone = tn.plan(dense, tn.CompressionConfig(**budget), stats := tn.calibrate(dense, batches))  # type: ignore[arg-type]
    config = tn.CompressionConfig(share_experts=True, **budget)  # type: ignore[arg-type]
    report = tn.compress(model, config, calibration=stats, progress=False)
    made = report.plan
    assert made.bits_per_weight <= bits
    assert made.predicted_loss_increase is not None
    assert alone.predicted_loss_increase is not None
    assert made.predicted_loss_increase <= alone.predicted_loss_increase
    assert any(layer.shared_core for layer in made)
    assert any(layer.storage.quantized for layer in made)
    assert model_size(dense)[1] - model_size(model)[1] == made.bytes_before - made.bytes_after
    th.save_model(model, tmp_path / "small")
    assert torch.equal(logits(th.load(tmp_path / "small").eval()), logits(model))
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "small").eval()), logits(model))


@pytest.mark.parametrize(("family", "bits"), [("mixtral", 6.0), ("olmoe", 6.0), ("qwen2_moe", 6.0)])
def test_a_folder_holds_shared_integers_once(family: str, bits: float, tmp_path: Path) -> None:
    dense, model = planted(family), planted(family)
    batches = [{"input_ids": tokens(8), "labels": tokens(8)}]
    config = tn.CompressionConfig(target_modules="*experts*", bits_per_weight=bits, share_experts=True)
    report = tn.compress(model, config, calibration=batches, progress=False)
    shared = [x for x in report.plan if x.shared_core]
    assert any(x.storage.quantized for x in shared)
    assert report.plan.bits_per_weight <= bits
    assert model_size(dense)[1] - model_size(model)[1] == report.plan.bytes_before - report.plan.bytes_after
    want = logits(model)
    th.save_model(model, tmp_path / "small")
    (file,) = (tmp_path / "small").glob("*.safetensors")
    assert sum(x.nbytes for x in load_file(file).values()) == model_size(model)[1]
    for again in (th.load(tmp_path / "small").eval(), type(model).from_pretrained(tmp_path / "small").eval()):
        assert torch.equal(logits(again), want)
        first, second = (again.get_submodule(x.name) for x in shared[:2])
        parts = [part for part in first.stored if part.endswith(f"_{shared[0].shared_core}")]
        assert all(first.stored[part] is second.stored[part] for part in parts)
    assert run(["inspect", str(tmp_path / "small")]) == 0
    assert run(["decompress", str(tmp_path / "small"), str(tmp_path / "dense")]) == 0
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path / "dense").eval()), want, atol=1e-4)


def test_the_command_shares_by_parameters_and_by_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted("olmoe").save_pretrained(tmp_path / "dense")
    command = ["compress", str(tmp_path / "dense"), "--target", "*experts*", "--share-experts", "--json"]
    assert run([*command, str(tmp_path / "small"), "--param-ratio", "0.6", "--objective", "weight"]) == 0
    report = json.loads(capsys.readouterr().out)
    layers = [layer for layer in report["layers"] if "gate_up_proj" in layer["name"]]
    assert len(layers) == 2 * EXPERTS
    again = th.load(tmp_path / "small").eval()
    first, second = (again.get_submodule(f"model.layers.0.mlp.experts.{e}.gate_up_proj") for e in (0, 1))
    assert first.core_1 is second.core_1
    assert run([*command, str(tmp_path / "bits"), "--bits", "8", "--objective", "weight"]) != 0
    assert "calibration" in capsys.readouterr().err


def test_shared_cores_train_as_one() -> None:
    model, _ = compressed("mixtral")
    layers = [model.get_submodule(f"model.layers.0.mlp.experts.{e}.gate_up_proj") for e in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=tokens(4), labels=tokens(4)).loss.backward()
    before = layers[0].core_1.detach().clone()
    optimizer.step()
    assert not torch.equal(layers[0].core_1, before)
    assert layers[1].core_1 is layers[0].core_1
