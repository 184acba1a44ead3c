"""Singular values and truncated SVD of one matrix from one Gram matrix.

A plan needs all singular values of a weight, and its execution the leading singular vectors. Both come from
the smaller Gram matrix, whose product and eigendecomposition take nearly all of the time.
"""

import torch
from torch import Tensor

from tensornet.linalg.gram_matrix import GramMatrix
from tensornet.linalg.subspace_iteration import worth_iterating
from tensornet.linalg.svd import TruncatedSVD, safe_scale, scaled_work, truncate


class MatrixSpectrum:
    """Singular values of a matrix, computed once; call it to get them.

    To explain how this works: values alone take a quarter of the time of values with vectors. So vectors are
    computed with the values only if a rank is expected for which `truncated` will need them, see `expect`.
    What is kept is the Gram matrix or its eigenvectors: `min(m, n)^2` numbers in double precision.

    Args:
        matrix: shape `(m, n)`, finite.
        truncates: whether `truncated` will be called.

    Example:
        >>> from tensornet.linalg.matrix_spectrum import MatrixSpectrum
        >>> spectrum = MatrixSpectrum(torch.diag(torch.tensor([4.0, 3.0, 0.0])))
        >>> spectrum()
        tensor([4., 3., 0.], dtype=torch.float64)
        >>> spectrum.truncated(1).S
        tensor([4.])
    """

    def __init__(self, matrix: Tensor, *, truncates: bool = False) -> None:
        self._matrix, self._truncates = matrix, truncates
        self._scale = safe_scale(matrix)
        self._gram: GramMatrix | None = None
        self._values: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Compute the singular values in descending order, in double precision."""
        if self._values is None:
            gram = self._shared()
            self._values = gram.energies.sqrt() * self._scale
            if not self._truncates:
                self._gram = None
        return self._values

    def expect(self, rank: int) -> None:
        """Compute eigenvectors together with the values if `truncated(rank)` will need them.

        Call it before the values are asked for.
        """
        if self._truncates and not worth_iterating(min(self._matrix.shape), rank):
            _ = self._shared().eigh

    @torch.no_grad()
    def truncated(self, rank: int) -> TruncatedSVD:
        """Truncate the SVD as `truncated_svd(matrix, max_rank=rank)` does."""
        return truncate(self._matrix, self._scale, rank, gram=self._shared())

    def _shared(self) -> GramMatrix:
        if self._gram is None:
            self._gram = GramMatrix(scaled_work(self._matrix, self._scale))
        return self._gram


def singular_values(matrix: Tensor) -> Tensor:
    """Compute the singular values in descending order, in double precision, from the smaller Gram matrix."""
    return MatrixSpectrum(matrix)()
