"""Reports say which share of a model's parameters was considered, and which modules hold the rest."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from hf.report.test_report import a_page, parsed
from sharded_folders import HALF, save
from torch import nn
from transformers.utils import logging

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.report import Coverage, compact_count, measure_coverage
from tensornet.nn.targets import list_weights
from tensornet_hf.cli.main import run

CONFIG = tn.CompressionConfig(param_ratio=0.5, objective="weight")


class Mixed(nn.Module):
    """Every class of parameter that a report tells apart, with a tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.inner = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12, bias=False))
        self.norm = nn.LayerNorm(12)
        self.depthwise = nn.Conv1d(12, 12, 3, groups=12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.table.weight


def test_every_parameter_is_counted_once() -> None:
    model = Mixed()
    coverage = tn.compress(model, CONFIG, progress=False).coverage
    assert coverage.total == sum(p.numel() for p in Mixed().parameters())
    assert coverage.covered == 2 * 12 * 24
    assert coverage.excluded == {"Embedding": 11 * 12}  # the head is tied to it
    assert coverage.unknown == {
        "Conv1d (groups too small for low rank)": 12 * 3 + 12,
        "LayerNorm": 24,
        "biases": 24,
    }


def test_the_configuration_and_missing_kinds_are_told_apart() -> None:
    config = tn.CompressionConfig(param_ratio=0.5, objective="weight", target_modules=["inner.0"])
    coverage = tn.compress(Mixed(), config, progress=False).coverage
    assert coverage.excluded == {"Linear": 24 * 12, "Embedding": 11 * 12}
    assert coverage.covered == 24 * 12
    assert "excluded: Linear 288, Embedding 132; skipped: Conv1d (groups too" in str(coverage)


def test_layers_that_cannot_be_compressed_are_not_left_out_by_choice() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.read = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.table = nn.Embedding(5, 8, max_norm=1.0)
            self.head = nn.Linear(8, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x) @ self.read.weight)

    with pytest.warns(UserWarning, match="Left dense|Put back dense"):
        coverage = tn.compress(Reader(), CONFIG, calibration=[torch.randn(4, 8)], progress=False).coverage
    assert coverage.excluded == {}
    assert coverage.unknown == {
        "Linear (weight read past the layer)": 64,
        "Linear (tied to Embedding)": 40,
        "biases": 8,
    }


def test_nothing_left_is_not_listed() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    assert str(measure_coverage(list_weights(model), ["0"])) == "covers 100.0 % of 64 parameters"


def test_many_types_are_added_up() -> None:
    coverage = Coverage(100, 30, {}, dict.fromkeys("abcdefg", 10))
    assert str(coverage).endswith("e 10, 2 other types 20")
    assert Coverage(0, 0, {}, {}).share == 0


@pytest.mark.parametrize(("value", "text"), [(999, "999"), (1000, "1.00k"), (12_340_000, "12.3M")])
def test_counts(value: int, text: str) -> None:
    assert compact_count(value) == text


def test_a_model_on_the_meta_device_is_counted() -> None:
    with torch.device("meta"):
        assert measure_coverage(list_weights(Mixed()), ["inner.0"]).covered == 24 * 12


def test_reports_say_it(tmp_path: Path) -> None:
    report = tn.compress(Mixed(), CONFIG, progress=False)
    assert str(report.coverage) in str(report)
    assert json.loads(report.to_json())["coverage"]["unknown"]["LayerNorm"] == 24
    page = a_page()
    assert str(page.report.coverage) in parsed(page, tmp_path).text


def test_checkpoints_say_it_as_models_do(tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path / "source")
    config = tn.CompressionConfig(**HALF, objective="weight")
    streamed = th.compress_checkpoint(folder, tmp_path / "made", config)
    loaded = th.load(folder)
    coverage = tn.compress(loaded, config, progress=False).coverage
    assert streamed.compression.coverage == coverage
    assert str(coverage) in str(streamed)
    assert coverage.excluded.keys() == {"Embedding"}
    assert coverage.unknown.keys() == {"LayerNorm", "biases"}


def test_the_command_line_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save("gpt2", tmp_path / "source")

    def said(*arguments: object) -> str:
        options = ["--param-ratio", 0.5, "--objective", "weight"]
        with warnings.catch_warnings():  # the command sets filters of its own
            assert run([str(x) for x in ("compress", folder, *arguments, *options)]) == 0
        return capsys.readouterr().out

    verbosity = logging.get_verbosity()
    try:
        for arguments in (["--dry-run"], [tmp_path / "a"]):
            assert "excluded: Embedding" in said(*arguments)
        for arguments in (["--dry-run"], [tmp_path / "b"], [tmp_path / "c", "--workers", 1]):
            assert 0 < json.loads(said(*arguments, "--json"))["coverage"]["share"] < 1
    finally:
        logging.set_verbosity(verbosity)  # the program sets both for its whole process
        logging.enable_progress_bar()
