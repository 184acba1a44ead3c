"""Write a model folder completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tensornet.errors import DestinationError
from tensornet.io import new_folder, restore_earlier


@contextmanager
def write_folder(
    destination: str | os.PathLike[str], *, force: bool = False, sources: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Yield a new folder that becomes `destination` when the block ends without an error.

    After an error, a full disk included, the new folder is removed, and `destination` is as it was.

    Args:
        destination: where the folder shall be.
        force: replace a model folder that is there; an empty folder is taken without it.
        sources: folders that are being read and must not be replaced.

    Raises:
        DestinationError: something is there already, or the place cannot be written.
    """
    target = Path(destination).expanduser().absolute()
    check_free(target, force=force, sources=sources)
    try:
        with new_folder(target) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        if isinstance(error, DestinationError) or not _is_about(error, target.parent):
            raise
        raise DestinationError(
            f"Writing {target} failed: {error}. Nothing was left there; free some space or choose another "
            "place."
        ) from error


def check_free(
    destination: str | os.PathLike[str], *, force: bool = False, sources: tuple[Path, ...] = ()
) -> None:
    """Raise DestinationError where `write_folder` would, before any work is done.

    A folder that a killed process moved aside is renamed back first, so that it is not replaced unasked.

    Args: as `write_folder`.
    """
    target = Path(destination).expanduser().absolute()
    restore_earlier(target)
    real = target.resolve()
    for source in sources:
        if source.exists() and (real == source.resolve() or real in source.resolve().parents):
            raise DestinationError(f"{target} is or holds the source {source}; choose another destination.")
    if not target.exists():
        return
    if not target.is_dir():
        raise DestinationError(f"{target} is a file; a folder is to be written there. Choose another name.")
    if not any(target.iterdir()):
        return
    if not force:
        raise DestinationError(
            f"{target} exists already. Choose another name, or replace it with force=True (--force)."
        )
    if not (target / "config.json").is_file():
        raise DestinationError(
            f"{target} is not a model folder (it has no config.json) and is not replaced, even with force. "
            "Remove it yourself, or choose another name."
        )


def _is_about(error: Exception, parent: Path) -> bool:
    """Return True if an error is a failure to write; safetensors names no file if the disk is full."""
    if isinstance(error, SafetensorError):
        return True
    names = [name for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    return not names or any(str(name).startswith(str(parent)) for name in names)
