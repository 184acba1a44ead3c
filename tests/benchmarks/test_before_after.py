"""The comparison with another checkout, of this one with itself at toy size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("before_after")


def test_a_checkout_is_compared_with_itself(module: Any, tmp_path: Path) -> None:
    path = module.main([str(ROOT), "--toy", "--rounds", "1", "--records", str(tmp_path)])
    record = json.loads(path.read_text())
    assert [row["question"] for row in record["rows"]] == list(module.questions(True))
    assert all(row["ratio"] > 0 and row["before_ms"] > 0 for row in record["rows"])


def test_a_folder_without_the_library_is_refused(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        module.main([str(tmp_path)])
    assert "git worktree add" in capsys.readouterr().err
