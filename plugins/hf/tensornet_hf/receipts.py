"""Receipts: a JSON file with each result that says what it was made of, with the digest of each file.

The receipt of a folder is the file `receipt.json` in it, that of `model.gguf` is `model.gguf.receipt.json`.
It is written last: a result without a receipt may be that of a run that did not finish.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tensornet.errors import FormatError
from tensornet.io import file_digest, write_file
from tensornet_hf.checkpoint import RECEIPT, other_files, read_json, weight_files

#: Version of the format.
RECEIPT_VERSION = 1

#: Length in bytes and SHA-256 checksum of files, by name.
Digests = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Receipt:
    """Source, plan, options and versions from which a model was written. Equal inputs give equal receipts.

    Args:
        files: length and checksum of each written file, by name relative to the folder.
        source: name of the model that was read; None if it was in memory.
        source_files: length and checksum of each file of the source, by name.
        target: name of the export target; None for a folder of this library.
        plan: the plan that was applied, with the error of every layer; None if nothing was compressed.
        options: options other than those in the plan.
        command: the command line.
        versions: versions of this library and of those that it uses.
        predicted_loss_increase: as planned; None if unknown.
        measured: the loss increase as measured on calibration tokens; None if it was not measured.
        exported_from: name and files of the compressed folder that was exported, if any.

    Example:
        >>> config = tn.CompressionConfig(formats=("int8",), method="nearest")
        >>> _ = th.compress_folder(th.embedded.gpt2_path(), "eight", config)
        >>> receipt = th.Receipt.load("eight")
        >>> receipt.source, sorted(receipt.files)[:2]
        ('gpt2', ['README.md', 'config.json'])
    """

    files: Digests
    source: str | None = None
    source_files: Digests = field(default_factory=dict)
    target: str | None = None
    plan: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: str = ""
    predicted_loss_increase: float | None = None
    measured: Mapping[str, Any] | None = None
    exported_from: Mapping[str, Any] | None = None

    def save(self, destination: Path) -> None:
        """Write the receipt of a file or folder; an incomplete file never replaces an old one.

        Raises:
            DestinationError: the file cannot be written.
        """
        content = {"version": RECEIPT_VERSION, **{x.name: getattr(self, x.name) for x in fields(self)}}
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        write_file(receipt_path(destination), [text.encode()], what="The receipt")

    @classmethod
    def load(cls, destination: str | Path) -> "Receipt":
        """Read the receipt of a file or folder.

        Raises:
            FormatError: there is no receipt, or it is damaged or has another version.
        """
        path = receipt_path(Path(destination))
        if not path.is_file():
            raise FormatError(
                f"{destination} has no receipt ({path.name}). It was written by another program or an older "
                "version, the run did not finish, or the receipt was not copied with it."
            )
        content = read_json(path)
        if content.pop("version", None) != RECEIPT_VERSION:
            raise FormatError(f"{path} is not a receipt of version {RECEIPT_VERSION}.")
        try:
            found = cls(**content)
            for digests in (found.files, found.source_files):
                for entry in digests.values():
                    int(entry["bytes"]), str(entry["sha256"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is damaged: {error!s:.200}") from error
        return found


def receipt_path(destination: Path) -> Path:
    """Return the path of the receipt of a file or folder."""
    if destination.is_dir():
        return destination / RECEIPT
    return destination.with_name(f"{destination.name}.{RECEIPT}")


def digests_of(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the length and the checksum of files, by the given names."""
    found = {}
    for name, path in sorted(paths.items()):
        written = file_digest(path)
        found[name] = {"bytes": written.nbytes, "sha256": written.sha256}
    return found


def source_paths(folder: Path, weights: str | Path | None = None) -> dict[str, Path]:
    """Return the files of a model folder, by relative name, with `weights` in place of its weight files."""
    files = weight_files(folder)[0] if weights is None else [Path(weights)]
    names = ["config.json", *other_files(folder)]
    return {**{x.name: x for x in files}, **{name: folder / name for name in names}}


def written_paths(destination: Path, adapter: Path | None = None) -> dict[str, Path]:
    """Return all files of a result except its receipt, by name.

    Args:
        destination: the file or folder.
        adapter: the adapter's file or folder, if there is one.
    """
    if destination.is_dir():
        files = [x for x in destination.rglob("*") if x.is_file()]
        named = {x.relative_to(destination).as_posix(): x for x in files}
        hidden = [x for x in named if any(part.startswith(".") for part in x.split("/"))]
        return {name: x for name, x in named.items() if name not in (RECEIPT, *hidden)}
    return {x.name: x for x in (destination, adapter) if x is not None and x.is_file()}
