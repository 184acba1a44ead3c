"""What a layer has at hand to answer at once, and the test that it may.

Looking up cores, asking whether the kept matrix is true and choosing a route takes longer than the arithmetic
of one token. After a forward pass that took the long way, its result is remembered with everything it
depended on; the next pass compares that and goes on. In doubt it takes the long way again.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _is_any_autocast_enabled as any_autocast

from tensornet.nn.cache import may_cache
from tensornet.nn.strategy import CACHED
from tensornet.sweep import Sweep, bind_sweep

if TYPE_CHECKING:
    from tensornet.nn.routing import RoutedModule


#: Gives, for a layer and a number of tokens, the kept matrix or a contraction bound to the cores, whichever
#: `layer.route` would give; None where that is not at hand, and where only a closer look could tell.
Shortcut = Callable[["RoutedModule", int], "Tensor | Sweep | None"]


def make_shortcut(layer: "RoutedModule", names: Sequence[str], *, bind: bool) -> Shortcut | None:
    """A shortcut for the present state of a layer; None if it has no state that could be compared.

    Args:
        layer: whose state it is.
        names: of the parameters its operator depends on.
        bind: whether these are the cores themselves and views of them may be held.
    """
    parameters = [layer._parameters.get(name) for name in names]
    if is_grad_enabled() or any_autocast() or not may_cache(parameters):
        return None
    cores = [core for core in parameters if core is not None]
    with torch.inference_mode(False), torch.no_grad():
        sweeps = [bind_sweep(plan, cores) for plan in layer.plan.applies if bind]
    states = [(name, core, core._version, core.data_ptr()) for name, core in zip(names, cores, strict=True)]
    return _comparing(layer, layer.matrix_at_hand, sweeps, tuple(states))


def _comparing(
    layer: "RoutedModule",
    matrix: Tensor | None,
    sweeps: Sequence[Sweep | None],
    states: tuple[tuple[str, Tensor, int, int], ...],
) -> Shortcut:
    """A closure, whose variables are found faster than attributes: it takes about a microsecond."""
    training, strategy, limit, bounds = layer.training, layer.strategy, layer.cache_limit, layer.bounds()
    ways = [(largest, matrix if route == CACHED else _entry(sweeps, route)) for largest, route in bounds]
    smaller, rest = tuple(ways[:-1]), ways[-1][1]

    def find(layer: "RoutedModule", tokens: int) -> Tensor | Sweep | None:
        if layer.training is not training or layer.strategy is not strategy or layer.cache_limit != limit:
            return None
        if is_grad_enabled() or transforms_active() or any_autocast():
            return None
        parameters = layer._parameters
        for name, core, version, address in states:
            if parameters.get(name) is not core or core._version != version or core.data_ptr() != address:
                return None
        for largest, way in smaller:
            if tokens <= largest:
                return way
        return rest

    return find


def _entry(sweeps: Sequence[Sweep | None], route: int) -> Sweep | None:
    return sweeps[route] if 0 <= route < len(sweeps) else None
