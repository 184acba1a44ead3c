"""What other processes run in the tests of faults; imports little, so that they start quickly."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def die_first_time(place: tuple[str, int]) -> int:
    """Kill this process the first time a number is asked for; count the attempts in files."""
    folder, number = place
    attempts = [name for name in os.listdir(folder) if name.startswith(f"{number}-")]
    Path(folder, f"{number}-{len(attempts)}").touch()
    if not attempts and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def die_always(number: int) -> int:
    """Kill this process when asked for 3."""
    if number == 3:
        time.sleep(0.2)  # until the others are through
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def process_id_then_wait(folder: str) -> int:
    """Leave a file named after this process, and stay."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)
    return 0


def hold_pool(folder: str) -> None:
    """A parent with two workers that wait."""
    from tensornet.streaming.pool import run_tasks

    run_tasks(process_id_then_wait, [("a", folder), ("b", folder)], print, workers=2, start_method="fork")


def hold_destination(destination: str, ready: Connection) -> None:
    """Keep a destination locked until killed."""
    from tensornet_hf.streaming.journal import staging

    with staging(Path(destination)):
        ready.send("locked")
        time.sleep(60)


def compress_and_tell(
    answer: Connection, arguments: tuple[Any, ...], options: dict[str, Any], limits: dict[str, int]
) -> None:
    """Compress a checkpoint and tell how it went.

    Args:
        answer: gets the name of an error, its text and its traceback, or `"done"` and the report.
        arguments, options: of `compress_checkpoint`.
        limits: `file_size`: bytes beyond which no file grows; `data_growth`: bytes that this process may
            allocate on top of what it has.
    """
    from tensornet_hf.streaming import compress_checkpoint

    if "file_size" in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"],) * 2)
    if "data_growth" in limits:
        resource.setrlimit(resource.RLIMIT_DATA, (data_size() + limits["data_growth"],) * 2)
    try:
        report = compress_checkpoint(*arguments, **options)
    except BaseException as error:
        answer.send((type(error).__name__, str(error), traceback.format_exc()))
    else:
        answer.send(("done", report.to_dict(), str(report)))


def data_size() -> int:
    """Bytes of private writable memory of this process, what RLIMIT_DATA limits."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData")))


def allocate_and_tell(answer: Connection, size: int, growth: int) -> None:
    """Allocate so many bytes where only `growth` are allowed, and tell how it went."""
    resource.setrlimit(resource.RLIMIT_DATA, (data_size() + growth,) * 2)
    try:
        held = bytearray(size)
    except MemoryError:
        answer.send("MemoryError")
    else:
        answer.send(f"allocated {len(held)}")
