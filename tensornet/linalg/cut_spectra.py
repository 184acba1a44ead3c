"""Singular values of the unfoldings of a matrix: error bounds before any decomposition.

A cut `(a, c)` splits the rows into `(a, out/a)` and the columns into `(c, in/c)` and reorders the matrix to
`(a c, rest)`. A chain whose bond there is `d` has an unfolding of rank `d`, so the energy beyond the `d`-th
singular value is a lower bound of its squared error; TT-SVD reaches at most the sum over its cuts.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet.linalg.svd import result_dtype, safe_scale, working_dtype
from tensornet.linalg.tt_svd import pad_matrix

#: A spectrum with less than this fraction of its energy in the lower half is steep: rounding in single
#: precision would drown its tail, so it is computed again in double precision.
_STEEP = 1e-3


class CutSpectra:
    """Relative discarded energies of the unfoldings of one matrix, each computed once.

    Args:
        matrix: shape `(out_features, in_features)`, finite.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._work = matrix.detach().to(result_dtype(matrix.dtype)) / safe_scale(matrix)
        self._tails: dict[tuple[int, int, int, int], Tensor] = {}
        self._blocks: dict[tuple[int, int, int, int], Tensor] = {}

    def tails(self, out_dims: Sequence[int], in_dims: Sequence[int], cut: int) -> Tensor:
        """Compute the energy fraction beyond the first `d = 0, 1, ...` singular values of an unfolding."""
        rows, columns = math.prod(out_dims), math.prod(in_dims)
        a, c = math.prod(out_dims[:cut]), math.prod(in_dims[:cut])
        key = (rows, columns, a, c)
        if key not in self._tails:
            work = pad_matrix(self._work, rows, columns)
            unfolded = work.reshape(a, rows // a, c, columns // c).permute(0, 2, 1, 3).reshape(a * c, -1)
            self._tails[key] = _tails(unfolded)
        return self._tails[key]

    def block_tails(self, out_dims: Sequence[int], in_dims: Sequence[int]) -> Tensor:
        """Compute the tails of the blocks of a two-core block tensor train, one rank for all blocks."""
        (o0, o1), (i0, i1) = out_dims, in_dims
        key = (o0, o1, i0, i1)
        if key not in self._blocks:
            work = pad_matrix(self._work, o0 * o1, i0 * i1)
            blocks = work.reshape(o0, o1, i0, i1).permute(1, 2, 0, 3)
            self._blocks[key] = _tails(blocks)
        return self._blocks[key]

    @staticmethod
    def rank_for(tails: Tensor, allowed: float) -> int:
        """Find the smallest rank, at least 1, that discards at most the allowed fraction of the energy."""
        return max(1, int((tails > allowed).sum()))


def _energies(blocks: Tensor) -> Tensor:
    """Compute squared singular values, descending, from the smaller Gram matrix; `(..., min(m, n))`."""
    if blocks.shape[-2] > blocks.shape[-1]:
        blocks = blocks.mH
    return torch.linalg.eigvalsh(blocks @ blocks.mH).flip(-1).clamp_min(0)


def _tails(blocks: Tensor) -> Tensor:
    tails = _cumulate(_energies(blocks))
    double = working_dtype(blocks.dtype)
    if blocks.dtype != double and float(tails[len(tails) // 2]) < _STEEP:
        tails = _cumulate(_energies(blocks.to(double)))
    return tails


def _cumulate(energies: Tensor) -> Tensor:
    energies = energies.double().reshape(-1, energies.shape[-1]).sum(0)
    total = energies.sum()
    beyond = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    return (beyond / total.clamp_min(torch.finfo(total.dtype).tiny)).cpu()
