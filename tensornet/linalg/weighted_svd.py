"""Low-rank approximation under a two-sided weighting, in closed form, as pure functions on matrices.

The weighted error of an approximation `W'` of `W: (out, in)` is

    1/2 tr(R (W - W') C (W - W')^T) = 1/2 || Lr^T (W - W') Lc ||_F^2,    R = Lr Lr^T,    C = Lc Lc^T,

so its best approximation of a given rank is the truncated SVD of `Lr^T W Lc`, transformed back. With `R = C =
1` this is the plain truncated SVD. A moment of None is the identity, a vector is a diagonal matrix.

Reference:
    Wang et al. 2024, "SVD-LLM" (one side, inputs); Srebro, Jaakkola 2003, "Weighted low-rank approximations".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite, fix_signs, working_dtype

#: If Cholesky fails, eigenvalues below this fraction of the largest count as zero.
_EIGEN_FLOOR = 1e-12


@dataclass(frozen=True)
class Weighting:
    """Sensitivity of the loss to errors of a matrix: a second moment for rows and one for columns.

    Args:
        rows: moment of the gradients at the outputs, `(out, out)`, `(out,)` or None.
        columns: moment of the inputs, `(in, in)`, `(in,)` or None.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def cost(self, error: Tensor) -> float:
        """Compute the predicted loss increase `1/2 tr(R E C E^T)` of an error `E: (out, in)`."""
        # Products can be computed in the precision of the error, the sum needs double precision.
        weighed = times(self.rows, error) * times(self.columns, error.T).T.conj()
        return 0.5 * float(weighed.sum(dtype=working_dtype(error.dtype)).real)


@dataclass(frozen=True)
class WeightedSVD:
    """SVD of the whitened matrix, with factors in the coordinates of the matrix.

    Args:
        values: singular values in descending order, shape `(min(out, in),)`.
        error: `error[r]` is the weighted error `1/2 sum of the squares of values[r:]`, shape `(k + 1,)`.
        left: `Lr^-T U`, shape `(out, k)`.
        right: factor such that `W = left @ right`, shape `(k, in)`.
    """

    values: Tensor
    error: Tensor
    left: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Slice the best factors `(out, rank)` and `(rank, in)` of a rank."""
        return self.left[:, :rank], self.right[:rank]


@remembered
def damped(moment: Tensor, amount: float) -> Tensor:
    """Add `amount * mean(diag M)` to the diagonal of a moment, in double precision."""
    moment = moment.to(working_dtype(moment.dtype))
    if moment.ndim == 1:
        return moment + amount * moment.mean()
    shifted = (moment + moment.T).mul_(0.5)  # symmetric only up to rounding
    shifted.diagonal().add_(amount * moment.diagonal().mean())
    return shifted


def root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise `M = L L^T` and return `(L, L^+)`, by Cholesky or, if `M` is singular, by eigenvectors.

    Args:
        moment: symmetric positive semi-definite `(n, n)`, or the diagonal `(n,)` of such a matrix.

    Returns:
        `L: (n, r)` and its pseudo-inverse `(r, n)`, with `r = n` for Cholesky; two vectors for a diagonal.
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
def weighted_svd(matrix: Tensor, weighting: Weighting, *, factors: bool = True) -> WeightedSVD:
    """Compute the SVD of the whitened matrix, which gives the best approximations of all ranks.

    Only the moment on the shorter side is factorised: with `m <= n` the left singular vectors come from the
    Gram matrix `Lr^T W C W^T Lr`, and `W' = Lr^-T U U^T Lr^T W` needs no root of `C`, which may be singular.

    Args:
        matrix: shape `(out, in)`.
        weighting: sensitivity of the loss to errors; the moment on the shorter side should have full rank.
        factors: whether to compute the factors; both are empty otherwise.

    Raises:
        NonFiniteError: the matrix or a moment contains NaN or infinity.
        ShapeError: a moment does not fit the matrix.
    """
    check_weighting(matrix, weighting)
    check_finite(matrix, "The matrix")
    work = matrix.detach().to(working_dtype(matrix.dtype))
    rows, columns = (None if x is None else x.to(work) for x in (weighting.rows, weighting.columns))
    if work.shape[0] > work.shape[1]:
        flipped = _short_side(work.T, columns, rows, factors)
        left, right = flipped.right.T, flipped.left.T
    else:
        flipped = _short_side(work, rows, columns, factors)
        left, right = flipped.left, flipped.right
    if factors:
        left, right = fix_signs(left, right)
    return WeightedSVD(flipped.values, flipped.error, left, right)


def frobenius_errors(result: WeightedSVD, matrix: Tensor) -> Tensor:
    """Compute the relative Frobenius error at every rank from 0 on, shape `(k + 1,)`.

    With a singular moment there are fewer values than the full rank: the part of the matrix in its null
    space, which is orthogonal to the rest, is discarded at every rank.
    """
    squares = 2 * tail_costs(result, Weighting())
    total = squares[0]
    if len(result.values) < min(matrix.shape):
        total = torch.maximum(total, matrix.to(squares).square().sum())
    return ((squares + (total - squares[0])) / total.clamp_min(1e-300)).sqrt()


@remembered
def tail_costs(result: WeightedSVD, weighting: Weighting) -> Tensor:
    """Compute the predicted loss increase of every rank under any weighting, shape `(k + 1,)`.

    Rank `r` discards the product of the trailing columns of `L` and rows of `Q`. Its loss is half the sum of
    the trailing block of the elementwise product `(L^T R L) * (Q C Q^T)`.
    """
    left, right = result.left, result.right
    overlaps = left.T @ times(weighting.rows, left) * (right @ times(weighting.columns, right.T))
    tails = overlaps.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0)
    return torch.cat([tails, tails.new_zeros(1)]) / 2


@remembered
def other_tail_costs(result: WeightedSVD, own: Weighting, other: Weighting) -> Tensor:
    """Compute `tail_costs` under another weighting than that of the SVD.

    No product with a moment is needed if the column moments of both weightings are the same tensor and the
    row moments satisfy `R' = a R + diag(v)` (or the other way round). Then the terms of the whitened SVD are
    orthogonal in both losses, so that their losses add up.

    Args:
        result: an SVD with factors.
        own: the weighting of the SVD.
        other: the weighting of the losses.
    """
    first, second = own.rows, other.rows
    if own.columns is not other.columns or first is None or second is None or first.ndim != second.ndim:
        return tail_costs(result, other)
    factor, shift, exact = closest_shift(first, second)
    if not exact:
        return tail_costs(result, other)
    left, energies = result.left, result.values.square()
    tall = left.shape[0] > result.right.shape[1]  # right vectors are then orthonormal
    added = shift.to(left) @ left.square()
    terms = factor * energies + (added if tall else energies * added)
    return torch.cat([terms.flip(0).cumsum(0).flip(0), terms.new_zeros(1)]) / 2


def leading_costs(matrix: Tensor, left: Tensor, right: Tensor, weighting: Weighting) -> Tensor:
    """Compute the predicted loss increase of `W - sum_{k < r} left_k right_k` at every rank from 0 on.

    Args:
        matrix: shape `(out, in)`.
        left: shape `(out, k)`; any factors, orthogonal or not.
        right: shape `(k, in)`.
        weighting: sensitivity of the loss to errors.

    Returns:
        Shape `(k + 1,)`.
    """
    moved, passed = times(weighting.rows, left), times(weighting.columns, right.T)
    whole = 2 * weighting.cost(matrix)
    met = ((moved.T @ matrix) * passed.T).sum(1).cumsum(0)
    own = ((left.T @ moved) * (right @ passed)).cumsum(0).cumsum(1).diagonal()
    costs = torch.cat([met.new_zeros(1), own - 2 * met]) + whole
    return costs.clamp_min(0) / 2


@remembered
def closest_shift(moment: Tensor, other: Tensor) -> tuple[float, Tensor, bool]:
    """Approximate a moment by a multiple of another one plus a diagonal, `M' ~ a M + diag(v)`.

    Args:
        moment: `M`, shape `(n, n)` or `(n,)`.
        other: `M'`, of the same shape.

    Returns:
        `a`, by least squares over off-diagonal elements; `v`, exact on the diagonal; and True if the
        approximation is exact up to rounding.
    """
    if moment.ndim == 1:
        return 1.0, other - moment, True
    own, its = moment.diagonal(), other.diagonal()
    square = float(torch.vdot(moment.flatten(), moment.flatten()) - torch.vdot(own, own))
    factor = 1.0
    if square > 0:
        factor = float(torch.vdot(moment.flatten(), other.flatten()) - torch.vdot(own, its)) / square
    rest = torch.sub(other, moment, alpha=factor)
    shift = rest.diagonal().clone()
    rest.diagonal().zero_()
    limit = 1e3 * torch.finfo(moment.dtype).eps * float(its.abs().max())
    return factor, shift, bool(rest.abs().max() <= limit)


def check_weighting(matrix: Tensor, weighting: Weighting) -> None:
    """Raise ShapeError unless both moments fit the matrix.

    Raises:
        ShapeError: a moment has another shape; the message names the side.
    """
    for side, moment, size in (
        ("rows", weighting.rows, matrix.shape[0]),
        ("columns", weighting.columns, matrix.shape[1]),
    ):
        if moment is not None and tuple(moment.shape) not in ((size,), (size, size)):
            raise ShapeError(
                f"The moment of the {side} has shape {tuple(moment.shape)}; a matrix of shape "
                f"{tuple(matrix.shape)} needs ({size}, {size}) or ({size},)."
            )


def _short_side(work: Tensor, near: Tensor | None, far: Tensor | None, factors: bool) -> WeightedSVD:
    """Compute the whitened SVD of `work: (m, n)` with `m <= n`; `near` is the moment of its rows."""
    lower, inverse = (None, None) if near is None else root(near)
    half = work if lower is None else times(transposed(lower), work)  # shape: (r, n), Lr^T W
    values, vectors = torch.linalg.eigh(half @ times(far, half.T))
    energies = values.flip(0).clamp_min(0)
    tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    empty = work.new_zeros(0, 0)
    if not factors:
        return WeightedSVD(energies.sqrt(), tail / 2, empty, empty)
    basis = vectors.flip(1)
    left = basis if inverse is None else times(transposed(inverse), basis)
    return WeightedSVD(energies.sqrt(), tail / 2, left, basis.T @ half)


def transposed(factor: Tensor) -> Tensor:
    """Transpose a factor of a moment; a diagonal, given as a vector, is its own transpose."""
    return factor if factor.ndim == 1 else factor.T


def times(moment: Tensor | None, matrix: Tensor) -> Tensor:
    """Multiply a matrix by a moment: full, diagonal as a vector, or None for the identity."""
    if moment is None:
        return matrix
    cast = _cast(moment, matrix.dtype, matrix.device)
    return cast[:, None] * matrix if moment.ndim == 1 else cast @ matrix


@remembered
def _cast(moment: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Convert a moment to the dtype and the device of a matrix."""
    return moment.to(device, dtype)


def nearest_kronecker(terms: list[Weighting]) -> Weighting:
    """Approximate a sum of Kronecker products by one product, for a weight with several uses.

    Minimises `|sum_k R_k (x) C_k - R (x) C|_F` over `R` and `C` in the span of the terms, which contains the
    best pair. The moments of one side must be all full or all diagonal.

    Reference:
        Van Loan, Pitsianis 1993, "Approximation with Kronecker products".
    """
    if len(terms) == 1:
        return terms[0]

    def same_form(moments: list[Tensor | None]) -> list[Tensor]:
        assert all(m is not None for m in moments), "identity moments are never combined"
        found = [m.double() for m in moments if m is not None]
        diagonal = any(m.ndim == 1 for m in found)
        return [m.diagonal() if diagonal and m.ndim == 2 else m for m in found]

    rows, columns = same_form([t.rows for t in terms]), same_form([t.columns for t in terms])
    left, right = torch.stack([x.flatten() for x in rows]), torch.stack([x.flatten() for x in columns])
    # The best rank-one term of sum_k r_k c_k^T, in the span of the r_k and c_k: an SVD of a small matrix.
    q_left, r_left = torch.linalg.qr(left.T)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    row, column = q_left @ u[:, 0] * s[0], q_right @ vh[0]
    sign = torch.sign(row.sum())  # both sides can be chosen positive
    return Weighting((sign * row).reshape(rows[0].shape), (sign * column).reshape(columns[0].shape))


#: Smallest pivot, as a fraction of the diagonal, that has about four correct digits in single precision.
_LEAST_PIVOT = 1e-3


def cholesky(moments: Tensor) -> tuple[Tensor, bool]:
    """Factorise `M = L L^T`, in single precision unless a pivot is small compared with the diagonal.

    A pivot is a diagonal element minus a sum of squares, so a small pivot has lost digits.

    Args:
        moments: shape `(..., n, n)`; the lower triangle is read.

    Returns:
        `L`, in the dtype of the moments or in double precision; and False if a moment is not positive
        definite.
    """
    lower, info = torch.linalg.cholesky_ex(moments)
    positive = not bool(info.any())
    if moments.dtype == torch.float64:
        return lower, positive
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    if positive and bool((pivots > _LEAST_PIVOT * moments.diagonal(dim1=-2, dim2=-1)).all()):
        return lower, True
    return cholesky(moments.double())
