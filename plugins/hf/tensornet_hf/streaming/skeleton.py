"""Build the model of a checkpoint without weights, and locate its stored parameters."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tensornet.errors import FormatError
from tensornet.io import FLOATS, Slice

_COUNT = re.compile(r"(^|_)(num|n)_(\w+_)?(layers?|blocks?|experts?|heads?|groups?)($|_)|^n_(layer|head)$")
_SIZES = ("_size", "_dim", "d_model", "d_ff", "n_embd", "n_positions", "n_inner")
#: No dimension of a model comes near this.
_LARGEST = 2**31


def model_skeleton(
    config: Mapping[str, Any], tensors: Mapping[str, Slice]
) -> tuple[PreTrainedModel, dict[str, str]]:
    """Build the model on the meta device, and map its parameters to the stored tensors.

    The class is that of transformers, so that kinds of layers, ties and renamings are those of loading. Code
    that comes with a checkpoint is never run.

    Args:
        config: content of `config.json`.
        tensors: the stored tensors.

    Returns:
        The skeleton, and `{parameter of the skeleton: stored name}` for all that are stored as they are.

    Raises:
        FormatError: transformers lacks the class, or the values are impossible or contradict the tensors.
    """
    check_values(config, tensors=len(tensors))
    model = _empty_model(config)
    stored = _stored_names(model, tensors)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = tensors.get(stored.get(name, ""))
        if part is None:
            continue
        if tuple(parameter.shape) != part.shape:
            raise FormatError(
                f"config.json describes {name} with shape {list(parameter.shape)}, it is stored with shape "
                f"{list(part.shape)}. One of the two belongs to another model."
            )
        if part.dtype in FLOATS:
            parameter.data = parameter.data.to(FLOATS[part.dtype])
    return model, stored


def check_values(config: Mapping[str, Any], *, tensors: int) -> None:
    """Raise FormatError for sizes so large that building even an empty model would not end.

    Args:
        config: nested as it may be.
        tensors: number of stored tensors; a model has no more layers or experts than a small multiple.
    """
    open_entries: list[tuple[str, Any]] = list(config.items())
    while open_entries:
        key, value = open_entries.pop()
        if isinstance(value, Mapping):
            open_entries += [(f"{key}.{inner}", entry) for inner, entry in value.items()]
        elif isinstance(value, list):
            open_entries += [(key, entry) for entry in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            leaf = key.rpartition(".")[2]
            counts = _COUNT.search(leaf) is not None
            limit = max(1024, 4 * tensors) if counts else _LARGEST
            if abs(value) > limit or (value < 0 and (counts or leaf.endswith(_SIZES))):
                raise FormatError(
                    f"config.json sets {key} to {value!r:.40}; a checkpoint of {tensors} tensors has values "
                    f"from 0 to {limit} there. It is damaged or hostile."
                )


def _empty_model(config: Mapping[str, Any]) -> PreTrainedModel:
    kind, names = config.get("model_type"), config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if not (known and isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        code = " It names code to run (auto_map), which is never run here." if "auto_map" in config else ""
        raise FormatError(
            f"config.json names the class {name!r:.80} (architectures) of the model type {kind!r:.80}, which "
            f"transformers {transformers.__version__} does not have.{code} Update transformers, convert the "
            "checkpoint to a class that it has, or load the model with its own code and use "
            "tensornet.compress and tensornet.save_model."
        )
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        read = _read_config(str(kind), plain)
        with torch.device("meta"):
            return cls(read)
    except Exception as error:  # model classes fail on nonsense in every way there is
        raise FormatError(
            f"config.json does not describe a {name}: {type(error).__name__}: {error!s:.300}"
        ) from error


def _read_config(kind: str, content: Mapping[str, Any]) -> PreTrainedConfig:
    """Read a configuration as transformers does, which decodes infinity and NaN that JSON cannot express."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(content), encoding="utf-8")
        read: PreTrainedConfig = CONFIG_MAPPING[kind].from_pretrained(folder, local_files_only=True)
    read.name_or_path = ""
    return read


def as_loaded(model: PreTrainedModel, tensors: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield stored name, name in the model, and the pattern of its converter (or None) of every tensor."""
    transforms = get_model_conversion_mapping(model)
    renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
    converters = [x for x in transforms if isinstance(x, WeightConverter)]
    state = model.state_dict()
    for stored in tensors:
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        yield stored, name, pattern


def _stored_names(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Map model names to stored names, for tensors that loading copies one to one."""
    found: dict[str, str] = {}
    for source, name, pattern in as_loaded(model, tensors):
        if pattern is None:
            if name in found:
                raise FormatError(
                    f"{found[name]!r} and {source!r} are both stored, and are the same parameter."
                )
            found[name] = source
    return found
