"""Mixtures of experts, compressed from the tensors of their checkpoint, whatever form these have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_models import EXPERTS, FAMILIES, logits, mixture, tokens
from safetensors.torch import load_file, save_file
from sharded_folders import contents

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError, NonFiniteError
from tensornet_hf.streaming import run
from tensornet_hf.streaming.journal import Staging
from tensornet_hf.streaming.mapped_model import mapped_model

EXACT = tn.CompressionConfig(topology="mpo", objective="weight")
HALF = tn.CompressionConfig(param_ratio=0.5, objective="weight")
PACKED = tn.CompressionConfig(param_ratio=0.5, objective="weight", pivoted=True)
#: A gate of one row has no low rank with half of its numbers, and a stream plans every layer by itself.
GATE = "shared_expert_gate"
#: One expert of the first mixture: the others leave their stack as they are.
ONE = tn.CompressionConfig(
    target_modules=["re:.*layers.0.mlp.experts.1.*"], param_ratio=0.5, objective="weight"
)
NONE = tn.CompressionConfig(target_modules=["q_proj"], param_ratio=0.5, objective="weight")
SMALL = {"max_shard_bytes": 30_000}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "dense"
    mixture(request.param).save_pretrained(folder, max_shard_size="15KB")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("config", [EXACT, HALF, PACKED], ids=["exact", "half", "packed"])
def test_same_folder_as_compressing_the_model(
    source: Path, config: tn.CompressionConfig, tmp_path: Path
) -> None:
    if config is PACKED and any(GATE in name for name in weights(source)):
        config = dataclasses.replace(config, exclude_modules=[f"re:.*{GATE}"])
    report = th.compress_checkpoint(source, tmp_path / "ours", config)
    model = th.load(source)
    expected = tn.compress(model, config, progress=False)
    model.save_pretrained(tmp_path / "reference")
    ours, reference = (tmp_path / x / "model.safetensors" for x in ("ours", "reference"))
    assert ours.read_bytes() == reference.read_bytes()
    for key in ("layers", "ties", "dtype", "other_dtypes", "format_version"):
        assert described(tmp_path / "ours")[key] == described(tmp_path / "reference")[key]
    assert [x.name for x in report.compression.layers] == [x.name for x in expected.layers]
    assert report.compression.model_params_before == expected.model_params_before
    assert report.compression.model_params_after == expected.model_params_after
    assert report.left_out == ()
    loaded = th.load(tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), logits(model))
    if config is EXACT:
        torch.testing.assert_close(logits(loaded), logits(th.load(source)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [ONE, NONE], ids=["one expert", "no expert"])
def test_what_is_not_compressed_is_kept(source: Path, config: tn.CompressionConfig, tmp_path: Path) -> None:
    report = th.compress_checkpoint(source, tmp_path / "ours", config)
    model = th.load(source)
    tn.compress(model, config, progress=False)
    torch.testing.assert_close(logits(th.load(tmp_path / "ours")), logits(model))
    assert report.compression.model_params_after == sum(
        x.numel() for x in weights(tmp_path / "ours").values()
    )
    assert report.compression.model_params_after == sum(p.numel() for p in model.parameters())
    assert len(report.compression.layers) == 2
    dense = [k for k in weights(tmp_path / "ours") if k.endswith(".matrix")]
    assert len(dense) == (2 * (EXPERTS - 1) if config is ONE else 0)


@pytest.mark.parametrize("config", [HALF, ONE], ids=["half", "one expert"])
@pytest.mark.parametrize("lines", [1, 9, 25])
def test_same_bytes_from_workers_and_after_interruptions(
    source: Path, config: tn.CompressionConfig, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    th.compress_checkpoint(source, tmp_path / "reference", config, **SMALL)
    original, left = Staging.note, iter(range(lines))

    def note(self: Staging, entry: dict[str, Any]) -> None:
        original(self, entry)
        if next(left, None) == lines - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "note", note)
        try:
            th.compress_checkpoint(source, tmp_path / "out", config, **SMALL)
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
            th.compress_checkpoint(source, tmp_path / "out", config, **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_same_bytes_from_processes(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    mixture("gpt_oss").save_pretrained(source, max_shard_size="15KB")
    th.compress_checkpoint(source, tmp_path / "one", ONE, **SMALL)
    th.compress_checkpoint(source, tmp_path / "two", ONE, workers=2, **SMALL)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_calibrated_without_loading(source: Path, tmp_path: Path) -> None:
    batches = [{"input_ids": tokens(2) + k, "labels": tokens(2) + k} for k in (0, -1)]
    for number, batch in enumerate(batches):  # each with padding of its own
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][number, 2 + number :] = 0
    config = tn.CompressionConfig(param_ratio=0.6)
    assert torch.equal(logits(mapped_model(source)), logits(mapped_model(source, spill=tmp_path)))
    torch.testing.assert_close(logits(mapped_model(source)), logits(th.load(source)), rtol=1e-4, atol=1e-4)
    ours = th.calibrate_checkpoint(source, batches, tmp_path / "stats")
    theirs = tn.calibrate(th.load(source), batches, config=config)
    assert set(ours.rows) == set(theirs.rows)
    for name, moment in theirs.rows.items():
        torch.testing.assert_close(ours.rows[name], moment, rtol=1e-3, atol=1e-5 * float(moment.max()))
    report = th.compress_checkpoint(source, tmp_path / "ours", config, stats=tmp_path / "stats")
    model = th.load(source)
    expected = tn.compress(model, config, calibration=ours, progress=False)
    assert str(report.compression.plan) == str(expected.plan)
    torch.testing.assert_close(logits(th.load(tmp_path / "ours")), logits(model))


def edited(change: Callable[[dict[str, torch.Tensor]], object], folder: Path) -> Path:
    """A Mixtral whose stored tensors were changed by somebody."""
    mixture("mixtral").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


W1 = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


def test_experts_that_are_missing(tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("w1", "w2", "w3"):
            del tensors[W1.format(2).replace("w1", name)]

    source = edited(drop, tmp_path / "dense")
    with pytest.raises(FormatError, match=r"describes 3 experts in .*gate_up_proj, 2 are stored"):
        th.compress_checkpoint(source, tmp_path / "ours", HALF)


def test_experts_of_another_size(tmp_path: Path) -> None:
    source = edited(lambda x: x.update({W1.format(1): torch.ones(40, 24)}), tmp_path / "dense")
    with pytest.raises(FormatError, match=r"experts\.1\.gate_up_proj with shape \[88, 24\].*\[84, 24\]"):
        th.compress_checkpoint(source, tmp_path / "ours", HALF)


def test_an_expert_that_is_not_finite(tmp_path: Path) -> None:
    source = edited(lambda x: x[W1.format(1)].__setitem__((3, 2), float("inf")), tmp_path / "dense")
    with pytest.raises(NonFiniteError, match=r"experts\.1\.gate_up_proj"):
        th.compress_checkpoint(source, tmp_path / "ours", HALF)


def test_no_stack_is_read_as_a_whole(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = run.compress_piece

    def watched(task: Any) -> Any:
        sizes.append(task.weight.nbytes)
        return original(task)

    monkeypatch.setattr(run, "compress_piece", watched)
    report = th.compress_checkpoint(source, tmp_path / "ours", HALF)
    largest = max(p.numel() * 4 for n, p in th.load(source).named_parameters() if "experts" not in n)
    assert max(sizes) < 24 * 88 * 4 + 1
    assert report.largest_tensor == max(largest, *sizes)
