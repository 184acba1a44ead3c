"""Gram matrices `x^T x`, computed from their upper half."""

import torch
from torch import Tensor

#: Columns of a block.
_BLOCK = 256


def upper_gram(x: Tensor) -> Tensor:
    """Compute the blocks of `X^T X` on and above the diagonal: little more than half of the products."""
    size = x.shape[1]
    found = x.new_zeros(size, size)
    for start in range(0, size, _BLOCK):
        rows = slice(start, start + _BLOCK)
        torch.mm(x[:, rows].T, x[:, start:], out=found[rows, start:])
    return found


def mirrored(moment: Tensor) -> Tensor:
    """Mirror the upper triangle of a moment; diagonal moments are returned unchanged."""
    return moment if moment.ndim == 1 else moment.triu_().add_(moment.triu(1).T)
