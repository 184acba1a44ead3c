"""What a layer has at hand to answer at once, and the test that it may.

Looking up cores, asking whether the kept matrix is true and choosing a route takes longer than the arithmetic
of one token. After a forward pass that took the long way, its result is remembered with everything it
depended on; the next pass compares that and goes on. In doubt it takes the long way again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _is_any_autocast_enabled as any_autocast

from tensornet.nn.cache import may_cache
from tensornet.nn.strategy import CACHED, Bounds
from tensornet.sweep import Sweep, bind_sweep

if TYPE_CHECKING:
    from tensornet.nn.routing import RoutedModule


class Shortcut(NamedTuple):
    """Ways to apply an operator that are at hand, and what must not have changed since they were made."""

    matrix: Tensor | None
    sweeps: tuple[Sweep | None, ...]
    bounds: Bounds
    cores: tuple[tuple[str, Tensor, int, int], ...]  # name, parameter, version, address
    training: bool
    strategy: str
    cache_limit: int | None

    def find(self, layer: "RoutedModule", tokens: int) -> Tensor | Sweep | None:
        """The kept matrix, or a contraction bound to the cores, whichever `layer.route` would give.

        None where that is not at hand, and where only a closer look could tell. One frame that takes less
        than a microsecond; not for compiled programs.
        """
        matrix, sweeps, bounds, cores, training, strategy, limit = self
        if layer.training is not training or layer.strategy is not strategy or layer.cache_limit != limit:
            return None
        if is_grad_enabled() or transforms_active() or any_autocast():
            return None
        parameters = layer._parameters
        for name, core, version, address in cores:
            if parameters.get(name) is not core or core._version != version or core.data_ptr() != address:
                return None
        route = (
            next(route for largest, route in bounds if tokens <= largest) if len(bounds) > 1 else bounds[0][1]
        )
        if route == CACHED:
            return matrix
        return sweeps[route] if 0 <= route < len(sweeps) else None


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
    versions = [(core._version, core.data_ptr()) for core in cores]
    return Shortcut(
        matrix=layer.matrix_at_hand,
        sweeps=tuple(sweeps),
        bounds=layer.bounds(),
        cores=tuple((name, core, *state) for name, core, state in zip(names, cores, versions, strict=True)),
        training=layer.training,
        strategy=layer.strategy,
        cache_limit=layer.cache_limit,
    )
