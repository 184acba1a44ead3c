"""Progress where there is no terminal: an estimate, then a line now and then, and nothing for short work."""

from __future__ import annotations

import io
import time

import pytest

import tensornet.progress as progress
from tensornet.progress import LineProgress, progress_bar


def test_long_work_is_estimated_and_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.1)
    monkeypatch.setattr(progress, "PERIOD", 0.25)
    out = io.StringIO()
    for _ in LineProgress(range(12), desc="planning", unit="layer", file=out):
        time.sleep(0.05)
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("planning: ") and " of 12 layers, " in line for line in lines)
    assert "about" in lines[0]
    assert "\r" not in out.getvalue()


def test_a_long_step_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.05)
    monkeypatch.setattr(progress, "PERIOD", 0.1)
    out = io.StringIO()
    with LineProgress(total=3, initial=1, desc="healing", unit="step", file=out):
        time.sleep(0.35)
    assert 2 <= len(out.getvalue().splitlines()) <= 4
    assert out.getvalue().startswith("healing: 1 of 3 steps, 0 s gone\n")


def test_short_work_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(range(3), desc="planning", unit="layer")
    assert isinstance(bar, LineProgress)
    assert list(bar) == [0, 1, 2]
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert capfd.readouterr().err == ""
