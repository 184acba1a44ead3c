"""A file of known layout is written in any order, and by several runs, down to the same bytes."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tensornet.errors import DestinationError, FormatError
from tensornet.io import ResumableFile

HEADER = b"head:"
DATA = {"a": b"first", "b": b"", "c": b"second" * 1000, "d": b"third"}
#: Each part begins at a multiple of 8; the file ends with padding.
PARTS: dict[str, tuple[int, int]] = {}
for part, content in DATA.items():
    PARTS[part] = (max((8 * -(-(x + y) // 8) for x, y in PARTS.values()), default=8), len(content))
NBYTES = 6100


def expected() -> bytes:
    whole = bytearray(NBYTES)
    whole[: len(HEADER)] = HEADER
    for name, (offset, length) in PARTS.items():
        whole[offset : offset + length] = DATA[name]
    return bytes(whole)


def opened(folder: Path, **options: Any) -> ResumableFile:
    return ResumableFile(folder / "unfinished", HEADER, PARTS, **{"nbytes": NBYTES, **options})


def write(file: ResumableFile, *names: str) -> None:
    for name in names:
        file.write(name, [DATA[name][:2], memoryview(DATA[name])[2:]])


@pytest.mark.parametrize("order", list(itertools.permutations("abcd"))[::5])
def test_parts_are_written_in_any_order_and_number_of_runs(order: tuple[str, ...], tmp_path: Path) -> None:
    for stop in range(5):
        first = opened(tmp_path)
        write(first, *order[:stop])
        second = opened(tmp_path)
        assert second.missing() == [name for name in "abcd" if name not in order[:stop]]
        write(second, *order[stop:])
        second.finish(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == expected()
        assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_a_part_is_written_exactly_once_and_whole(tmp_path: Path) -> None:
    file = opened(tmp_path)
    write(file, "c")
    with pytest.raises(ValueError, match="already"):
        file.write("c", [DATA["c"]])
    with pytest.raises(ValueError, match="not in the layout"):
        file.write("x", [b"x"])
    for chunks in ([b"shor"], [b"too", b" long"], []):
        with pytest.raises(ValueError, match="5 bytes"):
            file.write("a", chunks)
    assert file.missing() == ["a", "b", "d"]
    with pytest.raises(ValueError, match="3 parts"):
        file.finish(tmp_path / "file")
    write(file, "a", "b", "d")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DestinationError, match="exists"):
        file.finish(tmp_path / "file", force=False)
    assert (tmp_path / "file").read_text() == "mine"
    file.finish(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == expected()


def test_damaged_parts_are_written_again(tmp_path: Path) -> None:
    write(opened(tmp_path), *"abcd")
    unfinished = tmp_path / "unfinished"
    content = bytearray(unfinished.read_bytes())
    content[PARTS["c"][0]] ^= 1
    unfinished.write_bytes(content)
    assert opened(tmp_path).missing() == ["c"]
    unfinished.write_bytes(content[: PARTS["c"][0] + 10])  # also cuts off part d
    file = opened(tmp_path)
    assert file.missing() == ["c", "d"]
    write(file, "d", "c")
    file.finish(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == expected()
    # Without the unfinished file, or without its journal, everything is missing.
    for lost in ("unfinished", "unfinished.journal"):
        write(opened(tmp_path), *"ac")
        (tmp_path / lost).unlink()
        file = opened(tmp_path)
        assert file.missing() == [*"abcd"]
        assert unfinished.read_bytes()[len(HEADER) :] == bytes(NBYTES - len(HEADER))
        file.path.unlink()
        file.journal.unlink()


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = opened(tmp_path)
    write(file, *"abc")
    lines = file.journal.read_bytes()
    for cut in range(lines.rindex(b"{"), len(lines) - 1, 9):
        file.journal.write_bytes(lines[:cut])
        again = opened(tmp_path)
        assert again.missing() == ["c", "d"]
        write(again, "d")
        assert opened(tmp_path).missing() == ["c"]


def test_an_unfinished_file_of_another_run_is_refused(tmp_path: Path) -> None:
    write(opened(tmp_path, key="seed 0"), "c")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = {**PARTS, "d": (PARTS["d"][0] + 8, PARTS["d"][1])}
    with pytest.raises(FormatError, match="options"):
        opened(tmp_path, key="seed 1")
    with pytest.raises(FormatError, match="layout"):
        opened(tmp_path, key="seed 0", nbytes=NBYTES + 1)
    for header, parts in ((b"tail:", PARTS), (HEADER, changed)):
        with pytest.raises(FormatError, match="layout"):
            ResumableFile(tmp_path / "unfinished", header, parts, nbytes=NBYTES, key="seed 0")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("parts", [{"a": (4, 2)}, {"a": (5, 2), "b": (6, 2)}, {"a": (10, 2)}])
def test_parts_that_overlap_or_exceed_the_file(parts: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes"):
        ResumableFile(tmp_path / "unfinished", HEADER, parts, nbytes=11)
    assert not list(tmp_path.iterdir())


@contextmanager
def longest_file(nbytes: int) -> Iterator[None]:
    """Let the operating system refuse longer files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name == "nt", reason="there is no RLIMIT_FSIZE")
def test_a_full_disk(tmp_path: Path) -> None:
    with longest_file(NBYTES - 1), pytest.raises(DestinationError, match="The model"):
        opened(tmp_path, what="The model")
    assert not list(tmp_path.iterdir())  # known before the first part
    file = opened(tmp_path, what="The model")
    write(file, "d", "a")
    with longest_file(3000), pytest.raises(DestinationError, match="The model"):
        write(file, "c")
    assert file.missing() == ["b", "c"]
    file = opened(tmp_path)
    assert file.missing() == ["b", "c"]
    write(file, "b", "c")
    file.finish(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == expected()


PROGRAM = """
import os, signal, sys
from pathlib import Path
from tests.io.test_resumable_file import opened, write
calls, sync = [], os.fsync
def killed(handle):
    calls.append(handle)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = killed
file = opened(Path(sys.argv[1]))
write(file, *file.missing())
file.finish(Path(sys.argv[1]) / "file", force=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_again_and_again(tmp_path: Path) -> None:
    """Run after run is killed before its first, second, third, ... write to the disk."""
    left = []
    for calls in range(1, 30):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(calls)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not (tmp_path / "file").exists()
        if calls > 2:
            left.append(len(opened(tmp_path).missing()))
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 2
    assert (tmp_path / "file").read_bytes() == expected()
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
