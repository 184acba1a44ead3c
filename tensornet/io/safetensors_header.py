"""Headers of safetensors files, read strictly: where each tensor lies, in bytes.

A file is an 8-byte little-endian length, a JSON header of that length, and a buffer that the tensors fill
without holes. Nothing is trusted: a header that lies about lengths or places is refused before a byte of
the buffer is read, and no more is allocated than the file is long.

Reference: the format page of the safetensors project.
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensornet.errors import FormatError

#: Largest header read, the limit of the safetensors library.
MAX_HEADER = 100_000_000

#: Metadata that transformers looks for.
PYTORCH = {"format": "pt"}

#: Bits of an element, by name in a header.
BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
#: Dtypes of what is stored in place of a weight.
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
#: Dtypes in which weights can be decomposed.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Slice:
    """A tensor inside a file.

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
    """All tensors of a safetensors file, by name.

    Raises:
        FormatError: the file is truncated, or its header contradicts itself or the file.
        OSError: it cannot be opened.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
            raise _damaged(path, f"it is {size} bytes long and its header claims {length}")
        text = file.read(length)
    entries = parse_header(text, path)
    data = 8 + length
    slices = {}
    for name, entry in entries.items():
        try:
            slices[name] = _slice(entry, path, data)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"the entry of {name!r:.80} is {entry!r:.200} ({error})") from error
    end = data
    for name, part in sorted(slices.items(), key=lambda item: (item[1].start, item[1].stop)):
        if part.start != end:
            raise _damaged(path, f"{name!r:.80} starts at byte {part.start}, {end} was expected")
        end = part.stop
    if end != size:
        raise _damaged(path, f"it is {size} bytes long, its header says {end}")
    return slices


def parse_header(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON of a header without `__metadata__`; `path` is for messages.

    Raises:
        FormatError: not JSON, not an object, or a name twice.
    """
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # also what JSON and UTF-8 errors are
        raise _damaged(path, f"its header is not JSON: {error!s:.200}") from error
    if not isinstance(entries, dict):
        raise _damaged(path, f"its header is a {type(entries).__name__}, not an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is not a mapping of texts")
    return entries


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str] = PYTORCH
) -> bytes:
    """Length and JSON of a header, as the safetensors library writes them.

    Args:
        tensors: `{name: (dtype, shape, bytes)}` in the order of the buffer; see `in_file_order`.
        metadata: of the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the buffer starts aligned
    return len(text).to_bytes(8, "little") + text


def in_file_order(dtypes: Mapping[str, str]) -> list[str]:
    """Names in the order in which the safetensors library stores them: wide dtypes first, then by name."""
    rank = {dtype: place for place, dtype in enumerate(_WIDEST_FIRST)}
    return sorted(dtypes, key=lambda name: (rank[dtypes[name]], name))


def load_slice(part: Slice) -> Tensor:
    """One tensor, mapped into memory: only what is read of it is ever resident.

    The mapping is private to the process and copy-on-write; the file is never changed.

    Raises:
        FormatError: the file has become shorter.
        TypeError: a dtype that is not a float.
    """
    if part.dtype not in FLOATS:
        raise TypeError(f"Cannot map a tensor of dtype {part.dtype}; mapped are {', '.join(FLOATS)}.")
    dtype = FLOATS[part.dtype]
    if part.nbytes == 0:
        return torch.empty(part.shape, dtype=dtype)
    page = part.start - part.start % mmap.ALLOCATIONGRANULARITY
    with part.file.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), part.stop - page, access=mmap.ACCESS_COPY, offset=page)
        except ValueError as error:  # beyond the end of the file
            raise _damaged(part.file, "it has become shorter since its header was read") from error
    count = math.prod(part.shape)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=part.start - page).reshape(part.shape)


# The order of the library's own dtype list, reversed, which is what its writer sorts by.
_WIDEST_FIRST = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


def _slice(entry: Any, path: Path, data: int) -> Slice:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("expected dtype, shape and data_offsets")
    shape, (start, stop), bits = entry["shape"], entry["data_offsets"], BITS[entry["dtype"]]
    if len(shape) > 64 or not all(type(x) is int and 0 <= x < 2**62 for x in (*shape, start, stop)):
        raise ValueError("sizes and places must be whole and not negative, and at most 64")
    if (stop - start) * 8 != math.prod(shape) * bits:
        raise ValueError("its length in bytes is not that of its shape and dtype")
    return Slice(path, entry["dtype"], tuple(shape), data + start, data + stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(f"{path} is truncated or damaged: {what}. Copy or download it again.")
