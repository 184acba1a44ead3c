"""Save a finished model in a local folder, or with `hf://owner/name` in a repository on the hub."""

import re
import tempfile
from pathlib import Path

import huggingface_hub
from transformers import PreTrainedModel

from tensornet.errors import DestinationError
from tensornet_hf.checkpoint.folders import check_free
from tensornet_hf.checkpoint.headers import WEIGHT_SUFFIXES
from tensornet_hf.checkpoint.save import save_model
from tensornet_hf.text.tokens import first_line

HUB = "hf://"
#: Deleted in a repository that is replaced: weights of the old model would be loaded along with the new.
_REPLACED = [*(f"*{suffix}" for suffix in WEIGHT_SUFFIXES), "*.index.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def save_to(model: PreTrainedModel, destination: str, *, source: Path, force: bool = False) -> None:
    """Save a model as a folder, or upload it as one; see `save_model` for what the folder holds.

    Args:
        model: to save.
        destination: a local path, or `hf://owner/name`.
        source: the folder that the model came from.
        force: replace what is there; of a repository the weights, and files that the new model has as well.

    Raises:
        DestinationError: it exists already, or cannot be written. What was there stays, and a repository that
            was created for the upload is deleted; where that fails too, the message says so.
    """
    require_free(destination, source=source, force=force)
    if not destination.startswith(HUB):
        save_model(model, destination, source=source, force=force)
        return
    with tempfile.TemporaryDirectory(prefix="tensornet-") as parent:
        folder = save_model(model, Path(parent) / "model", source=source)
        try:
            _upload(folder, _repository(destination), force=force)
        except Exception as error:  # of a dozen unrelated classes, httpx's among them
            raise DestinationError(f"Cannot upload to {destination}: {first_line(error)}") from error


def require_free(destination: str, *, source: Path, force: bool) -> None:
    """Check that a destination may be written, before any work is done for it.

    Raises:
        DestinationError: it exists and `force` is not set, it is the source, or it is not an address.
    """
    if not destination.startswith(HUB):
        check_free(destination, force=force, sources=(source,))
        return
    try:
        taken = huggingface_hub.repo_exists(_repository(destination))
    except DestinationError:
        raise
    except Exception as error:  # as above
        raise DestinationError(f"Cannot ask the hub about {destination}: {first_line(error)}") from error
    if taken and not force:
        raise DestinationError(
            f"{destination} exists already. Choose another name, or replace it with force=True (--force)."
        )


def _upload(folder: Path, name: str, *, force: bool) -> None:
    repository, created = _open_repository(name, force=force)
    try:
        huggingface_hub.upload_folder(
            repo_id=repository, folder_path=folder, delete_patterns=_REPLACED if force else None
        )
    except BaseException as error:
        if not created:
            raise
        try:
            huggingface_hub.delete_repo(repository)
        except Exception as failure:
            raise OSError(
                f"{first_line(error)}; the new repository {repository} could not be deleted "
                f"({first_line(failure)}): delete it yourself."
            ) from error
        raise


def _open_repository(name: str, *, force: bool) -> tuple[str, bool]:
    """Return the full name of a repository, and True if it was created here."""
    try:
        return huggingface_hub.create_repo(name).repo_id, True  # without `exist_ok` only the creator succeeds
    except Exception:
        if not force:
            raise
    return huggingface_hub.create_repo(name, exist_ok=True).repo_id, False


def _repository(destination: str) -> str:
    name = destination.removeprefix(HUB)
    if not _HUB_ID.fullmatch(name):
        raise DestinationError(f"{destination!r} is not an address on the hub; write {HUB}owner/name.")
    return name
