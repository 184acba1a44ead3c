"""The benchmark of decompositions runs, and its record says what was measured and where."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tensornet.testing import reference

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("torchtt")
    pytest.importorskip("tltorch")
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("decomposition_benchmark", FOLDER / "decomposition.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_toy_run_writes_a_record(benchmark: ModuleType, tmp_path: Path) -> None:
    path = benchmark.main(["--toy", "--threads", "1", "--repeats", "1", "--records", str(tmp_path)])
    record = json.loads(path.read_text())
    assert {"commit", "dirty", "device", "dtype", "versions", "date", "summary"} <= record.keys()
    assert len(record["rows"]) == 2 * len(benchmark.TOY)
    for row in record["rows"]:
        assert set(row["milliseconds"]) == {"tensornet", "torchTT", "tltorch", "torch.linalg.svd"}
        assert len({tuple(bonds) for bonds in row["bonds"].values()}) == 1, "not the same bonds"
        assert row["error_ratio"] <= 1.01
    assert torch.get_num_threads() == 1


def test_decaying_matrix_decays_across_the_last_bond(benchmark: ModuleType) -> None:
    case = benchmark.TOY[0]
    unfolded = reference.unfolding(benchmark.matrix(case, "decaying"), case.out_dims, case.in_dims, 1)
    values = np.linalg.svd(unfolded, compute_uv=False)
    np.testing.assert_allclose(values, np.arange(1, len(values) + 1) ** -0.5, rtol=1e-4)
