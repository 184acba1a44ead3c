"""Predicted loss increase of rounding both factors of a product, for all ranks at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet._util import outside_autocast, remembered
from tensornet.linalg.weighted_svd import Weighting, closest_shift, times
from tensornet.quantization.curvature import prepare_side
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.prediction import ExpectedResiduals, spaced_rows, unit_losses
from tensornet.quantization.rounding import COLUMN_DAMPING, LEAST_DAMPING, Rounding, _Problem, _roundings
from tensornet.quantization.scales import search_scales

#: Rows of each factor whose residuals are predicted one by one; they stand for the others.
SAMPLED_ROWS = 128


@torch.no_grad()
@outside_autocast
def predict_product_losses(
    left: Tensor,
    right: Tensor,
    number_format: NumberFormat | str,
    weightings: Sequence[Weighting],
    rounding: Rounding = "two_sided",
) -> Tensor:
    """Predict the loss increase of `round_product` for all leading parts of a sum of rank-one terms.

    To explain how this works: `sum_k a_k b_k^T` of a whitened SVD is nested, and its terms do not meet in the
    loss. An error of `b_k` costs by the norm of `a_k` and the input moment, an error of `a_k` by that of
    `b_k` and the gradient moment. So the expected losses of single terms add up. Factors are rounded with
    the first weighting; under another one errors also cost by the difference of the diagonals.

    Args:
        left: shape `(out, rank)`.
        right: shape `(rank, in)`.
        number_format: integer format of both factors, or its name.
        weightings: of the loss; the first one is rounded with.
        rounding: as for `round_weight`.

    Returns:
        Shape `(weightings, rank)`.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> from tensornet.quantization import predict_product_losses
        >>> left, right = torch.randn(16, 4), torch.randn(4, 64)
        >>> predict_product_losses(left, right, "int4", [Weighting()]).shape
        torch.Size([1, 4])
    """
    number_format, chosen = NumberFormat.parse(number_format), weightings[0]
    seen = [(_norms(left, 0, each.rows, chosen.rows), _norms(right, 1, each.columns)) for each in weightings]
    errors_right = _expected(right, number_format, seen[0][0], chosen.columns, rounding)
    errors_left = _expected(left, number_format, chosen.rows, seen[0][1], rounding)
    found = []
    for weighting, (of_left, of_right) in zip(weightings, seen, strict=True):
        by_column = unit_losses(errors_right.columns, chosen.columns, weighting.columns, COLUMN_DAMPING)
        by_row = unit_losses(errors_left.rows, chosen.rows, weighting.rows, LEAST_DAMPING)
        each = errors_right.by_row(by_column)[0] * of_left + errors_left.by_column(by_row)[0] * of_right
        found.append(each.cumsum(0) / 2)
    return torch.stack(found)


@remembered
def _norms(factor: Tensor, axis: int, moment: Tensor | None, known: Tensor | None = None) -> Tensor:
    """Compute squared norms of columns (axis 0) or rows (1) under a moment, in double precision.

    Args:
        factor: matrix.
        axis: that the norms sum over.
        moment: of that axis.
        known: moment that norms are needed of anyway: where they differ by a factor and on the diagonal
            alone, no other product of matrices is computed.
    """
    vectors = factor if axis == 0 else factor.mT
    if moment is not known and moment is not None and known is not None and moment.ndim == known.ndim == 2:
        times_known, shift, exact = closest_shift(known, moment)
        if exact:
            return times_known * _norms(factor, axis, known) + shift.double() @ vectors.double().square()
    return (vectors * times(moment, vectors)).sum(0, dtype=torch.float64)


def _expected(
    factor: Tensor,
    number_format: NumberFormat,
    rows: Tensor | None,
    columns: Tensor | None,
    rounding: Rounding,
) -> ExpectedResiduals:
    """Predict the residuals of one factor with all feedback that its moments allow."""
    work = factor.float()[None]
    problem = _Problem(
        work,
        number_format,
        # Damped as for the dense matrix, so that both share one factorisation.
        prepare_side(rows, work.shape[1], (), LEAST_DAMPING, work, "rows"),
        prepare_side(columns, work.shape[2], (), COLUMN_DAMPING, work, "columns"),
    )
    importance = None if problem.columns is None else problem.columns.diagonal[:, None, :]
    sample = spaced_rows(factor, SAMPLED_ROWS)
    scales = search_scales(work if sample is None else work[:, sample], number_format, importance)
    return problem.expected(scales, problem.rounder(_roundings(rounding, problem)[-1]), sample)
