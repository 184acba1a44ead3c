"""Importance matrices of llama.cpp: mean squares of the inputs of every tensor, read and written.

`llama-imatrix` collects them, `llama-quantize` weights errors with them, and most published GGUF models come
with one. They are the diagonals of the moments of inputs that a survey collects.

A GGUF file has two tensors for each tensor `NAME` of the model: `NAME.in_sum2`, the sums of the squared
inputs of each expert, and `NAME.counts`, the number of tokens of each expert. A matrix that is not an expert
counts as one expert. Legacy files (`.dat`) have the mean squares of all experts in one list, and neither the
number of experts nor their counts.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensornet._util import import_optional
from tensornet.errors import FormatError
from tensornet.io import new_file, write_file
from tensornet_hf.exporters.base import GGUF
from tensornet_hf.text import first_line

#: Suffixes of the two tensors of each entry.
SUMS, COUNTS = ".in_sum2", ".counts"
#: Largest length of a name in a legacy file; larger numbers mean that the file is damaged.
_LONGEST = 1 << 12


class Importance(NamedTuple):
    """Entry of an importance matrix.

    Args:
        squares: mean squares of the inputs of each expert, float32, shape `(experts, in)`. If it was read
            from a legacy file, all experts are in one row.
        counts: number of tokens of each row, shape `(rows,)`; of a legacy file, the number of chunks.
    """

    squares: Tensor
    counts: Tensor


def read_imatrix(path: str | Path) -> dict[str, Importance]:
    """Read an importance matrix, either a GGUF file or a legacy file.

    Returns:
        The entries by the name of the tensor in GGUF files, such as `blk.0.attn_q.weight`.

    Raises:
        FormatError: the file is damaged or not an importance matrix, or contains NaN or negative numbers.
        MissingDependencyError: the package `gguf` is not installed.

    Example:
        >>> from tensornet_hf.imatrix import Importance, read_imatrix, write_imatrix
        >>> importance = Importance(torch.ones(1, 4), torch.tensor([8]))
        >>> write_imatrix("importance.dat", {"blk.0.attn_q.weight": importance}, source="text.txt")
        >>> read_imatrix("importance.dat")["blk.0.attn_q.weight"].squares
        tensor([[1., 1., 1., 1.]])
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            legacy = file.read(4) != b"GGUF"
        found = dict(_read_legacy(path.read_bytes())) if legacy else dict(_read_gguf(path))
    except OSError as error:
        raise FormatError(f"Cannot read the importance matrix {path}: {first_line(error)}") from error
    except (ValueError, KeyError, struct.error, IndexError) as error:
        raise FormatError(
            f"{path} is not an importance matrix, or is damaged: {first_line(error)}. Give a GGUF file or a "
            ".dat file that llama-imatrix wrote."
        ) from error
    if not found:
        raise FormatError(f"The importance matrix {path} is empty; give a file that llama-imatrix wrote.")
    for name, (squares, _) in found.items():
        if not bool(squares.isfinite().all()) or bool((squares < 0).any()):
            raise FormatError(f"{path}: the entry {name!r} has NaN, infinite or negative mean squares.")
    return found


def _read_gguf(path: Path) -> Iterator[tuple[str, Importance]]:
    """Yield the entries of a GGUF file; raise ValueError if it is not an importance matrix."""
    gguf = import_optional("gguf", extra="gguf", user="Reading importance matrices")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the parser raises any exception for a damaged file
        raise ValueError(first_line(error)) from error
    kind = reader.fields.get(gguf.Keys.General.TYPE)
    if kind is None or kind.contents() != gguf.GGUFType.IMATRIX:
        raise ValueError(f"general.type is {None if kind is None else kind.contents()!r}, not 'imatrix'")
    tensors = {x.name: np.array(x.data, np.float32) for x in reader.tensors}
    for name, sums in tensors.items():
        if not name.endswith(SUMS):
            continue
        tensor = name.removesuffix(SUMS)
        counts = tensors[tensor + COUNTS].reshape(-1)
        sums = sums.reshape(len(counts), -1)
        squares = sums / np.maximum(counts, 1)[:, None]
        yield tensor, Importance(torch.from_numpy(squares), torch.from_numpy(counts).round().long())


def _read_legacy(data: bytes) -> Iterator[tuple[str, Importance]]:
    """Yield the entries of a legacy file; raise ValueError or struct.error if it is damaged."""
    place = 0

    def number() -> int:
        nonlocal place
        (found,) = struct.unpack_from("<i", data, place)
        place += 4
        return int(found)

    entries = number()
    if not 0 <= entries < 1 << 24:
        raise ValueError(f"it has {entries} entries")
    for _ in range(entries):
        length = number()
        if not 0 < length < _LONGEST or place + length > len(data):
            raise ValueError(f"a name has {length} bytes")
        name = data[place : place + length].decode()
        place += length
        calls, size = number(), number()
        if size < 1 or calls < 0:
            raise ValueError(f"{name} has {size} numbers of {calls} chunks")
        values = np.frombuffer(data, "<f4", size, place).astype(np.float32)
        place += 4 * size
        squares = torch.from_numpy(values / max(calls, 1))[None]
        yield name, Importance(squares, torch.tensor([calls]))


def write_imatrix(
    path: str | Path, entries: Mapping[str, Importance], *, source: str, chunk_size: int = 512
) -> None:
    """Write an importance matrix that `llama-quantize` reads; a legacy file if the name ends in `.dat`.

    Args:
        path: file to write; an existing file is replaced when the new one is complete.
        entries: the entries by the name of the tensor.
        source: name of the text.
        chunk_size: number of tokens that count as one chunk in the metadata.

    Raises:
        DestinationError: the file cannot be written.
        MissingDependencyError: the package `gguf` is not installed.
    """
    path = Path(path)
    most = max((int(x.counts.max()) for x in entries.values()), default=0)
    chunks = max(1, round(most / chunk_size))
    if path.suffix != GGUF:
        write_file(path, _legacy(entries, source, chunks), what="The importance matrix")
        return
    gguf = import_optional("gguf", extra="gguf", user="Writing importance matrices")
    with new_file(path, what="The importance matrix") as made:
        writer = gguf.GGUFWriter(made, arch="")
        writer.kv_data[0].clear()  # an importance matrix has no architecture
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array(gguf.Keys.IMatrix.DATASETS, [source])
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, chunks)
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, chunk_size)
        for name, (squares, counts) in entries.items():
            numbers = counts.float()[:, None]
            writer.add_tensor(name + SUMS, (squares.float() * numbers).numpy())
            writer.add_tensor(name + COUNTS, numbers.numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _legacy(entries: Mapping[str, Importance], source: str, chunks: int) -> Iterator[bytes]:
    """Yield the bytes of a legacy file, which ends with the number of chunks and the name of the text."""
    yield struct.pack("<i", len(entries))
    for name, (squares, _) in entries.items():
        yield struct.pack("<i", len(name.encode())) + name.encode()
        yield struct.pack("<ii", chunks, squares.numel())
        yield (squares.float() * chunks).numpy().astype("<f4").tobytes()
    yield struct.pack("<ii", chunks, len(source.encode())) + source.encode()
