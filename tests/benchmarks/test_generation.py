"""The benchmark of generation runs, goes on where it ended, and reports every side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.test_speed import load

import tensornet as tn


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("generation", monkeypatch)
    common = ["--toy", "--threads", "1", "--modes", "eager", "--seconds", "0.01", "--records", str(tmp_path)]
    path = module.main([*common, "--tokens", "1"])
    first = json.loads(path.read_text())["rows"]
    assert [row["side"] for row in first] == list(module.SIDES)
    assert {row["side"]: row["times_bfloat16"] for row in first}["bfloat16"] == 1
    content = json.loads(module.main([*common, "--tokens", "1", "16"]).read_text())
    assert content["rows"][: len(first)] == first
    assert [row["tokens"] for row in content["rows"]] == [1] * 5 + [16] * 5
    by_side = {row["side"]: row for row in first}
    assert by_side["int4"]["file_MiB"] < by_side["int8:row"]["file_MiB"] < by_side["bfloat16"]["file_MiB"]
    assert by_side["int4"]["held_MiB"] < by_side["bfloat16"]["held_MiB"] < by_side["float32"]["held_MiB"]
    assert len(content["summary"]) == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernels_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("generation", monkeypatch)
    monkeypatch.setattr(module, "TUNED", {"freezing": True})  # tuning takes minutes
    some = ["--sides", "bfloat16", "int4", "--tokens", "2", "--threads", "1", "--modes", "tuned"]
    path = module.main(["--toy", *some, "--seconds", "0.01", "--records", str(tmp_path)])
    assert [(row["side"], row["mode"]) for row in json.loads(path.read_text())["rows"]] == [
        ("bfloat16", "tuned"),
        ("int4", "tuned"),
    ]


def test_shares_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("generation", monkeypatch)
    found = module.formats("planned", 210)
    assert {name: found.count(name) for name in module.PLANNED} == module.PLANNED
    made = module.integers(torch.nn.Linear(64, 64), "int4").eval()
    assert isinstance(made, tn.nn.TensorNetworkLinear)
    assert bool(made(torch.ones(1, 64, dtype=torch.bfloat16)).isfinite().all())
