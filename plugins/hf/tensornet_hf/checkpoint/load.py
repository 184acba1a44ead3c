"""Load a model from a folder or the hub in its own class; missing and unexpected weights are errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tensornet._util import warn
from tensornet.errors import FormatError, NonFiniteError, TensorNetError
from tensornet_hf.checkpoint.describe import is_inside
from tensornet_hf.checkpoint.headers import Checkpoint, read_checkpoint
from tensornet_hf.checkpoint.quantization_config import Descriptions

#: What a model needs, and nothing that has to be unpickled.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
#: Options of `from_pretrained` that say which files on the hub are meant.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
#: Options of `from_pretrained` that never change the model's configuration.
PLACEMENT_OPTIONS = frozenset({"dtype", "torch_dtype", "device_map", "trust_remote_code"})


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model, compressed or not, in the class it was saved as.

    Unlike `from_pretrained`, which only reports what is wrong with a checkpoint, this refuses it. Compressed
    layers are never built dense. Pickled weights are refused.

    Args:
        path: a folder written by `save_pretrained`, or a hub id.
        kwargs: passed to `from_pretrained`. The dtype is the stored one unless given. `revision`, `token`,
            `cache_dir`, `local_files_only` and `force_download` say which files on the hub are meant.

    Raises:
        FormatError: the folder is not a model, or something in it is missing, surplus, damaged or wrong.
        NonFiniteError: a stored core contains NaN or infinity.

    Example:
        >>> type(th.load(th.embedded.gpt2_path())).__name__
        'GPT2LMHeadModel'
    """
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    folder = resolve_folder(path, **hub) / kwargs.pop("subfolder", "")
    checkpoint = read_checkpoint(folder)
    options = {"dtype": "auto", **kwargs, "use_safetensors": True, "output_loading_info": True}
    kind = model_class(checkpoint, **kwargs)
    with _refusing(folder, kind, damaged=not kwargs):
        if (
            kwargs.keys() <= PLACEMENT_OPTIONS
            and (config := _configuration(folder, checkpoint, kind)) is not None
        ):
            options["config"] = config
        loaded: Any = kind.from_pretrained(folder, **options)
    model, info = loaded
    _refuse_mismatch(checkpoint, info)
    _refuse_non_finite(checkpoint, model)
    return model


def _configuration(
    folder: Path, checkpoint: Checkpoint, kind: type[PreTrainedModel]
) -> PreTrainedConfig | None:
    """Build the configuration of a compressed model, and add the descriptions of its layers afterwards.

    `PreTrainedConfig.from_dict` formats the whole configuration for a log line, shown or not. For the
    descriptions of 210 layers that takes a tenth of the time of loading.

    Returns:
        None for an uncompressed model, and where transformers has to look for the configuration: inside that
        of a composite model, or in another file.
    """
    made_by, raw = kind.config_class, checkpoint.config
    if checkpoint.compression is None or made_by is None or raw.get("model_type") != made_by.model_type:
        return None
    if made_by.base_config_key in raw or "configuration_files" in raw:
        return None
    data, _ = made_by.get_config_dict(folder)  # which reads infinities as well
    entry = data.pop("quantization_config")
    config = made_by.from_dict(data)
    config.quantization_config = {**entry, "layers": Descriptions(entry["layers"])}
    return config


def on_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Move a model to a device in place and return it; dtypes stay."""
    torch.nn.Module.to(model, device=torch.device(device))
    return model


@contextmanager
def _refusing(folder: Path, kind: type[PreTrainedModel], *, damaged: bool) -> Iterator[None]:
    """Convert errors of transformers inside the block to FormatError: the folder is damaged.

    Model classes fail on nonsense in every way there is. Where the caller gave options, which may be at fault
    as well, only a configuration that cannot be read is blamed on the folder.
    """
    try:
        yield
    except (TensorNetError, MemoryError, torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:
        if damaged or isinstance(error, StrictDataclassError):
            raise FormatError(
                f"{folder} does not describe a {kind.__name__} that can be loaded: {type(error).__name__}: "
                f"{error!s:.300} Copy or download it again."
            ) from error
        raise


def resolve_folder(path: str | Path, **hub: Any) -> Path:
    """Return a local folder for a path or hub id; files of the hub are downloaded or taken from its cache.

    Args:
        path: a folder, or a hub id; a folder wins.
        hub: `revision`, `token` and the like, passed to `huggingface_hub.snapshot_download`.

    Raises:
        FormatError: neither a folder nor a model that the hub or its cache has.
    """
    if Path(path).exists() or not isinstance(path, str) or path.startswith((".", "/", "~")):
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=list(HUB_FILES), **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"{path} is not a folder here, and as a hub id it could not be had: {reason}"
        ) from error


def model_class(checkpoint: Checkpoint, **kwargs: Any) -> type[PreTrainedModel]:
    """Import the model class that the configuration names in `architectures`.

    Args:
        checkpoint: what was read of the folder.
        kwargs: `trust_remote_code=True` allows classes that the folder brings itself.

    Raises:
        FormatError: none is named, or transformers has no such class.
    """
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    entries = checkpoint.config.get("auto_map")
    custom = entries.values() if isinstance(entries, dict) else ()
    reference = next((r for r in custom if isinstance(r, str) and r.endswith(f".{name}")), None)
    if reference is not None and kwargs.get("trust_remote_code"):
        return get_class_from_dynamic_module(reference, str(checkpoint.folder))
    raise FormatError(
        f"{checkpoint.folder}: config.json names the class {name!r} under 'architectures', which "
        f"transformers {transformers.__version__} does not have. Update transformers, or load the folder "
        "with the AutoModel class that fits (after import tensornet_hf); a class that the folder brings "
        "itself needs trust_remote_code=True."
    )


def _refuse_mismatch(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    missing, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise FormatError(f"{checkpoint.folder} lacks weights: {_some(missing)}.")
    if surplus and checkpoint.compression is not None:
        raise FormatError(
            f"{checkpoint.folder} stores weights that the model does not have: {_some(surplus)}."
        )
    if surplus:
        # Usual for models of others: heads of the pre-training, masks that older versions saved.
        warn(f"{checkpoint.folder}: not used by the model: {_some(surplus)}.")


def _refuse_non_finite(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    layers = set(checkpoint.compression.layers if checkpoint.compression else ())
    for name, parameter in model.named_parameters():
        if is_inside(name, layers) and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"{checkpoint.folder}: {name} contains NaN or infinity. The file is damaged, or was saved "
                "from a model whose training diverged."
            )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
