"""Which layers a checkpoint describes: a model without weights, from its configuration or its names alone."""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tensornet.errors import FormatError
from tensornet.io.safetensors_files import FLOATS, Slice
from tensornet.nn.stock_layers import LayerKind, layer_kind
from tensornet.streaming.worker import place

#: Types of model whose linear layers with these names are `Conv1D`, weight `(in, out)`.
CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
HEADS = ("lm_head", "embed_out", "output")
#: Routers are plain parameters, and these positions are tables with rules of their own: never layers.
NO_LAYERS = {"gate", "router", "embed_positions"}

_EMBEDDING = re.compile(r"(^|_)(wte|wpe|shared|embed|embeddings?|embd|relative_attention_bias)(_|$)")
_COUNT = re.compile(r"(^|_)(num|n)_(\w+_)?(layers?|blocks?|experts?|heads?|groups?)($|_)|^n_(layer|head)$")
#: No dimension of a model comes near this.
_LARGEST = 2**31


class NamedLayers(nn.Module):
    """Layers on the meta device at the names a checkpoint gives them. It computes nothing."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that makes logits, by its usual names."""
        return next((layer for name in HEADS if (layer := getattr(self, name, None)) is not None), None)


def model_skeleton(
    config: Mapping[str, Any], tensors: Mapping[str, Slice]
) -> tuple[nn.Module, dict[str, str]]:
    """The model on the meta device, and where the weights of its layers are stored.

    transformers' own class is used where it has one, so that kinds of layers, ties and renamings are those
    of loading; code that comes with a checkpoint is never run. For types that it does not know, layers are
    told by the names and shapes of the tensors.

    Args:
        config: content of `config.json`.
        tensors: the stored tensors.

    Returns:
        The skeleton, and `{parameter of the skeleton: stored name}` for all that are stored as they are.

    Raises:
        FormatError: values that no model has, or that contradict the tensors.
    """
    check_values(config, tensors=len(tensors))
    model = _from_transformers(config)
    if model is None:
        if "auto_map" in config:
            raise FormatError(
                "config.json names code to run (auto_map) for a model type that transformers does not have "
                f"({config.get('model_type')!r}). Such code is never run here. Remove auto_map from a copy "
                "of "
                "config.json to compress by the names of the tensors, and load the result with that class."
            )
        return skeleton_from_names(str(config.get("model_type")), tensors), {name: name for name in tensors}
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
    """Refuse numbers that would make building even an empty model endless.

    Args:
        config: nested as it may be.
        tensors: number of stored tensors; a model has no more layers or experts than a small multiple.

    Raises:
        FormatError: naming the entry.
    """
    open_entries: list[tuple[str, Any]] = list(config.items())
    while open_entries:
        key, value = open_entries.pop()
        if isinstance(value, Mapping):
            open_entries += [(f"{key}.{inner}", entry) for inner, entry in value.items()]
        elif isinstance(value, list):
            open_entries += [(key, entry) for entry in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            leaf = key.rpartition(".")[2]
            counts = _COUNT.search(leaf) is not None
            limit = max(1024, 4 * tensors) if counts else _LARGEST
            size = counts or leaf.endswith(
                ("_size", "_dim", "d_model", "d_ff", "n_embd", "n_positions", "n_inner")
            )
            if isinstance(value, int) and (abs(value) > limit or (size and value < 0)):
                raise FormatError(
                    f"config.json sets {key} to {value!r:.40}; a checkpoint of {tensors} tensors has values "
                    "from "
                    f"0 to {limit} there. It is damaged or hostile."
                )


def skeleton_from_names(model_type: str, tensors: Mapping[str, Slice]) -> NamedLayers:
    """Linear layers, `Conv1D` and embeddings told by name, shape and model type.

    Raises:
        FormatError: a name that no model can have.

    A two-dimensional floating `NAME.weight` is a layer: an embedding if its name says so, a `Conv1D` for
    the model types that use it, a linear layer otherwise. See also `NO_LAYERS`.
    """
    root = NamedLayers()
    for name, part in tensors.items():
        layer, _, leaf = name.rpartition(".")
        own = layer.rpartition(".")[2]
        if (
            leaf != "weight"
            or len(part.shape) != 2
            or part.dtype not in FLOATS
            or not layer
            or own in NO_LAYERS
        ):
            continue
        weight = torch.empty(part.shape, dtype=FLOATS[part.dtype], device="meta")
        bias = _empty_bias(tensors.get(f"{layer}.bias"))
        kind = _kind_by_name(own, model_type)
        try:
            place(root, layer, kind.build(weight.T if kind.name == "conv1d" else weight, bias))
        except (KeyError, AttributeError) as error:  # empty parts, or names of methods
            raise FormatError(f"No model has a layer named {layer!r:.200}: {error!s:.200}.") from error
    return root


def _empty_bias(part: Slice | None) -> torch.Tensor | None:
    return None if part is None else torch.empty(part.shape, dtype=FLOATS.get(part.dtype), device="meta")


def _kind_by_name(own: str, model_type: str) -> LayerKind:
    if _EMBEDDING.search(own) and "proj" not in own:
        return layer_kind("embedding")
    return layer_kind("conv1d" if model_type in CONV1D_TYPES and own in CONV1D_NAMES else "linear")


def _from_transformers(config: Mapping[str, Any]) -> PreTrainedModel | None:
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        return None
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        read = _read_config(kind, plain)
        with torch.device("meta"):
            return cls(read)
    except Exception as error:  # model classes fail on nonsense in every way there is
        raise FormatError(
            f"config.json does not describe a {name}: {type(error).__name__}: {error!s:.300}"
        ) from error


def _read_config(kind: str, content: Mapping[str, Any]) -> PreTrainedConfig:
    """Read a configuration as loading does: transformers decodes what JSON cannot say, such as infinity."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(content), encoding="utf-8")
        read: PreTrainedConfig = CONFIG_MAPPING[kind].from_pretrained(folder, local_files_only=True)
    read.name_or_path = ""
    return read


def _stored_names(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """As loading maps names, for those tensors that it takes over one to one."""
    transforms = get_model_conversion_mapping(model)
    renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
    converters = [x for x in transforms if isinstance(x, WeightConverter)]
    state = model.state_dict()
    found: dict[str, str] = {}
    for source in tensors:
        name, converter = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
        if converter is None:
            if name in found:
                raise FormatError(
                    f"{found[name]!r} and {source!r} are both stored, and are the same parameter."
                )
            found[name] = source
    return found
