"""TT-SVD of a matrix into matrix-product-operator cores, with certified error.

Bonds without truncation cost nothing: their cores are identities, and the sweep runs only over the
truncated bonds, from the end with the smaller legs.

Reference: Oseledets 2011, "Tensor-Train Decomposition", algorithm 1 and theorem 2.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tensornet._util import check_sizes
from tensornet.budget import Budget
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.svd import (
    Method,
    allowed_energy,
    check_finite,
    check_method,
    energy,
    factorize,
    fix_signs,
    is_single,
    iterated_basis,
    result_dtype,
    safe_scale,
    safe_scales,
    scaled_back,
    working_dtype,
    worth_iterating,
)

# --- one step: split a block into an orthonormal factor and the rest ------------------------------

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


# --- all steps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TTResult:
    """Chain of cores `(left, out, in, right)` with the certified truncation error.

    Args:
        cores: the chain, canonical around `center`: left-orthonormal before it, right-orthonormal after.
        error: certified relative Frobenius error, `sqrt(sum over bonds of discarded energy) / |W|`.
        bound_by: the cap that decided (see `Decomposition.bound_by`).
        center: the site that holds the norm.
    """

    cores: tuple[Tensor, ...]
    error: float
    bound_by: str
    center: int


@dataclass(frozen=True)
class TTStack:
    """Chains of a stack: cores `(batch, left, out, in, right)` and one certified error for each item."""

    cores: tuple[Tensor, ...]
    errors: tuple[float, ...]
    bound_by: str
    center: int


def check_dims(shape: tuple[int, int], out_dims: Sequence[int], in_dims: Sequence[int]) -> None:
    """Raise TopologyError unless the leg sizes can hold a matrix of this shape.

    Raises:
        TopologyError: no sequences of integers of at least 1, different numbers of out- and in-dims, or a
            product that is too small.
    """
    check_sizes("out_dims", out_dims)
    check_sizes("in_dims", in_dims)
    if len(out_dims) != len(in_dims) or not out_dims:
        raise TopologyError(
            f"out_dims {tuple(out_dims)} and in_dims {tuple(in_dims)} must have the same number of sites, "
            "at least one; use size 1 where a site has no leg."
        )
    for name, features, dims in (("out_dims", shape[0], out_dims), ("in_dims", shape[1], in_dims)):
        if math.prod(dims) < features:
            raise TopologyError(
                f"{name} {tuple(dims)} multiply to {math.prod(dims)}, which does not hold {features} "
                "features; the product must be at least that (the excess is padded with zeros)."
            )


def max_bonds(out_dims: Sequence[int], in_dims: Sequence[int]) -> tuple[int, ...]:
    """Compute the exact bonds `d_k = min(prod of legs left of bond k, prod of legs right of it)`."""
    legs = [o * i for o, i in zip(out_dims, in_dims, strict=True)]
    return tuple(min(math.prod(legs[:k]), math.prod(legs[k:])) for k in range(1, len(legs)))


def mpo_params(out_dims: Sequence[int], in_dims: Sequence[int], bonds: Sequence[int]) -> int:
    """Count the elements of all cores of a chain."""
    full = (1, *bonds, 1)
    return sum(full[k] * o * i * full[k + 1] for k, (o, i) in enumerate(zip(out_dims, in_dims, strict=True)))


def cap_bonds(
    shape: tuple[int, int], out_dims: Sequence[int], in_dims: Sequence[int], budget: Budget
) -> tuple[tuple[int, ...], str]:
    """Turn `max_bond` and `param_ratio` into one cap for each bond, and name the cap that decides.

    The parameter budget is turned into the largest uniform cap that fits it.

    Returns:
        `(bonds, bound_by)`; `bound_by` is `"exact"` if no cap truncates a bond.

    Raises:
        BudgetError: not even bonds of 1 fit `param_ratio`, or another number of caps than bonds.
    """
    full = max_bonds(out_dims, in_dims)
    bonds, bound_by = full, "exact"
    caps = budget.caps_of_bonds(len(full))
    if any(b > (cap or b) for b, cap in zip(full, caps, strict=True)):
        bonds, bound_by = tuple(min(b, cap or b) for b, cap in zip(full, caps, strict=True)), "max_bond"
    if budget.param_ratio is not None:
        allowed = budget.param_ratio * shape[0] * shape[1]
        smallest = mpo_params(out_dims, in_dims, [1] * len(full))
        if smallest > allowed:
            raise BudgetError(
                f"param_ratio={budget.param_ratio} allows {int(allowed)} parameters for a matrix of shape "
                f"{tuple(shape)}, but dims {tuple(out_dims)} x {tuple(in_dims)} need {smallest} at bond 1; "
                "raise the budget, use more sites, or another topology."
            )
        if mpo_params(out_dims, in_dims, bonds) > allowed:
            low, high = 1, max(bonds)  # invariant: low fits, high does not
            while high - low > 1:
                middle = (low + high) // 2
                fits = mpo_params(out_dims, in_dims, [min(b, middle) for b in bonds]) <= allowed
                low, high = (middle, high) if fits else (low, middle)
            bonds, bound_by = tuple(min(b, low) for b in bonds), "param_ratio"
    return bonds, bound_by


def pad_matrix(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pad the last two dimensions to `(rows, columns)`."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2]))


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the default relative error `eps^(3/4)` of the dtype of the result.

    1.8e-12 in double and 6.4e-6 in single precision: above the rounding of a matrix computed in that dtype,
    so that an exact rank is found, and below what anybody can want to keep.

    Example:
        >>> f"{default_tolerance(torch.float64):.1e}"
        '1.8e-12'
    """
    return torch.finfo(result_dtype(dtype)).eps ** 0.75


@torch.no_grad()
def has_full_bonds(
    matrices: Tensor, out_dims: Sequence[int], in_dims: Sequence[int], tolerance: float
) -> bool:
    """Return True if every bond of every matrix stays full at relative error `tolerance`, by Gram matrices.

    May be false where it is true: a Gram matrix in double precision resolves singular values down to 1e-6.
    """
    sites = len(out_dims)
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    sizes = [o * i for o, i in zip(out_dims, in_dims, strict=True)]
    full = max_bonds(out_dims, in_dims)
    for matrix in matrices:
        work = matrix.detach().to(working_dtype(matrix.dtype)) / safe_scale(matrix)
        work = pad_matrix(work, math.prod(out_dims), math.prod(in_dims))
        work = work.reshape(*out_dims, *in_dims).permute(order).contiguous()
        for bond in sorted(range(sites - 1), key=full.__getitem__):
            block = work.reshape(math.prod(sizes[: bond + 1]), -1)
            block = block if block.shape[0] <= block.shape[1] else block.mH
            energies = torch.linalg.eigvalsh(block @ block.mH)
            if not bool(energies[0] > max(tolerance**2, 1e-12) * energies.sum()):
                return False
    return True


@torch.no_grad()
def tt_svd(
    matrix: Tensor,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    budget: Budget,
    *,
    bonds: Sequence[int] | None = None,
    method: Method = "auto",
) -> TTResult:
    """Decompose `matrix: (out, in)` into a chain of cores `(left, out_k, in_k, right)`.

    Arguments are those of `tt_svd_stack`, for one matrix.

    Raises:
        BudgetError, NonFiniteError, TopologyError: see `cap_bonds`, `check_finite`, `check_dims`.
    """
    stack = tt_svd_stack(matrix[None], out_dims, in_dims, budget, bonds=bonds, method=method)
    return TTResult(tuple(core[0] for core in stack.cores), stack.errors[0], stack.bound_by, stack.center)


@torch.no_grad()
def tt_svd_stack(
    matrices: Tensor,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    budget: Budget,
    *,
    bonds: Sequence[int] | None = None,
    method: Method = "auto",
) -> TTStack:
    """Decompose a stack `(batch, out, in)` in one sweep; all items get the same bonds.

    Args:
        matrices: real or complex; padded with zeros to the product of the dims.
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, as many as out-legs.
        budget: caps. `rel_error` holds for every item and is spent bond by bond, what one bond leaves
            over goes to the next.
        bonds: an explicit cap for each bond, on top of the budget.
        method: see `truncated_svd`; `"auto"` also computes single-precision input in single precision
            where the discarded energy is far above its rounding.

    Raises:
        BudgetError, NonFiniteError, TopologyError: see `cap_bonds`, `check_finite`, `check_dims`.
    """
    shape = (matrices.shape[1], matrices.shape[2])
    check_dims(shape, out_dims, in_dims)
    check_method(method)
    check_finite(matrices, "The matrix")
    caps, bound_by = cap_bonds(shape, out_dims, in_dims, budget)
    if bonds is not None:
        if len(bonds) != len(caps):
            raise TopologyError(f"bonds {tuple(bonds)} must have {len(caps)} entries, one for each bond.")
        if any(b < c for b, c in zip(bonds, caps, strict=True)):
            bound_by = "max_bond"
        caps = tuple(min(b, c) for b, c in zip(bonds, caps, strict=True))
    dtype, sites = result_dtype(matrices.dtype), len(out_dims)
    dims = list(zip(out_dims, in_dims, strict=True))
    order = list(range(sites))
    # Decided by the dims alone, so that a larger budget never changes the sweep and so never the error.
    backwards = [o * i for o, i in dims] > [o * i for o, i in reversed(dims)]
    if backwards:
        order, dims, caps = order[::-1], dims[::-1], caps[::-1]
    scale = safe_scales(matrices)
    rest = pad_matrix(matrices.detach().to(dtype), math.prod(out_dims), math.prod(in_dims))
    rest = rest.reshape(-1, *out_dims, *in_dims)
    rest = rest.permute(0, *(1 + axis for k in order for axis in (k, sites + k))).flatten(1)
    sweep = _sweep(rest if scale is None else rest / scale[:, None], dims, caps, budget.rel_error, method)
    cores = [core.to(dtype).contiguous() for core in sweep.cores]
    center = sweep.center
    if scale is not None:
        cores[center] = scaled_back(cores[center], scale.view(-1, 1, 1, 1, 1), dtype)
    if backwards:
        cores, center = [core.permute(0, 4, 2, 3, 1).contiguous() for core in cores[::-1]], sites - 1 - center
    return TTStack(tuple(cores), sweep.errors, "rel_error" if sweep.below_caps else bound_by, center)


@dataclass(frozen=True)
class _Sweep:
    cores: list[Tensor]
    errors: tuple[float, ...]
    center: int
    below_caps: bool


def _sweep(
    rest: Tensor,
    dims: Sequence[tuple[int, int]],
    caps: Sequence[int],
    rel_error: float | None,
    method: Method,
) -> _Sweep:
    """Decompose `rest: (batch, product of all legs)` by TT-SVD from left to right."""
    batch, sites, single = rest.shape[0], len(dims), is_single(rest.dtype)
    sizes = [o * i for o, i in dims]
    first, last = (0, sites - 1) if rel_error is not None else _cut_range(sizes, caps)
    right = math.prod(sizes[last + 1 :])  # bond on the right of the last core that is not an identity
    total = energy(rest[:, None])
    inside, spent, below = total, torch.zeros_like(total), False
    left, center = math.prod(sizes[:first]), last
    cores = [
        _identity(math.prod(sizes[: k + 1]), rest, (math.prod(sizes[:k]), *dims[k], -1)) for k in range(first)
    ]
    for k in range(first, last):
        block = rest.reshape(batch, left * sizes[k], -1)
        allowed = None
        if rel_error is not None:
            allowed = (allowed_energy(rel_error, total) - spent).clamp_min(0) / (sites - 1 - k)
        split = split_block(block, inside, caps[k], allowed, method=method, single=single, last=k == last - 1)
        below |= split.left.shape[-1] < min(caps[k], *block.shape[1:])
        spent, inside = spent + split.discarded, split.kept
        cores.append(split.left.reshape(batch, left, *dims[k], -1))
        left, rest, center = split.left.shape[-1], split.rest, last - split.centered
    cores.append(rest.reshape(batch, left, *dims[last], right))
    for k in range(last + 1, sites):
        cores.append(_identity(math.prod(sizes[k:]), rest, (-1, *dims[k], math.prod(sizes[k + 1 :]))))
    errors = torch.where(total > 0, (spent / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt(), 0)
    return _Sweep(cores, tuple(errors.tolist()), center, below)


def _cut_range(sizes: Sequence[int], caps: Sequence[int]) -> tuple[int, int]:
    """Find the sites between which bonds are truncated; the cores outside are identities."""
    first, last = 0, len(sizes) - 1
    while first < last and caps[first] == math.prod(sizes[: first + 1]):
        first += 1
    while last > first and caps[last - 1] == math.prod(sizes[last:]):
        last -= 1
    return first, last


def _identity(size: int, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    core = torch.eye(size, dtype=like.dtype, device=like.device).reshape(shape)
    return core.expand(like.shape[0], *core.shape)


# --- error bounds before any decomposition --------------------------------------------------------

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
