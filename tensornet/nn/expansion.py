"""Showing a model's weights as layers where its classes keep them in another form.

A model class may hold many matrices in one parameter, as stacks of experts, of which nothing is a layer. A
plugin registers how to take such modules apart; this is done while a model is observed, planned or changed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

#: Takes parts of a model apart inside the block, and puts back at its end what was not replaced.
Expansion = Callable[[nn.Module], AbstractContextManager[None]]

_EXPANSIONS: list[Expansion] = []


def register_expansion(expansion: Expansion) -> Expansion:
    """Have `expansion` applied wherever targets of a model are looked for. Usable as a decorator."""
    _EXPANSIONS.append(expansion)
    return expansion


@contextmanager
def expanded(model: nn.Module) -> Iterator[None]:
    """A model with all its weights as layers, inside the block; may be nested."""
    with ExitStack() as stack:
        for expansion in _EXPANSIONS:
            stack.enter_context(expansion(model))
        yield
