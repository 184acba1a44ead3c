"""Staging folder beside the destination, with a lock and a journal, so that work survives interruption.

    .NAME.partial/lock           held while a run writes here
    .NAME.partial/journal        one line for each finished piece or file, with its checksum
    .NAME.partial/pieces/        cores of single layers
    .NAME.partial/out/           becomes NAME by one rename, when everything is in it

A process killed at any moment leaves at most files that no line of the journal names, and one torn line at
its end. Both are ignored by the next run.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from tensornet.errors import DestinationError
from tensornet.io import take_place, write_file


class Staging:
    """Staging folder of a run, with the finished work of earlier attempts.

    Args:
        folder: the staging folder; see `staging`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces, self.out = folder / "pieces", folder / "out"
        self.pieces.mkdir(exist_ok=True)
        self.out.mkdir(exist_ok=True)
        self._journal: IO[bytes] | None = None

    @property
    def journal(self) -> Path:
        """Journal file, with one line for each finished piece."""
        return self.folder / "journal"

    def entries(self) -> list[dict[str, Any]]:
        """Read the lines of the journal in order, up to the first torn or altered one."""
        if not self.journal.is_file():
            return []
        entries = []
        for line in self.journal.read_bytes().splitlines(keepends=True):
            entry = _entry(line)
            if entry is None:
                break
            entries.append(entry)
        return entries

    def begin(self, kept: list[dict[str, Any]]) -> None:
        """Start a journal with the valid entries of an earlier one; `note` appends to it."""
        write_file(self.journal, map(_line, kept))
        self._journal = self.journal.open("ab")

    def note(self, entry: dict[str, Any]) -> None:
        """Append one line and flush it to the disk."""
        assert self._journal is not None
        self._journal.write(_line(entry))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def clear(self) -> None:
        """Delete all staged work."""
        self.close()
        self.journal.unlink(missing_ok=True)
        for folder in (self.pieces, self.out):
            shutil.rmtree(folder)
            folder.mkdir()

    def publish(self, destination: Path) -> None:
        """Flush the finished folder and rename it to its final name, atomically."""
        self.close()
        take_place(self.out, destination)
        shutil.rmtree(self.folder)


def staging_folder(destination: Path) -> Path:
    """Return the folder beside a destination: on the same file system, so that the rename is one step."""
    return destination.with_name(f".{destination.name}.partial")


@contextmanager
def staging(destination: Path) -> Iterator[Staging]:
    """Open the staging folder of a destination, made if absent, locked against other runs.

    The lock belongs to the process: the system drops it when the process ends, however it ends.

    Raises:
        DestinationError: another run holds the lock.
        OSError: the folder cannot be made.
    """
    folder = staging_folder(destination)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DestinationError(
            f"Another run is writing {destination} (it holds {folder / 'lock'}). Wait for it, or choose "
            "another destination."
        ) from error
    try:
        with closing(Staging(folder)) as made:
            yield made
    finally:
        lock.release()


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the journal; None if its checksum does not match."""
    checksum, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest().encode() != checksum:
        return None
    entry = json.loads(text)
    assert isinstance(entry, dict)
    return entry
