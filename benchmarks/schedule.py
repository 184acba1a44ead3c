"""How long would a run take with more workers than this machine has cores?

    OMP_NUM_THREADS=1 python benchmarks/schedule.py [--source FOLDER] [--bits 4.25] [--tokens 4096] [--toy]

A model is compressed with one worker process beside the main process, and every task is recorded: when the
main process submits it, how long the worker takes, and when the main process waits for it. The schedule is
then played with 1 to 64 workers: a free worker takes the first task that was submitted, and the main process
takes as long between these events as it did. `clock` is the measured time with 1 and with 2 workers. Played
times only count if they agree with it; the main process and two workers need three cores.
"""

from __future__ import annotations

import argparse
import heapq
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import gpt2_path

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, record

WORKERS = (1, 2, 4, 8, 16, 32, 64)


class Event(NamedTuple):
    """Event of the main process.

    Args:
        kind: `"submit"`, `"wait"`, or `"end"` of the run.
        task: index of the task.
        busy: seconds that the main process was busy since the event before.
    """

    kind: str
    task: int
    busy: float


def play(events: Sequence[Event], seconds: Sequence[float], workers: int) -> float:
    """Return the seconds that a recorded run takes with another number of workers.

    Args:
        events: the events of the main process, in order.
        seconds: the duration of each task.
        workers: number of workers; each runs one task at a time.
    """
    clock, free, finished = 0.0, [0.0] * workers, {}
    for event in events:
        clock += event.busy
        if event.kind == "submit":
            finished[event.task] = max(clock, heapq.heappop(free)) + seconds[event.task]
            heapq.heappush(free, finished[event.task])
        elif event.kind == "wait":
            clock = max(clock, finished[event.task])
    return clock


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Call a function in a worker; return its seconds and its result."""
    start = time.perf_counter()
    found = function(*args)
    return time.perf_counter() - start, found


class Recorder(Executor):
    """Executor that records what another one does; the main process asks for the result of every task."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.events: list[Event] = []
        self.seconds: list[float] = []
        self.since = time.perf_counter()

    def note(self, kind: str, task: int) -> None:
        self.events.append(Event(kind, task, time.perf_counter() - self.since))
        self.since = time.perf_counter()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        recorder, task = self, len(self.seconds)
        inner = self.executor.submit(timed, function, *args, **kwargs)
        self.seconds.append(0.0)
        self.note("submit", task)

        class Recorded(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                recorder.note("wait", task)
                recorder.seconds[task], found = inner.result(timeout)
                recorder.since = time.perf_counter()
                return found

        return Recorded()


def run(source: Path, bits: float, tokens: int, workers: int) -> tuple[list[Event], list[float], float]:
    """Compress a model; return the events, the duration of each task, and the seconds of the whole run."""
    config = tn.CompressionConfig(bits_per_weight=bits)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        for _ in range(2):  # the first run starts the workers, which import modules
            recorder = Recorder(pool)
            options = th.CompressOptions(
                calibration="default", calibration_tokens=tokens, executor=recorder, force=True
            )
            start = time.perf_counter()
            th.compress_folder(source, Path(folder, "small"), config, options)
            recorder.note("end", -1)
        return recorder.events, recorder.seconds, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=gpt2_path(), help="folder of the model")
    parser.add_argument("--bits", type=float, default=4.25)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the survey")
    parser.add_argument("--toy", action="store_true", help="few tokens")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    tokens = 512 if given.toy else given.tokens
    events, seconds, first = run(given.source, given.bits, tokens, 1)
    clock = {1: first, 2: run(given.source, given.bits, tokens, 2)[2]}
    main_seconds, alone = sum(x.busy for x in events), play(events, seconds, 1)
    rows = []
    for workers in WORKERS:
        played = play(events, seconds, workers)
        rows.append(
            {
                "workers": workers,
                "played": played,
                "clock": clock.get(workers),
                "ratio": played / clock[workers] if workers in clock else None,
                "of_perfect": alone / (workers * played),
                "main_process": main_seconds,
                "tasks": len(seconds),
                "task_seconds": sum(seconds),
                "longest_task": max(seconds),
            }
        )
    return record("schedule", rows, folder=given.records, source=given.source.name, tokens=tokens)


if __name__ == "__main__":
    main()
