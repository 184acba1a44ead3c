"""Open the source folder: its tensors, its other files, and fingerprints that reveal a later change."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensornet.errors import FormatError
from tensornet.io import Slice, read_headers
from tensornet_hf.checkpoint.headers import INDEX, WEIGHT_SUFFIXES, weight_files
from tensornet_hf.checkpoint.json_files import read_json
from tensornet_hf.checkpoint.links import inside

#: Written anew.
REWRITTEN = ("config.json", INDEX)

#: Identifies a file between two runs: bytes, time of change in ns, SHA-256 of its header if it has one.
Mark = tuple[int, int, str | None]


@dataclass(frozen=True)
class Source:
    """Model folder that is read without opening its weights.

    Args:
        folder: where it is.
        config: content of `config.json`.
        tensors: every stored tensor by name.
        others: relative paths of the files that are copied as they are.
        marks: the mark of every file that is read, by relative path.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Slice]
    others: tuple[str, ...]
    marks: dict[str, Mark]


def open_source(folder: Path) -> Source:
    """Read configuration, index and headers of a model folder.

    Raises:
        FormatError: something is missing, damaged, contradictory, quantized, or leads out of the folder; the
            message names it.
    """
    if not (folder / "config.json").is_file():
        raise FormatError(
            f"{folder} is not a model folder: it has no config.json. Give a folder written by "
            "save_pretrained."
        )
    config = read_json(inside(folder, "config.json"))
    if (entry := config.get("quantization_config")) is not None:
        method = entry.get("quant_method") if isinstance(entry, dict) else entry
        raise FormatError(
            f"{folder} is quantized or compressed already (by {method!r:.80}). Use the original model, with "
            "weights in floating point."
        )
    files, index = weight_files(folder)
    tensors = read_headers(files)
    for tensor, name in index.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise FormatError(
                f"{folder / INDEX} says that {name} holds {tensor!r}, and it does not: the index belongs to "
                "other files, or a file is incomplete. Copy or download the folder again."
            )
    others = tuple(_others(folder))
    used = ["config.json", *(file.name for file in files), *others]
    return Source(folder, config, tensors, others, {name: _mark(folder, name) for name in used})


def check_unchanged(source: Source, marks: Mapping[str, Mark | None], *, since: str) -> None:
    """Compare the fingerprints of a source with earlier ones.

    Raises:
        FormatError: files differ; the message names them, and when they were first read.
    """
    names = sorted(source.marks.keys() | marks.keys())
    changed = [name for name in names if source.marks.get(name) != marks.get(name)]
    if changed:
        raise FormatError(
            f"{', '.join(changed)} in {source.folder} changed since {since}: what is finished belongs to the "
            "old content. Put the old files back, or start again with resume=False (--no-resume)."
        )


def marks_now(source: Source) -> dict[str, Mark]:
    """Compute the present fingerprints of the same files; absent files are left out."""
    return {name: _mark(source.folder, name) for name in source.marks if (source.folder / name).is_file()}


def _others(folder: Path) -> Iterator[str]:
    """Yield all files except hidden ones and weights in other formats."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or name in REWRITTEN or path.suffix in WEIGHT_SUFFIXES or path.name.endswith(f"{INDEX}"):
            continue
        if path.is_dir() and not path.is_symlink():
            continue
        inside(folder, name)
        if not path.is_file():
            raise FormatError(f"{path} is neither a file nor a folder; only those are copied. Remove it.")
        yield name


def _mark(folder: Path, name: str) -> Mark:
    path = folder / name
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, _header_hash(path) if path.suffix == ".safetensors" else None


def _header_hash(path: Path) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return hashlib.sha256(file.read(min(length, 100_000_000))).hexdigest()


def digest(content: Any) -> str:
    """Return the SHA-256 of JSON-ready content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def total_bytes(parts: Iterable[Slice]) -> int:
    """Sum the lengths of several tensors in bytes."""
    return sum(part.nbytes for part in parts)
