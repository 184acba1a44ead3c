"""The benchmark of given experts finds what was planted, within the budget."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_each_structure_is_fitted_best_by_its_own_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("planted_stacks")
    rows = script.main(["--toy", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "planted_stacks.json").read_text())["rows"] == rows
    assert len(rows) == len(script.STACKS) * len(script.KEEP) * len(script.METHODS)
    case = script.TOY
    whole = case.experts * case.rows * case.columns
    errors = {}
    for row in rows:
        if row["error"] is not None:
            assert row["parameters"] <= row["keep"] * whole
            errors[row["stack"], row["keep"], row["method"]] = row["error"]

    def best(stack: str, keep: float) -> str:
        found = {method: errors.get((stack, keep, method), 1.0) for method in script.METHODS}
        return min(found, key=found.__getitem__)

    assert best("base and deltas", 0.6) == "base and deltas"
    assert best("one center", 0.6) == "shared center"
    assert best("one subspace", 0.6) == "mixture of bases"
    assert best("unrelated", 0.6) == "SVD of each"
