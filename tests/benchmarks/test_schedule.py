"""Schedules that are played, against schedules by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize(("workers", "seconds"), [(1, 1 + 9 + 2), (2, 1 + 5 + 2), (3, 1 + 4 + 2), (64, 7)])
def test_free_workers_take_the_first_task(
    workers: int, seconds: float, load_benchmark: Callable[[str], Any]
) -> None:
    """Tasks of 4, 2 and 3 seconds are submitted after 1 second, and 2 seconds of work follow."""
    schedule = load_benchmark("schedule")
    submitted = [schedule.Event("submit", task, 0.0 if task else 1.0) for task in range(3)]
    waits = [schedule.Event("wait", task, 0.0) for task in range(3)]
    events = [*submitted, *waits, schedule.Event("end", -1, 2.0)]
    assert schedule.play(events, [4.0, 2.0, 3.0], workers) == seconds


def test_the_main_process_works_while_tasks_run(load_benchmark: Callable[[str], Any]) -> None:
    schedule = load_benchmark("schedule")
    kinds = [("submit", 0, 0.0), ("submit", 1, 3.0), ("wait", 0, 0.0), ("wait", 1, 0.0), ("end", -1, 0.0)]
    events = [schedule.Event(*x) for x in kinds]
    assert schedule.play(events, [5.0, 1.0], 1) == 6.0
    assert schedule.play(events, [5.0, 1.0], 2) == 5.0
