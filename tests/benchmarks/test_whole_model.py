"""The benchmark of whole models at toy size: rows, the size of files, and going on where a run ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_toy_run_writes_a_record_and_goes_on(load_benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    module = load_benchmark("whole_model")
    given = ["--toy", "--records", str(tmp_path), "--work", str(tmp_path), "--shares", "0.2"]
    path = module.main(given)
    untrained, refined, healed = json.loads(path.read_text())["rows"]
    assert (untrained["after"], refined["after"], healed["after"]) == ("", "refined", "healed")
    assert healed["heal_steps"] > 0
    assert healed["loss_increase"] < refined["loss_increase"]  # which it starts from
    # Names and what each layer is take some thousand bytes beside the tensors.
    assert untrained["file_bytes"] < untrained["budget_bytes"] + 20_000
    before = path.read_bytes()
    assert module.main(given).read_bytes() == before
    path.unlink()  # the steps are taken from the working folder
    module.main(given)
    again = json.loads(path.read_text())["rows"]
    assert [row["loss_increase"] for row in again] == [
        row["loss_increase"] for row in (untrained, refined, healed)
    ]
    assert again[2]["healed_seconds"] == healed["healed_seconds"]
    module.main([*given, "--parameters", "vectors"])  # beside the row that trains codes, not in its place
    rows = json.loads(path.read_text())["rows"]
    assert [row["trained"] for row in rows if "trained" in row] == ["codes", "vectors"]
    assert rows[0] == again[2]
    assert rows[-1]["loss_increase"] != healed["loss_increase"]
