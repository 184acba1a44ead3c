"""Argument checks for several modules; messages contain the name of the argument."""

import math

from torch import Tensor

from tensornet.errors import ShapeError


def check_whole(**counts: int | None) -> None:
    """Raise ValueError unless each value is None or a whole number of at least 1."""
    for name, value in counts.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def check_not_negative(**values: float) -> None:
    """Raise ValueError unless each value is a finite number of at least 0."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value!r}.")


def check_capacity(factor: float | None) -> None:
    """Raise ValueError unless the capacity factor is None or a finite number above 0."""
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ValueError(f"capacity_factor must be above 0, got {factor!r}; None computes every token.")


def check_weights(weights: object, *shape: str) -> None:
    """Raise ShapeError unless `weights` is a floating tensor with one dimension for each name in `shape`."""
    expected = f"Expected a floating tensor of shape ({', '.join(shape)})"
    if not isinstance(weights, Tensor):
        raise ShapeError(f"{expected}, got a {type(weights).__name__}; stack matrices of one shape.")
    floating = weights.is_floating_point() or weights.is_complex()
    if weights.ndim != len(shape) or not floating or weights.numel() == 0:
        raise ShapeError(f"{expected}, got {tuple(weights.shape)}, {weights.dtype}.")
