"""The benchmark of rounding runs, and its record says what was measured and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def test_toy_run_writes_a_record(load_benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    record = json.loads(load_benchmark("rounding").main(["--toy", "--records", str(tmp_path)]).read_text())
    assert {"commit", "dirty", "device", "dtype", "versions", "date", "summary"} <= record.keys()
    (row,) = record["rows"]
    assert set(row["seconds"]) == set(row["price"]) == {"nearest", "columns", "both"}
    assert row["price"]["both"] < row["price"]["columns"] < row["price"]["nearest"]
    assert torch.get_num_threads() == 1
