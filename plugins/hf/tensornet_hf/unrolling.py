"""Run the layers of a transformers model several times, each pass with a KV cache of its own."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from tensornet._util import check_type
from tensornet.compression.apply import set_submodule
from tensornet.errors import TargetError
from tensornet_moe.passes import unroll

#: Attributes in which modules of transformers keep the number of their layer: their place in a cache.
_NUMBERS = ("layer_idx", "layer_id")


def unroll_layers(model: PreTrainedModel, stack: str, passes: int) -> None:
    """Make a model run its stack of layers several times, in place.

    The model then has `passes` times as many layers, so that each pass has its own place in a KV cache. The
    layers of all passes share their parameters, except for routers and experts; see `tensornet_moe.unroll`.

    Args:
        model: the model.
        stack: name of the stack, as found by `find_stack` before layers were replaced by mixtures.
        passes: number of passes.
    """
    layers = unroll(list(model.get_submodule(stack).children()), passes)
    for number, layer in enumerate(layers):
        for part in layer.modules():
            for key in _NUMBERS:
                if key in vars(part):
                    setattr(part, key, number)
    set_submodule(model, stack, layers)
    _lengthen(model.config, passes)


def find_stack(model: nn.Module, passes: int) -> str:
    """Return the name of the only stack of layers, and check that its layers can run several times.

    Raises:
        TargetError: the model has no single stack of layers, or a longer model of its class would have other
            layers.
    """
    check_type("model", model, PreTrainedModel, "for example one of AutoModelForCausalLM")
    assert isinstance(model, PreTrainedModel)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [
        name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    if len(stacks) != 1 or model.config.is_encoder_decoder:
        raise TargetError(
            f"passes={passes} repeats a single stack of layers, but {type(model).__name__} has "
            f"{stacks or 'none'}. Choose a model with one stack, or leave out passes=."
        )
    config = copy.deepcopy(model.config)
    _lengthen(config, passes)
    with torch.device("meta"), no_init_weights():
        longer = type(model)(config)
    layers = list(model.get_submodule(stacks[0]).children())
    for number, other in enumerate(longer.get_submodule(stacks[0]).children()):
        if _facts(layers[number % len(layers)]) != _facts(other):
            raise TargetError(
                f"Layer {number} of a longer {type(model).__name__} would differ from layer "
                f"{number % len(layers)} of this one, so that it could not be loaded again. Leave out "
                "passes=, or use a dense model whose layers are all equal."
            )
    return stacks[0]


def _lengthen(config: Any, passes: int) -> None:
    """Multiply the number of layers in a configuration, and repeat its lists with an entry for each layer."""
    config = config.get_text_config()
    count = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(config, key, value * passes)
    config.num_hidden_layers = count * passes


def _facts(layer: nn.Module) -> list[tuple[Any, ...]]:
    """Describe what a layer computes, apart from its weights and its number."""
    found: list[tuple[Any, ...]] = []
    for name, part in layer.named_modules():
        simple = {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, bool | int | float | str)
            and not key.startswith("_")
            and key not in (*_NUMBERS, "training")
        }
        shapes = {key: tuple(x.shape) for key, x in part.named_parameters(recurse=False)}
        found.append((name, type(part).__name__, simple, shapes))
    return found
