"""Put empty compressed modules into a model skeleton, under the names of its class."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tensornet.errors import FormatError
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.module import NetworkModule
from tensornet.nn.serialization import build_module
from tensornet_hf.moe.banks import make_room
from tensornet_moe import lend_shared_cores


def place_layers(
    model: PreTrainedModel, layers: Mapping[str, Any], *, dtype: torch.dtype | None
) -> dict[str, str]:
    """Replace modules of a skeleton by uninitialized ones built from descriptions.

    Args:
        model: on the meta device; changed in place.
        layers: descriptions by the name in the model that was saved.
        dtype: dtype of the new parameters.

    Returns:
        Name in this model of each module, by its name in the saved one. Another class than the saved one
        (with another head, or none) lacks some, which are then left out.

    Raises:
        FormatError: a module has no place in the model, or does not fit there.
    """
    make_room(model, layers)
    names = {layer: name for layer in layers if (name := _name_in(model, layer)) is not None}
    saved_as = getattr(model.config, "architectures", None) or []
    absent = [layer for layer in layers if layer not in names]
    if absent and (not names or type(model).__name__ in saved_as):
        raise FormatError(
            f"{type(model).__name__} has no module {absent[0]!r}, which quantization_config describes; it "
            f"was saved as {', '.join(saved_as) or 'an unknown class'}."
        )
    built = {layer: build_module(layers[layer], device="meta", dtype=dtype) for layer in names}
    for layer, name in names.items():
        _check_place(name, model.get_submodule(name), layers[layer], built[layer])
    for layer, name in names.items():
        made = built[layer]
        # Every core is loaded: the model's class has nothing to initialize in these modules.
        for part in made.modules():
            part._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(name, made)
    lend_shared_cores(model)
    return names


def rename(parameter: str, names: Mapping[str, str], layers: Collection[str]) -> str | None:
    """Translate a parameter name of the saved model to this model; None if its module does not exist here.

    Names outside the compressed modules are returned as they are.

    Args:
        parameter: name in the saved model.
        names: name in this model of each compressed module that it has, by its name in the saved one.
        layers: names of all compressed modules of the saved model.
    """
    layer = parameter
    while layer:
        layer = layer.rpartition(".")[0]
        if layer in layers:
            return names[layer] + parameter[len(layer) :] if layer in names else None
    return parameter


def _name_in(model: PreTrainedModel, layer: str) -> str | None:
    """Find a layer by a name with or without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    for name in (layer, prefix + layer, layer.removeprefix(prefix)):
        try:
            model.get_submodule(name)
        except AttributeError:
            continue
        return name
    return None


def _check_place(name: str, module: nn.Module, spec: Mapping[str, Any], made: nn.Module) -> None:
    """Raise FormatError unless a described linear layer or embedding fits the layer in its place."""
    if not isinstance(made, NetworkModule):
        return
    kind = kind_of(module)
    shape = made.topology.shape
    if kind is None or kind.name != spec.get("source"):
        raise FormatError(
            f"quantization_config describes {name!r} in place of a {spec.get('source')!r} layer, the "
            f"model has a {type(module).__name__} there."
        )
    if tuple(kind.matrix(module).shape) != shape:
        raise FormatError(
            f"quantization_config describes {name!r} with shape {list(shape)}, the model has shape "
            f"{list(kind.matrix(module).shape)} there (out_features, in_features)."
        )
