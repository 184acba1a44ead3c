"""List the files of a finished folder with their checksums, and verify a folder by its list."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tensornet.errors import FormatError
from tensornet.io import Written, intact
from tensornet_hf.checkpoint.json_files import read_json

MANIFEST = "tensornet_manifest.json"
MANIFEST_VERSION = 1


def manifest_text(files: Iterable[Written]) -> str:
    """Return the content of the manifest; equal folders have equal manifests."""
    entries = {file.name: {"bytes": file.nbytes, "sha256": file.sha256} for file in files}
    return json.dumps({"version": MANIFEST_VERSION, "files": dict(sorted(entries.items()))}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Written]:
    """Read the list of files that a folder should hold.

    Raises:
        FormatError: there is no manifest, or it is damaged, or names files elsewhere.
    """
    path = folder / MANIFEST
    content = read_json(path)
    files = content.get("files")
    if content.get("version") != MANIFEST_VERSION or not isinstance(files, dict):
        raise FormatError(f"{path} is not a manifest of version {MANIFEST_VERSION}.")
    return {name: _written(name, entry, path) for name, entry in files.items()}


def verify_manifest(folder: str | Path) -> int:
    """Compare every file of a folder with its manifest.

    Returns:
        The number of files compared.

    Raises:
        FormatError: files are missing or differ; the message names them all.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5)
        >>> report = th.compress_checkpoint(th.embedded.gpt2_path(), "small", config)
        >>> th.verify_manifest("small") > 0
        True
    """
    folder = Path(folder)
    files = read_manifest(folder)
    bad = [name for name, written in files.items() if not intact(folder / name, written)]
    if bad:
        raise FormatError(
            f"{folder}: {', '.join(bad)} missing or not as written. Copy the folder again, or compress again."
        )
    return len(files)


def _written(name: str, entry: object, path: Path) -> Written:
    inside = name and not name.startswith("/") and ".." not in Path(name).parts and "\0" not in name
    if isinstance(entry, dict) and inside:
        nbytes, sha256 = entry.get("bytes"), entry.get("sha256")
        if (
            type(nbytes) is int
            and nbytes >= 0
            and isinstance(sha256, str)
            and re.fullmatch("[0-9a-f]{64}", sha256)
        ):
            return Written(name, nbytes, sha256)
    raise FormatError(f"{path}: bad entry {name!r:.80}: {entry!r:.200}.")
