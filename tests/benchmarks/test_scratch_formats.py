"""Rounding the networks of runs from scratch: bytes and losses are those of the rounded model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tensornet_hf

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(tensornet_hf.__file__).parent / "data" / "heldout.txt"


@pytest.fixture
def script(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return load_benchmark("scratch_formats")


def test_the_script_judges_every_run_in_every_format(script: ModuleType, tmp_path: Path) -> None:
    state, rows = tmp_path / "state", ["dense", "fine, MPOE", "fine, tied, E = 12"]
    bench = importlib.import_module("moe_from_scratch")
    folders = ["--state", str(state), "--out", str(tmp_path)]
    bench.main([str(TEXT), "--toy", *folders, "--rows", *rows, "--tokens", "0.0001"])
    path = script.main([str(TEXT), "--toy", *folders])
    lines = json.loads(path.read_text())["rows"]
    found = {(line["row"], line["format"]): line for line in lines}
    assert {name for row, name in found if row != "fine, MPOE"} == {"float", "int8", "int4"}
    assert len([1 for row, _ in found if row == "fine, MPOE"]) == 5
    trained = {
        line["row"]["name"]: line for line in map(json.loads, (p.read_text() for p in state.glob("*.json")))
    }
    for row in rows:
        whole, half, quarter = (found[row, name] for name in ("float", "int8", "int4"))
        assert whole["loss"] == pytest.approx(trained[row]["history"][-1]["loss"], abs=1e-6)
        assert whole["feed_forward_bytes"] == 4 * trained[row]["expert_parameters"]
        assert 0.25 < half["feed_forward_bytes"] / whole["feed_forward_bytes"] < 0.5
        assert quarter["feed_forward_bytes"] < 0.7 * half["feed_forward_bytes"]
        assert 0 < abs(half["loss"] - whole["loss"]) < abs(quarter["loss"] - whole["loss"]) < 0.1
    center = found["fine, MPOE", "int4, center"]["feed_forward_bytes"]
    assert found["fine, MPOE", "int4"]["feed_forward_bytes"] < center
    assert center < found["fine, MPOE", "float"]["feed_forward_bytes"]


def test_rounding_leaves_the_model_itself_alone(script: ModuleType) -> None:
    rows = importlib.import_module("scratch_rows")
    sizes = rows.Sizes(width=64, hidden=256, layers=2, heads=2, context=8, vocabulary=300)
    model = rows.build(script.ROWS["fine, MPOE"], sizes, seed=0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made, saved = script.rounded(model, "int8", center=True)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    banks = [bank for bank in script.stored_banks(made) if bank.num_experts == 30]
    assert len(banks) == 4
    assert saved == sum(3 * bank.core_1.numel() - bank.scale_1.nbytes for bank in banks)
    assert all(bank.core_1.dtype == torch.uint8 and bank.core_0.dtype == torch.float32 for bank in banks)
