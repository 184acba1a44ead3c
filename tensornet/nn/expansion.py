"""Showing a model's weights as layers where its classes keep them in another form.

A module may own many matrices, as recurrent layers and stacks of experts do, none of which is a layer. While
a model is observed, planned or changed, such modules are replaced by equivalent ones with layers in them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from tensornet.nn.compound import Compound, Shared
from tensornet.nn.stock_layers import compound_of

#: Takes parts of a model apart inside the block, and puts back at its end what was not replaced.
Expansion = Callable[[nn.Module], AbstractContextManager[None]]

#: Called with a module and the keyword arguments of the model that the module is going to run on.
BatchListener = Callable[[nn.Module, Mapping[str, Any]], None]

_EXPANSIONS: list[Expansion] = []
_LISTENERS: list[BatchListener] = []


def register_expansion(expansion: Expansion) -> Expansion:
    """Have `expansion` applied wherever targets of a model are looked for. Usable as a decorator."""
    _EXPANSIONS.append(expansion)
    return expansion


def register_batch_listener(listener: BatchListener) -> BatchListener:
    """Have `listener` called where blocks run without their model. Usable as a decorator."""
    _LISTENERS.append(listener)
    return listener


def announce_batch(block: nn.Module, batch: Mapping[str, Any]) -> None:
    """Tell modules taken apart inside `block` which batch comes next, as the model would tell them."""
    for listener in _LISTENERS:
        listener(block, batch)


@contextmanager
def expanded(model: nn.Module) -> Iterator[None]:
    """A model with all its weights as layers, inside the block; may be nested."""
    with ExitStack() as stack:
        for expansion in (matrices_apart, *_EXPANSIONS):
            stack.enter_context(expansion(model))
        yield


@contextmanager
def matrices_apart(model: nn.Module) -> Iterator[None]:
    """Take every module that owns several matrices apart inside the block."""
    names = take_apart(model)
    try:
        yield
    finally:
        settle(model, names)


def take_apart(model: nn.Module, *, inside: Iterable[str] | None = None) -> list[str]:
    """Replace modules that own several matrices by equivalent ones, in place; nothing is copied.

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
        kind = compound_of(module) if name and not isinstance(module, Compound) else None
        if kind is not None and (wanted is None or name in wanted):
            if id(module) not in made:
                made[id(module)] = kind.take_apart(module, shared)
            _put(model, name, made[id(module)])
            found.append(name)
    return found


def settle(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put stock modules back where no matrix of theirs was replaced.

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
    setattr(model.get_submodule(parent), child, module)
