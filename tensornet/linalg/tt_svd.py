"""TT-SVD: decompose a matrix into the cores of a matrix product operator, with certified error.

Bonds that are not truncated need no SVD, because their cores are identities. The sweep visits only the
truncated bonds. It starts at whichever end of the chain has smaller legs.

Reference: Oseledets 2011, "Tensor-Train Decomposition", algorithm 1 and theorem 2.2.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tensornet._util import check_sizes
from tensornet.budget import Budget, uniform_caps
from tensornet.errors import TopologyError
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
    keep_rank,
    leading_basis,
    result_dtype,
    rounding_error,
    safe_scale,
    safe_scales,
    scaled_back,
    working_dtype,
    worth_iterating,
)

# --- one step: split a matrix into an orthonormal factor and the rest; energy is a squared norm ---

#: Smallest discarded fraction of the energy, in units of eps, that `_fast` can compute accurately.
_TRUSTED = 1e5
#: Fraction by which the energy that subspace iteration discards may exceed the optimum.
_SLACK = 3e-3
#: Discarded energy below this fraction of the total is computed from the residual, not from a difference.
_MEASURED_BELOW = 1e-4
#: Bound on the relative rounding error of a sum of squares, in units of eps; at most 26 were observed for
#: matrices of 400 x 400.
_ROUNDING = 64


class Split(NamedTuple):
    """Approximate factorization `block ~ left @ rest` with `left: (*batch, m, r)`, `rest: (*batch, r, n)`.

    The columns of `left` or, if `centered`, the rows of `rest` are orthonormal. The energies `kept =
    |left @ rest|^2` and `discarded = |block - left @ rest|^2` have the shape `(*batch)`.
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
    single: bool,
    method: Method = "auto",
    last: bool = False,
    ordered: bool = False,
    zero: Tensor | None = None,
) -> Split:
    """Factorize matrices approximately with a common rank, the smallest that keeps enough energy.

    Args:
        block: matrices, shape `(*batch, m, n)`; the elements must be finite and of moderate size.
        total: energy of each matrix, shape `(*batch)`, double precision.
        cap: largest rank.
        allowed: largest energy that may be discarded, shape `(*batch)`; if None, the rank is `cap`.
        single: True if the elements are accurate to single precision only, whatever their dtype.
        method: see `truncated_svd`.
        last: True for the last step of a sweep. Then, if this saves a QR decomposition, `rest` may be the
            orthonormal factor instead of `left`.
        ordered: True if the columns of `left` must be singular vectors in descending order; otherwise they
            may be any basis.
        zero: if `allowed` is None, energy of the smallest singular values that are discarded in addition,
            shape `(*batch)`, since they cannot be distinguished from zero. None keeps a rank of `cap`.
    """
    rows, columns = block.shape[-2:]
    if not ordered and allowed is None:
        if cap >= min(rows, columns):
            return _whole(block, total, last)
        if method == "auto" and (fast := _fast(block, total, cap, last)) is not None:
            return fast
    alone = block.shape[:-2] == (1,) and not ordered and method == "auto"
    if alone and allowed is not None and not worth_iterating(min(rows, columns), cap):
        work = block[0].to(working_dtype(block.dtype))
        basis, after, discarded = leading_basis(work, float(total), cap, float(allowed))
        return Split(basis[None], after[None], energy(after[None]), torch.full_like(total, discarded))
    found = factorize(block.to(working_dtype(block.dtype)), cap, allowed, method=method, single=single)
    U, Vh = fix_signs(found.U, found.Vh)
    energies = found.S.square()
    # `_fast` never keeps numerical zeros, because the energy that it discards is far above rounding errors.
    rank = energies.shape[-1] if allowed is not None else keep_rank(energies, energies.shape[-1], zero)
    kept, lost = energies[..., :rank].sum(-1), energies[..., rank:].sum(-1)
    rest = found.S[..., :rank, None] * Vh[..., :rank, :]
    return Split(U[..., :rank], rest, kept, found.discarded + lost)


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
    """Compute `split_block` in the dtype of the block; None if rounding errors hide the discarded energy."""
    tall = block.shape[-2] > block.shape[-1]
    wide = block.mH if tall else block  # shape: (*batch, short, long)
    basis = None
    if worth_iterating(wide.shape[-2], cap):
        basis = iterated_basis(wide, total, cap, slack=_SLACK)
    if basis is None:
        basis = torch.linalg.eigh(wide @ wide.mH).eigenvectors[..., -cap:].flip(-1)
    projected = basis.mH @ wide
    # For a basis B and P = B^H M, |M - B P|^2 = |M|^2 - |P|^2 + tr((B^H B - 1) P P^H). Up to rounding, B is
    # orthonormal and the rows of P are orthogonal, so only the diagonal of the last term matters.
    double = working_dtype(block.dtype)
    rows = torch.linalg.vector_norm(projected, dim=-1, dtype=double).square()
    columns = torch.linalg.vector_norm(basis, dim=-2, dtype=double).square()
    kept = (rows * columns).sum(-1)
    discarded = total - (rows * (2 - columns)).sum(-1)
    rounding = torch.finfo(block.dtype).eps * total
    if bool((discarded < _TRUSTED * rounding).any()):
        return None
    if bool((discarded < _MEASURED_BELOW * total).any()):  # the difference of large numbers is inaccurate
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


def check_dims(shape: tuple[int, int], out_dims: Sequence[int], in_dims: Sequence[int]) -> None:
    """Raise TopologyError unless dims are positive, equal in number, and their products cover the shape."""
    check_sizes("out_dims", out_dims)
    check_sizes("in_dims", in_dims)
    if len(out_dims) != len(in_dims) or not out_dims:
        raise TopologyError(
            f"out_dims {tuple(out_dims)} and in_dims {tuple(in_dims)} must have the same number of sites, "
            "at least one; use size 1 for a missing leg."
        )
    for name, features, dims in (("out_dims", shape[0], out_dims), ("in_dims", shape[1], in_dims)):
        if math.prod(dims) < features:
            raise TopologyError(
                f"{name} {tuple(dims)} multiply to {math.prod(dims)}, which is less than {features} "
                "features; choose larger dims (if their product is larger, the matrix is padded with zeros)."
            )


def max_bonds(out_dims: Sequence[int], in_dims: Sequence[int]) -> tuple[int, ...]:
    """Compute the largest useful bonds: each is the smaller of the leg-size products on its two sides."""
    legs = [o * i for o, i in zip(out_dims, in_dims, strict=True)]
    return tuple(min(math.prod(legs[:k]), math.prod(legs[k:])) for k in range(1, len(legs)))


def pad_matrix(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Pad the last two dimensions with zeros to the sizes `(rows, columns)`."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2]))


@torch.no_grad()
def has_full_bonds(
    matrices: Tensor, out_dims: Sequence[int], in_dims: Sequence[int], tolerance: float
) -> bool:
    """Return True if no bond of any matrix can be truncated at the relative error `tolerance`.

    Singular values are computed from Gram matrices, which cannot resolve values below 1e-6 of the norm. So
    the result can be False although no bond can be truncated.
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
) -> tuple[list[Tensor], float, str]:
    """Decompose one matrix `(out, in)` into a chain of cores.

    Arguments, results and errors are those of `tt_svd_stack`, without the batch dimension.
    """
    cores, errors, bound_by = tt_svd_stack(matrix[None], out_dims, in_dims, budget, bonds=bonds)
    return [core[0] for core in cores], errors[0], bound_by


@torch.no_grad()
def tt_svd_stack(
    matrices: Tensor,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    budget: Budget,
    *,
    bonds: Sequence[int] | None = None,
    method: Method = "auto",
) -> tuple[list[Tensor], list[float], str]:
    """Decompose a stack of matrices into chains of cores in one sweep; all items get the same bonds.

    Args:
        matrices: real or complex matrices, shape `(batch, out, in)`; they are padded with zeros to the
            products of the dims.
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, one for each out-leg.
        budget: limits on bonds, error and number of parameters. `rel_error` limits the error of every item;
            the part of it that one bond does not use is available to the next bonds. Without `rel_error`,
            bonds that the other limits truncate get no singular values below rounding errors.
        bonds: size of each bond, in addition to the budget; then singular values of zero are kept, too.
        method: see `truncated_svd`. With `"auto"`, single-precision input is processed in single precision if
            the discarded energy is far above the rounding errors.

    Returns:
        `(cores, errors, bound_by)`: cores of shape `(batch, left, out, in, right)`, left-orthonormal before
        one site and right-orthonormal after it; the certified relative Frobenius error of each item,
        `sqrt(sum over bonds of discarded energy) / |W|`; and the limit that determined the bonds (see
        `Decomposition.bound_by`).

    Raises:
        BudgetError: even bonds of 1 exceed `param_ratio`, or `max_bond` has the wrong number of entries.
        NonFiniteError: a matrix contains NaN or infinity.
        TopologyError: the dims do not fit the matrices.
    """
    # 1. Compute the largest allowed size of each bond.
    shape = (matrices.shape[1], matrices.shape[2])
    check_dims(shape, out_dims, in_dims)
    check_method(method)
    check_finite(matrices, "The matrix")
    dims, sites = list(zip(out_dims, in_dims, strict=True)), len(out_dims)

    def params(inner: Sequence[int]) -> int:
        full = (1, *inner, 1)
        return sum(full[k] * o * i * full[k + 1] for k, (o, i) in enumerate(dims))

    what = f"a chain with dims {tuple(out_dims)} x {tuple(in_dims)}"
    caps, bound_by = uniform_caps(budget, shape, max_bonds(out_dims, in_dims), params, what)
    if bonds is not None:
        if len(bonds) != len(caps):
            raise TopologyError(f"bonds {tuple(bonds)} must have {len(caps)} entries, one for each bond.")
        if any(b < c for b, c in zip(bonds, caps, strict=True)):
            bound_by = "max_bond"
        caps = [min(b, c) for b, c in zip(bonds, caps, strict=True)]

    # 2. Order the legs for the sweep, which starts at the end with the smaller legs. The order depends only
    # on the dims, so that a larger budget never increases the error.
    order = list(range(sites))
    if backwards := [o * i for o, i in dims] > [o * i for o, i in reversed(dims)]:
        order, dims, caps = order[::-1], dims[::-1], caps[::-1]
    dtype, scale = result_dtype(matrices.dtype), safe_scales(matrices)
    rest = pad_matrix(matrices.detach().to(dtype), math.prod(out_dims), math.prod(in_dims))
    rest = rest.reshape(-1, *out_dims, *in_dims)
    rest = rest.permute(0, *(1 + axis for k in order for axis in (k, sites + k))).flatten(1)
    rest = rest if scale is None else rest / scale[:, None]

    # 3. At both ends, cores whose bonds are not truncated become identities.
    sizes = [o * i for o, i in dims]
    first, last = 0, sites - 1
    if budget.rel_error is None:
        while first < last and caps[first] == math.prod(sizes[: first + 1]):
            first += 1
        while last > first and caps[last - 1] == math.prod(sizes[last:]):
            last -= 1

    def identity(size: int, shape: tuple[int, ...]) -> Tensor:
        core = torch.eye(size, dtype=rest.dtype, device=rest.device).reshape(shape)
        return core.expand(len(rest), *core.shape)

    # 4. Truncate each of the other bonds by one factorization.
    total = inside = energy(rest[:, None])
    spent, left, center = torch.zeros_like(total), math.prod(sizes[:first]), last
    cores = [identity(math.prod(sizes[: k + 1]), (math.prod(sizes[:k]), *dims[k], -1)) for k in range(first)]
    for k in range(first, last):
        block = rest.reshape(len(rest), left * sizes[k], -1)
        allowed = allowed_energy(budget.rel_error, total, spent, sites - 1 - k)
        split = split_block(
            block,
            inside,
            caps[k],
            allowed,
            method=method,
            single=is_single(dtype),
            last=k == last - 1,
            zero=rounding_error(dtype) ** 2 * total if bonds is None else None,
        )
        if allowed is not None and split.left.shape[-1] < min(caps[k], *block.shape[1:]):
            bound_by = "rel_error"
        spent, inside = spent + split.discarded, split.kept
        cores.append(split.left.reshape(len(rest), left, *dims[k], -1))
        left, rest, center = split.left.shape[-1], split.rest, last - split.centered
    cores.append(rest.reshape(len(rest), left, *dims[last], math.prod(sizes[last + 1 :])))
    for k in range(last + 1, sites):
        cores.append(identity(math.prod(sizes[k:]), (-1, *dims[k], math.prod(sizes[k + 1 :]))))

    errors = torch.where(total > 0, (spent / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt(), 0)

    # 5. If the limits truncate nothing but rounding errors, reduce the bonds that they do not truncate, too.
    if bonds is None and budget.rel_error is None and bound_by != "exact":
        nothing = rounding_error(dtype)
        if bool((errors <= nothing).all()):
            whole = replace(budget, rel_error=nothing)
            return *tt_svd_stack(matrices, out_dims, in_dims, whole, method=method)[:2], "exact"

    # 6. Multiply the only core that is not orthonormal by the scale, and restore the order of the cores.
    cores = [core.to(dtype).contiguous() for core in cores]
    if scale is not None:
        cores[center] = scaled_back(cores[center], scale.view(-1, 1, 1, 1, 1), dtype)
    if backwards:
        cores = [core.permute(0, 4, 2, 3, 1).contiguous() for core in cores[::-1]]
    return cores, errors.tolist(), bound_by
