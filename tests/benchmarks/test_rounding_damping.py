"""The question of damping at toy size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_toy_run_writes_every_damping(load_benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    module = load_benchmark("rounding_damping")
    path = module.main(["--toy", "--records", str(tmp_path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["damping"] for row in rows] == list(module.DAMPINGS)
    one_sided, least, *more = rows
    assert least["over_least"] == least["over_least_error"] == 0
    # The price knows the damping of decompositions, so the farther from it the dearer.
    prices = [row["price"] for row in (least, *more, one_sided)]
    assert prices == sorted(prices)
    assert all(0 < row["loss_increase"] < 1 for row in rows)
    before = path.read_bytes()
    assert module.main(["--toy", "--records", str(tmp_path)]).read_bytes() == before
