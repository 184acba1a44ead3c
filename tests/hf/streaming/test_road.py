"""What an interrupted run leaves is used only for the same run, and a report is about the written files."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files, interrupted_in
from sharded_folders import contents
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.calibration import label_losses
from tensornet.calibration.walk import in_memory, walk_dtype
from tensornet.compression.road import make_plan
from tensornet.errors import FormatError, TargetError
from tensornet.nn.extension import ProvidedData
from tensornet_hf.embedded import calibration_text, gpt2_path
from tensornet_hf.file_sink import FileSink
from tensornet_hf.lazy_model import open_model
from tensornet_hf.staging import OUT, begin, staging_folder
from tensornet_hf.text import calibration_data

ROUNDED = tn.CompressionConfig(bits_per_weight=5, formats=("int4",), method="nearest")
TIED = tn.CompressionConfig(
    bits_per_weight=2.4, formats=("int2", "int4"), target_modules="all", method="nearest"
)


@cache
def text() -> ProvidedData:
    model = th.load(gpt2_path())
    data = calibration_data(model, gpt2_path(), calibration_text()[:60_000], tokens=1024)
    return ProvidedData(data.batches, "the text", loss_fn=data.loss_fn)


def tokens(seed: int) -> ProvidedData:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(64, (2, 64), generator=generator) for _ in range(2)]
    return ProvidedData([{"input_ids": x, "labels": x} for x in ids], f"seed {seed}")


def llama(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.2))  # type: ignore[arg-type]
    model.save_pretrained(folder)
    return folder


def test_the_measured_loss_increase_is_that_of_the_written_folder(tmp_path: Path) -> None:
    """Also with a rounded embedding that is tied to the head: all hidden states begin with it."""
    data = text()
    report = compress_files(gpt2_path(), tmp_path / "small", TIED, calibration=data, calibration_tokens=512)
    dense, small = th.load(gpt2_path()).eval(), th.load(tmp_path / "small").eval()
    assert report.measured is not None
    batches = [{"input_ids": x, "labels": x} for x in data.batches]
    with torch.no_grad():
        before, after = (torch.cat([label_losses(x, y) for y in batches]) for x in (dense, small))
    changes = (after - before).flatten()
    wanted = float(changes[: report.measured.tokens].mean())
    assert wanted > 0.05
    assert report.measured.mean == pytest.approx(wanted, rel=0.03)


def test_a_fresh_run_uses_nothing_of_an_interrupted_one(tmp_path: Path) -> None:
    """No layer of the first blocks is planned, so only hidden states are left of them."""
    source = llama(tmp_path / "dense")
    config = tn.CompressionConfig(
        bits_per_weight=2.5, formats=("int2", "int4"), target_modules="*.layers.3.*", method="nearest"
    )
    run = partial(compress_files, source, config=config)
    interrupted_in("model.layers.3", lambda: run(tmp_path / "out", calibration=tokens(1)))
    assert list((staging_folder(tmp_path / "out") / "states").iterdir())
    with pytest.raises(FormatError, match="other texts"):
        run(tmp_path / "out", calibration=tokens(2))
    report = run(tmp_path / "out", calibration=tokens(2), resume=False)
    expected = run(tmp_path / "fresh", calibration=tokens(2))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert report.measured == expected.measured


def test_a_file_is_reused_only_if_all_that_it_depends_on_is_the_same(tmp_path: Path) -> None:
    def kept(source: str, budget: int, *, resume: bool = True) -> set[str]:
        reusable = {"survey": "text", "plan": budget}
        begin(tmp_path, {"weights": source}, {"options": budget}, resume=resume, reusable=reusable)
        found = {x.name for x in tmp_path.iterdir()} & reusable.keys()
        for name in reusable:
            (tmp_path / name).touch()
        return found

    assert kept("a", 4) == set()
    assert kept("a", 4) == {"survey", "plan"}
    assert kept("a", 3) == {"survey"}
    assert kept("b", 3) == set()
    assert kept("b", 3, resume=False) == set()


def test_a_source_that_changes_during_a_run_is_refused_at_its_end(tmp_path: Path) -> None:
    source = llama(tmp_path / "dense")
    finish = FileSink.finish

    def changing(self: FileSink) -> None:
        (file,) = source.glob("*.safetensors")
        os.utime(file, (0, 0))
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSink, "finish", changing)
        with pytest.raises(FormatError, match="changed since"):
            compress_files(source, tmp_path / "out", ROUNDED)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["_write_done", "save"])
def test_a_result_that_is_still_to_be_changed_goes_on(tmp_path: Path, step: str) -> None:
    """The run is interrupted after the last block, or when the changed model is saved."""
    source = llama(tmp_path / "dense")

    def stopping(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"tensornet_hf.compress.{step}", stopping)
        with pytest.raises(KeyboardInterrupt):
            compress_files(source, tmp_path / "out", ROUNDED, dtype="bfloat16")
    again = compress_files(source, tmp_path / "out", ROUNDED, dtype="bfloat16")
    expected = compress_files(source, tmp_path / "fresh", ROUNDED, dtype="bfloat16")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert again.plan == expected.plan
    assert not staging_folder(tmp_path / "out").exists()


def test_a_plan_by_weights_is_made_once(tmp_path: Path) -> None:
    source = llama(tmp_path / "dense")
    interrupted_in("model.layers.1", lambda: compress_files(source, tmp_path / "out", ROUNDED))
    given = []

    def planning(opened: Any, config: Any, *args: Any, **options: Any) -> Any:
        given.append(config)
        return make_plan(opened, config, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensornet_hf.compress.make_plan", planning)
        compress_files(source, tmp_path / "out", ROUNDED)
    assert isinstance(given[0], tn.CompressionPlan)


def test_damaged_tensors_of_an_interrupted_run_are_written_again(tmp_path: Path) -> None:
    """Here those of an embedding, which belongs to no block."""
    data = text()
    run = partial(compress_files, gpt2_path(), config=TIED, calibration=data, calibration_tokens=512)
    run(tmp_path / "whole")
    interrupted_in("transformer.h.2", lambda: run(tmp_path / "out"))
    work = staging_folder(tmp_path / "out")
    (file,) = (work / OUT).glob("*.safetensors")
    journal = (work / OUT / f"{file.name}.journal").read_text()
    assert "wpe" in journal
    from tensornet.io import read_header

    damaged = read_header(file)["transformer.wpe.core_matrix.codes"]
    content = bytearray(file.read_bytes())
    content[damaged.start] ^= 255
    file.write_bytes(content)
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_refused_run_leaves_no_files(tmp_path: Path) -> None:
    source = llama(tmp_path / "dense")
    config = tn.CompressionConfig(bits_per_weight=5, formats=("int4",), method="nearest")
    plan = tn.plan(th.load(source), config)
    other = th.load(source)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(TargetError, match="another model"):
        compress_files(tmp_path / "other", tmp_path / "out", plan)
    assert {x.name for x in tmp_path.iterdir()} == {"dense", "other"}


def test_a_small_model_is_calibrated_in_the_same_precision_from_every_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tensornet.calibration.walk.has_bfloat16", lambda device: True)
    monkeypatch.setattr("tensornet.calibration.calibrate.has_bfloat16", lambda device: True)
    lazy, device = open_model(gpt2_path()), torch.device("cpu")
    assert walk_dtype(lazy.model, lazy.loaded, device) is None
    assert walk_dtype(th.load(gpt2_path()), in_memory, device) is None
