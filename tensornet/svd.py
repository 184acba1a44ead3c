"""Truncated singular value decomposition: exact, by Gram matrix, or randomized; always certified.

Everything is computed in double precision and returned in the dtype of the input (float32 for half
types). For float32 input that makes the Gram route *more* accurate than a float32 SVD: squaring the
condition number costs half of the 16 digits and float32 only ever had 7.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tensornet.budget import Budget
from tensornet.errors import NonFiniteError, ShapeError

Method = Literal["auto", "exact", "gram", "randomized"]
METHODS = ("auto", "exact", "gram", "randomized")

#: Randomized range finding pays off when the wanted rank is below this share of the smaller dimension.
_RANDOMIZED_SHARE = 0.08
_RANDOMIZED_MIN_SIZE = 512
_OVERSAMPLING = 10
_POWER_ITERATIONS = 2
#: The captured energy must have settled to this relative accuracy, else the exact route takes over.
_RANDOMIZED_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TruncatedSVD:
    """`matrix ~ U @ diag(S) @ Vh`, signs fixed.

    Args:
        U: left singular vectors, shape `(m, rank)`.
        S: singular values in descending order, shape `(rank,)`.
        Vh: right singular vectors, shape `(rank, n)`.
        error: certified relative Frobenius error of the truncation, `sqrt(sum discarded S^2) / |matrix|`.
        method: the route that produced it: `"exact"`, `"gram"` or `"randomized"`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: float
    method: str


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Double precision of the same kind: complex128 for complex dtypes, float64 otherwise."""
    return torch.complex128 if dtype.is_complex else torch.float64


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of returned factors: the input's, float32 for half types (decompositions never return half)."""
    return dtype if dtype.is_complex or dtype in (torch.float32, torch.float64) else torch.float32


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse NaN and infinity by name.

    Raises:
        NonFiniteError: with the count of offending elements and what to do.
    """
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NonFiniteError(
            f"{name} holds {bad} NaN or infinite value{'s' if bad > 1 else ''} of {tensor.numel()}; "
            "a decomposition needs finite numbers. Check the checkpoint or exclude this layer."
        )


@torch.no_grad()
def truncated_svd(
    matrix: Tensor,
    *,
    max_rank: int | None = None,
    rel_error: float | None = None,
    method: Method = "auto",
) -> TruncatedSVD:
    """Best low-rank approximation in the Frobenius norm (Eckart-Young), with its certified error.

    The rank is the smallest that satisfies `rel_error`, cut at `max_rank` if that is smaller.

    Args:
        matrix: shape `(m, n)`, real or complex, any floating dtype.
        max_rank: largest rank to keep, at least 1; values above `min(m, n)` are clipped.
        rel_error: keep the relative Frobenius error at or below this, in `[0, 1)`.
        method: `"exact"` (LAPACK on the matrix), `"gram"` (eigenvectors of the smaller Gram matrix),
            `"randomized"` (range finder with power iterations, for small `max_rank`; checked a
            posteriori and redone exactly if the captured energy has not settled), or `"auto"`.

    Returns:
        Factors in the input's dtype (float32 for half types) and on its device.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        ShapeError: the input is not a floating matrix.
        BudgetError: a cap is out of range.
        ValueError: unknown method.

    Reference:
        Halko, Martinsson, Tropp 2011, "Finding structure with randomness", algorithms 4.4 and 5.1.
    """
    if matrix.ndim != 2 or matrix.numel() == 0 or not (matrix.is_floating_point() or matrix.is_complex()):
        raise ShapeError(
            "truncated_svd needs a non-empty floating or complex matrix of shape (m, n), "
            f"got {tuple(matrix.shape)} {matrix.dtype}."
        )
    if method not in METHODS:
        raise ValueError(f"Unknown SVD method {method!r}; choose one of {', '.join(METHODS)}.")
    budget = Budget(max_bond=max_rank, rel_error=rel_error)
    check_finite(matrix, "The matrix")
    work = matrix.detach().to(working_dtype(matrix.dtype))
    cap = min(*work.shape, max_rank or min(work.shape))
    route = _choose(work, matrix.dtype, cap, budget) if method == "auto" else method
    if route == "randomized":
        result = _randomized(work, cap, budget.rel_error)
    elif route == "gram":
        result = _gram(work, cap, budget.rel_error)
    else:
        result = _exact(work, cap, budget.rel_error)
    dtype = result_dtype(matrix.dtype)
    real = torch.float32 if dtype in (torch.float32, torch.complex64) else torch.float64
    return replace(result, U=result.U.to(dtype), S=result.S.to(real), Vh=result.Vh.to(dtype))


def keep_rank(energies: Tensor, total: float, cap: int, rel_error: float | None) -> int:
    """Smallest rank whose discarded energy is at most `rel_error^2 * total`, cut at `cap`, at least 1.

    Args:
        energies: squared singular values in descending order, shape `(k,)`.
        total: squared Frobenius norm of the matrix.
    """
    if rel_error is None:
        return cap
    # tail[r] = energy discarded when r values are kept, summed from the small end for accuracy
    tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    rank = int((tail > rel_error**2 * total).sum())
    return max(1, min(rank, cap))


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest element of each left vector real and positive, so every device agrees."""
    pivot = U.gather(0, U.abs().argmax(dim=0, keepdim=True))  # shape: (1, rank)
    phase = torch.where(pivot == 0, torch.ones_like(pivot), pivot / pivot.abs())
    return U * phase.conj(), Vh * phase.T


def _choose(work: Tensor, dtype: torch.dtype, cap: int, budget: Budget) -> str:
    small = min(work.shape)
    if budget.max_bond is not None and small >= _RANDOMIZED_MIN_SIZE and cap <= _RANDOMIZED_SHARE * small:
        return "randomized"
    # Double-precision input may carry singular values below 1e-8 of the largest, which a Gram matrix loses.
    return "exact" if dtype in (torch.float64, torch.complex128) else "gram"


def _energy(work: Tensor) -> float:
    return float(torch.linalg.vector_norm(work)) ** 2


def _relative(discarded: float, total: float) -> float:
    return math.sqrt(max(discarded, 0.0) / total) if total > 0 else 0.0


def _exact(work: Tensor, cap: int, rel_error: float | None) -> TruncatedSVD:
    U, S, Vh = _lapack_svd(work)
    energies = S.square()
    total = float(energies.sum())
    rank = keep_rank(energies, total, cap, rel_error)
    U, Vh = fix_signs(U[:, :rank], Vh[:rank])
    return TruncatedSVD(U, S[:rank], Vh, _relative(float(energies[rank:].sum()), total), "exact")


def _lapack_svd(work: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD that survives a diverging driver: the divide-and-conquer driver fails on rare inputs."""
    try:
        U, S, Vh = torch.linalg.svd(work, full_matrices=False)
        if bool(torch.isfinite(S).all() & torch.isfinite(U).all() & torch.isfinite(Vh).all()):
            return U, S, Vh
    except torch.linalg.LinAlgError:
        pass
    import scipy.linalg  # slower but convergent driver, wanted only here

    U, S, Vh = scipy.linalg.svd(work.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    return tuple(torch.from_numpy(x).to(work.device) for x in (U, S, Vh))  # type: ignore[return-value]


def _gram(work: Tensor, cap: int, rel_error: float | None) -> TruncatedSVD:
    if work.shape[0] > work.shape[1]:
        flipped = _gram(work.mH, cap, rel_error)
        U, Vh = fix_signs(flipped.Vh.mH, flipped.U.mH)
        return replace(flipped, U=U, Vh=Vh)
    values, vectors = torch.linalg.eigh(work @ work.mH)
    energies = values.flip(0).clamp_min(0)
    total = _energy(work)
    rank = keep_rank(energies, total, cap, rel_error)
    U = vectors.flip(1)[:, :rank]
    # Rounding leaves the eigenvalues an absolute error of about eps * total; the exact residual of the
    # projection decides, and is what gets certified.
    return _from_left_basis(work, U, total, "gram")


def _from_left_basis(work: Tensor, U: Tensor, total: float, method: str) -> TruncatedSVD:
    """SVD of the projection of `work` onto the orthonormal columns of `U` that diagonalise it."""
    projected = U.mH @ work  # shape: (rank, n), rows orthogonal up to rounding
    S = torch.linalg.vector_norm(projected, dim=1)
    floor = 1e-7 * float(S.max()) if S.numel() else 0.0
    if float(S.min()) > floor:
        Vh = projected / S[:, None]
    else:
        # Rows of nearly zero norm have no direction of their own: QR completes them orthonormally.
        Q, R = torch.linalg.qr(projected.mH)
        diagonal = R.diagonal()
        phase = torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal / diagonal.abs())
        Vh = (Q * phase).mH
    U, Vh = fix_signs(U, Vh)
    error = _relative(total - float(S.square().sum()), total)
    if error < 1e-6:  # the difference of two equal energies has lost its digits: measure the residual
        error = _relative(_energy(work - (U * S) @ Vh), total)
    return TruncatedSVD(U, S, Vh, error, method)


def _randomized(work: Tensor, cap: int, rel_error: float | None) -> TruncatedSVD:
    total = _energy(work)
    width = min(cap + _OVERSAMPLING, *work.shape)
    generator = torch.Generator(device="cpu").manual_seed(0)  # deterministic and the same on every device
    probe = torch.randn(work.shape[1], width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(work @ probe.to(work)).Q
    captured = [_captured(work, basis, cap)]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(work @ torch.linalg.qr(work.mH @ basis).Q).Q
        captured.append(_captured(work, basis, cap))
    residual = max(total - captured[-1], 0.0)
    if captured[-1] - captured[-2] > _RANDOMIZED_TOLERANCE * max(residual, 1e-12 * total):
        return _exact(work, cap, rel_error)
    inner = _exact(basis.mH @ work, cap, None)
    energies = inner.S.square()
    # Energy outside the sketch counts as discarded whatever rank is kept.
    outside = max(total - float(energies.sum()), 0.0)
    rank = cap
    if rel_error is not None:
        allowed = rel_error**2 * total - outside
        tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
        rank = max(1, min(cap, int((tail > max(allowed, 0.0)).sum())))
    U, Vh = fix_signs(basis @ inner.U[:, :rank], inner.Vh[:rank])
    discarded = outside + float(energies[rank:].sum())
    return TruncatedSVD(U, inner.S[:rank], Vh, _relative(discarded, total), "randomized")


def _captured(work: Tensor, basis: Tensor, cap: int) -> float:
    return float(torch.linalg.svdvals(basis.mH @ work)[:cap].square().sum())
