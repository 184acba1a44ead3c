"""Writing safetensors files: completely, or not at all."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tensornet.errors import DestinationError
from tensornet.optional import import_optional


def check_place(what: str, path: Path) -> None:
    """Refuse a path that no file can be written to.

    Args:
        what: the file, as in a sentence: `"The checkpoint"`.
        path: of the file.

    Raises:
        DestinationError: it is a folder, or in none.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DestinationError(f"{what} cannot be written to {path}: name a file in a folder that exists.")


def write_tensors(
    what: str, path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, user: str
) -> None:
    """Write one file; an earlier one stays until the new one is complete.

    Args:
        what: see `check_place`.
        path: of the file.
        tensors: contiguous, and none in the memory of another.
        metadata: of the file.
        user: who needs safetensors, for the error where it is not installed.

    Raises:
        DestinationError: there is no place for it, or it is full.
    """
    path = Path(path)
    check_place(what, path)
    torch_side = import_optional("safetensors.torch", extra="hf", user=user)
    failures = (OSError, import_optional("safetensors", extra="hf", user=user).SafetensorError)
    beside = path.with_name(path.name + ".part")
    try:
        torch_side.save_file(dict(tensors), str(beside), metadata=dict(metadata))
        beside.replace(path)
    except failures as error:
        raise DestinationError(f"{what} cannot be written to {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
