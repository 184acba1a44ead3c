"""Linear algebra on chains of cores `(left, out, in, right)`, without ever forming the matrix.

Pure functions on sequences of cores; `tensornet.MPO` is their object form. A chain is `n` cores whose end
bonds are 1; bond `k` lies on the right of core `k`.

Reference: Schollwoeck 2011, "The density-matrix renormalization group in the age of matrix product
states", sections 4 and 5; Oseledets 2011, "Tensor-Train Decomposition", section 3.
"""

import math
from collections.abc import Sequence
from numbers import Complex, Real
from operator import index

import torch
from torch import Tensor

from tensornet.context import outside_autocast
from tensornet.errors import ShapeError
from tensornet.linalg.svd import (
    check_finite,
    frobenius,
    result_dtype,
    safe_scale,
    truncated_svd,
    working_dtype,
)

Cores = tuple[Tensor, ...]


def add(left: Sequence[Tensor], right: Sequence[Tensor]) -> Cores:
    """Sum of two chains with equal dims; bonds add up."""
    left, right = _same_dtype(left, right)
    last = len(left) - 1
    if last == 0:
        return (left[0] + right[0],)
    total = []
    for k, (a, b) in enumerate(zip(left, right, strict=True)):
        if k == 0:
            total.append(torch.cat([a, b], dim=3))
        elif k == last:
            total.append(torch.cat([a, b], dim=0))
        else:
            upper = torch.cat([a, a.new_zeros(*a.shape[:3], b.shape[3])], dim=3)
            lower = torch.cat([b.new_zeros(*b.shape[:3], a.shape[3]), b], dim=3)
            total.append(torch.cat([upper, lower], dim=0))
    return tuple(total)


def scale(cores: Sequence[Tensor], factor: complex | Tensor) -> Cores:
    """The chain times a number; the last core takes it."""
    last = cores[-1]
    if not isinstance(factor, Tensor | int | float | complex):  # a fraction, or one of NumPy's numbers
        plain = complex if isinstance(factor, Complex) and not isinstance(factor, Real) else float
        factor = plain(factor)
    if isinstance(factor, complex) or (isinstance(factor, Tensor) and factor.is_complex()):
        last = last.to(torch.promote_types(last.dtype, torch.complex64))  # half of a complex has no products
    scaled = last * factor
    return (*(core.to(scaled.dtype) for core in cores[:-1]), scaled)


@outside_autocast
def multiply(left: Sequence[Tensor], right: Sequence[Tensor]) -> Cores:
    """Product of two chains as operators; in-dims of `left` are out-dims of `right`, bonds multiply."""
    left, right = _same_dtype(left, right)
    product = []
    for a, b in zip(left, right, strict=True):
        core = torch.einsum("aomb,cmid->acoibd", a, b)
        product.append(core.reshape(a.shape[0] * b.shape[0], a.shape[1], b.shape[2], -1))
    return tuple(product)


def transpose(cores: Sequence[Tensor]) -> Cores:
    """The transposed operator."""
    return tuple(core.transpose(1, 2) for core in cores)


@outside_autocast
def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Frobenius inner product `sum conj(L) R`, a 0-dimensional tensor; of half types in single precision."""
    left, right = _same_dtype(left, right)
    dtype = result_dtype(left[0].dtype)  # a square overflows half precision from 256 on
    left, right = [core.to(dtype) for core in left], [core.to(dtype) for core in right]
    transfer = torch.ones(1, 1, dtype=left[0].dtype, device=left[0].device)
    for a, b in zip(left, right, strict=True):
        partial = torch.einsum("ac,coid->aoid", transfer, b)
        transfer = torch.einsum("aoib,aoid->bd", a.conj(), partial)
    return transfer[0, 0]


def leading_projector(dims: Sequence[int], features: int, *, like: Tensor) -> Cores | None:
    """The diagonal operator that keeps the first `features` of `prod(dims)` indices, bonds at most 2.

    An index lies below `features` if, read from its most significant digit, it stays equal to the digits
    of `features - 1` or falls below them at some digit; the two bond values are these two states.

    Returns:
        The chain, or None where nothing is cut.
    """
    if features == math.prod(dims):
        return None
    digits, rest = [], features - 1
    for dim in reversed(dims):
        digits.append(rest % dim)
        rest //= dim
    chain = []
    for dim, digit in zip(dims, reversed(digits), strict=True):
        core = like.new_zeros(2, dim, dim, 2)
        values = torch.arange(dim, device=like.device)
        core[0, values, values, 0] = (values == digit).to(like.dtype)
        core[0, values, values, 1] = (values < digit).to(like.dtype)
        core[1, values, values, 1] = 1
        chain.append(core)
    chain[0] = chain[0][:1]
    chain[-1] = chain[-1].sum(dim=3, keepdim=True)
    return tuple(chain)


def mask_padding(cores: Sequence[Tensor], out_features: int, in_features: int) -> Cores:
    """The same leading block with exact zeros in the padding; bonds at most four times as large."""
    rows = leading_projector([core.shape[1] for core in cores], out_features, like=cores[0])
    columns = leading_projector([core.shape[2] for core in cores], in_features, like=cores[0])
    masked = tuple(cores)
    if rows is not None:
        masked = multiply(rows, masked)
    if columns is not None:
        masked = multiply(masked, columns)
    return masked


@torch.no_grad()
def canonicalize(cores: Sequence[Tensor], center: int) -> Cores:
    """The same operator with every core left of `center` left-orthonormal, every core right of it
    right-orthonormal, and the whole norm in the center. Bonds shrink to what a QR leaves.

    The diagonal of each triangular factor is made real and positive, so the result is unique.

    Args:
        cores: the chain.
        center: site of the center, negative ones count from the end.

    Raises:
        ShapeError: no such site.
    """
    sites = len(cores)
    if not _is_place(center, -sites, sites):
        raise ShapeError(f"center={center} is not a site; the chain has {sites}, 0 to {sites - 1}.")
    center = index(center) % sites
    dtype = result_dtype(cores[0].dtype)
    work = [core.to(working_dtype(core.dtype)) for core in cores]
    for k in range(center):
        left, out, in_, right = work[k].shape
        Q, R = _positive_qr(work[k].reshape(-1, right))
        work[k] = Q.reshape(left, out, in_, -1)
        work[k + 1] = torch.tensordot(R, work[k + 1], dims=1)
    for k in range(sites - 1, center, -1):
        left, out, in_, right = work[k].shape
        Q, R = _positive_qr(work[k].reshape(left, -1).mH)
        work[k] = Q.mH.reshape(-1, out, in_, right)
        work[k - 1] = torch.tensordot(work[k - 1], R.mH, dims=1)
    return tuple(core.to(dtype) for core in work)


@torch.no_grad()
def round_chain(
    cores: Sequence[Tensor], *, max_bond: int | None = None, rel_error: float | None = None
) -> tuple[Cores, float]:
    """Cut the bonds of a chain: canonical form, then one truncated SVD for each bond.

    Args:
        cores: the chain.
        max_bond: cap on every bond.
        rel_error: largest Frobenius error relative to the norm of the chain. What one bond leaves over
            goes to the next.

    Returns:
        The cores, left-canonical, and the certified relative error `sqrt(sum of cut energies) / norm`.

    Reference:
        Oseledets 2011, algorithm 2.
    """
    dtype = result_dtype(cores[0].dtype)
    work = list(canonicalize([core.to(working_dtype(core.dtype)) for core in cores], 0))
    scale = safe_scale(work[0])  # no square below may overflow or vanish: it would count as nothing cut
    work[0] = work[0] / scale
    total = float(torch.linalg.vector_norm(work[0])) ** 2
    spent = 0.0
    for k in range(len(work) - 1):
        left, out, in_, right = work[k].shape
        block = work[k].reshape(-1, right)
        energy = float(torch.linalg.vector_norm(block)) ** 2
        tolerance = bond_tolerance(rel_error, total, spent, energy, bonds_left=len(work) - 1 - k)
        factors = truncated_svd(block, max_rank=max_bond, rel_error=tolerance, method="exact")
        spent += factors.error**2 * energy
        work[k] = factors.U.reshape(left, out, in_, -1)
        rest = factors.S[:, None] * factors.Vh
        work[k + 1] = torch.tensordot(rest, work[k + 1], dims=1)
    work[-1] = work[-1] * scale
    error = math.sqrt(spent / total) if total > 0 else 0.0
    return tuple(core.to(dtype) for core in work), error


def bond_tolerance(
    rel_error: float | None, total: float, spent: float, energy: float, *, bonds_left: int
) -> float | None:
    """Relative error that the next bond may make: an even share of the energy that is still allowed.

    Args:
        rel_error: promise for the whole chain, None for no promise.
        total: squared norm of the operator.
        spent: energy cut at the bonds before.
        energy: squared norm of the block about to be cut.
        bonds_left: this bond and those after it.
    """
    if rel_error is None or energy == 0:
        return None
    share = max(rel_error**2 * total - spent, 0.0) / bonds_left
    return min(math.sqrt(share / energy), 1 - 1e-12)


@torch.no_grad()
def norm(cores: Sequence[Tensor]) -> Tensor:
    """Frobenius norm, accurate to relative rounding even where the terms of the chain cancel.

    It has no gradient: that of the QR does not exist where a core has dependent columns. `inner` has one.
    """
    center = canonicalize(cores, len(cores) - 1)[-1]
    return torch.tensor(frobenius(center), dtype=center.real.dtype, device=center.device)


@torch.no_grad()
def bond_spectrum(cores: Sequence[Tensor], bond: int) -> Tensor:
    """Singular values across a bond, descending: those of the matrix `(legs up to it, legs after it)`.

    Args:
        cores: the chain.
        bond: `0 ... n - 2`, the bond on the right of that core.

    Raises:
        NonFiniteError: the operator holds NaN or infinity.
        ShapeError: no such bond.
    """
    if not _is_place(bond, 0, len(cores) - 1):
        there = (
            f"{len(cores)} cores have bonds 0 to {len(cores) - 2}" if len(cores) > 1 else "one core has none"
        )
        raise ShapeError(f"Bond {bond} does not exist; {there}.")
    bond = index(bond)
    dtype = result_dtype(cores[0].dtype)
    center = canonicalize([core.to(working_dtype(core.dtype)) for core in cores], bond)[bond]
    check_finite(center, "The operator")
    values = torch.linalg.svdvals(center.reshape(-1, center.shape[3]))
    return values.to(torch.float32 if dtype in (torch.float32, torch.complex64) else torch.float64)


def bond_entropy(cores: Sequence[Tensor], bond: int) -> Tensor:
    """Von Neumann entropy `-sum p log p` in nats of `p = S^2 / sum S^2` across a bond.

    0 for a product, `log(d)` for `d` equal singular values; the bond `exp(entropy)` is the effective one.
    """
    values = bond_spectrum(cores, bond).double()
    energies = (values / safe_scale(values)).square()
    p = energies / energies.sum() if float(energies.sum()) > 0 else energies
    return torch.special.entr(p).sum().abs()  # a product has 0, not -0


def _is_place(value: int, first: int, end: int) -> bool:
    """Whether it is an integer, of NumPy as well, from `first` to before `end`."""
    try:
        return first <= index(value) < end
    except TypeError:
        return False


def _same_dtype(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Cores, Cores]:
    if left[0].device != right[0].device:
        raise ShapeError(
            f"One operator lies on {left[0].device}, the other on {right[0].device}; move the cores of one."
        )
    dtype = torch.promote_types(left[0].dtype, right[0].dtype)
    return tuple(core.to(dtype) for core in left), tuple(core.to(dtype) for core in right)


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(matrix)
    diagonal = R.diagonal()
    phase = torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal / diagonal.abs())
    return Q * phase, R * phase.conj()[:, None]
