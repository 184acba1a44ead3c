"""Results that are computed once for the same tensors, as long as a block of code runs."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

#: Results of the innermost block with the arguments they belong to, which keeps these alive; None outside.
_known: ContextVar[dict[Hashable, tuple[Any, Any]] | None] = ContextVar("known", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Compute what `remembered` functions return once for the same arguments; forget all after the block.

    Candidates of one layer need the same decompositions several times. They are larger than the layer, so
    that they must not outlive it.

    Example:
        >>> import torch
        >>> @remembered
        ... def double(x):
        ...     return 2 * x
        >>> x = torch.ones(2)
        >>> with remembering():
        ...     double(x) is double(x)
        True
        >>> double(x) is double(x)
        False
    """
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Return the result of an earlier call with the same arguments inside `remembering`.

    Tensors are the same if they are one object that was not changed in between. Other arguments are compared.
    Callers share the result and must not change it.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        known = _known.get()
        if known is None:
            return function(*args, **kwargs)
        key = (function, _key(args), _key(tuple(sorted(kwargs.items()))))
        if key not in known:
            known[key] = (args, kwargs), function(*args, **kwargs)
        found: R = known[key][1]
        return found

    return wrapped


def _key(value: Any) -> Hashable:
    """Identify an argument: tensors by identity and version, tuples and dataclasses by what they hold."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, tuple):
        return tuple(_key(x) for x in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_key(getattr(value, field.name)) for field in fields(value))
    return value
