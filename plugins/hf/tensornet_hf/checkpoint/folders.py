"""Writing a folder completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tensornet.errors import DestinationError


@contextmanager
def write_folder(
    destination: str | os.PathLike[str], *, force: bool = False, sources: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """A new folder to write into, which becomes `destination` when the block ends without an error.

    It lies beside the destination, so that taking its place is a rename. After an error, a full disk
    included, it is removed, and what was at the destination is still there.

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
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise DestinationError(f"Cannot write {target}: {error}.") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes folders for the owner alone
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # as safetensors makes files
        take_place(folder, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, DestinationError) or not _is_about(error, folder):
            raise
        raise DestinationError(
            f"Writing {target} failed: {error}. Nothing was left there; free some space or choose another "
            "place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already if it took its place


def check_free(
    destination: str | os.PathLike[str], *, force: bool = False, sources: tuple[Path, ...] = ()
) -> None:
    """Refuse a destination that `write_folder` would refuse, before any work is done.

    Args, Raises: as `write_folder`.
    """
    target = Path(destination).expanduser().absolute()
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
            f"{target} is no model folder (it has no config.json) and is not replaced, not even with force. "
            "Remove it yourself, or choose another name."
        )


def take_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to its destination; what was there is removed, or put back on failure."""
    if not target.exists():
        folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        target.rename(old / target.name)
        try:
            folder.rename(target)
        except OSError:
            (old / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _is_about(error: Exception, folder: Path) -> bool:
    """Whether writing failed. safetensors reports a full disk as an error of its own, without a file."""
    if isinstance(error, SafetensorError):
        return True
    names = [name for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    return not names or any(str(name).startswith(str(folder.parent)) for name in names)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
