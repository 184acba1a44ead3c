"""The benchmark of scale runs, at toy size; its numbers mean nothing here."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "scale.py"


def test_toy_run(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--toy", "--output", tmp_path]
    subprocess.run(command, check=True, timeout=280, capture_output=True)
    record = json.loads((tmp_path / "scale.json").read_text())
    assert len(record["rows"]) == 7
    assert record["commit"]
