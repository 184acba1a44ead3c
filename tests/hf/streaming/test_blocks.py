"""A checkpoint is surveyed, planned and written block by block, and an interrupted run goes on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from transformers import BertConfig, BertForSequenceClassification

import tensornet as tn
import tensornet_hf as th
from tensornet.calibration import label_losses
from tensornet.compression import road
from tensornet.compression.report import model_size
from tensornet.errors import BudgetError, DestinationError
from tensornet.nn.extension import ProvidedData
from tensornet_hf.compress import calibration_batches, text_of
from tensornet_hf.embedded import calibration_text, gpt2_path
from tensornet_hf.file_sink import FileSink
from tensornet_hf.staging import StatesOnDisk, staging_folder
from tensornet_hf.text import calibration_data

CONFIG = tn.CompressionConfig(
    bits_per_weight=4.8,
    formats=("gguf", "int4:g32:float16", "int8:g32:float16"),
    method="gptq",
    exclude_modules="transformer.wpe",
)
TOKENS = 256


@cache
def text() -> ProvidedData:
    data = calibration_data(th.load(gpt2_path()), gpt2_path(), calibration_text()[:60_000], tokens=2 * TOKENS)
    return ProvidedData(data.batches, "the text", loss_fn=data.loss_fn)


def compress(destination: Path, config: Any = CONFIG, **options: Any) -> tn.CompressionReport:
    given = {"calibration": text(), "calibration_tokens": TOKENS, **options}
    return compress_files(gpt2_path(), destination, config, **given)


def test_a_gguf_file_is_that_of_the_exported_folder(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("conversion")
    compress(tmp_path / "folder")
    report = compress(tmp_path / "model.gguf")
    th.export(tmp_path / "folder", tmp_path / "exported.gguf", source=gpt2_path())
    straight, exported = ((tmp_path / x).read_bytes() for x in ("model.gguf", "exported.gguf"))
    # The title in the metadata is the name of the folder, which differs; all tensors follow the metadata.
    size = report.plan.bytes_after
    assert straight[-size:] == exported[-size:]
    assert report.model_bytes_after == len(straight)
    assert report.measured is not None
    assert report.measured.mean < 3 * report.plan.predicted_loss_increase + 4 * report.measured.stderr
    files = {"exported.gguf", "model.gguf"}
    assert {x.name for x in tmp_path.iterdir()} == {"folder", *files, *(f"{x}.receipt.json" for x in files)}
    with pytest.raises(DestinationError, match="exists"):
        compress(tmp_path / "model.gguf")


@pytest.mark.parametrize("target", [None, "gguf"])
def test_an_interrupted_run_goes_on_at_its_block(
    target: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target:
        pytest.importorskip("gguf")
        pytest.importorskip("conversion")
    name = "model.gguf" if target else "model"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    compress(tmp_path / "a" / name)
    put, blocks = FileSink.put, []

    def stopping(self: Any, block: str, layers: Any) -> None:
        blocks.append(block)
        if block == "transformer.h.2":
            raise KeyboardInterrupt
        put(self, block, layers)

    with monkeypatch.context() as patch:
        patch.setattr(FileSink, "put", stopping)
        with pytest.raises(KeyboardInterrupt):
            compress(tmp_path / "b" / name)
    assert staging_folder(tmp_path / "b" / name).is_dir()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("surveyed again")

    rounded: list[str] = []
    original = road.compress_alone

    def counting(matrix: Any, layer: Any, *rest: Any) -> Any:
        rounded.append(layer.name)
        return original(matrix, layer, *rest)

    monkeypatch.setattr("tensornet.compression.surveying.survey_model", never)
    monkeypatch.setattr(road, "compress_alone", counting)
    compress(tmp_path / "b" / name)
    assert {x.rpartition(".h.")[2][0] for x in rounded if ".h." in x} == {"2", "3"}  # not blocks 0 and 1
    files = [sorted(x for x in (tmp_path / y).rglob("*") if x.is_file()) for y in "ab"]
    assert [x.read_bytes() for x in files[0]] == [x.read_bytes() for x in files[1]]
    assert {x.name for x in (tmp_path / "b").iterdir()} <= {name, f"{name}.receipt.json"}


def test_a_failed_run_leaves_only_its_survey_and_another_budget_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = replace(CONFIG, bits_per_weight=1.0)
    with pytest.raises(BudgetError):
        compress(tmp_path / "model", tight)
    work = staging_folder(tmp_path / "model")
    assert not (work / "out").exists()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("surveyed again")

    with monkeypatch.context() as patch:
        patch.setattr("tensornet.compression.surveying.survey_model", never)
        compress(tmp_path / "model")
    assert (tmp_path / "model").is_dir()
    assert not work.exists()
    with pytest.raises(tn.errors.TargetError):
        compress(tmp_path / "other", tn.CompressionConfig(bits_per_weight=4.5, target_modules="nosuch"))
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_states_of_a_block_are_complete_or_ignored(tmp_path: Path) -> None:
    states = StatesOnDisk(tmp_path / "states")
    for number in range(3):
        states[0, number] = torch.ones(2)
    for number in range(2):
        states[1, number] = torch.ones(2)
    assert states.complete(3) == 0
    states[1, 2] = torch.ones(2)
    assert states.complete(3) == 1
    states.clear()
    assert StatesOnDisk(tmp_path / "states").complete(3) == 0


def test_a_plan_is_made_without_loading_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    options = th.CompressOptions(calibration="default", calibration_tokens=256)
    config = tn.CompressionConfig(max_bytes=1_100_000, formats=("int4", "int8"), method="nearest")
    model = th.load(gpt2_path())
    data = calibration_batches(model, gpt2_path(), config, options, text_of(options, gpt2_path()))
    assert data is not None
    expected = tn.survey(model, data.batches, config, loss_fn=data.loss_fn, tokens=256).plan()
    monkeypatch.delattr("tensornet_hf.compress.load")
    planned = th.plan_folder(gpt2_path(), config, options)
    assert [x.storage for x in planned] == [x.storage for x in expected]
    assert planned.predicted_loss_increase == pytest.approx(expected.predicted_loss_increase, rel=0.02)
    params, size = model_size(model)
    assert (planned.model_params_before, planned.model_bytes_before) == (params, size)


def test_the_losses_of_the_rows_that_both_walks_read_are_compared(tmp_path: Path) -> None:
    """If a loss belongs to rows, the survey reads more rows than the walk that compresses."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=64, num_labels=3, initializer_range=0.3)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "dense")
    batches = [
        {"input_ids": torch.randint(50, (64, 32)), "labels": torch.randint(3, (64,))} for _ in range(16)
    ]
    options = {"config": tn.CompressionConfig(bits_per_weight=2.5), "calibration": ProvidedData(batches, "x")}
    measured = compress_files(tmp_path / "dense", tmp_path / "small", **options).measured
    small = th.load(tmp_path / "small")
    with torch.no_grad():
        changes = torch.cat([label_losses(small, x) - label_losses(model, x) for x in batches[:8]])
    assert measured is not None
    assert measured.mean == pytest.approx(float(changes.mean()), abs=0.1 * float(changes.abs().mean()))
    assert float(changes.abs().mean()) > 0.01


def test_an_encoder_decoder_is_compared_by_the_labels_of_the_text(tmp_path: Path) -> None:
    """It is calibrated on labels that it draws itself, whose losses are random."""
    (tmp_path / "pairs.txt").write_text("a question\tand its answer\n" * 64)
    options = th.CompressOptions(calibration=str(tmp_path / "pairs.txt"), calibration_tokens=128)
    config = tn.CompressionConfig(bits_per_weight=5, formats=("int4", "int8"), method="nearest")
    done = th.compress_folder(th.embedded.t5_path(), tmp_path / "small", config, options)
    assert isinstance(done, tn.CompressionReport)
    dense, small = th.load(th.embedded.t5_path()).eval(), th.load(tmp_path / "small").eval()
    text = (tmp_path / "pairs.txt").read_text()
    batches = calibration_data(dense, th.embedded.t5_path(), text, tokens=128, rows=1024).batches
    with torch.no_grad():
        changes = torch.cat([label_losses(small, x) - label_losses(dense, x) for x in batches])
    assert done.measured is not None
    tolerance = 0.1 * float(changes.abs().mean())
    assert done.measured.mean == pytest.approx(float(changes.mean()), abs=tolerance)
