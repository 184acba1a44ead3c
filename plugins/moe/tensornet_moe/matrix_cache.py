"""Rebuilt matrices of a bank, kept while nothing they were built from has changed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tensornet.nn.matrix_cache import CachedMatrix, compute_dtype, may_cache


class MatrixCache:
    """Holds one tensor built from parameters, within a memory limit (see `tensornet.nn.matrix_cache`).

    Args:
        limit: bytes it may hold; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: CachedMatrix | None = None

    def drop(self) -> None:
        """Forget what is held."""
        self._held = None

    def get(self, parameters: Sequence[Tensor], elements: int, build: Callable[[], Tensor]) -> Tensor | None:
        """The tensor, built if needed; None if it may not be kept or is too large.

        Args:
            parameters: everything `build` reads.
            elements: size of the result.
            build: makes it.
        """
        if not may_cache(parameters):
            return None
        if self._held is None or not self._held.holds_for(parameters):
            self.drop()  # before building: the old and the new tensor need not exist at once
            if elements * compute_dtype(parameters[0]).itemsize > self.limit:
                return None
            with torch.no_grad():
                self._held = CachedMatrix.of(build(), parameters)
        return self._held.matrix

    def __deepcopy__(self, memo: object) -> "MatrixCache":
        return MatrixCache(self.limit)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return MatrixCache, (self.limit,)
