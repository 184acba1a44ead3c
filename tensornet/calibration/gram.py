"""Gram matrices `x^T x`, computed from their upper half."""

import torch
from torch import Tensor

#: Columns of a block.
_BLOCK = 128


def upper_gram(x: Tensor) -> Tensor:
    """Compute the blocks of `X^T X` on and above the diagonal; blocks below it are undefined."""
    found = x.new_empty(x.shape[1], x.shape[1])
    for rows, columns in _blocks(x.shape[1]):
        torch.mm(x[:, rows].T, x[:, columns], out=found[rows, columns])
    return found


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add `X^T X` to the upper half of a sum, in its dtype, block by block while they are in the cache.

    Args:
        total: shape `(features, features)`; what stands below the diagonal is not defined afterwards.
        x: shape `(tokens, features)`, perhaps in 16 bits: then the product of these tokens is, not the sum.
    """
    for rows, columns in _blocks(x.shape[1]):
        left, right = x[:, rows].T, x[:, columns]
        if x.dtype == total.dtype:
            total[rows, columns].addmm_(left, right)
        else:
            total[rows, columns] += torch.mm(left, right)


def add_moment(total: Tensor, moment: Tensor) -> None:
    """Add a moment to a sum: the upper half of a matrix, or a diagonal."""
    if moment.ndim == 1:
        total += moment
        return
    for rows, columns in _blocks(len(moment)):
        total[rows, columns] += moment[rows, columns]


def _blocks(size: int) -> list[tuple[slice, slice]]:
    """List the blocks of rows of a square matrix, with the columns from their diagonal on."""
    return [(slice(k, k + _BLOCK), slice(k, None)) for k in range(0, size, _BLOCK)]


def mirrored(moment: Tensor) -> Tensor:
    """Mirror the upper triangle of a moment; diagonal moments are returned unchanged."""
    return moment if moment.ndim == 1 else moment.triu_().add_(moment.triu(1).T)
