"""Best low-rank approximation of a matrix under a two-sided weighting, in closed form.

The weighted error of an approximation `W'` of `W: (out, in)` is

    1/2 tr(R (W - W') C (W - W')^T) = 1/2 || Lr^T (W - W') Lc ||_F^2,    R = Lr Lr^T,    C = Lc Lc^T,

so the best approximation of a given rank is found by truncating the SVD of the whitened matrix `Lr^T W Lc`
and transforming back. With `R = C = 1` this is the plain truncated SVD. `R` and `C` are called moments. None
represents the identity, and a vector represents a diagonal matrix.

Reference:
    Wang et al. 2024, "SVD-LLM" (inputs only); Srebro, Jaakkola 2003, "Weighted low-rank approximations".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite, fix_signs, largest_element, working_dtype

#: If Cholesky fails, eigenvalues below this fraction of the largest count as zero.
_EIGEN_FLOOR = 1e-12


@dataclass(frozen=True)
class Weighting:
    """Sensitivity of the loss to errors of a matrix: second moments of output gradients and of inputs.

    Args:
        rows: second moment `R` of the gradients at the outputs, shape `(out, out)` or `(out,)`, or None.
        columns: second moment `C` of the inputs, shape `(in, in)` or `(in,)`, or None.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def full(self) -> bool:
        """True if both moments are matrices, or stacks of matrices, as two-sided rounding needs."""
        return all(x is not None and x.ndim > 1 for x in (self.rows, self.columns))

    def cost(self, error: Tensor) -> float:
        """Compute the predicted loss increase `1/2 tr(R E C E^T)` of an error `E: (out, in)`."""
        # The products may have the precision of `error`, but the sum needs double precision.
        weighed = times(self.rows, error) * times(self.columns, error.T).T.conj()
        return 0.5 * float(weighed.sum(dtype=working_dtype(error.dtype)).real)


@dataclass(frozen=True)
class WeightedSVD:
    """SVD of the whitened matrix `Lr^T W Lc`, and the factors of `W` that follow from it.

    `Lr` and `Lc` are factors of the moments, `R = Lr Lr^T` and `C = Lc Lc^T`; `k` is the largest rank.

    Args:
        values: singular values of the whitened matrix in descending order, shape `(min(out, in),)`.
        error: weighted error at the ranks from 0 to `k`: `error[r]` is half the sum of the squares of
            `values[r:]`.
        left: left factor `Lr^-T U`, shape `(out, k)`.
        right: right factor, shape `(k, in)`, so that `W = left @ right`.
    """

    values: Tensor
    error: Tensor
    left: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best factors of a given rank, shapes `(out, rank)` and `(rank, in)`."""
        return self.left[:, :rank], self.right[:rank]


@remembered
def damped(moment: Tensor, amount: float) -> Tensor:
    """Add `amount * mean(diag M)` to the diagonal of a moment `M`, in double precision."""
    dtype = working_dtype(moment.dtype)
    if moment.ndim == 1:
        moment = moment.to(dtype)
        return moment + amount * moment.mean()
    shifted = moment.to(dtype, copy=True)
    shifted = shifted.add_(moment.T).mul_(0.5)  # a moment is symmetric only up to rounding
    shifted.diagonal().add_(amount * moment.diagonal().mean())
    return shifted


def restore_trace(moment: Tensor, amount: float) -> Tensor:
    """Scale a moment to the trace that it had before it was `damped` by an amount."""
    return moment / (1 + amount)


def root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize a moment `M = L L^T`, by Cholesky or, if `M` is singular, by eigenvectors.

    Args:
        moment: symmetric positive semi-definite matrix, shape `(n, n)`, or the diagonal of a diagonal matrix,
            shape `(n,)`.

    Returns:
        `L: (n, r)` and its pseudo-inverse `(r, n)`, with `r = n` for Cholesky. For a diagonal, both are
        vectors of length `n`.
    """
    check_finite(moment, "A second moment")
    if moment.ndim == 1:
        size = moment.clamp_min(0).sqrt()
        return size, torch.where(size > 0, 1 / size, torch.zeros_like(size))
    lower, info = torch.linalg.cholesky_ex(moment)
    diagonal = lower.diagonal()
    if int(info) == 0 and float(diagonal.min()) ** 2 > _EIGEN_FLOOR * float(diagonal.max()) ** 2:
        eye = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
        return lower, torch.linalg.solve_triangular(lower, eye, upper=False)
    values, vectors = torch.linalg.eigh(moment)
    keep = values > _EIGEN_FLOOR * max(float(values[-1]), 0.0)
    if not bool(keep.any()):
        return torch.zeros_like(moment), torch.zeros_like(moment)
    size = values[keep].sqrt()
    return vectors[:, keep] * size, (vectors[:, keep] / size).T


@remembered
@torch.no_grad()
def weighted_svd(matrix: Tensor, weighting: Weighting) -> WeightedSVD:
    """Compute the SVD of the whitened matrix, which gives the best approximations of all ranks.

    Only the moment of the shorter side of the matrix is factorized. For `out <= in`, the left singular
    vectors `U` are eigenvectors of `Lr^T W C W^T Lr`, and the approximation is `W' = Lr^-T U U^T Lr^T W`. So
    `C` may be singular.

    Args:
        matrix: the matrix `W`, shape `(out, in)`.
        weighting: sensitivity of the loss to errors; the moment of the shorter side should have full rank.

    Raises:
        NonFiniteError: the matrix or a moment contains NaN or infinity.
        ShapeError: the shape of a moment does not fit the matrix.
    """
    check_weighting(matrix, weighting)
    check_finite(matrix, "The matrix")
    work = matrix.detach().to(working_dtype(matrix.dtype))
    rows, columns = (None if x is None else x.to(work) for x in (weighting.rows, weighting.columns))
    if work.shape[0] > work.shape[1]:
        flipped = _short_side(work.T, columns, rows)
        left, right = flipped.right.T, flipped.left.T
    else:
        flipped = _short_side(work, rows, columns)
        left, right = flipped.left, flipped.right
    return WeightedSVD(flipped.values, flipped.error, *fix_signs(left, right))


def frobenius_errors(result: WeightedSVD, matrix: Tensor) -> Tensor:
    """Compute the relative Frobenius errors of the approximations of ranks 0 to `k`, shape `(k + 1,)`.

    If a moment is singular, the part of the matrix in its null space is discarded at every rank.
    """
    squares = 2 * tail_costs(result, Weighting())
    total = squares[0]
    if len(result.values) < min(matrix.shape):
        total = torch.maximum(total, matrix.to(squares).square().sum())
    return ((squares + (total - squares[0])) / total.clamp_min(1e-300)).sqrt()


@remembered
def tail_costs(result: WeightedSVD, weighting: Weighting) -> Tensor:
    """Compute the loss increase that a weighting predicts for each rank from 0 to `k`, shape `(k + 1,)`.

    Let `W = A B` with the factors of the SVD. At rank `r`, the columns of `A` and the rows of `B` from index
    `r` on are discarded. The loss increase is half the sum of the elements `[r:, r:]` of the elementwise
    product `(A^T R A) * (B C B^T)`.
    """
    left, right = result.left, result.right
    overlaps = left.T @ times(weighting.rows, left) * (right @ times(weighting.columns, right.T))
    tails = overlaps.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0)
    return torch.cat([tails, tails.new_zeros(1)]) / 2


@remembered
def other_tail_costs(result: WeightedSVD, own: Weighting, other: Weighting) -> Tensor:
    """Compute `tail_costs(result, other)`, faster if `other` is similar to the weighting of the SVD.

    The fast way needs no product with a moment. It is used if both weightings have the same tensor as column
    moment and their row moments satisfy `R' = a R + diag(v)`. Then the rank-one terms of the SVD are
    orthogonal under both weightings, so the losses of the discarded terms add up.

    Args:
        result: an SVD with factors.
        own: the weighting that `result` was computed with.
        other: the weighting that defines the loss increase.
    """
    first, second = own.rows, other.rows
    if own.columns is not other.columns or first is None or second is None or first.ndim != second.ndim:
        return tail_costs(result, other)
    factor, shift, exact = closest_shift(first, second)
    if not exact:
        return tail_costs(result, other)
    left, energies = result.left, result.values.square()
    tall = left.shape[0] > result.right.shape[1]  # then `left` contains the singular values
    added = shift.to(left) @ left.square()
    terms = factor * energies + (added if tall else energies * added)
    return torch.cat([terms.flip(0).cumsum(0).flip(0), terms.new_zeros(1)]) / 2


def leading_costs(matrix: Tensor, left: Tensor, right: Tensor, weighting: Weighting) -> Tensor:
    """Compute the predicted loss increase of replacing `W` by `left[:, :r] @ right[:r]`, for every rank `r`.

    Args:
        matrix: the matrix `W`, shape `(out, in)`.
        left: left factor, shape `(out, k)`; its columns need not be orthogonal.
        right: right factor, shape `(k, in)`.
        weighting: sensitivity of the loss to errors.

    Returns:
        The increase for `r = 0 ... k`, shape `(k + 1,)`.
    """
    moved, passed = times(weighting.rows, left), times(weighting.columns, right.T)
    whole = 2 * weighting.cost(matrix)
    met = ((moved.T @ matrix) * passed.T).sum(1).cumsum(0)
    own = ((left.T @ moved) * (right @ passed)).cumsum(0).cumsum(1).diagonal()
    costs = torch.cat([met.new_zeros(1), own - 2 * met]) + whole
    return costs.clamp_min(0) / 2


@remembered
def closest_shift(moment: Tensor, other: Tensor) -> tuple[float, Tensor, bool]:
    """Approximate the moment `other` by a multiple of `moment` plus a diagonal: `M' ~ a M + diag(v)`.

    Args:
        moment: the moment `M`, shape `(n, n)` or `(n,)`.
        other: the moment `M'`, of the same shape.

    Returns:
        `a`, the least-squares fit of the off-diagonal elements; `v`, which makes the diagonal exact; and True
        if the approximation is exact up to rounding.
    """
    if moment.ndim == 1:
        return 1.0, other - moment, True
    own, its = moment.diagonal(), other.diagonal()
    if other is moment:
        return 1.0, torch.zeros_like(own), True
    square = float(torch.vdot(moment.flatten(), moment.flatten()) - torch.vdot(own, own))
    factor = 1.0
    if square > 0:
        factor = float(torch.vdot(moment.flatten(), other.flatten()) - torch.vdot(own, its)) / square
    rest = torch.sub(other, moment, alpha=factor)
    shift = rest.diagonal().clone()
    rest.diagonal().zero_()
    limit = 1e3 * torch.finfo(moment.dtype).eps * float(its.abs().max())
    return factor, shift, largest_element(rest) <= limit


def check_weighting(matrix: Tensor, weighting: Weighting) -> None:
    """Raise ShapeError unless the shapes of both moments fit the matrix."""
    for side, moment, size in (
        ("rows", weighting.rows, matrix.shape[0]),
        ("columns", weighting.columns, matrix.shape[1]),
    ):
        if moment is not None and tuple(moment.shape) not in ((size,), (size, size)):
            raise ShapeError(
                f"The moment of the {side} has shape {tuple(moment.shape)}; a matrix of shape "
                f"{tuple(matrix.shape)} needs ({size}, {size}) or ({size},)."
            )


def _short_side(work: Tensor, near: Tensor | None, far: Tensor | None) -> WeightedSVD:
    """Compute `weighted_svd` for `work: (m, n)` with `m <= n`, row moment `near` and column moment `far`."""
    lower, inverse = (None, None) if near is None else root(near)
    half = work if lower is None else times(transposed(lower), work)  # shape: (r, n), Lr^T W
    values, vectors = torch.linalg.eigh(half @ times(far, half.T))
    energies = values.flip(0).clamp_min(0)
    tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    basis = vectors.flip(1)
    left = basis if inverse is None else times(transposed(inverse), basis)
    return WeightedSVD(energies.sqrt(), tail / 2, left, basis.T @ half)


def transposed(factor: Tensor) -> Tensor:
    """Transpose a factor of a moment; a vector (a diagonal matrix) is returned unchanged."""
    return factor if factor.ndim == 1 else factor.T


def times(moment: Tensor | None, matrix: Tensor) -> Tensor:
    """Compute `moment @ matrix`; a moment may be a vector (a diagonal) or None (the identity)."""
    if moment is None:
        return matrix
    cast = _cast(moment, matrix.dtype, matrix.device)
    return cast[:, None] * matrix if moment.ndim == 1 else cast @ matrix


@remembered
def _cast(moment: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return moment.to(device, dtype)


def nearest_kronecker(terms: list[Weighting]) -> Weighting:
    """Combine several weightings into one, for a matrix that a model uses several times.

    The result minimizes `|sum_k R_k (x) C_k - R (x) C|_F` over `R` and `C`: the nearest Kronecker product. If
    any `R_k` is diagonal, only the diagonals of all `R_k` are used; the same holds for the `C_k`.

    Reference:
        Van Loan, Pitsianis 1993, "Approximation with Kronecker products".
    """
    if len(terms) == 1:
        return terms[0]

    def same_form(moments: list[Tensor | None]) -> list[Tensor]:
        assert all(m is not None for m in moments), "moments of None cannot be combined"
        found = [m.double() for m in moments if m is not None]
        diagonal = any(m.ndim == 1 for m in found)
        return [m.diagonal() if diagonal and m.ndim == 2 else m for m in found]

    rows, columns = same_form([t.rows for t in terms]), same_form([t.columns for t in terms])
    left, right = torch.stack([x.flatten() for x in rows]), torch.stack([x.flatten() for x in columns])
    # With the moments of term k flattened to vectors r_k and c_k, find the best rank-one approximation of
    # sum_k r_k c_k^T. QR reduces this to the SVD of a small matrix.
    q_left, r_left = torch.linalg.qr(left.T)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    row, column = q_left @ u[:, 0] * s[0], q_right @ vh[0]
    sign = torch.sign(row.sum())  # make both moments positive
    return Weighting((sign * row).reshape(rows[0].shape), (sign * column).reshape(columns[0].shape))


#: Smallest pivot, as a fraction of its diagonal element, that has about four correct digits in single
#: precision.
_LEAST_PIVOT = 1e-3


def cholesky(moments: Tensor) -> tuple[Tensor, bool]:
    """Factorize moments `M = L L^T` by Cholesky, and repeat it in double precision if a pivot is small.

    A pivot is a diagonal element minus a sum of squares, so a small pivot has few correct digits.

    Args:
        moments: symmetric matrices, shape `(..., n, n)`.

    Returns:
        `L`, in the dtype of the moments or in double precision, and whether all moments are positive
        definite.
    """
    lower, info = torch.linalg.cholesky_ex(moments)
    positive = not bool(info.any())
    if moments.dtype == torch.float64:
        return lower, positive
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    if positive and bool((pivots > _LEAST_PIVOT * moments.diagonal(dim1=-2, dim2=-1)).all()):
        return lower, True
    # In place, since moments may need most of the memory. A symmetric matrix has the memory of its transpose,
    # whose columns are contiguous, as LAPACK needs them.
    del lower
    lower = moments.double().mT
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower, not bool(info.any())
