"""Expansion of a model: weights that its classes store in another form become layers.

A module may own many matrices, as recurrent layers and stacks of experts do, none of which is a layer. While
a model is observed, planned or changed, such modules are replaced by equivalent ones with layers in them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from tensornet.nn.carried_hooks import carry_hooks, has_own_forward
from tensornet.nn.compound import Compound, Shared
from tensornet.nn.stock_layers import compound_of


@contextmanager
def matrices_apart(model: nn.Module) -> Iterator[None]:
    """Split every module that owns several matrices inside the block."""
    names = take_apart(model)
    try:
        yield
    finally:
        settle(model, names)


def take_apart(model: nn.Module, *, inside: Iterable[str] | None = None) -> list[str]:
    """Replace modules that own several matrices by equivalent compounds, in place, without copies.

    Args:
        model: any model; if it is such a module itself, it is left as it is.
        inside: only modules that hold one of these names, which are those of layers in replaced modules.

    Returns:
        Names of the modules that were replaced.

    >>> model = nn.Sequential(nn.Conv1d(4, 4, 3))
    >>> take_apart(model), [name for name, _ in model.named_modules()]
    (['0'], ['', '0', '0.matrix'])
    """
    wanted = None if inside is None else {name[:k] for name in inside for k, x in enumerate(name) if x == "."}
    shared: Shared = {}
    made: dict[int, nn.Module] = {}  # one module under several names stays one module
    found = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or isinstance(module, Compound) or (wanted is not None and name not in wanted):
            continue
        kind = None if has_own_forward(module) else compound_of(module)
        if kind is not None:
            if id(module) not in made:
                made[id(module)] = kind.take_apart(module, shared)
            _put(model, name, made[id(module)])
            found.append(name)
    return found


def settle(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Restore stock modules whose matrices were not replaced.

    Args:
        model: any model.
        names: look at these modules only.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Compound)
    }
    shared: Shared = {}
    made: dict[int, nn.Module] = {}
    for name, module in found.items():
        if names is not None and name not in names:
            continue
        if id(module) not in made:
            made[id(module)] = module.settle(shared)
        if made[id(module)] is not module:
            _put(model, name, made[id(module)])


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    place = model.get_submodule(parent)
    carry_hooks(place.get_submodule(child), module)
    setattr(place, child, module)
