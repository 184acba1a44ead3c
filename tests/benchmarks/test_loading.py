"""The time of loading in two checkouts, of this one with itself at toy size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tensornet_hf as th

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("loading")


def test_loading_is_compared_with_itself(module: Any, tmp_path: Path) -> None:
    path = module.main([str(ROOT), "--toy", "--rounds", "1", "--records", str(tmp_path)])
    record = json.loads(path.read_text())
    assert [row["question"] for row in record["rows"]] == list(module.QUESTIONS)
    by_name = {row["question"]: row for row in record["rows"]}
    assert by_name["th.load"]["now_ms"] > by_name["transformers alone"]["now_ms"] > 0
    assert record["summary"]["linear layers"] == 14


def test_the_dense_model_has_as_many_parameters(module: Any, tmp_path: Path) -> None:
    module.write_models(tmp_path, 2)
    compressed, dense = (th.load(tmp_path / name) for name in ("compressed", "dense"))
    assert len(list(compressed.parameters())) == pytest.approx(len(list(dense.parameters())), abs=5)


def test_a_folder_without_the_library_is_refused(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        module.main([str(tmp_path)])
    assert "git worktree add" in capsys.readouterr().err
