"""Save a finished model in a local folder, or with `hf://owner/name` in a repository on the hub."""

import re
import tempfile
from pathlib import Path

import huggingface_hub
from transformers import PreTrainedModel

from tensornet.errors import DestinationError
from tensornet_hf.checkpoint.folders import check_free
from tensornet_hf.checkpoint.save import save_model
from tensornet_hf.text.tokens import first_line

HUB = "hf://"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def save_to(model: PreTrainedModel, destination: str, *, source: Path, force: bool = False) -> None:
    """Save a model as a folder, or upload it as one; see `save_model` for what the folder holds.

    Args:
        model: to save.
        destination: a local path, or `hf://owner/name`.
        source: the folder that the model came from.
        force: replace what is there.

    Raises:
        DestinationError: it exists already, or cannot be written; nothing is left there.
    """
    require_free(destination, source=source, force=force)
    if not destination.startswith(HUB):
        save_model(model, destination, source=source, force=force)
        return
    with tempfile.TemporaryDirectory(prefix="tensornet-") as parent:
        folder = save_model(model, Path(parent) / "model", source=source)
        try:
            repository = huggingface_hub.create_repo(_repository(destination), exist_ok=True).repo_id
            huggingface_hub.upload_folder(repo_id=repository, folder_path=folder)
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


def _repository(destination: str) -> str:
    name = destination.removeprefix(HUB)
    if not _HUB_ID.fullmatch(name):
        raise DestinationError(f"{destination!r} is not an address on the hub; write {HUB}owner/name.")
    return name
