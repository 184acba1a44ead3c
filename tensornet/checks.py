"""Argument checks; messages state the expected value, the value received, and the remedy."""

from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Tensor

from tensornet.errors import BudgetError, ShapeError, TopologyError

#: Numbers that can be decomposed.
FLOATING = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def check_dense(value: Any, who: str, what: str, ndim: int) -> None:
    """Raise ShapeError unless `value` is a dense floating tensor with `ndim` dimensions, not on meta.

    Args:
        value: the argument.
        who: the public function or class that was called.
        what: the expected argument, for example `"a matrix of shape (out, in)"`.
        ndim: number of dimensions.

    Raises:
        ShapeError: another type, shape, dtype or layout; the message names the remedy.
    """
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"{who} needs {what} as a torch.Tensor, got {type(value).__name__}; convert it with "
            "torch.as_tensor."
        )
    if value.ndim != ndim or value.numel() == 0:
        raise ShapeError(f"{who} needs {what} with at least one element, got shape {tuple(value.shape)}.")
    if value.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise ShapeError(
            f"{who} needs {what} of floating or complex numbers ({names}), got {value.dtype}; cast it, for "
            "example with .float()."
        )
    if value.is_meta:
        raise ShapeError(f"{who} needs {what} with numbers in it, got one on the meta device; load it first.")
    if value.layout is not torch.strided:
        raise ShapeError(f"{who} needs {what} in dense layout, got {value.layout}; use .to_dense().")


def check_input(x: Tensor, in_features: int) -> None:
    """Raise ShapeError unless the last dimension of the input is `in_features`.

    Raises:
        ShapeError: another size; the message shows both.
    """
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ShapeError(
            f"The input has shape {tuple(x.shape)}; its last dimension must be in_features={in_features}."
        )


def check_size(name: str, value: Any, *, least: int = 1, error: type[ValueError] = TopologyError) -> int:
    """Convert a size to `int`, NumPy integers included, or raise if it is below `least`.

    Args:
        name: the argument as the caller wrote it.
        value: the size to convert.
        least: smallest value allowed.
        error: class to raise.
    """
    try:
        size = index(value)
    except TypeError:
        size = least - 1
    if isinstance(value, bool) or size < least:
        raise error(f"{name} must be an integer of at least {least}, got {value!r}.")
    return size


def check_sizes(name: str, values: Any) -> tuple[int, ...]:
    """Convert a sequence of sizes to a tuple of `int`.

    Raises:
        TopologyError: not a sequence of integers of at least 1.
    """
    if not isinstance(values, Sequence | torch.Size) or isinstance(values, str):
        raise TopologyError(f"{name} must be a sequence of integers, for example (4, 8, 8); got {values!r}.")
    return tuple(check_size(f"Every entry of {name}", value) for value in values)


def check_type(name: str, value: Any, kind: type, advice: str) -> None:
    """Raise TypeError unless `value` is an instance of `kind`.

    Args:
        name: the argument as the caller wrote it.
        value: the argument.
        kind: the expected class.
        advice: the remedy, for the message.

    Raises:
        TypeError: another type; the message shows it.
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {type(value).__name__}; {advice}.")


def check_number(name: str, value: Any) -> None:
    """Raise BudgetError unless `value` is a real number.

    Raises:
        BudgetError: another type; the message shows the value.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise BudgetError(f"{name} must be a number, got {value!r}.")
