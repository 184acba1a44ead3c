"""The benchmark of planning runs, and its record says what was measured and where."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_toy_run_writes_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("planning_benchmark", FOLDER / "planning.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = json.loads(module.main(["--toy", "--records", str(tmp_path)]).read_text())
    assert {"commit", "dirty", "device", "dtype", "versions", "date", "summary"} <= record.keys()
    (row,) = record["rows"]
    assert set(row["seconds"]) == {"plan", "round 4.25", "round 2.25"}
    four, two = row["losses"]["4.25"], row["losses"]["2.25"]
    assert (four["format"], two["format"]) == ("int4:g32:float8", "int2:g32:float8")
    assert four["loss_increase"] < two["loss_increase"]
    for each in (four, two):
        assert each["predicted"] == pytest.approx(each["loss_increase"], rel=0.3)
    assert torch.get_num_threads() == 1
