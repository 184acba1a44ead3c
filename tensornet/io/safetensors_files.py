"""Read headers of safetensors files, map and write their tensors.

The safetensors package checks headers and writes tensors that are in memory. What it does not do is here:
telling the bytes of a tensor in its file, refusing a name that occurs twice, and copying tensors from file
to file.
"""

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensornet.errors import FormatError
from tensornet.io.atomic import CHUNK, Written, new_file, write_file

#: Metadata that transformers looks for.
PYTORCH = {"format": "pt"}
#: Dtypes in which weights can be decomposed.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Dtypes of tensors that can be mapped: weights, and buffers such as counters, positions and masks.
MAPPED = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# The package sorts the tensors of a file by dtype in this order, then by name.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """Location of a tensor inside a file.

    Args:
        file: the safetensors file.
        dtype: as named in the header, such as `"BF16"`.
        shape: of the tensor.
        start: first byte, counted from the start of the file.
        stop: end, exclusive.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Slice]:
    """Locate all tensors of a safetensors file, by name; nothing but the header is read.

    Raises:
        FormatError: the file cannot be read, is truncated, its header contradicts itself or the file, or a
            name occurs twice.
    """
    try:
        with path.open("rb") as file, safe_open(path, framework="np"):  # checks sizes and offsets
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length), object_pairs_hook=_unique)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is truncated or damaged: {error!s:.200}. Copy or download it again."
        ) from error
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror or error}.") from error
    entries.pop("__metadata__", None)
    return {
        name: Slice(path, x["dtype"], tuple(x["shape"]), *(8 + length + place for place in x["data_offsets"]))
        for name, x in entries.items()
    }


def read_headers(files: Iterable[Path]) -> dict[str, Slice]:
    """Locate all tensors of several files, by name.

    Raises:
        FormatError: as `read_header`, or two files hold the same name.
    """
    tensors: dict[str, Slice] = {}
    for file in files:
        for name, part in read_header(file).items():
            if name in tensors:
                raise FormatError(f"{file} and {tensors[name].file} both store {name!r}.")
            tensors[name] = part
    return tensors


def load_slice(part: Slice) -> Tensor:
    """Map one tensor into memory: only the pages that are touched are ever resident.

    The mapping is private to the process and copy-on-write; the file is never changed.

    Raises:
        FormatError: the file has become shorter, or holds a dtype that is not in `MAPPED`.
    """
    if part.dtype not in MAPPED:
        raise FormatError(
            f"{part.file} holds a tensor of dtype {part.dtype}, which cannot be mapped; mapped are "
            f"{', '.join(MAPPED)}. Load the model and save it in one of these."
        )
    dtype = MAPPED[part.dtype]
    if part.nbytes == 0:
        return torch.empty(part.shape, dtype=dtype)
    page = part.start - part.start % mmap.ALLOCATIONGRANULARITY
    with part.file.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), part.stop - page, access=mmap.ACCESS_COPY, offset=page)
        except ValueError as error:  # beyond the end of the file
            raise FormatError(f"{part.file} has become shorter since its header was read.") from error
    flat = torch.frombuffer(mapped, dtype=dtype, count=part.numel, offset=part.start - page)
    return flat.reshape(part.shape)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] = PYTORCH,
    *,
    what: str | None = None,
) -> None:
    """Write tensors that are in memory into one file, atomically.

    Args:
        path: of the file.
        tensors: contiguous, no two in the same memory.
        metadata: of the file.
        what: names the file in errors, see `tensornet.io.atomic.new_file`.

    Raises:
        DestinationError: `what` is given, and the file cannot be written.
        OSError: it cannot be written otherwise.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "x.safetensors")
        >>> write_tensors(path, {"x": torch.ones(2, 3)})
        >>> read_header(path)["x"].shape
        (2, 3)
    """
    with new_file(Path(path), what=what) as beside:
        try:
            save_file(dict(tensors), beside, dict(metadata))
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error


@dataclass(frozen=True)
class ShardTask:
    """Shard to assemble: its path and the tensors it holds.

    Args:
        path: file to write.
        tensors: where the content of each tensor lies now, by name.
        metadata: of the file.
    """

    path: Path
    tensors: Mapping[str, Slice]
    metadata: Mapping[str, str] = field(default_factory=lambda: PYTORCH)


def write_shard(task: ShardTask) -> Written:
    """Copy tensors from other files, chunk by chunk, into the file that the safetensors package would write.

    Bytes are copied so that memory holds one chunk, whatever the dtype: the package would need all tensors
    of the file in memory, or mapped, and a mapped file that is cut short kills the process.

    Raises:
        FormatError: a source file has become shorter.
        OSError: a file cannot be read or written.
    """
    rank = {dtype: place for place, dtype in enumerate(_ORDER)}
    parts = dict(sorted(task.tensors.items(), key=lambda x: (rank.get(x[1].dtype, len(rank)), x[0])))
    entries: dict[str, Any] = {"__metadata__": dict(task.metadata)}
    end = 0
    for name, part in parts.items():
        place = [end, end := end + part.nbytes]
        entries[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the buffer starts aligned
    return write_file(task.path, chain([len(text).to_bytes(8, "little"), text], contents(parts.values())))


def contents(parts: Iterable[Slice]) -> Iterator[bytes]:
    """Yield the bytes of tensors one after another, in chunks.

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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return made
