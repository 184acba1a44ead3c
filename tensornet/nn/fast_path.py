"""What a layer has at hand to answer at once, and the test that it may.

Looking up cores, asking whether the kept matrix is true and choosing a route takes longer than the arithmetic
of one token. After a forward pass that took the long way, its result is remembered with everything it
depended on; the next pass compares that and goes on. In doubt it takes the long way again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _get_tracing_state as tracing_state
from torch._C import _is_any_autocast_enabled as any_autocast
from torch.nn.functional import linear

from tensornet.contraction.bound import Sweep, bind_sweep
from tensornet.nn.matrix_cache import may_cache
from tensornet.nn.strategy import CACHED

if TYPE_CHECKING:
    from tensornet.nn.execution import RoutedModule


#: Gives the output of a layer for an input: the product with the kept matrix or a contraction bound to the
#: cores, whichever `layer.route` would give; None where that is not at hand, and where only a closer look
#: could tell whether it is.
Shortcut = Callable[["RoutedModule", Tensor], Tensor | None]


def make_shortcut(layer: "RoutedModule", names: Sequence[str], *, bind: bool) -> Shortcut | None:
    """A shortcut for the present state of a layer; None if it has no state that could be compared.

    Args:
        layer: whose state it is.
        names: of the parameters and buffers its operator depends on.
        bind: whether these are the cores themselves and views of them may be held.
    """
    held = layer.tensors_of_cores()
    if is_grad_enabled() or any_autocast() or not may_cache(held):
        return None
    cores = [core for core in held if core is not None]
    with torch.inference_mode(False), torch.no_grad():
        sweeps = [bind_sweep(plan, cores) for plan in layer.plan.applies if bind]
    matrix = layer.matrix_at_hand
    kept = None if matrix is None else partial(_times, matrix)
    ways = [
        (largest, kept if route == CACHED else sweeps[route] if 0 <= route < len(sweeps) else None)
        for largest, route in layer.bounds()
    ]
    return _comparing(layer, ways, kept, [(name, core) for name, core in zip(names, cores, strict=True)])


def _times(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, matrix, bias)


def _comparing(
    layer: "RoutedModule",
    ways: Sequence[tuple[float, Sweep | None]],
    kept: Sweep | None,
    cores: Sequence[tuple[str, Tensor]],
) -> Shortcut:
    """A closure, whose variables are found faster than attributes: it takes about a microsecond."""
    training, strategy, limit = layer.training, layer.strategy, layer.cache_limit
    out_features, in_features = layer.plan.topology.shape
    smaller, rest = tuple(ways[:-1]), ways[-1][1]
    in_parameters = layer._parameters.keys()
    addresses = tuple((name, core, core.data_ptr()) for name, core in cores if name in in_parameters)
    integers = tuple((name, core, core.data_ptr()) for name, core in cores if name not in in_parameters)
    # Views of cores see what is written into them; a matrix made of them does not.
    versions = () if kept is None else tuple((core, core._version) for _, core in cores)

    def answer(layer: "RoutedModule", x: Tensor) -> Tensor | None:
        if layer.training is not training or layer.strategy is not strategy or layer.cache_limit != limit:
            return None
        if is_grad_enabled() or transforms_active() or any_autocast() or tracing_state() is not None:
            return None
        parameters, shape, way = layer._parameters, x.shape, rest
        for name, core, address in addresses:
            if parameters.get(name) is not core or core.data_ptr() != address:
                return None
        for name, core, address in integers:
            if layer._buffers.get(name) is not core or core.data_ptr() != address:
                return None
        for core, version in versions:
            if core._version != version:
                return None
        if smaller:
            tokens = x.numel() // in_features
            for largest, candidate in smaller:  # `next` and a generator would take as long as all the rest
                if tokens <= largest:
                    way = candidate
                    break
        if (
            way is None or not shape or shape[-1] != in_features or "bias" not in parameters
        ):  # a parametrized bias is not
            return None
        if len(shape) == 2 or way is kept:
            return way(x, parameters["bias"])
        return way(x.reshape(-1, in_features), parameters["bias"]).reshape(*shape[:-1], out_features)

    return answer
