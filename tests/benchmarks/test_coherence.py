"""The benchmark of coherence at toy size: groups, ratios, and going on where a run ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_toy_run_writes_a_record_and_goes_on(load_benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    module = load_benchmark("coherence")
    path = module.main(["--toy", "--records", str(tmp_path)])
    made = json.loads(path.read_text())
    assert {(row["by"], row["group"], row["layers"]) for row in made["rows"]} == {
        ("kind", "attn.c_proj", 2),
        ("block", "2", 1),
        ("block", "3", 1),
    }
    for row in made["rows"]:
        assert row["loss_increase"] > 0
        assert 0.2 < row["coherent"] < 5
        assert row["coherent"] != row["independent"]
        assert 0.5 < row["made"] / row["estimated"] < 2
    assert made["summary"]["gpt2, by kind"] == {"independent": 1, "coherent": 1}
    before = path.read_bytes()
    assert module.main(["--toy", "--records", str(tmp_path)]).read_bytes() == before


def test_groups_by_kind_and_by_block(load_benchmark: Callable[[str], Any]) -> None:
    names = ["encoder.layer.0.attention.self.key", "encoder.layer.0.output.dense"]
    names += ["encoder.layer.1.attention.output.dense", "encoder.layer.1.output.dense"]
    groups = load_benchmark("coherence").groups
    kinds = {"attention.self.key": 1, "output.dense": 2, "attention.output.dense": 1}
    assert {key: len(found) for key, found in groups(names, "kind").items()} == kinds
    assert {key: len(found) for key, found in groups(names, "block").items()} == {"0": 2, "1": 2}
