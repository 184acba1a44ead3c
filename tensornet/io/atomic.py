"""Write files and folders atomically: beside their place, flushed to the disk, then renamed."""

import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tensornet.errors import DestinationError

#: Bytes copied at a time.
CHUNK = 1 << 24
#: End of the name of a folder that holds what is being replaced.
_OLD = ".old"


@dataclass(frozen=True)
class Written:
    """Name, length and checksum of a finished file.

    Args:
        name: of the file.
        nbytes: its length.
        sha256: of its content.
    """

    name: str
    nbytes: int
    sha256: str


def check_place(what: str, path: Path) -> None:
    """Raise DestinationError unless a file can be written to `path`.

    Args:
        what: the file, as in a sentence: `"The checkpoint"`.
        path: of the file.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DestinationError(f"{what} cannot be written to {path}: name a file in a folder that exists.")


@contextmanager
def new_file(path: Path, *, what: str | None = None) -> Iterator[Path]:
    """Yield a path that replaces `path` when the block ends without an error.

    An earlier file stays until then, and stays for good after an error.

    Args:
        path: of the file.
        what: names the file in errors, see `check_place`.

    Raises:
        DestinationError: `what` is given, and the file cannot be written.
        OSError: it cannot be written otherwise.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with new_file(folder / "x") as beside:
        ...     _ = beside.write_text("done")
        >>> (folder / "x").read_text()
        'done'
    """
    if what is not None:
        check_place(what, path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        _sync_file(beside)
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if what is None:
            raise
        raise DestinationError(f"{what} cannot be written to {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, what: str | None = None) -> Written:
    """Write chunks of bytes into one file; arguments and errors as for `new_file`.

    Example:
        >>> write_file(Path(tempfile.mkdtemp(), "x"), [b"a", b"b"]).nbytes
        2
    """
    total, checksum = 0, hashlib.sha256()
    with new_file(path, what=what) as beside, beside.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            checksum.update(chunk)
            total += len(chunk)
    return Written(path.name, total, checksum.hexdigest())


def file_digest(path: Path) -> Written:
    """Compute the record that `write_file` would have returned for an existing file."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum.update(chunk)
    return Written(path.name, path.stat().st_size, checksum.hexdigest())


def intact(path: Path, written: Written) -> bool:
    """Return True if a file exists with the recorded content."""
    try:
        return path.stat().st_size == written.nbytes and file_digest(path).sha256 == written.sha256
    except OSError:
        return False


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that replaces `target` when the block ends without an error.

    What was at `target` stays until then, and stays for good after an error. A process killed in between may
    leave it as `.NAME.*.old/NAME`; the next call renames it back first.

    Raises:
        DestinationError: no folder can be made beside `target`, or as `take_place`.
        OSError: the folder cannot take its place.
    """
    restore_earlier(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise DestinationError(f"Cannot write {target}: {error}.") from error
    try:
        yield folder
        os.umask(mask := os.umask(0))  # the only way to read it
        folder.chmod(0o777 & ~mask)  # mkdtemp makes folders for the owner alone
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~mask)
        take_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already if it took its place


def take_place(folder: Path, target: Path) -> None:
    """Flush a finished folder and rename it to its destination; delete or restore what was there.

    To explain how this works: what was at `target` waits as `.NAME.*.old/NAME` beside it until the new folder
    has its name. Any failure, Ctrl-C included, renames it back; after SIGKILL `restore_earlier` does.

    Raises:
        DestinationError: the renames failed and what was there cannot be renamed back; the message says where
            it is.
        OSError: the folder cannot take its place.
    """
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            _sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    if not target.exists():
        folder.rename(target)
        sync_folder(target.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_OLD, dir=target.parent))
    earlier = old / target.name
    try:
        target.rename(earlier)
        folder.rename(target)
    finally:
        # The file system is asked, since an interrupt may come before or after either rename.
        if os.path.lexists(target) and not os.path.lexists(folder):
            sync_folder(target.parent)
            _discard(earlier)
        else:
            _put_back(earlier, target)


def restore_earlier(target: Path) -> None:
    """Rename a folder back to `target` that a killed process moved aside, unless something is there.

    Raises:
        DestinationError: it cannot be renamed; the message says where it is.

    Example:
        >>> target = Path(tempfile.mkdtemp(), "model")
        >>> aside = target.with_name(".model.x.old") / "model"
        >>> aside.mkdir(parents=True)
        >>> restore_earlier(target)
        >>> target.exists(), aside.parent.exists()
        (True, False)
    """
    if os.path.lexists(target):
        return
    aside = target.parent.glob(f".{glob.escape(target.name)}.*{_OLD}")
    found = [folder / target.name for folder in aside if os.path.lexists(folder / target.name)]
    if found:
        _put_back(max(found, key=lambda path: path.parent.stat().st_mtime_ns), target)


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to the disk, where the system supports it."""
    if os.name != "posix":  # Windows opens no directories
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # of folders that may not be listed, and of some network file systems
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def _sync_file(path: Path) -> None:
    with path.open("rb" if os.name == "posix" else "rb+") as file:  # Windows flushes what may be written
        os.fsync(file.fileno())


def _put_back(earlier: Path, target: Path) -> None:
    if os.path.lexists(earlier):
        try:
            earlier.rename(target)
        except OSError as error:
            raise DestinationError(
                f"What was at {target} is kept in {earlier}: it could not be renamed back ({error}). Move it "
                "there yourself."
            ) from error
    with suppress(OSError):  # never by force: nothing but an empty folder is to go
        earlier.parent.rmdir()


def _discard(earlier: Path) -> None:
    with suppress(OSError):  # `restore_earlier` would take it for a whole folder when it is half deleted
        earlier.rename(earlier.with_name(f"{earlier.name}.replaced"))
    shutil.rmtree(earlier.parent, ignore_errors=True)
