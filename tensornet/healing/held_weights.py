"""Frozen matrices in the dtype of autocast, cast or unpacked once for all steps of healing.

To explain the gain: autocast casts a frozen weight at every use, and a layer of integers unpacks its matrix
and casts it, although neither changes from step to step.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.strategy import Strategy

#: Stock layers whose weight enters matrix products alone, which autocast computes in its dtype.
_PRODUCTS = ("linear", "conv1d")


@contextmanager
def held_weights(
    *models: nn.Module, dtype: torch.dtype | None, trained: Collection[Tensor] = ()
) -> Iterator[None]:
    """Hold the frozen matrices of linear layers in a dtype inside the block; restore the layers after it.

    Products under autocast in that dtype are the same to the bit. Until the block ends, every dense weight of
    another dtype and every matrix of integers whose scales are not trained takes the bytes of the matrix in
    this dtype beside its own. Tied weights are cast once.

    Args:
        models: in eval mode.
        dtype: of autocast; None, without autocast, changes nothing.
        trained: parameters that change inside the block; layers that hold one are left alone.

    Example:
        >>> from tensornet.healing.held_weights import held_weights
        >>> layer = torch.nn.Linear(8, 8)
        >>> with held_weights(layer, dtype=torch.bfloat16):
        ...     layer.weight.dtype
        torch.bfloat16
        >>> layer.weight.dtype
        torch.float32
    """
    moving = {id(parameter) for parameter in trained}
    modules = [] if dtype is None else [module for model in models for module in model.modules()]
    with ExitStack() as stack:
        cast: dict[int, nn.Parameter] = {}
        for module in dict.fromkeys(modules):
            if isinstance(module, TensorNetworkLinear):
                frozen = not any(id(tensor) in moving for tensor in module.stored.values())
                if frozen and module.integer_core is not None and module.strategy != "cached":
                    stack.callback(_set_strategy, module, module.strategy)
                    module.strategy = "cached"
            elif (weight := _castable(module, dtype)) is not None and id(weight) not in moving:
                stack.callback(module._parameters.__setitem__, "weight", weight)
                if id(weight) not in cast:
                    cast[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                module._parameters["weight"] = cast[id(weight)]
        yield


def _set_strategy(layer: TensorNetworkLinear, strategy: Strategy) -> None:
    layer.strategy = strategy
    layer.kept.drop()


def _castable(module: nn.Module, dtype: torch.dtype | None) -> nn.Parameter | None:
    """Return the weight of a stock linear layer if autocast would cast it at every use, else None."""
    kind = kind_of(module)
    if kind is None or kind.name not in _PRODUCTS:
        return None
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta:
        return None
    # Autocast leaves float64 alone.
    return weight if weight.dtype not in (dtype, torch.float64) and weight.is_floating_point() else None
