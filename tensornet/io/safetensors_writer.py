"""Writing safetensors files piece by piece: the bytes of a shard pass through, they are never collected."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from tensornet.errors import FormatError
from tensornet.io.safetensors_header import FLOATS, INTEGERS, PYTORCH, Slice, in_file_order, make_header

#: Bytes copied at a time.
CHUNK = 1 << 24

_NAMES = {dtype: name for name, dtype in (FLOATS | INTEGERS).items()}


@dataclass(frozen=True)
class Written:
    """A finished file.

    Args:
        name: of the file.
        nbytes: its length.
        sha256: of its content.
    """

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ShardTask:
    """One file of weights to put together.

    Args:
        path: file to write.
        tensors: where the content of each tensor lies now, by name.
        metadata: of the file.
    """

    path: Path
    tensors: Mapping[str, Slice]
    metadata: Mapping[str, str] = field(default_factory=lambda: PYTORCH)


def write_shard(task: ShardTask) -> Written:
    """Copy tensors, byte for byte, into one safetensors file.

    The file is what the safetensors library writes for the same tensors.

    Raises:
        FormatError: a source file has become shorter.
        OSError: it cannot be read or written.
    """
    names = in_file_order({name: part.dtype for name, part in task.tensors.items()})
    parts = {name: task.tensors[name] for name in names}
    header = make_header({name: (x.dtype, x.shape, x.nbytes) for name, x in parts.items()}, task.metadata)
    return write_file(task.path, chain([header], contents(parts.values())))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write contiguous tensors, floating or integer, into one safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    dtypes = {name: _NAMES[tensor.dtype] for name, tensor in tensors.items()}
    ordered = {name: tensors[name] for name in in_file_order(dtypes)}
    header = make_header(
        {name: (dtypes[name], tuple(x.shape), x.numel() * x.element_size()) for name, x in ordered.items()}
    )
    contents = (x.reshape(-1).view(torch.uint8).numpy().data for x in ordered.values())
    return write_file(path, [header, *contents])


def copy_file(source: Path, path: Path, name: str) -> Written:
    """Copy the content of one file, without its permissions; `name` is what the result is called."""
    with source.open("rb") as file:
        return replace(write_file(path, iter(lambda: file.read(CHUNK), b"")), name=name)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Write a file that is either there as a whole or not at all.

    It is written beside its place, flushed to the disk, and renamed.

    Raises:
        OSError: naming what could not be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    total, checksum = 0, hashlib.sha256()
    try:
        with beside.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                checksum.update(chunk)
                total += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return Written(path.name, total, checksum.hexdigest())


def file_digest(path: Path) -> Written:
    """What `write_file` would have returned for a file that is there."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum.update(chunk)
    return Written(path.name, path.stat().st_size, checksum.hexdigest())


def intact(path: Path, written: Written) -> bool:
    """Whether a file is there and has the content that was noted."""
    try:
        return path.stat().st_size == written.nbytes and file_digest(path).sha256 == written.sha256
    except OSError:
        return False


def contents(parts: Iterable[Slice]) -> Iterator[bytes]:
    """The bytes of some tensors one after the other, in chunks.

    Raises:
        FormatError: a file has become shorter.
    """
    for part in parts:
        with part.file.open("rb") as file:
            file.seek(part.start)
            left = part.nbytes
            while left:
                chunk = file.read(min(left, CHUNK))
                if not chunk:
                    raise FormatError(f"{part.file} has become shorter while it was being read.")
                left -= len(chunk)
                yield chunk
