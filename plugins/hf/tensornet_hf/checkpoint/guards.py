"""Guards: empty tensors that make a loader fail if it does not know compressed layers.

Without this library transformers only warns of an unknown quantization type, and fills dense weights that it
finds nowhere with random numbers. But it refuses tensors of another shape. So a saved folder holds, under the
name of every dense weight that cores replace, a tensor without elements: a *guard*. Our own loading ignores
guards. They take no bytes but their names in the header.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from tensornet_hf.checkpoint.describe import is_inside
from tensornet_hf.checkpoint.quantization_config import TensorNetworkConfig

_Stored = TypeVar("_Stored")

#: Shape of a guard; weights are never empty.
GUARD_SHAPE = (0,)


def make_guards(model: PreTrainedModel, config: TensorNetworkConfig) -> dict[str, Tensor]:
    """Build the guards of a compressed model, by name.

    Args:
        model: the model that is saved.
        config: its description.
    """
    dtype = getattr(torch, config.dtype or "float32")
    dtype = dtype if dtype.is_floating_point else torch.float32
    names = replaced_names(_dense_names(model, config), model.state_dict(), config.layers)
    return {name: torch.empty(GUARD_SHAPE, dtype=dtype, device="cpu") for name in names}


def replaced_names(dense: Iterable[str], present: Iterable[str], layers: Iterable[str]) -> list[str]:
    """Return the names of weights that compressed layers replace.

    Args:
        dense: names of the tensors of the dense model.
        present: names of the tensors of the compressed model.
        layers: names of the compressed layers, which may lie below the module that held a weight, as the
            experts of a stack do.
    """
    layers = set(layers)
    around = {layer[:end] for layer in layers for end in range(len(layer)) if layer[end] == "."}
    absent = set(dense) - set(present)
    return sorted(x for x in absent if is_inside(x, layers) or x.rpartition(".")[0] in around)


def _dense_names(model: PreTrainedModel, config: TensorNetworkConfig) -> Iterable[str]:
    """Return the names of all tensors of the dense model of this class and configuration."""
    try:
        with torch.device("meta"), no_init_weights():
            return tuple(type(model)(copy.deepcopy(model.config)).state_dict())
    except Exception:  # classes that compute while they are built, or that take more than a configuration
        return tuple(f"{layer}.weight" for layer in config.layers)


def without_guards(tensors: Mapping[str, _Stored]) -> dict[str, _Stored]:
    """Remove guards from a mapping of tensors."""
    return {name: x for name, x in tensors.items() if getattr(x, "shape", None) != GUARD_SHAPE}


def pass_by_guards(model: nn.Module, names: Iterable[str]) -> None:
    """Prevent transformers from reporting guards as unexpected weights.

    Args:
        model: about to be loaded; changed in place.
        names: of the guards, with or without the prefix of the base model.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {name.removeprefix(prefix) for name in names}
    ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {rf"(^|\.){re.escape(x)}$" for x in known}  # type: ignore[assignment]
