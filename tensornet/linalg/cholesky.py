"""Cholesky factors of second moments, in single precision where that is accurate."""

import torch
from torch import Tensor

#: Least pivots, as shares of the diagonal, of which single precision leaves four digits or so.
_LEAST_PIVOT = 1e-3


def cholesky(moments: Tensor) -> tuple[Tensor, bool]:
    """Factorise `M = L L^T`, with single precision only as far as pivots are not small beside the diagonal.

    To explain why: a pivot is a diagonal element less a sum of squares, so that a small one has lost digits.

    Args:
        moments: shape `(..., n, n)`; the lower triangle is read.

    Returns:
        `L`, in the dtype of the moments or in double precision; and False if one is not positive definite.

    Example:
        >>> from tensornet.linalg.cholesky import cholesky
        >>> lower, positive = cholesky(4 * torch.eye(2))
        >>> lower.tolist(), positive
        ([[2.0, 0.0], [0.0, 2.0]], True)
    """
    lower, info = torch.linalg.cholesky_ex(moments)
    positive = not bool(info.any())
    if moments.dtype == torch.float64:
        return lower, positive
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    if positive and bool((pivots > _LEAST_PIVOT * moments.diagonal(dim1=-2, dim2=-1)).all()):
        return lower, True
    return cholesky(moments.double())
