"""Smaller Gram matrix of a block and its eigendecomposition, each computed once."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Eigenpairs(NamedTuple):
    """Eigenvalues in ascending order, shape `(*batch, k)`, and their vectors as columns, `(*batch, k, k)`."""

    values: Tensor
    vectors: Tensor


class GramMatrix:
    """Gram matrix `B B^H` of a block, or `B^H B` where that is smaller, for several users.

    Args:
        block: shape `(*batch, m, n)`, in double precision.
    """

    def __init__(self, block: Tensor) -> None:
        wide = block.mH if block.shape[-2] > block.shape[-1] else block
        self.product = wide @ wide.mH  # shape: (*batch, k, k) with k = min(m, n)

    @cached_property
    def eigh(self) -> Eigenpairs:
        """Eigenvalues and eigenvectors of the product."""
        return Eigenpairs(*torch.linalg.eigh(self.product))

    @property
    def energies(self) -> Tensor:
        """Squared singular values in descending order, shape `(*batch, k)`."""
        known = "eigh" in self.__dict__
        values = self.eigh.values if known else torch.linalg.eigvalsh(self.product)
        return values.flip(-1).clamp_min(0)
