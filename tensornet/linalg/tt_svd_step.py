"""One step of TT-SVD: split a block into an orthonormal factor and the rest.

Only the subspace and the projection onto it are needed here, not the singular vectors themselves. That
is why this step can be taken in single precision where the discarded energy is large: a rounding error of
the subspace changes that energy to second order only. The discarded energy is measured, not assumed, and
where it is too close to the rounding the step is taken again in double precision.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tensornet.linalg.subspace_iteration import iterated_basis, worth_iterating
from tensornet.linalg.svd import Method, energy, factorize, fix_signs, working_dtype

#: Smallest fraction of discarded energy, in units of rounding, for which the fast step is trusted.
_TRUSTED = 1e5
#: Iterated subspaces may exceed the optimal discarded energy by this fraction (half of it in the error).
_SLACK = 3e-3
#: Below this fraction of the total, discarded energy is summed from the residual, not taken as a difference.
_MEASURED_BELOW = 1e-4
#: Rounding of a sum of squares, in units of the last digit; 26 were seen for blocks of 400 x 400.
_ROUNDING = 64


class Split(NamedTuple):
    """Split block `block ~ left @ rest` with `left: (*batch, m, r)` and `rest: (*batch, r, n)`.

    Orthonormal are the columns of `left`, or, where `centered` says so, the rows of `rest`. The energies
    `kept = |left @ rest|^2` and `discarded = |block - left @ rest|^2` have shape `(*batch)`.
    """

    left: Tensor
    rest: Tensor
    kept: Tensor
    discarded: Tensor
    centered: bool = False


def split_block(
    block: Tensor,
    total: Tensor,
    cap: int,
    allowed: Tensor | None,
    *,
    method: Method,
    single: bool,
    last: bool = False,
    ordered: bool = False,
) -> Split:
    """Split blocks at rank `cap`, or at the smallest rank that discards at most `allowed`.

    Args:
        block: shape `(*batch, m, n)`, finite, elements of moderate size.
        total: energy of the blocks, shape `(*batch)`, double precision.
        cap: largest rank.
        allowed: energy that may be discarded, shape `(*batch)`, or None.
        method: see `truncated_svd`.
        single: whether the numbers carry single precision only, whatever their dtype.
        last: no step follows, so `left` may take the norm where that saves a QR.
        ordered: columns of `left` are singular vectors, the strongest first, not just any basis.
    """
    rows, columns = block.shape[-2:]
    if not ordered and allowed is None:
        if cap >= min(rows, columns):
            return _whole(block, total, last)
        if method == "auto" and (fast := _fast(block, total, cap, last)) is not None:
            return fast
    found = factorize(block.to(working_dtype(block.dtype)), cap, allowed, method=method, single=single)
    U, Vh = fix_signs(found.U, found.Vh)
    return Split(U, found.S[..., None] * Vh, found.S.square().sum(-1), found.discarded)


def _whole(block: Tensor, total: Tensor, last: bool) -> Split:
    size, nothing = min(block.shape[-2:]), torch.zeros_like(total)
    eye = torch.eye(size, dtype=block.dtype, device=block.device).expand(*block.shape[:-2], size, size)
    if block.shape[-2] <= block.shape[-1]:
        return Split(eye, block, total, nothing)
    if last:
        return Split(block, eye, total, nothing, centered=True)
    Q, R = torch.linalg.qr(block)
    return Split(Q, R, total, nothing)


def _fast(block: Tensor, total: Tensor, cap: int, last: bool) -> Split | None:
    """Split in the dtype of the block; None if the discarded energy is near the rounding of that dtype."""
    tall = block.shape[-2] > block.shape[-1]
    wide = block.mH if tall else block  # shape: (*batch, short, long)
    basis = None
    if worth_iterating(wide.shape[-2], cap):
        basis = iterated_basis(wide, total, cap, slack=_SLACK)
    if basis is None:
        basis = torch.linalg.eigh(wide @ wide.mH).eigenvectors[..., -cap:].flip(-1)
    projected = basis.mH @ wide
    # |block - B P|^2 = |block|^2 - |P|^2 + tr((B^H B - 1) P P^H); the rows of P are orthogonal, and B is
    # orthonormal, both up to rounding, so only the diagonal of the correction counts.
    double = working_dtype(block.dtype)
    rows = torch.linalg.vector_norm(projected, dim=-1, dtype=double).square()
    columns = torch.linalg.vector_norm(basis, dim=-2, dtype=double).square()
    kept = (rows * columns).sum(-1)
    discarded = total - (rows * (2 - columns)).sum(-1)
    rounding = torch.finfo(block.dtype).eps * total
    if bool((discarded < _TRUSTED * rounding).any()):
        return None
    if bool((discarded < _MEASURED_BELOW * total).any()):  # a difference with few digits: measure it
        slack = _ROUNDING * torch.finfo(block.dtype).eps * total.sqrt()
        discarded = (energy(wide - basis @ projected).sqrt() + slack).square()
    else:
        discarded = discarded + rounding + _ROUNDING * torch.finfo(double).eps * total
    if not tall:
        return Split(*fix_signs(basis, projected), kept, discarded)
    left, rest = projected.mH, basis.mH
    if not last:
        left, R = torch.linalg.qr(left)
        rest = R @ rest
    return Split(*fix_signs(left, rest), kept, discarded, centered=last)
