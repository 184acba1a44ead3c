"""The benchmark of a real model runs, on the embedded one, and its figures make sense."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_toy_run_records_dense_ours_and_plain_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("harness", "real_data", "real_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import real_model

    record = json.loads(real_model.main(["--toy", "--threads", "1", "--records", str(tmp_path)]).read_text())
    dense, ours, plain = record["rows"]
    assert [row["method"] for row in record["rows"]] == ["dense", "curvature", "plain SVD"]
    assert dense["perplexity"] < ours["perplexity"] < plain["perplexity"]
    assert ours["file_bytes"] < dense["file_bytes"]
    assert ours["kept"] <= 0.5
    assert plain["kept"] <= 0.5
    assert ours["predicted_rise"] > 0
    assert all(row["peak_memory_mb"] > 0 and row["sample"] for row in record["rows"])
    assert {"commit", "dirty", "device", "dtype", "versions", "heldout_tokens", "seed"} <= record.keys()
