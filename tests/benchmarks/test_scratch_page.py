"""The page of training from scratch shows what the record says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scratch_page")


def run(name: str, kind: str, parameters: int, losses: dict[float, float]) -> dict[str, Any]:
    return {
        "row": {"name": name, "kind": kind},
        "seed": 0,
        "expert_parameters": parameters,
        "bytes": 4 * parameters,
        "flops_per_token": 2_500_000,
        "tokens": 4_000_000,
        "seconds": 100.0,
        "history": [
            {"tokens": mark * 1e6 + 320, "loss": loss, "entropy": None if kind == "dense" else 0.98}
            for mark, loss in losses.items()
        ],
    }


def test_the_page_is_made_of_the_record(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    record, forms = (
        json.loads((script.RECORDS / f"moe_from_scratch{name}.json").read_text()) for name in ("", "_forms")
    )
    assert script.fill(page, record, forms) == page
    assert "| fine, scaled |" in page


def test_forms_are_compared_with_the_dense_run_of_their_own_record(script: ModuleType) -> None:
    older = [
        run("dense", "dense", 100, {1: 4.0}),
        run("Switch", "switch", 800, {1: 4.1}),
        run("both", "mpoe", 200, {1: 3.9}),
    ]
    runs = [
        run("dense", "dense", 100, {1: 3.0}),
        run("new", "scaled", 120, {1: 3.25}),
        run("both", "mpoe", 200, {1: 2.95}),
        run("young", "mpoe", 200, {0.5: 3.5}),
    ]
    assert script.forms_table(runs, older).splitlines()[2:] == [
        "| both | 200 | 0.25 | -0.050 | -0.100 |",
        "| dense | 100 | 0.12 | +0.000 | +0.000 |",
        "| Switch | 800 | 1.00 |  | +0.100 |",
        "| new | 120 | 0.15 | +0.250 |  |",
    ]


def test_rows_are_compared_at_the_last_mark_of_both(script: ModuleType, tmp_path: Path) -> None:
    runs = [
        run("dense", "dense", 100, {1: 4.0, 3: 3.5}),
        run("Switch", "switch", 800, {1: 4.1, 3: 3.4, 4: 3.3}),
        run("young", "delta", 200, {1: 3.9}),
    ]
    lines = script.table(runs).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| Switch", "| dense", "| young"]
    assert "| 1.00 | 2.50 | 4.100 |  | 3.400 | 3.300 | -0.100 at 3 M | 0.98 | 40,000 |" in lines[0]
    assert "| 0.25 | 2.50 | 3.900 |  |  |  | -0.100 at 1 M | 0.98 |" in lines[2]
    script.draw({"rows": runs}, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
