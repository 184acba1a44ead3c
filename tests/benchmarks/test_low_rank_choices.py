"""The benchmark of choices for low rank runs, and its record pairs every variant with the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def test_toy_run_writes_a_record(
    load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = load_benchmark("low_rank_choices")
    few = ("base", "norms clipped at their median", "ranks in multiples of 8", "refitted")
    monkeypatch.setattr(script, "VARIANTS", {name: script.VARIANTS[name] for name in few})
    command = ["--toy", "--records", str(tmp_path)]
    rows = json.loads(script.main(command).read_text())["rows"]
    assert [(row["variant"], row["ratio"]) for row in rows] == [(x, r) for x in few for r in (0.8, 0.6)]
    by = {(row["variant"], row["ratio"]): row for row in rows}
    assert by["base", 0.8]["reported divergence over base"] == 1
    assert 0 < by["base", 0.8]["reported divergence"] < by["base", 0.6]["reported divergence"]
    assert by["norms clipped at their median", 0.6]["reported divergence over base"] != 1
    again = json.loads(script.main(command).read_text())["rows"]
    assert {(row["variant"], row["ratio"]): row["seconds"] for row in again if row["variant"] != "base"} == {
        key: row["seconds"] for key, row in by.items() if key[0] != "base"
    }  # not measured again
    assert by["refitted", 0.6]["reported divergence over base"] == pytest.approx(1, abs=0.2)  # a few tokens


def test_clipping_limits_the_norms_of_tokens(load_benchmark: Callable[[str], Any]) -> None:
    script = load_benchmark("low_rank_choices")
    gradient = torch.diag(torch.tensor([0.0, 1.0, 2.0, 9.0]))
    norms = script.Clip(quantile=0.5)(gradient).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([0.0, 1.0, 2.0, 2.0]))
    limit = float(gradient.square().sum() / 4) ** 0.5
    norms = script.Clip(of_rms=1.0)(gradient).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([0.0, 1.0, 2.0, limit]))
