"""One step of TT-SVD: a block becomes an orthonormal factor times the rest.

Only the subspace and the projection onto it are needed here, not the singular vectors themselves. That
is why this step can be taken in single precision where the energy cut away is large: a rounding error of
the subspace changes that energy to second order only. What was cut is measured, not assumed, and where it
is too close to the rounding the step is taken again in double precision.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tensornet.subspace import iterated_basis, worth_iterating
from tensornet.svd import Method, energy, factorize, fix_signs, working_dtype

#: Smallest share of the energy cut away, in units of rounding, for which the fast step is trusted.
_TRUSTED = 1e5
#: Iterated subspaces may leave this share of the cut energy on the table (half of it in the error).
_SLACK = 3e-3


class Split(NamedTuple):
    """`block ~ left @ rest` with orthonormal columns `left: (*batch, m, r)`, `rest: (*batch, r, n)`.

    `discarded: (*batch)` is the energy `|block - left @ rest|^2`.
    """

    left: Tensor
    rest: Tensor
    discarded: Tensor


def split_block(block: Tensor, cap: int, allowed: Tensor | None, *, method: Method, single: bool) -> Split:
    """Split blocks at rank `cap`, or at the smallest rank that discards at most `allowed`.

    Args:
        block: shape `(*batch, m, n)`, finite, elements of moderate size.
        cap: largest rank.
        allowed: energy that may be discarded, shape `(*batch)`, or None.
        method: see `truncated_svd`.
        single: whether the numbers carry single precision only, whatever their dtype.
    """
    rows, columns = block.shape[-2:]
    if allowed is None and cap >= min(rows, columns):
        return _whole(block)
    if method == "auto" and allowed is None and (fast := _fast(block, cap)) is not None:
        return fast
    found = factorize(block.to(working_dtype(block.dtype)), cap, allowed, method=method, single=single)
    U, Vh = fix_signs(found.U, found.Vh)
    return Split(U, found.S[..., None] * Vh, found.discarded)


def _whole(block: Tensor) -> Split:
    rows, columns = block.shape[-2:]
    nothing = torch.zeros(block.shape[:-2], dtype=torch.float64, device=block.device)
    if rows <= columns:
        eye = torch.eye(rows, dtype=block.dtype, device=block.device).expand(*block.shape[:-2], rows, rows)
        return Split(eye, block, nothing)
    Q, R = torch.linalg.qr(block)
    return Split(Q, R, nothing)


def _fast(block: Tensor, cap: int) -> Split | None:
    """In the dtype of the block; None if what was cut is not far above the rounding of that dtype."""
    tall = block.shape[-2] > block.shape[-1]
    wide = block.mH if tall else block  # shape: (*batch, short, long)
    basis = None
    if worth_iterating(wide.shape[-2], cap):
        basis = iterated_basis(wide, cap, slack=_SLACK)
    if basis is None:
        basis = torch.linalg.eigh(wide @ wide.mH).eigenvectors[..., -cap:].flip(-1)
    projected = basis.mH @ wide
    total = energy(block)
    discarded = _residual(total, basis, projected)
    rounding = torch.finfo(block.dtype).eps * total
    if bool((discarded < _TRUSTED * rounding).any()):
        return None
    discarded = discarded + rounding
    if not tall:
        basis, projected = fix_signs(basis, projected)
        return Split(basis, projected, discarded)
    Q, R = torch.linalg.qr(projected.mH)
    Q, rest = fix_signs(Q, R @ basis.mH)
    return Split(Q, rest, discarded)


def _residual(total: Tensor, basis: Tensor, projected: Tensor) -> Tensor:
    """`|block - basis @ projected|^2`, with the rounding of the basis accounted for.

    With `G` the Gram matrix of the basis, the identity up to rounding, and `P = projected`, it is
    `|block|^2 - |P|^2 + tr((G - 1) P P^H)`.
    """
    double = basis.to(working_dtype(basis.dtype))
    skew = double.mH @ double
    skew.diagonal(dim1=-2, dim2=-1).sub_(1)
    correction = (skew.mT * (projected @ projected.mH)).sum((-2, -1))
    return total - energy(projected) + (correction.real if correction.is_complex() else correction)
