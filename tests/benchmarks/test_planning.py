"""The benchmark of planning runs, and its record says what was measured and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def test_toy_run_writes_a_record(load_benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    record = json.loads(load_benchmark("planning").main(["--toy", "--records", str(tmp_path)]).read_text())
    assert {"commit", "dirty", "device", "dtype", "versions", "date", "summary"} <= record.keys()
    (row,) = record["rows"]
    assert set(row["seconds"]) == {"plan", "round 4.25", "round 2.25"}
    four, two = row["losses"]["4.25"], row["losses"]["2.25"]
    assert (four["format"], two["format"]) == ("int4:g32:float8", "int2:g32:float8")
    assert four["loss_increase"] < two["loss_increase"]
    for each in (four, two):
        assert each["predicted"] == pytest.approx(each["loss_increase"], rel=0.3)
    assert torch.get_num_threads() == 1
