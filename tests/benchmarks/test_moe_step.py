"""The benchmark of the mixtures runs, with tiny sizes, and records what it measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "moe_step.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts its folder there
    spec = importlib.util.spec_from_file_location("moe_step", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "moe_step", module)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_toy_run_measures_and_records(script: ModuleType, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        rows = script.main(["--toy", "--output", str(tmp_path), "--threads", "1", "2"])
    finally:
        torch.set_num_threads(before)
    stored = json.loads((tmp_path / "moe_step.json").read_text())
    forms = [f"{what}, {x}" for what in ("training step", "training step with AdamW") for x in script.FORMS]
    once = ["training step", *forms, "inference", "inference"]
    assert [row["what"] for row in stored["rows"]] == once * 2
    assert [row["threads"] for row in stored["rows"]] == [1] * len(once) + [2] * len(once)
    assert stored["rows"] == json.loads(json.dumps(rows))
    assert all(row["ratio"] > 0 for row in rows)


def test_multiply_adds_are_those_of_the_formula(script: ModuleType) -> None:
    """3 (E (l + r) + N) O I for each of the two matrices, the small merges on top."""
    got = script.training_multiply_adds(script.BASE, script.mixture(script.BASE, dense=False))
    assert got == pytest.approx(3 * 2 * (8 * 576 + 2048) * 768 * 3072, rel=0.01)
