"""Argument checks for several modules; messages contain the name of the argument."""

import math
from collections.abc import Sequence

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


def check_noise(noise: float) -> None:
    """Raise ValueError unless the noise is a finite number of at least 0."""
    if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0, got {noise!r}: it is relative to the size of the cores.")


def check_capacity(factor: float | None) -> None:
    """Raise ValueError unless the capacity factor is None or a finite number above 0."""
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ValueError(f"capacity_factor must be above 0, got {factor!r}; None computes every token.")


def check_weights(weights: object, *shape: str) -> None:
    """Raise ShapeError unless `weights` is a floating tensor with one dimension for each name in `shape`."""
    expected = f"a floating tensor of shape ({', '.join(shape)})"
    if isinstance(weights, Sequence) and weights and all(isinstance(each, Tensor) for each in weights):
        odd = next((k for k, each in enumerate(weights) if each.shape != weights[0].shape), None)
        got = f"a {type(weights).__name__} of tensors"
        if odd is None:
            raise ShapeError(f"Expected {expected}, got {got}: pass torch.stack of them.")
        raise ShapeError(
            f"Expected {expected}, got {got}: number 0 has shape {tuple(weights[0].shape)} and number "
            f"{odd} {tuple(weights[odd].shape)}. Only matrices of one shape share cores: fit those of each "
            "shape apart."
        )
    if not isinstance(weights, Tensor):
        raise ShapeError(f"Expected {expected}, got a {type(weights).__name__}.")
    floating = weights.is_floating_point() or weights.is_complex()
    if weights.ndim != len(shape) or not floating or weights.numel() == 0:
        raise ShapeError(f"Expected {expected}, got {tuple(weights.shape)}, {weights.dtype}.")
