"""Truncated SVD with certified error, by LAPACK, by a Gram matrix, or by randomized subspace iteration.

All methods compute in double precision and return the dtype of the input (float32 for 16-bit types). For
float32 input, the Gram matrix is therefore *more* accurate than a float32 SVD: squaring the condition number
loses half of the 16 digits, while float32 has only 7.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tensornet._util import check_dense, check_size, outside_autocast, refuse_transforms
from tensornet.budget import Budget
from tensornet.errors import BudgetError, NonFiniteError

# --- subspace iteration ---------------------------------------------------------------------------

#: Smallest matrix size for which subspace iteration is faster than an eigendecomposition of the Gram matrix.
MIN_SIZE = 256
#: Largest rank, as a fraction of the smaller dimension, for which subspace iteration is fastest.
MAX_SHARE = 1 / 8
_MAX_ITERATIONS = 10
#: Factor on `_MAX_ITERATIONS` if singular values are needed, which converge later than the energy.
_PATIENCE = 2
#: Typical number of iterations. Building the Gram matrix takes as long as `size / width` iterations without
#: it, so it is built if `size / width` is at most this number.
_GRAM_PAYS_BELOW = 12


def worth_iterating(size: int, rank: int) -> bool:
    """Return True if subspace iteration is the fastest way to find `rank` of `size` singular vectors."""
    return size >= MIN_SIZE and rank <= MAX_SHARE * size


def iterated_basis(
    block: Tensor,
    total: Tensor,
    rank: int,
    *,
    slack: float,
    kept_slack: float | None = None,
) -> Tensor | None:
    """Compute the `rank` leading left singular vectors by subspace iteration, in descending order.

    Here the energy of a matrix is its squared Frobenius norm.

    Args:
        block: matrices, shape `(*batch, m, n)` with `m <= n`.
        total: energy of each matrix, shape `(*batch)`, double precision.
        rank: number of vectors, at most `m`.
        slack: the iteration stops when a step lowers the energy outside of the basis by less than this
            fraction of the energy outside.
        kept_slack: if given, the iteration stops only if that step also raises the energy inside the basis by
            less than this fraction of the energy inside. Singular values are then accurate unless the energy
            outside is large.

    Returns:
        Orthonormal basis of shape `(*batch, m, rank)`, or None if the energy has not converged.
    """
    size, width = block.shape[-2], min(block.shape[-2], rank + max(rank // 2, 8))
    gram = block @ block.mH if size <= _GRAM_PAYS_BELOW * width else None
    generator = torch.Generator(device="cpu").manual_seed(0)  # draws the same numbers for every device
    probe = torch.randn(size, width, generator=generator, dtype=torch.float64, device="cpu").to(block)
    basis = torch.linalg.qr(_square(block, gram, probe.expand(*block.shape[:-2], size, width))).Q
    before = torch.zeros_like(total)
    for _ in range(_MAX_ITERATIONS if kept_slack is None else _PATIENCE * _MAX_ITERATIONS):
        image = _square(block, gram, basis)
        values, vectors = torch.linalg.eigh(basis.mH @ image)
        captured = values[..., -rank:].double().sum(-1)
        outside = (total - captured).clamp_min(0)
        resolution = 10 * torch.finfo(block.dtype).eps * total
        allowed = slack * outside
        if kept_slack is not None:
            allowed = torch.minimum(allowed, kept_slack * captured)
        if bool((captured - before <= allowed + resolution).all()):
            return basis @ vectors[..., -rank:].flip(-1)
        before = captured
        basis = torch.linalg.qr(image).Q
    return None


def _square(block: Tensor, gram: Tensor | None, vectors: Tensor) -> Tensor:
    """Compute `block @ block^H @ vectors`; `gram` is `block @ block^H`, or None if unknown."""
    return block @ (block.mH @ vectors) if gram is None else gram @ vectors


# --- truncated SVD --------------------------------------------------------------------------------

Method = Literal["auto", "exact", "gram", "randomized"]
METHODS = ("auto", "exact", "gram", "randomized")

#: Matrices with at least this ratio of the longer to the shorter side are reduced by QR before the SVD.
_TALL = 2
#: Matrices whose largest element is outside this range are rescaled, so that squares neither overflow nor
#: underflow.
_SAFE_RANGE = (1e-8, 1e8)


#: Largest matrices, by their smaller side, for which `leading_basis` does not use a Gram matrix.
_SMALL = 16
#: Largest matrices, by their longer side, for which a QR decomposition before the SVD does not pay.
_LONG = 128
#: Eigenvalues of a Gram matrix are accurate enough to choose a rank at energies above this number times
#: `size * eps` of the total.
_RESOLVED = 4
#: If a limit of the rank discards this fraction of the energy, a Gram matrix finds the leading vectors.
_CLEAR = 1e-9
#: Discarded energy below this fraction of the total is computed from the residual, not from a difference.
_MEASURED = 1e-6


@dataclass(frozen=True)
class TruncatedSVD:
    """Truncated SVD `matrix ~ U @ diag(S) @ Vh` with fixed signs.

    Args:
        U: left singular vectors, shape `(m, rank)`.
        S: singular values in descending order, shape `(rank,)`.
        Vh: right singular vectors, shape `(rank, n)`.
        error: certified relative Frobenius error of the truncation, `sqrt(sum discarded S^2) / |matrix|`.
        method: the method that was used: `"exact"`, `"gram"` or `"randomized"`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: float
    method: str


class TruncatedStack(NamedTuple):
    """Truncated SVDs of a stack of matrices in double precision, with arbitrary signs of singular vectors.

    Shapes: `U: (*batch, m, rank)`, `S: (*batch, rank)`, `Vh: (*batch, rank, n)`. `discarded` is the sum of
    the discarded `S^2`, shape `(*batch)`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    discarded: Tensor
    method: str


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of computations: complex128 for complex dtypes, otherwise float64."""
    return torch.complex128 if dtype.is_complex else torch.float64


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of results: the dtype of the input, but float32 for 16-bit types."""
    return dtype if dtype.is_complex or dtype in (torch.float32, torch.float64) else torch.float32


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the default relative error `eps^(3/4)`, with `eps` of the dtype of the result.

    This is 1.8e-12 in double and 6.4e-6 in single precision. It is larger than the rounding errors of a
    matrix that was computed in this precision, so decompositions find the exact rank of such a matrix.
    """
    return torch.finfo(result_dtype(dtype)).eps ** 0.75


def check_rel_error(
    error: float, rel_error: float | None, limits: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Raise BudgetError if a certified error exceeds `rel_error` by more than rounding errors.

    Args:
        error: the certified error.
        rel_error: largest relative error that the caller allows; None allows any.
        limits: the other limits of the caller by name, None for those that are absent.
        dtype: dtype of the matrix.

    Raises:
        BudgetError: the error is larger; the message names all limits.
    """
    if rel_error is None or error <= rel_error + default_tolerance(dtype):
        return
    given = [f"{name}={value}" for name, value in limits.items() if value is not None]
    within = f"within {' and '.join(given)}" if given else "by this method"
    raise BudgetError(
        f"rel_error={rel_error} cannot be kept {within}, where the relative error is {error:.4g}. "
        f"Allow a larger error{f', or raise or leave out {given[0]}' if given else ''}."
    )


def rounding_error(dtype: torch.dtype) -> float:
    """Return the relative error `16 eps` below which singular values cannot be distinguished from zero.

    `eps` is that of the dtype of the result. Without `rel_error`, decompositions do not store such values.
    """
    return 16 * torch.finfo(result_dtype(dtype)).eps


def is_single(dtype: torch.dtype) -> bool:
    """Return True if the dtype has single or half precision."""
    return dtype not in (torch.float64, torch.complex128)


def check_finite(tensor: Tensor, name: str, advice: str = "only finite numbers can be decomposed") -> None:
    """Raise NonFiniteError if a tensor contains NaN or infinity.

    The message begins with `name` and ends with `advice`, which says what the owner of the tensor can do.
    """
    if not math.isfinite(largest_element(tensor)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{name} contains {bad} NaN or infinite value{'s' if bad > 1 else ''} among {tensor.numel()} "
            f"elements; {advice}."
        )


#: Advice of `check_finite` for the weight of a layer.
OF_LAYER = "check the checkpoint, or leave this layer out with exclude_modules"


def largest_element(tensor: Tensor) -> float:
    """Find the largest absolute value of all real and imaginary parts; NaN if the tensor contains NaN."""
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    least, most = torch.aminmax(parts.detach())
    low, high = least.item(), most.item()
    return max(-low, high) if low == low else math.nan  # only NaN differs from itself


def safe_scale(tensor: Tensor) -> float:
    """Choose a divisor, usually 1, so that squares of the elements neither overflow nor underflow."""
    size = largest_element(tensor)
    return size if size > 0 and not _SAFE_RANGE[0] <= size <= _SAFE_RANGE[1] else 1.0


def safe_scales(stack: Tensor) -> Tensor | None:
    """Compute `safe_scale` of every item of a finite stack, shape `(items,)`; None if all are 1."""
    scales = [safe_scale(item) for item in stack]  # faster than one reduction over two axes
    if all(scale == 1 for scale in scales):
        return None
    return torch.tensor(scales, dtype=result_dtype(stack.dtype).to_real(), device=stack.device)


def scaled_work(matrix: Tensor, scale: float) -> Tensor:
    """Convert a matrix to double precision and divide it by `scale`, without a copy if nothing changes."""
    work = matrix.detach().to(working_dtype(matrix.dtype))
    return work if scale == 1 else work / scale


def scaled_back(tensor: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a result by `scale`, to undo the division by `safe_scale`, and convert it to `dtype`.

    Raises:
        NonFiniteError: an element of the result is outside the range of the dtype.
    """
    scaled = (tensor * scale).to(dtype)
    if not math.isfinite(largest_element(scaled)):
        raise NonFiniteError(
            f"The matrix is so large that its factors overflow in {dtype}; divide it by its largest element "
            "first, or convert it to torch.float64."
        )
    return scaled


@torch.no_grad()
@outside_autocast
def truncated_svd(
    matrix: Tensor,
    *,
    max_rank: int | None = None,
    rel_error: float | None = None,
    method: Method = "auto",
) -> TruncatedSVD:
    """Compute a truncated SVD with a certified error (not differentiable).

    This is the best low-rank approximation in the Frobenius norm (Eckart-Young). The rank is the smallest
    that satisfies `rel_error`. If this rank is larger than `max_rank`, an error is raised.

    The methods are:

    - `"exact"`: LAPACK, after a QR decomposition of tall or wide matrices.
    - `"gram"`: eigenvectors of the smaller Gram matrix. If the smallest kept singular value is not accurate,
      the method `"exact"` is used instead. So factors of a double-precision matrix are orthonormal to 1e-10.
    - `"randomized"`: subspace iteration, for ranks far below the size. Another method is used instead if the
      iteration has not converged, if `rel_error` is exceeded, or if the discarded part of a double-precision
      matrix is too small to be computed. Singular values are accurate to about 1e-4 of the largest one in
      single precision and 1e-9 in double precision; the other methods are accurate up to rounding.
    - `"auto"`: `"randomized"` if both sizes are at least 256 and the rank is at most an eighth of both.
      Otherwise `"gram"` for single and half precision, and `"exact"` for double precision.

    Args:
        matrix: the matrix, shape `(m, n)`, real or complex, of any floating-point dtype.
        max_rank: largest rank to keep, at least 1; values above `min(m, n)` are clipped.
        rel_error: largest relative Frobenius error, in `[0, 1)`.
        method: `"auto"`, `"exact"`, `"gram"` or `"randomized"`.

    Returns:
        Factors in the dtype of the matrix (float32 for 16-bit types) and on its device. Equal inputs give
        equal outputs: signs are fixed and random numbers have a fixed seed.

    Raises:
        NonFiniteError: the matrix contains NaN or infinity.
        ShapeError: the input is not a matrix of floating-point or complex numbers.
        BudgetError: `max_rank` or `rel_error` is out of range, or a rank of `max_rank` does not satisfy
            `rel_error`.
        ValueError: the method is unknown.

    Reference:
        Halko, Martinsson, Tropp 2011, "Finding structure with randomness", algorithms 4.4 and 5.1.

    Example:
        >>> found = tn.truncated_svd(torch.randn(20, 30), rel_error=0.5)
        >>> found.U.shape[1] == len(found.S), found.error <= 0.5
        (True, True)
    """
    found = capped_svd(matrix, max_rank=max_rank, rel_error=rel_error, method=method)
    check_rel_error(found.error, rel_error, {"max_rank": max_rank}, matrix.dtype)
    return found


@torch.no_grad()
@outside_autocast
def capped_svd(
    matrix: Tensor,
    *,
    max_rank: int | None = None,
    rel_error: float | None = None,
    method: Method = "auto",
) -> TruncatedSVD:
    """Compute `truncated_svd`, but keep `max_rank` values, without an error, if `rel_error` needs more."""
    check_dense(matrix, "truncated_svd", "a matrix of shape (m, n)", 2)
    refuse_transforms(matrix, "truncated_svd")
    check_method(method)
    if max_rank is not None:
        max_rank = check_size("max_rank", max_rank, error=BudgetError)
    Budget(rel_error=rel_error)
    check_finite(matrix, "The matrix")
    scale = safe_scale(matrix)
    work = scaled_work(matrix, scale)
    total = energy(work)
    allowed = allowed_energy(rel_error, total)
    single = is_single(matrix.dtype)
    found = factorize(work, max_rank or min(matrix.shape), allowed, method=method, single=single)
    U, Vh = fix_signs(found.U, found.Vh)
    dtype = result_dtype(matrix.dtype)
    error = relative(float(found.discarded), float(total))
    S = scaled_back(found.S, scale, torch.float32 if single else torch.float64)
    return TruncatedSVD(U.to(dtype), S, Vh.to(dtype), error, found.method)


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is a known SVD method."""
    if method not in METHODS:
        raise ValueError(f"Unknown SVD method {method!r}; choose one of {', '.join(METHODS)}.")


def factorize(
    work: Tensor,
    cap: int,
    allowed: Tensor | None,
    *,
    single: bool,
    method: Method = "auto",
) -> TruncatedStack:
    """Compute truncated SVDs of a stack of double-precision matrices, all with the same rank.

    Args:
        work: matrices, shape `(*batch, m, n)`.
        cap: largest rank.
        allowed: largest energy (squared norm) that each matrix may lose, shape `(*batch)`; None for no limit.
            The rank is large enough for all matrices.
        single: True if the elements are accurate to single precision only.
        method: see `truncated_svd`.
    """
    size = min(work.shape[-2:])
    cap = min(cap, size)
    iterate = method == "randomized" or (method == "auto" and worth_iterating(size, cap))
    if iterate and (found := _randomized(work, cap, allowed, single)) is not None:
        return found
    if method == "gram" or (method == "auto" and single):
        return _gram(work, cap, allowed, single)
    return _exact(work, cap, allowed)


def allowed_energy(
    rel_error: float | None, total: Tensor, spent: Tensor | float = 0.0, steps: int = 1
) -> Tensor | None:
    """Compute the energy (squared norm) that the next truncation may discard, with a margin for rounding.

    The allowed energy that is left is distributed evenly over the remaining truncations.

    Args:
        rel_error: largest relative error after all truncations; if None, the result is None.
        total: energy of the operator.
        spent: energy discarded by earlier truncations.
        steps: number of remaining truncations, including the next one.
    """
    if rel_error is None:
        return None
    return ((1 - 1e-12) * rel_error**2 * total - spent).clamp_min(0) / steps


def keep_rank(energies: Tensor, cap: int, allowed: Tensor | None) -> int:
    """Find the smallest rank in `1 ... cap` at which every matrix loses at most the energy `allowed`.

    Args:
        energies: squared singular values in descending order, shape `(*batch, k)`.
        cap: largest rank.
        allowed: largest energy that may be discarded, shape `(*batch)`; if None, the result is `cap`.
    """
    if allowed is None:
        return cap
    # tail[r] is the energy discarded at rank r. It is summed from the smallest value on, for accuracy.
    tail = energies.flip(-1).cumsum(-1).flip(-1)
    rank = int((tail > allowed[..., None]).sum(-1).max())
    return max(1, min(rank, cap))


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply singular vectors by phases that make the largest element of each left vector positive."""
    pivot = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True))  # shape: (*batch, 1, rank)
    phase = torch.where(pivot == 0, torch.ones_like(pivot), pivot / pivot.abs())
    return U * phase.conj(), Vh * phase.transpose(-1, -2)


def energy(block: Tensor) -> Tensor:
    """Compute the squared Frobenius norm of each matrix, shape `(*batch)`, in double precision."""
    norm = torch.linalg.vector_norm(block, dim=(-2, -1), dtype=working_dtype(block.dtype))
    return norm.square()


def frobenius(tensor: Tensor) -> float:
    """Compute the Frobenius norm in double precision; squares neither overflow nor underflow."""
    scale = safe_scale(tensor)
    norm = torch.linalg.vector_norm(tensor.detach() / scale, dtype=working_dtype(tensor.dtype))
    return float(norm) * scale


def relative(discarded: float, total: float) -> float:
    """Compute the relative error `sqrt(discarded / total)` from two energies; 0 if `total` is 0."""
    return math.sqrt(max(discarded, 0.0) / total) if total > 0 else 0.0


def _exact(work: Tensor, cap: int, allowed: Tensor | None) -> TruncatedStack:
    rows, columns = work.shape[-2:]
    if columns >= _TALL * rows:
        return _flip(_exact(work.mH, cap, allowed))
    if rows >= _TALL * columns:
        Q, R = torch.linalg.qr(work)
        inner = _exact(R, cap, allowed)
        return inner._replace(U=Q @ inner.U)
    U, S, Vh = _lapack_svd(work)
    energies = S.square()
    rank = keep_rank(energies, cap, allowed)
    return TruncatedStack(
        U[..., :rank], S[..., :rank], Vh[..., :rank, :], energies[..., rank:].sum(-1), "exact"
    )


def _lapack_svd(work: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a thin SVD; if LAPACK's default driver does not converge, use a second one."""
    try:
        U, S, Vh = torch.linalg.svd(work, full_matrices=False)
        if all(math.isfinite(largest_element(factor)) for factor in (S, U, Vh)):
            return U, S, Vh
    except torch.linalg.LinAlgError:
        pass
    import scipy.linalg  # offers the driver gesvd, which is slower but converges

    blocks = work.reshape(-1, *work.shape[-2:]).cpu().numpy()
    parts = [scipy.linalg.svd(block, full_matrices=False, lapack_driver="gesvd") for block in blocks]
    U, S, Vh = (torch.stack([torch.from_numpy(part[k]) for part in parts]).to(work.device) for k in range(3))
    batch = work.shape[:-2]
    return U.reshape(*batch, *U.shape[1:]), S.reshape(*batch, -1), Vh.reshape(*batch, *Vh.shape[1:])


def _gram(work: Tensor, cap: int, allowed: Tensor | None, single: bool) -> TruncatedStack:
    if work.shape[-2] > work.shape[-1]:
        return _flip(_gram(work.mH, cap, allowed, single))
    values, vectors = torch.linalg.eigh(work @ work.mH)
    energies = values.flip(-1).clamp_min(0)
    rank = keep_rank(energies, cap, allowed)
    found = _project(work, vectors.flip(-1)[..., :rank])
    # Eigenvalues S^2 of a Gram matrix are accurate to eps * S_max^2. So a singular vector is orthogonal to
    # the others up to eps * (S_max / S)^2, which must be at most 1e-6 in single and 1e-10 in double
    # precision.
    resolution = math.sqrt(torch.finfo(torch.float64).eps / (1e-6 if single else 1e-10))
    unresolved = bool((found.S[..., -1] < resolution * found.S[..., 0]).any()) or bool(
        (found.S[..., 0] == 0).any()
    )
    missed = allowed is not None and rank < cap and bool((found.discarded > allowed).any())
    return _exact(work, cap, allowed) if unresolved or missed else found


def _randomized(work: Tensor, cap: int, allowed: Tensor | None, single: bool) -> TruncatedStack | None:
    if work.shape[-2] > work.shape[-1]:
        flipped = _randomized(work.mH, cap, allowed, single)
        return None if flipped is None else _flip(flipped)
    total = energy(work)
    slack, kept_slack = (1e-4, 1e-5) if single else (1e-8, 1e-10)
    basis = iterated_basis(work, total, cap, slack=slack, kept_slack=kept_slack)
    if basis is None:
        return None
    sketch = basis.mH @ work
    # The energy outside of the basis is discarded at any rank.
    outside = (total - energy(sketch)).clamp_min(0)
    if bool((outside < 1e-6 * total).any()):  # the difference of large numbers is inaccurate
        outside = energy(work - basis @ sketch)
    # The iteration compares energies, and cannot resolve a residual norm below 1e-5 of the total norm. This
    # is sufficient for single precision, but not for double precision.
    if not single and bool(((outside < 1e-10 * total) & (outside > 1e-26 * total)).any()):
        return None
    inside = None if allowed is None else (allowed - outside).clamp_min(0)
    inner = _gram(sketch, cap, inside, single)
    found = inner._replace(U=basis @ inner.U, discarded=inner.discarded + outside, method="randomized")
    missed = allowed is not None and bool((found.discarded > allowed).any())
    return None if missed else found


def _project(work: Tensor, U: Tensor) -> TruncatedStack:
    """Compute the sorted SVD of matrices from their left singular vectors `U`."""
    projected = U.mH @ work  # shape: (*batch, rank, n); its rows are orthogonal up to rounding
    S, order = torch.linalg.vector_norm(projected, dim=-1).sort(dim=-1, descending=True, stable=True)
    U, projected = (
        torch.take_along_dim(U, order[..., None, :], -1),
        torch.take_along_dim(projected, order[..., None], -2),
    )
    Vh = projected / S.clamp_min(torch.finfo(S.dtype).tiny)[..., None]
    total = energy(work)
    discarded = total - S.square().sum(-1)
    if bool((discarded < 1e-6 * total).any()):  # the difference of large numbers is inaccurate
        discarded = energy(work - U @ projected)
    return TruncatedStack(U, S, Vh, discarded, "gram")


def leading_basis(
    block: Tensor, total: float, cap: int | None, allowed: float | None
) -> tuple[Tensor, Tensor, float]:
    """Find the leading left singular vectors `U` of one matrix, and the rest `U^H block`.

    For small matrices an SVD by LAPACK is fastest. For larger ones the smaller Gram matrix is used, unless
    the energies that decide the rank are close to `eps` times the largest one, since its eigenvalues are not
    more accurate. The discarded energy is accurate in all cases.

    Args:
        block: finite matrix in double precision, shape `(m, n)`, whose squares do not overflow.
        total: its energy (squared norm).
        cap: largest rank; None for no limit.
        allowed: largest energy that may be discarded; None for no limit, so that the rank is `cap`.

    Returns:
        Orthonormal vectors in descending order of their singular values, with fixed phases, shape
        `(m, rank)`; the rest, shape `(rank, n)`; and the discarded energy.
    """
    size = min(block.shape)
    cap = min(cap or size, size)
    found = _basis_by_gram(block, total, cap, allowed) if size > _SMALL and total > 0 else None
    if found is None:
        long = max(block.shape) > max(_TALL * size, _LONG)
        U, S, Vh = _exact(block, size, None)[:3] if long else _lapack_svd(block)
        rank, lost = choose_rank([value * value for value in reversed(S.tolist())], cap, allowed)
        found = U[:, :rank], S[:rank, None] * Vh[:rank], lost
    U, rest, lost = found
    phase = torch.sgn(U.gather(0, U.abs().argmax(dim=0, keepdim=True)))
    return U * phase.conj(), phase.mT * rest, lost


def _basis_by_gram(
    block: Tensor, total: float, cap: int, allowed: float | None
) -> tuple[Tensor, Tensor, float] | None:
    """Compute `leading_basis` from a Gram matrix; None if this is not accurate enough to choose the rank."""
    tall, size = block.shape[0] > block.shape[1], min(block.shape)
    resolved = allowed is not None and allowed > _RESOLVED * size * torch.finfo(block.dtype).eps * total
    if not resolved and cap == size:
        return None
    values, vectors = torch.linalg.eigh(block.mH @ block if tall else block @ block.mH)
    rank, lost = choose_rank([max(value, 0.0) for value in values.tolist()], cap, allowed)
    if not resolved and lost < _CLEAR * total:
        return None
    kept = vectors[:, size - rank :].flip(1)
    U = torch.linalg.qr(block @ kept).Q if tall else kept
    rest = U.mH @ block
    if lost < _MEASURED * total:  # the difference of large numbers is inaccurate
        lost = float(torch.linalg.vector_norm(block - U @ rest)) ** 2
    missed = allowed is not None and rank < cap and lost > allowed
    return None if missed else (U, rest, lost)


def choose_rank(energies: Sequence[float], cap: int, allowed: float | None) -> tuple[int, float]:
    """Choose the smallest rank of one matrix that loses at most the energy `allowed`, but at most `cap`.

    Args:
        energies: squared singular values in ascending order.
        cap: largest rank.
        allowed: largest energy that may be discarded; if None, the rank is `cap`.

    Returns:
        The rank, at least 1, and the discarded energy.
    """
    tails = list(accumulate(energies))
    cut = 0 if allowed is None else bisect_right(tails, allowed)
    cut = min(max(cut, len(tails) - cap), len(tails) - 1)
    return len(tails) - cut, tails[cut - 1] if cut else 0.0


def _flip(factors: TruncatedStack) -> TruncatedStack:
    return factors._replace(U=factors.Vh.mH, Vh=factors.U.mH)


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """Compute the singular values of a matrix in descending order, from its smaller Gram matrix.

    Args:
        matrix: finite matrix, shape `(m, n)`.

    Returns:
        Shape `(min(m, n),)`, in double precision.
    """
    scale = safe_scale(matrix)
    work = scaled_work(matrix, scale)
    wide = work.mH if work.shape[0] > work.shape[1] else work
    return torch.linalg.eigvalsh(wide @ wide.mH).flip(-1).clamp_min(0).sqrt() * scale
