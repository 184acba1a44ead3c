"""The speed benchmarks run, their records say where they come from, and the page is made from them."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from tensornet.contraction.cost import CPU

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RATIOS = {
    "forward": ("over_dense", "bytes_over_dense", "over_best_strategy"),
    "search_speed": ("speedup",),
    "training_step": ("over_needed",),
}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


# tltorch and tensorly use deprecated parts of NumPy and of the import system.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
@pytest.mark.parametrize("name", RATIOS)
def test_benchmark_writes_its_record(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(name, monkeypatch)
    arguments = ["--toy", "--threads", "1", "--seconds", "0.01", "--records", str(tmp_path)]
    path = module.main(arguments)
    record = json.loads(path.read_text())
    assert record["name"] == name
    assert {"commit", "dirty", "device", "dtype", "versions", "summary", "date"} <= record.keys()
    for row in record["rows"]:
        assert all(row[ratio] > 0 for ratio in RATIOS[name])
    page = load("make_docs", monkeypatch).page(tmp_path)
    question = (module.__doc__ or "").splitlines()[0]
    assert question.endswith("?")
    assert f"## {question}" in page
    assert record["commit"][:10] in page
    for ratio in RATIOS[name]:
        assert ratio.replace("_", " ") in page


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_fitted_constants_foresee_better(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("fit_machine", monkeypatch)
    layers = [module.Case("", *shape) for shape in module.SHAPES[:3]]
    truth = replace(CPU, bandwidth=5e9, copy_element=1e-9, overhead=30e-6)
    timed = [
        module.Timed(plan, tokens, {k: module.predict(plan, k, tokens, truth) for k in (0, -1, -2)})
        for plan in (case.layer().plan for case in layers)
        for tokens in (1, 4, 16, 256)
    ]
    fitted = module.fit(timed, CPU)
    assert max(module.choices(timed, fitted)) <= max(module.choices(timed, CPU))
    for name in ("bandwidth", "copy_element", "overhead"):
        before, after = (abs(math.log(getattr(m, name) / getattr(truth, name))) for m in (CPU, fitted))
        assert after < 0.3 * before


def test_functions_are_timed_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, seen = load("harness", monkeypatch), []
    names = "abcd"
    harness.paired_medians({name: lambda name=name: seen.append(name) for name in names}, 50)
    rounds = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert all(sorted(turn) == list(names) for turn in rounds)
    assert all(a != b for a, b in pairwise(seen))
    assert len(set(pairwise(seen))) == 12


def test_page_keeps_foreign_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {
        "name": "elsewhere",
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "dirty": True,
        "device": "a machine",
        "dtype": "float32",
        "python": "3.11",
        "versions": {"torch": "2"},
        "rows": [{"a": 1.23456, "b": {"c": [1, 2]}}, {"a": 2.0, "d": "x|y"}],
    }
    (tmp_path / "elsewhere.json").write_text(json.dumps(record))
    page = load("make_docs", monkeypatch).page(tmp_path)
    assert "## elsewhere" in page
    assert "with uncommitted changes" in page
    assert "| 1.235 | 1x2 |  |" in page
    assert "| 2 |  | x/y |" in page


def test_fitted_constants_foresee_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("fit_machine", monkeypatch)
    truth = replace(CPU, half_peak=400e9, unpack_pass=1e-9, kernel_peak=5e9)
    formats = [None, *map(module.NumberFormat.parse, ("int8:row", "int3", "int4"))]
    empty = [module.TimedInteger(x, (512, 256), tokens, 0.0) for x in formats for tokens in (1, 16, 64, 1024)]
    timed = [replace(row, seconds=row.predicted(truth)) for row in empty]
    fitted = module.fit_integers(timed, CPU)
    for name in ("half_peak", "unpack_pass", "kernel_peak"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=0.2), name


def test_integer_layers_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("fit_machine", monkeypatch)
    monkeypatch.setattr(module, "FORMATS", ("int4", "int3"))
    timed = module.measure_integers((64, 64), 2, 1, 0.001)
    assert [str(row.number_format) for row in timed] == ["None", "int4", "int3"]
    assert all(row.seconds > 0 for row in timed)
