"""Rebuilt matrices, kept while nothing they were built from has changed."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class MatrixCache:
    """Holds one tensor built from parameters, for inference, within a memory limit.

    The key is the identity, storage and version of every parameter, the autocast dtype included: an in-place
    update, a reassignment or a move to another device or dtype makes the next call build anew.

    Args:
        limit: bytes it may hold; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.drop()

    def drop(self) -> None:
        """Forget what is held."""
        self._key: Hashable = None
        self._value: Tensor | None = None

    def get(self, parameters: Sequence[Tensor], elements: int, build: Callable[[], Tensor]) -> Tensor | None:
        """The tensor, built if needed; None if it is too large to be kept or could become stale unnoticed.

        Args:
            parameters: everything `build` reads.
            elements: size of the result.
            build: makes it.
        """
        key = _key(parameters)
        if key == self._key:
            return self._value
        self.drop()  # before building: the old and the new tensor need not exist at once
        if any(p.is_inference() for p in parameters):
            return None  # made under inference_mode: such tensors do not count their in-place updates
        if elements * _built_dtype(parameters[0]).itemsize > self.limit:
            return None
        self._key, self._value = key, build()
        return self._value

    def __deepcopy__(self, memo: object) -> "MatrixCache":
        return MatrixCache(self.limit)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return MatrixCache, (self.limit,)


def _key(parameters: Sequence[Tensor]) -> Hashable:
    state = tuple(
        (id(p), p.data_ptr(), p.dtype, p.device, 0 if p.is_inference() else p._version) for p in parameters
    )
    return state, _built_dtype(parameters[0])


def _built_dtype(parameter: Tensor) -> torch.dtype:
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
