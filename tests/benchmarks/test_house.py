"""The script that measures the house runs, and finds what the house promises."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "house.py"


def test_the_house_is_measured() -> None:
    done = subprocess.run([sys.executable, FILE, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["sizes"]["comparisons with the name of a family"] == 0
    kinds = ("code", "docstrings", "examples", "comments", "blank")
    assert found["sizes"]["lines"] == sum(found["sizes"][f"lines, {kind}"] for kind in kinds)
    assert found["journeys"].keys() == {"compress", "layer forward", "load", "upcycle"}
    for counts in found["journeys"].values():
        assert counts["files"] > 1
        assert counts["depth"] > 1


LINES = '''"""A module.

A sentence.
"""

TEXT = """no docstring

# no comment
"""


def one(x):  # not counted as a comment
    """Return one.

    >>> one(
    ...     0
    ... )
    1

    Prose again.
    """

    # Why.
    return 1
'''


def test_lines_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("house", FILE)
    house = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(house)
    (tmp_path / "package" / "room").mkdir(parents=True)
    module = tmp_path / "package" / "room" / "one.py"
    module.write_text(LINES)
    found = house.line_kinds(module)
    assert found == Counter(code=6, docstrings=6, examples=4, comments=1, blank=7)
    assert found.total() == len(LINES.splitlines())

    monkeypatch.setattr(house, "ROOMS", [tmp_path / "package"])
    rows = [line.split() for line in house.table().splitlines()]
    counts = ["6", "6", "4", "1", "7"]
    assert rows[1:] == [["package", *counts], ["package/room", *counts], ["package/room/one.py", *counts]]
