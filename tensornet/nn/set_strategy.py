"""How the layers of a whole model are applied, under one memory limit."""

from torch import nn

from tensornet.contraction.machine import Machine, default_machine
from tensornet.errors import TargetError
from tensornet.nn.execution import RoutedModule
from tensornet.nn.strategy import CACHED, Strategy, check_options, choose, route_seconds


def set_strategy(
    model: nn.Module,
    strategy: Strategy | None = None,
    *,
    cache_limit: int | None = None,
    machine: Machine | None = None,
) -> dict[str, int]:
    """Set strategy, memory limit and machine of every layer made of cores.

    Args:
        model: any module.
        strategy: for all layers; None leaves each as it is.
        cache_limit: bytes that the kept matrices of all layers together may take in eval. The limit is dealt
            out now, to the layers that gain the most time per byte on a single token, and does not move
            between layers later. None leaves the limit of each layer as it is.
        machine: constants to decide by, for example from `tensornet.measure_machine()`.

    Returns:
        Bytes that each layer may keep, by name; layers that keep none are left out.

    Raises:
        TargetError: the model has no layer made of cores.
        TypeError: `machine` is none.
        ValueError: unknown strategy, negative limit.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedModule)}
    if not layers:
        raise TargetError(
            f"{type(model).__name__} has no layer made of cores; compress it first, or check that it is the "
            "compressed model that was passed."
        )
    check_options(strategy or "auto", cache_limit)
    for layer in layers.values():
        layer.configure(strategy=strategy, machine=machine)
    if cache_limit is not None:
        left = cache_limit
        for layer in sorted(layers.values(), key=_gain_per_byte, reverse=True):
            fits = layer.strategy in ("auto", "cached") and layer.matrix_bytes <= left
            layer.configure(cache_limit=layer.matrix_bytes if fits else 0)
            left -= layer.matrix_bytes if fits else 0
    return {name: layer.matrix_bytes for name, layer in layers.items() if layer.may_keep_matrix}


def cached_bytes(model: nn.Module) -> int:
    """Bytes of all matrices that layers of a model keep at the moment."""
    return sum(module.cached_bytes for module in model.modules() if isinstance(module, RoutedModule))


def _gain_per_byte(layer: RoutedModule) -> float:
    machine, itemsize = layer.machine or default_machine(layer.weight.device), layer.weight.element_size()
    without = choose(layer.dispatch.uncached, 1)
    seconds = [route_seconds(layer.plan, route, 1, machine, itemsize) for route in (without, CACHED)]
    return (seconds[0] - seconds[1]) / layer.matrix_bytes
