"""Killed, out of disk space, started twice: what a run leaves, and how the next one goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fault_tasks
import pytest
from sharded_folders import HALF, contents, save

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError
from tensornet.streaming.pool import WorkerError, run_tasks
from tensornet_hf.streaming.journal import staging_folder

CONFIG = tn.CompressionConfig(**HALF)
SMALL = {"max_shard_bytes": 6_000}


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Real processes that have the library imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensornet_hf.streaming"])
    return context


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("gpt2", tmp_path_factory.mktemp("faults") / "dense")


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, str]:
    th.compress_checkpoint(source, source.parent / "expected", CONFIG, **SMALL)
    return contents(source.parent / "expected")


class Run:
    """A run in another process."""

    def __init__(
        self, context: Any, *arguments: Any, limits: dict[str, int] | None = None, **options: Any
    ) -> None:
        self.answer, theirs = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(
            target=fault_tasks.compress_and_tell, args=(theirs, arguments, options, limits or {})
        )
        self.process.start()
        theirs.close()

    def result(self) -> tuple[str, Any, str]:
        """What it says when it ends."""
        answer = self.answer.recv()
        self.process.join()
        return answer


def finished_layers(out: Path) -> int:
    journal = staging_folder(out) / "journal"
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    return sum(b'"piece"' in line for line in lines if line.endswith(b"\n"))


def kill_after(run: Run, out: Path, lines: int, delay: float) -> None:
    """Kill a run when its journal has so many lines, and a moment more."""
    journal = staging_folder(out) / "journal"
    while run.process.is_alive() and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        time.sleep(0.0005)
    time.sleep(delay)
    run.process.kill()
    run.process.join()


def test_killed_at_random_moments_and_resumed(
    processes: Any, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    draw, before, interrupted = random.Random(6), contents(source), 0
    for trial in range(20):
        out = tmp_path / f"out{trial}"
        kill_after(Run(processes, source, out, CONFIG, **SMALL), out, trial, draw.uniform(0, 0.02))
        if out.exists():  # it was through
            assert contents(out) == expected
            continue
        interrupted += 1
        done = finished_layers(out)
        report = th.compress_checkpoint(source, out, CONFIG, **SMALL)
        assert report.resumed == done
        assert contents(out) == expected
        assert not staging_folder(out).exists()
    assert interrupted >= 10
    assert contents(source) == before


def test_killed_again_and_again(
    processes: Any, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """A run that is never left alone for long comes to its end all the same, and never loses ground."""
    draw, out, done = random.Random(7), tmp_path / "out", 0
    while not out.exists():
        kill_after(Run(processes, source, out, CONFIG, **SMALL), out, done + 3, draw.uniform(0, 0.02))
        assert out.exists() or finished_layers(out) >= min(done, 8)
        done += 2
    assert contents(out) == expected


def test_workers_end_with_their_parent(processes: Any, tmp_path: Path) -> None:
    parent = processes.Process(target=fault_tasks.hold_pool, args=(str(tmp_path),))
    parent.start()
    children = _wait_for(
        lambda: len(list(tmp_path.iterdir())) == 2 and [int(x.name) for x in tmp_path.iterdir()]
    )
    parent.kill()
    parent.join()
    _wait_for(lambda: not any(_alive(child) for child in children))


def test_a_worker_that_dies_is_replaced(processes: Any, tmp_path: Path) -> None:
    results: dict[str, int] = {}
    tasks = [(str(n), (str(tmp_path), n)) for n in range(5)]
    run_tasks(fault_tasks.die_first_time, tasks, results.__setitem__, workers=2, start_method="forkserver")
    assert results == {str(n): n * n for n in range(5)}
    assert (tmp_path / "1-1").exists()


def test_a_task_that_kills_its_workers_is_named(processes: Any) -> None:
    results: dict[str, int] = {}
    tasks = [(f"layer {n}", n) for n in range(5)]
    with pytest.raises(WorkerError, match=r"died 3 times while at work on.*layer 3.*fewer workers"):
        run_tasks(fault_tasks.die_always, tasks, results.__setitem__, workers=2, start_method="forkserver")
    assert {"layer 0", "layer 1", "layer 2"} <= set(results)


def test_no_space_left(processes: Any, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Files cannot grow beyond a limit, as on a full disk; the system enforces it for root as well."""
    out = tmp_path / "out"
    kind, text, _ = Run(processes, source, out, CONFIG, limits={"file_size": 9_000}, **SMALL).result()
    assert kind == "DestinationError"
    assert "What is finished is kept in" in text
    assert not out.exists()
    assert not list(staging_folder(out).rglob("*.tmp"))
    done = finished_layers(out)
    report = th.compress_checkpoint(source, out, CONFIG, **SMALL)
    assert report.resumed == done > 0
    assert contents(out) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 KB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = _mount("-t", "tmpfs", "-o", "size=48k", "tmpfs", folder)
    if done.returncode:
        pytest.skip(f"mounting a file system is not permitted here: {done.stderr.strip()}")
    yield folder
    # Lazily: a file that was just read may be mapped until the next collection of garbage.
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("room", [48, 72, 96])
def test_a_disk_that_is_full_in_the_middle(
    source: Path, expected: dict[str, str], small_disk: Path, room: int
) -> None:
    """Of three sizes, so that pieces, files of weights or the rest are what finds no room."""
    out = small_disk / "out"
    assert not _mount("-o", f"remount,size={room}k", small_disk).returncode
    with pytest.raises(DestinationError, match=r"No space left on device.*kept in .*free some space and run"):
        th.compress_checkpoint(source, out, CONFIG, **SMALL)
    assert not out.exists()
    assert not list(staging_folder(out).rglob("*.tmp"))
    assert not _mount("-o", "remount,size=4m", small_disk).returncode
    done = finished_layers(out)
    report = th.compress_checkpoint(source, out, CONFIG, **SMALL)
    assert report.resumed == done > 0
    assert contents(out) == expected
    assert os.listdir(small_disk) == ["out"]


def _mount(*options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *options], check=False, capture_output=True, text=True)


def test_two_runs_into_one_destination(processes: Any, source: Path, tmp_path: Path) -> None:
    ready, theirs = processes.Pipe(duplex=False)
    holder = processes.Process(target=fault_tasks.hold_destination, args=(str(tmp_path / "out"), theirs))
    holder.start()
    assert ready.recv() == "locked"
    with pytest.raises(DestinationError, match="Another run is writing"):
        th.compress_checkpoint(source, tmp_path / "out", CONFIG)
    holder.kill()
    holder.join()
    th.compress_checkpoint(source, tmp_path / "out", CONFIG)


def _wait_for(condition: Any, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture(autouse=True)
def _no_children_left() -> Iterator[None]:
    yield
    for child in multiprocessing.active_children():
        child.kill()
