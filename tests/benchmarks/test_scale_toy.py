"""The benchmarks of scale run, at toy size; their numbers mean nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(("name", "rows"), [("scale", 7), ("scale_plan", 6)])
def test_toy_run(name: str, rows: int, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--toy", "--output", tmp_path]
    subprocess.run(command, check=True, timeout=280, capture_output=True)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(record["rows"]) == rows
    assert record["commit"]
