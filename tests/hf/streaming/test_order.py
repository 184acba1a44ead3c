"""Who computed what, in which order, and how often the run stopped leaves no trace in the result."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sharded_folders import HALF, contents, save

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError, FormatError
from tensornet.streaming import pool
from tensornet_hf.streaming import run
from tensornet_hf.streaming.journal import Staging, staging, staging_folder

CONFIG = tn.CompressionConfig(**HALF)
SMALL = {"max_shard_bytes": 6_000}


class Stop(Exception):
    """What a test raises where a run shall end."""


class Shuffled(Executor):
    """Runs tasks here, in an order of its own, when somebody waits for the last one submitted."""

    def __init__(self, seed: int, count: int) -> None:
        self.random, self.count = random.Random(seed), count
        self.waiting: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []
        self.ran: list[Any] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, function, args))
        if len(self.waiting) == self.count or self.ran:
            self.random.shuffle(self.waiting)
            for made, call, given in self.waiting:
                self.ran.append(given)
                made.set_result(call(*given))
            self.waiting = []
        return future


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("gpt2", tmp_path_factory.mktemp("order") / "dense")


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, str]:
    th.compress_checkpoint(source, source.parent / "expected", CONFIG, **SMALL)
    return contents(source.parent / "expected")


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let a run end after some lines of its journal."""
    original = Staging.note

    def arm(lines: int) -> None:
        left = iter(range(lines))

        def note(self: Staging, entry: dict[str, Any]) -> None:
            if next(left, None) is None:
                raise Stop
            original(self, entry)

        monkeypatch.setattr(Staging, "note", note)

    return arm


def test_same_bytes_again(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    th.compress_checkpoint(source, tmp_path / "again", CONFIG, **SMALL)
    assert contents(tmp_path / "again") == expected


@pytest.mark.parametrize("seed", range(3))
def test_same_bytes_in_any_order(source: Path, expected: dict[str, str], tmp_path: Path, seed: int) -> None:
    executor = Shuffled(seed, count=8)
    th.compress_checkpoint(source, tmp_path / "out", CONFIG, executor=executor, **SMALL)
    assert len(executor.ran) > 8
    assert contents(tmp_path / "out") == expected


def test_same_bytes_from_threads(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as executor:
        th.compress_checkpoint(source, tmp_path / "out", CONFIG, executor=executor, **SMALL)
    assert contents(tmp_path / "out") == expected


def test_same_bytes_from_processes(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    report = th.compress_checkpoint(source, tmp_path / "out", CONFIG, workers=2, **SMALL)
    assert contents(tmp_path / "out") == expected
    assert report.workers in (1, 2)  # on a busy machine the first may be through before the second is up
    assert report.worker_memory > 50e6
    assert f"in the largest of {report.workers} workers" in str(report)


@pytest.mark.parametrize("lines", [0, 1, 5, 8, 9, 12])
def test_same_bytes_after_an_interruption(
    source: Path, expected: dict[str, str], tmp_path: Path, stop_after: Callable[[int], None], lines: int
) -> None:
    out = tmp_path / "out"
    stop_after(lines)
    with pytest.raises(Stop):
        th.compress_checkpoint(source, out, CONFIG, **SMALL)
    assert not out.exists()
    stop_after(10**6)
    report = th.compress_checkpoint(source, out, CONFIG, **SMALL)
    assert report.resumed == min(lines, 8)
    assert contents(out) == expected
    assert not staging_folder(out).exists()


def test_finished_layers_are_not_done_again(
    source: Path, tmp_path: Path, stop_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(5)
    with pytest.raises(Stop):
        th.compress_checkpoint(source, tmp_path / "out", CONFIG)
    stop_after(10**6)
    done: list[str] = []
    monkeypatch.setattr(run, "compress_piece", _counting(run.compress_piece, done))
    th.compress_checkpoint(source, tmp_path / "out", CONFIG)
    assert len(done) == 3


@pytest.mark.parametrize(
    "damage", ["torn piece", "lost piece", "torn shard", "torn journal", "wrong journal"]
)
def test_torn_work_is_done_again(
    source: Path, expected: dict[str, str], tmp_path: Path, stop_after: Callable[[int], None], damage: str
) -> None:
    out = tmp_path / "out"
    stop_after(16 if damage == "torn shard" else 6)
    with pytest.raises(Stop):
        th.compress_checkpoint(source, out, CONFIG, **SMALL)
    work = staging_folder(out)
    journal = work / "journal"
    if damage == "torn shard":
        for file in (work / "out").glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1] + b"\1")
    elif damage == "torn piece":
        file = min((work / "pieces").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "lost piece":
        min((work / "pieces").glob("*.safetensors")).unlink()
    elif damage == "torn journal":
        journal.write_bytes(journal.read_bytes()[:-20])
    else:
        lines = journal.read_bytes().splitlines(keepends=True)
        lines[2] = lines[2].replace(b"low_rank", b"low_tank")
        journal.write_bytes(b"".join(lines))
    stop_after(10**6)
    report = th.compress_checkpoint(source, out, CONFIG, **SMALL)
    assert report.resumed < (8 if damage == "torn shard" else 6)
    assert contents(out) == expected


def test_resume_false_starts_again(source: Path, tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    stop_after(5)
    with pytest.raises(Stop):
        th.compress_checkpoint(source, tmp_path / "out", CONFIG)
    stop_after(10**6)
    assert th.compress_checkpoint(source, tmp_path / "out", CONFIG, resume=False).resumed == 0


def test_other_options_do_not_continue_a_run(
    source: Path, tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    stop_after(5)
    with pytest.raises(Stop):
        th.compress_checkpoint(source, tmp_path / "out", CONFIG)
    with pytest.raises(FormatError, match="had other options"):
        th.compress_checkpoint(source, tmp_path / "out", tn.CompressionConfig(param_ratio=0.4))


def test_two_runs_into_one_destination(source: Path, tmp_path: Path) -> None:
    with staging(tmp_path / "out"), pytest.raises(DestinationError, match="Another run is writing"):
        th.compress_checkpoint(source, tmp_path / "out", CONFIG)
    th.compress_checkpoint(source, tmp_path / "out", CONFIG)


def test_dask_is_an_executor(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            host="127.0.0.1",
            protocol="tcp://",
            dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):
        th.compress_checkpoint(source, tmp_path / "out", CONFIG, executor=executor, **SMALL)
    assert contents(tmp_path / "out") == expected


def test_the_first_failure_ends_a_run() -> None:
    done: list[str] = []
    with ThreadPoolExecutor(1) as executor, pytest.raises(ZeroDivisionError):
        pool.run_tasks(
            _reciprocal,
            [(str(x), x) for x in (2, 1, 0, 4)],
            lambda name, _: done.append(name),
            executor=executor,
        )
    assert set(done) <= {"2", "1", "4"}


def _reciprocal(x: int) -> float:
    return 1 / x


def _counting(function: Callable[[Any], Any], calls: list[str]) -> Callable[[Any], Any]:
    def counted(task: Any) -> Any:
        calls.append(task.uses[0].name)
        return function(task)

    return counted
