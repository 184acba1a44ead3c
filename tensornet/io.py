"""Files: write files and folders atomically; read and assemble safetensors files without loading tensors."""

import errno
import glob
import hashlib
import json
import math
import mmap
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensornet.errors import DestinationError, FormatError

# --- files and folders that are written completely or not at all ----------------------------------

#: Number of bytes that are copied at a time.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Written:
    """Name, length and checksum of a finished file.

    Args:
        name: name of the file.
        nbytes: length of the file in bytes.
        sha256: SHA-256 checksum of the content, in hexadecimal.
    """

    name: str
    nbytes: int
    sha256: str


def check_place(what: str, path: Path) -> None:
    """Raise DestinationError if `path` is a folder or its parent is not; `what` begins the message."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DestinationError(f"{what} cannot be written to {path}: name a file in a folder that exists.")


def _temporary(target: Path, suffix: str) -> Path:
    """Return an unused path `.NAME.PROCESS-RANDOM.SUFFIX` in the folder that contains `target`."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.{suffix}")


@contextmanager
def new_file(path: Path, *, what: str | None = None, force: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename that file to `path` if the block ends without an error.

    After an error, an existing file `path` is unchanged. If `path` is a symbolic link, the file that it
    points to is replaced.

    Args:
        path: final path of the file.
        what: subject of the error message, such as `"The checkpoint"`.
        force: replace an existing file.

    Raises:
        DestinationError: the file cannot be written, or it exists and `force` is False.
        OSError: the same, if `what` is absent.
    """
    if what is not None:
        check_place(what, path)
    partial = _temporary(Path(os.path.realpath(path)), "tmp")
    with _os_errors(what, path):
        try:
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode  # follows the umask, which cannot be read without changing it
            yield partial
            partial.chmod(stat.S_IMODE(mode))  # safetensors creates files that only their owner can read
            _take_name(partial, path, force=force)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _os_errors(what: str | None, path: Path) -> Iterator[None]:
    """Raise OSErrors as DestinationErrors that begin with `what`, unless `what` is None."""
    try:
        yield
    except OSError as error:
        if what is None:
            raise
        taken = isinstance(error, FileExistsError)
        why = "it exists already. Choose another name, or set force=True." if taken else error
        raise DestinationError(f"{what} cannot be written to {path}: {why}") from error


def _take_name(partial: Path, path: Path, *, force: bool) -> None:
    """Rename a finished file to `path`, or to the file to which the symbolic link `path` points.

    Raises:
        FileExistsError: the file exists and `force` is False.
    """
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    target = Path(os.path.realpath(path))
    if not force:
        target.touch(exist_ok=False)  # claims the name, or fails if another run was faster
    partial.replace(target)


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, what: str | None = None) -> Written:
    """Write chunks of bytes to a file atomically; `what` and the errors are as for `new_file`."""
    total, checksum = 0, hashlib.sha256()
    with new_file(path, what=what) as made, made.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            checksum.update(chunk)
            total += len(chunk)
    return Written(path.name, total, checksum.hexdigest())


def file_digest(path: Path) -> Written:
    """Return the name, the length and the SHA-256 checksum of an existing file."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum.update(chunk)
    return Written(path.name, path.stat().st_size, checksum.hexdigest())


def intact(path: Path, written: Written) -> bool:
    """Return True if the file exists and has the recorded length and checksum."""
    try:
        return path.stat().st_size == written.nbytes and file_digest(path).sha256 == written.sha256
    except OSError:
        return False


class ResumableFile:
    """A file of known layout, whose parts are written in any order and by one or several runs.

    A journal next to the unfinished file contains the checksum of each finished part. A run that was killed
    or stopped by a full disk is continued by making the same object again: `missing()` then names the parts
    that are still to be written. Bytes outside the header and the parts are zero.

    The unfinished file must not be used by two processes at the same time; lock its folder. Threads may write
    different parts at the same time.

    Args:
        path: the unfinished file, on the same disk as the final file.
        header: first bytes of the file.
        parts: offset and length of each part in bytes, by name; offsets count from the start of the file.
        nbytes: length of the file in bytes; None ends the file with its last part.
        key: text that identifies everything that the content depends on, such as options and versions.
        what: subject of error messages, such as `"The model"`.

    Raises:
        DestinationError: the file cannot be created; usually the disk has no room for the whole file.
        FormatError: the journal belongs to another layout or key.
        ValueError: parts overlap with each other or with the header.
    """

    def __init__(
        self,
        path: Path,
        header: bytes,
        parts: Mapping[str, tuple[int, int]],
        *,
        nbytes: int | None = None,
        key: str = "",
        what: str = "The file",
    ) -> None:
        self.path, self.parts, self.what = path, dict(parts), what
        self.journal = path.with_name(f"{path.name}.journal")
        end = len(header)
        for offset, length in sorted(self.parts.values()):
            if offset < end or length < 0:
                raise ValueError(f"A part at {offset} of {length} bytes overlaps with what ends at {end}.")
            end = offset + length
        nbytes = end if nbytes is None else nbytes
        if nbytes < end:
            raise ValueError(f"The file has {nbytes} bytes, but its parts end at {end}.")
        content = json.dumps([nbytes, key, sorted(self.parts.items())]).encode()
        layout = hashlib.sha256(hashlib.sha256(header).digest() + content).hexdigest()

        # Keep the parts of an earlier run whose bytes have the recorded checksum.
        self._checksums = {
            name: checksum
            for name, checksum in self._recorded(layout).items()
            if name in self.parts and self._checksum(name) == checksum
        }
        with _os_errors(what, path):
            if not self._checksums:
                path.unlink(missing_ok=True)
            try:
                _allocate(path, nbytes)
            except OSError:
                if not self._checksums:
                    path.unlink(missing_ok=True)
                raise
            lines = [{"layout": layout}, *({"part": [*x]} for x in self._checksums.items())]
            text = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
            renewed = self.journal.with_name(f"{self.journal.name}.new")
            renewed.write_bytes(b"")
            for file_path, content in ((path, header), (renewed, text)):
                with file_path.open("rb+") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            renewed.replace(self.journal)

    def missing(self) -> list[str]:
        """Return the names of the parts that have not been written, in the order of the layout."""
        return [name for name in self.parts if name not in self._checksums]

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one part and record it in the journal, both down to the disk.

        Args:
            name: name of the part.
            chunks: the bytes of the part, in pieces of any lengths.

        Raises:
            DestinationError: the bytes cannot be written (full disk); finished parts are kept.
            ValueError: there is no such part, it was written before, or it has another length.
        """
        if name not in self.parts or name in self._checksums:
            known = "was written already" if name in self.parts else "is not in the layout of this file"
            raise ValueError(f"{name!r} {known}; missing() lists what is to be written.")
        offset, length = self.parts[name]
        total, checksum = 0, hashlib.sha256()
        with _os_errors(self.what, self.path):
            with self.path.open("rb+") as file:
                file.seek(offset)
                for chunk in chunks:
                    total += memoryview(chunk).nbytes
                    if total > length:
                        break
                    file.write(chunk)
                    checksum.update(chunk)
                if total != length:
                    more = "more than " if total > length else ""
                    raise ValueError(f"{name!r} has {length} bytes in the layout, but {more}{total} came.")
                file.flush()
                os.fsync(file.fileno())
            # The line is written by a single call, so that lines of several threads do not mix.
            with self.journal.open("ab", buffering=0) as journal:
                journal.write(f"{json.dumps({'part': [name, checksum.hexdigest()]})}\n".encode())
                os.fsync(journal.fileno())
        self._checksums[name] = checksum.hexdigest()

    def finish(self, path: Path, *, force: bool = True) -> None:
        """Rename the complete file to `path`, and delete the journal.

        Args:
            path: final path of the file.
            force: replace an existing file.

        Raises:
            DestinationError: the file exists and `force` is False, or it cannot be renamed.
            ValueError: a part is missing.
        """
        if missing := self.missing():
            raise ValueError(f"{len(missing)} parts of {path} have not been written, such as {missing[0]!r}.")
        with _os_errors(self.what, path):
            _take_name(self.path, path, force=force)
        self.journal.unlink(missing_ok=True)

    def _recorded(self, layout: str) -> dict[str, str]:
        """Read the checksums of finished parts from the journal; without a journal, there are none.

        Raises:
            FormatError: the journal belongs to another layout.
        """
        lines = []
        if self.journal.is_file():
            for line in self.journal.read_bytes().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # the run was killed while it wrote this line
                    lines.append({})
            if not lines or lines[0].get("layout") != layout:
                raise FormatError(
                    f"The unfinished file {self.path} has another layout or other options. Continue the run "
                    f"that wrote it with the same options, or delete {self.path} and {self.journal}."
                )
        return dict(line["part"] for line in lines if "part" in line)

    def _checksum(self, name: str) -> str:
        """Return the checksum of a part of the unfinished file; empty if the file is shorter."""
        offset, left = self.parts[name]
        checksum = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                while chunk := file.read(min(left, CHUNK)):
                    checksum.update(chunk)
                    left -= len(chunk)
        except FileNotFoundError:
            return ""
        return "" if left else checksum.hexdigest()


def _allocate(path: Path, nbytes: int) -> None:
    """Create or extend a file, and reserve its room on the disk if the system can do this."""
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate") and nbytes:
            try:
                os.posix_fallocate(file.fileno(), 0, nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        file.truncate(nbytes)


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to write to, and rename it to `target` if the block ends without an error.

    After an error, an existing folder `target` is unchanged. If `target` is a symbolic link, the folder that
    it points to is replaced. A warning lists temporary folders that killed processes left behind.

    Args:
        target: final path of the folder; an empty folder may already exist there.
        force: replace an existing folder.

    Raises:
        DestinationError: the temporary folder cannot be created next to `target`; or `target` exists when
            the new folder is complete, and `force` is not set.
        OSError: the temporary folder cannot be renamed to `target`.
    """
    target = Path(os.path.realpath(target))
    folder = _temporary(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if remains := [str(path) for path in _remains(target)]:
            warnings.warn(
                f"Runs that were interrupted while writing {target} left {', '.join(remains)}. Delete them, "
                "unless another machine is writing there.",
                stacklevel=3,  # the warning names the line of the `with` statement
            )
        folder.mkdir()
    except OSError as error:
        raise DestinationError(f"Cannot write {target}: {error}.") from error
    try:
        yield folder
        mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # follows the umask
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors creates files that only their owner can read
        take_place(folder, target, force=force)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # does nothing after a success: the folder was renamed


def take_place(folder: Path, target: Path, *, force: bool = False) -> None:
    """Rename a finished folder to `target`, which may already exist as an empty folder.

    With `force`, an existing folder is first renamed to `.NAME.*.old/NAME`, and is deleted at the end. After
    an error or Ctrl-C, this function renames it back; after a crash, `restore` does so.

    Raises:
        DestinationError: the destination exists and `force` is not set.
        OSError: a folder cannot be renamed.
    """
    while True:
        old = _temporary(target, "old")
        earlier = old / target.name
        try:
            if force and target.exists():
                old.mkdir()
                target.rename(earlier)
            folder.rename(target)  # fails if the destination contains files
            return
        except OSError as error:
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if taken and not force:
                raise DestinationError(
                    f"{target} exists already: another run has written it. Choose another name, or replace "
                    "it with force=True."
                ) from error
            if not (taken or error.errno == errno.ENOENT) or not folder.exists():
                raise
            # Another run replaced the target between two of these steps: try again.
        finally:  # the block may have been interrupted before or after each rename
            if earlier.exists() and not target.exists():
                try:
                    earlier.rename(target)
                except OSError as error:  # another run may have written the target since the line above
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            shutil.rmtree(old, ignore_errors=True)


def moved_aside(target: Path) -> Path | None:
    """Return the path to which a killed run of `take_place` moved the existing folder `target`.

    The result is None if `target` exists, or if no such path is found.
    """
    if target.exists():
        return None
    return next((x for x in target.parent.glob(f".{glob.escape(target.name)}.*.old/*") if x.is_dir()), None)


def restore(target: Path) -> None:
    """Rename a folder back to `target` if a killed run of `take_place` moved it away, and issue a warning."""
    target = Path(os.path.realpath(target))
    if (earlier := moved_aside(target)) is not None:
        earlier.rename(target)
        earlier.parent.rmdir()
        warnings.warn(
            f"A run was interrupted while it replaced {target}: its earlier content was restored.",
            stacklevel=2,
        )


def _remains(target: Path) -> list[Path]:
    """List temporary folders for `target` left behind by processes that no longer run on this machine."""
    found = []
    for path in target.parent.glob(f".{glob.escape(target.name)}.*-*.*"):
        process = path.name.removeprefix(f".{target.name}.").partition("-")[0]
        if path.suffix in (".partial", ".old") and process.isdecimal() and not _is_running(int(process)):
            found.append(path)
    return sorted(found)


def _is_running(process: int) -> bool:
    """Return True if a process with this id may be running on this machine."""
    if os.name == "nt":
        return True  # on Windows, `os.kill(process, 0)` would end the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# --- safetensors files ----------------------------------------------------------------------------

#: Metadata that transformers requires.
PYTORCH = {"format": "pt"}
#: Dtypes of weights that can be decomposed.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Dtypes that `load_slice` supports: those of weights, and of buffers such as counters and masks.
MAPPED = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# The safetensors package sorts the tensors of a file by dtype, in this order, and then by name.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """Location of a tensor inside a safetensors file.

    Args:
        file: path of the file.
        dtype: dtype as named in the header, such as `"BF16"`.
        shape: shape of the tensor.
        start: position of the first byte, counted from the start of the file.
        stop: position after the last byte.
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
    """Read the header of a safetensors file, and return the location of every tensor by name.

    Raises:
        FormatError: the file cannot be read or is truncated, its header is invalid, or a name occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):  # the JSON parser would silently keep the last of equal names
            raise ValueError("a name occurs twice in its header")
        return made

    try:
        with path.open("rb") as file, safe_open(path, framework="np"):  # `safe_open` checks sizes and offsets
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length), object_pairs_hook=unique)
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
    """Read the headers of several safetensors files, and return the location of every tensor by name.

    Raises:
        FormatError: a header cannot be read (see `read_header`), or two files have a tensor of the same name.
    """
    tensors: dict[str, Slice] = {}
    for file in files:
        for name, part in read_header(file).items():
            if name in tensors:
                raise FormatError(f"{file} and {tensors[name].file} both store {name!r}.")
            tensors[name] = part
    return tensors


def load_slice(part: Slice) -> Tensor:
    """Map one tensor of a file into memory; the system loads only the pages that are accessed.

    The mapping is copy-on-write: changes of the tensor do not change the file.

    Raises:
        FormatError: the file was truncated, or the dtype of the tensor is not in `MAPPED`.
    """
    dtype = _mapped_dtype(part)
    if part.nbytes == 0:
        return torch.empty(part.shape, dtype=dtype)
    page = part.start - part.start % mmap.ALLOCATIONGRANULARITY
    with part.file.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), part.stop - page, access=mmap.ACCESS_COPY, offset=page)
        except ValueError as error:  # the slice exceeds the file
            raise FormatError(f"{part.file} has become shorter since its header was read.") from error
    flat = torch.frombuffer(mapped, dtype=dtype, count=part.numel, offset=part.start - page)
    return flat.reshape(part.shape)


def _mapped_dtype(part: Slice) -> torch.dtype:
    if part.dtype not in MAPPED:
        raise FormatError(
            f"{part.file} contains a tensor of dtype {part.dtype}, which cannot be read; load the model "
            f"and save it in one of {', '.join(MAPPED)}."
        )
    return MAPPED[part.dtype]


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] = PYTORCH,
    *,
    what: str | None = None,
) -> None:
    """Write a safetensors file of contiguous tensors with separate memory.

    `what` and the errors are as for `new_file`.
    """
    with new_file(Path(path), what=what) as made:
        try:
            save_file(dict(tensors), made, dict(metadata))
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error


def safetensors_layout(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] = PYTORCH
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Compute the header and the positions of tensors in a safetensors file, before their values are known.

    The file has exactly the layout that safetensors would write.

    Args:
        tensors: dtype as named in the header (such as `"BF16"`), shape and length in bytes of each tensor, by
            name.
        metadata: metadata of the file.

    Returns:
        The first bytes of the file; and the offset of each tensor from the start of the file, with its length
        in bytes, by name and in the order of the file.
    """
    rank = {dtype: place for place, dtype in enumerate(_ORDER)}
    ordered = sorted(tensors.items(), key=lambda x: (rank.get(x[1][0], len(rank)), x[0]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, nbytes) in ordered:
        place = [end, end := end + nbytes]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    header = len(text).to_bytes(8, "little") + text
    starts = {name: len(header) + entries[name]["data_offsets"][0] for name, _ in ordered}
    return header, {name: (starts[name], nbytes) for name, (_, _, nbytes) in ordered}


def write_shard(path: Path, tensors: Mapping[str, Slice], metadata: Mapping[str, str] = PYTORCH) -> Written:
    """Copy tensors from other files to a new safetensors file, one chunk of bytes at a time.

    The safetensors package would need all tensors loaded or memory-mapped, and a process is killed if a file
    that it has mapped is truncated. The result is byte for byte the file that safetensors would write.

    Args:
        path: file to write.
        tensors: location of each tensor in a source file, by name.
        metadata: metadata of the new file.

    Raises:
        FormatError: a source file was truncated.
        OSError: a file cannot be read or written.
    """
    facts = {name: (part.dtype, part.shape, part.nbytes) for name, part in tensors.items()}
    header, places = safetensors_layout(facts, metadata)
    return write_file(path, chain([header], contents(tensors[name] for name in places)))


def read_slices(parts: Sequence[Slice]) -> Tensor:
    """Read tensors of one dtype from their files, and return all their elements as one flat tensor.

    Unlike mapped memory, the result does not change with the files, and a truncated file is an error instead
    of the end of the process.

    Raises:
        FormatError: a file was truncated, or the dtype is not in `MAPPED`.
    """
    flat = torch.empty(sum(part.numel for part in parts), dtype=_mapped_dtype(parts[0]), device="cpu")
    view: Any = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers
    for part in parts:
        with part.file.open("rb") as file:
            file.seek(part.start)
            if file.readinto(view[: part.nbytes]) != part.nbytes:
                raise FormatError(f"{part.file} has become shorter since its header was read.")
        view = view[part.nbytes :]
    return flat


def contents(parts: Iterable[Slice]) -> Iterator[bytes]:
    """Read the bytes of tensors one after another, and yield them in chunks.

    Raises:
        FormatError: a file was truncated.
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
