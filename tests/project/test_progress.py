"""Progress where there is no terminal: nothing for short work, few lines for long work."""

from __future__ import annotations

import pytest

from tensornet._util import progress_bar


def test_short_work_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(3), desc="planning", unit="layer")) == [0, 1, 2]
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert capfd.readouterr().err == ""


def test_the_first_line_of_long_work_gives_the_estimate(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in progress_bar(range(3), desc="planning", unit="layer", delay=0, mininterval=0):
        pass
    assert "planning: 100%" in capfd.readouterr().err
