"""Staging folders: unfinished results, which an interrupted run can continue.

A run writes to `.NAME.partial` next to its destination, and renames the result when it is complete. A record
contains everything that the files in this folder depend on. If it differs, none of them is used.

    .NAME.partial/lock           locked while a run writes to this folder
    .NAME.partial/run.json       the record
    .NAME.partial/surveyed/      hidden states of a survey, which cannot be continued
    .NAME.partial/states/        hidden states before the block that is being written
    .NAME.partial/out/           unfinished files of the result
    .NAME.partial/...            other files that the run has made so far
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from torch import Tensor

import tensornet as tn
from tensornet.errors import DestinationError, FormatError, TensorNetError
from tensornet.io import load_slice, read_header, write_file, write_tensors
from tensornet_hf.checkpoint import other_files, read_json, weight_files

LOCK, RECORD = "lock", "run.json"
#: Folders in a staging folder: hidden states of a survey, hidden states of a run, and unfinished files.
SURVEYED, STATES, OUT = "surveyed", "states", "out"


def staging_folder(destination: Path) -> Path:
    """Return the staging folder of a destination; both have the same parent folder."""
    return destination.with_name(f".{destination.name}.partial")


@contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """Create the staging folder of a destination if necessary, and lock it within a `with` block.

    The operating system releases the lock when the process ends, even if the process is killed.

    Raises:
        DestinationError: another run has locked the folder, or the folder cannot be created.
    """
    folder = staging_folder(destination)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(
            f"{destination} cannot be written: {error}. Choose another destination."
        ) from error
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DestinationError(
            f"Another run is writing {destination} (it has locked {folder / LOCK}). Wait until it has "
            "finished, or choose another destination."
        ) from error
    try:
        yield folder
    finally:
        if not _kept(folder):
            shutil.rmtree(folder, ignore_errors=True)  # no run could continue from these files
        lock.release()


def _kept(folder: Path) -> list[Path]:
    """List what a run has finished: files from which another one could continue."""
    unfinished = (LOCK, RECORD, SURVEYED, STATES, OUT)
    return [x for x in folder.glob("*") if x.name not in unfinished and not x.name.endswith(".new")]


def begin(
    work: Path,
    sources: Mapping[str, str],
    depends_on: Mapping[str, Any],
    *,
    resume: bool,
    reusable: Mapping[str, Any] = {},
) -> None:
    """Keep the files of an interrupted run if they belong to this run; otherwise delete all of them.

    Args:
        work: the staging folder, locked by this process.
        sources: size and modification time of each file that the run reads, by path (see `file_marks`).
        depends_on: everything else that the result depends on, such as options and texts, by its name;
            JSON-ready.
        resume: whether to continue an interrupted run.
        reusable: files that depend on less than the result does, and what they depend on. As long as there is
            nothing else, other options are no error: these files are kept if this is unchanged, or deleted.

    Raises:
        FormatError: `resume` is set, but the interrupted run read other files, or had other options or other
            versions of the library.
    """
    versions = {"tensornet": tn.__version__, "torch": torch.__version__}
    record: dict[str, Any] = {
        "library": {**versions, "transformers": transformers.__version__},
        "sources": dict(sources),
        "depends_on": {what: json_digest(x) for what, x in depends_on.items()},
        "reusable": {name: json_digest(x) for name, x in reusable.items()},
    }
    path, again = work / RECORD, "start again with resume=False"
    shutil.rmtree(work / SURVEYED, ignore_errors=True)
    keep = {LOCK}
    if resume and _kept(work) and path.is_file():
        earlier = read_json(path)
        if all(earlier.get(key) == x for key, x in record.items()):
            return
        if (work / OUT).is_dir() or {x.name for x in _kept(work)} - reusable.keys():
            if changed := _differing(earlier.get("sources") or {}, sources):
                raise FormatError(
                    f"{', '.join(changed)} changed since the interrupted run, so what is in {work} belongs "
                    f"to the old content. Restore the old files, or {again}."
                )
            what = _differing(earlier.get("depends_on") or {}, record["depends_on"])
            if earlier.get("library") != record["library"]:
                what = ["versions of the library"]
            raise FormatError(
                f"The interrupted run in {work} had other {' and '.join(what) or 'options'}. "
                f"Use the same to continue it, or {again}."
            )
        if all(earlier.get(key) == record[key] for key in ("library", "sources")):
            known = earlier.get("reusable") or {}
            keep |= {name for name, x in record["reusable"].items() if known.get(name) == x}
    for file in work.iterdir():
        if file.name not in keep:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    write_file(path, [json.dumps(record).encode()])


def check_unchanged(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise FormatError if files changed while they were read."""
    if changed := _differing(before, now):
        raise FormatError(
            f"{', '.join(changed)} changed since this run began, so finished tensors belong to the old "
            "content. Restore the old files, or start again with resume=False."
        )


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return sorted(x for x in before.keys() | now.keys() if before.get(x) != now.get(x))


def json_digest(content: Any) -> str:
    """Return the SHA-256 of JSON-ready content; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_marks(folder: Path, weights: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Return the size and modification time of each file that is read from a model folder, by path.

    Args:
        folder: the model folder.
        weights: file that is read in place of the weight files of the folder.
    """
    files = weight_files(folder)[0] if weights is None else [Path(weights)]
    marks = {}
    for path in [folder / "config.json", *files, *(folder / name for name in other_files(folder))]:
        stat = path.stat()
        marks[str(path)] = f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
    return marks


@contextmanager
def reading_or_writing(source: Path, destination: Path) -> Iterator[None]:
    """Convert OSError within a `with` block to errors that say what failed and which files are kept."""
    try:
        yield
    except (OSError, DestinationError) as error:
        known = isinstance(error, TensorNetError)
        if known and not isinstance(error.__cause__, OSError):
            raise
        work = staging_folder(destination)
        kept = f" Finished tensors are kept in {work}." if work.is_dir() and _kept(work) else ""
        if not known and str(error.filename or "").startswith(str(source)):
            raise FormatError(f"Reading {source} failed: {error}.{kept}") from error
        todo = "run the same command again, or delete this folder" if kept else "run the same command again"
        raise DestinationError(
            f"Writing {destination} failed: {error}.{kept} Free some space and {todo}."
        ) from error


class StatesOnDisk:
    """Hidden states in files, as a mapping from `(block, batch)` (see `tensornet.calibration.walk.Walk`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __getitem__(self, key: tuple[int, int], /) -> Tensor:
        return load_slice(read_header(self._path(key))["x"])

    def __setitem__(self, key: tuple[int, int], value: Tensor, /) -> None:
        write_tensors(self._path(key), {"x": value.detach().float().cpu().contiguous()})

    def __delitem__(self, key: tuple[int, int], /) -> None:
        self._path(key).unlink()

    def complete(self, batches: int) -> int:
        """Return the largest index of a block before which the states of all batches are known, or 0."""
        found = Counter(int(file.name.partition("-")[0]) for file in self.folder.glob("*-*.safetensors"))
        return max((block for block, count in found.items() if count == batches), default=0)

    def clear(self) -> None:
        """Remove all states."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def _path(self, key: tuple[int, int]) -> Path:
        return self.folder / "{}-{}.safetensors".format(*key)
