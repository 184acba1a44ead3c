"""Rounding of both factors of a low-rank product, each under the moments that it sees.

An error `F` of the right factor of `A B` is the error `A F` of the product, so that its loss increase is that
under `(A^T R A, C)`. An error of the left factor is seen through `(R, B C B^T)`. After the right factor has
been rounded the left one is fitted again, which compensates a part of the rounding error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.context import outside_autocast
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.linalg.weighted_svd import Weighting, damped, times
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.rounding import COLUMN_DAMPING, ROW_DAMPING, RoundedWeight, round_weight

#: Damping of moments seen through a factor: only against singular ones, since both sides are damped already.
_LEAST_DAMPING = 1e-6


@dataclass(frozen=True)
class RoundedFactors:
    """Rounded factors of a low-rank product.

    Args:
        left: codes of `A: (out, rank)`.
        right: codes of `B: (rank, in)`.
        loss_increase: exact loss increase of the product against the target, under the damped moments.
    """

    left: RoundedWeight
    right: RoundedWeight
    loss_increase: float

    def to_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiply the dequantized factors, shape `(out, in)`."""
        return self.left.dequantize(dtype) @ self.right.dequantize(dtype)


@torch.no_grad()
@outside_autocast
def round_factors(
    left: Tensor,
    right: Tensor,
    number_format: NumberFormat | str,
    *,
    target: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    row_damping: float = ROW_DAMPING,
    column_damping: float = COLUMN_DAMPING,
) -> RoundedFactors:
    """Round the right factor, refit and round the left one; skip the refit if that gives a lower loss.

    Args:
        left: `A`, shape `(out, rank)`.
        right: `B`, shape `(rank, in)`.
        number_format: an integer format or its name; groups lie along the inputs of each factor.
        target: matrix `(out, in)` that the product stands for; the product itself if absent.
        rows: moment of the gradients by the outputs, `(out, out)` or `(out,)`; identity if absent.
        columns: moment of the inputs, `(in, in)` or `(in,)`; identity if absent.
        row_damping: as for `round_weight`.
        column_damping: as for `round_weight`.

    Raises:
        FormatError, NonFiniteError, ShapeError: as `round_weight`; also for factors that do not fit.

    Example:
        >>> import torch
        >>> from tensornet.quantization import round_factors
        >>> round_factors(torch.randn(16, 4), torch.randn(4, 64), "int8").left.codes.shape
        torch.Size([16, 4])
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ShapeError(
            f"round_factors needs factors (out, rank) and (rank, in), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}."
        )
    a, b = left.double(), right.double()
    for factor, name in ((a, "The left factor"), (b, "The right factor")):
        check_finite(factor, name)
    weighting = Weighting(
        None if rows is None or not rows.any() else damped(rows, row_damping),
        None if columns is None or not columns.any() else damped(columns, column_damping),
    )
    wanted = a @ b if target is None else target.double()
    if wanted.shape != (a.shape[0], b.shape[1]):
        raise ShapeError(f"target= has shape {tuple(wanted.shape)}; the product {(a.shape[0], b.shape[1])}.")

    def rounded(factor: Tensor, r: Tensor | None, c: Tensor | None) -> RoundedWeight:
        return round_weight(
            factor,
            number_format,
            rows=r,
            columns=c,
            row_damping=_LEAST_DAMPING,
            column_damping=_LEAST_DAMPING,
        )

    right_codes = rounded(b, a.mT @ times(weighting.rows, a), weighting.columns)
    b = right_codes.dequantize(torch.float64)
    seen = times(weighting.columns, b.mT)  # shape: (in, rank), C B^T
    fitted = wanted @ seen @ torch.linalg.pinv(b @ seen, hermitian=True)
    found = []
    for factor in (fitted, a):
        left_codes = rounded(factor, weighting.rows, b @ seen)
        cost = weighting.cost(wanted - left_codes.dequantize(torch.float64) @ b)
        found.append(RoundedFactors(left_codes, right_codes, cost))
    return min(found, key=lambda each: each.loss_increase)
