"""The script that measures the house runs, and finds what the house promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "house.py"


def test_the_house_is_measured() -> None:
    done = subprocess.run([sys.executable, FILE, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["sizes"]["comparisons with the name of a family"] == 0
    assert found["journeys"].keys() == {"compress", "layer forward", "load", "upcycle"}
    for counts in found["journeys"].values():
        assert counts["files"] > 1
        assert counts["depth"] > 1
