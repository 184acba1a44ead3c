"""Predict by how much rounding a matrix, or the factors of a product, will increase the loss.

The formula `s^2/24 tr D_R tr D_C` for scales `s` and moments `U D U^T` assumes that residuals are uniform in
a rounding interval. But feedback moves some elements out of the range of the grid, where they are clamped. At
4 bits this increases the loss by a fifth. And scales are searched for which many elements are close to the
grid. So each squared residual is averaged over the feedback that the element may get. Sums over all rows are
estimated from a sample of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensornet._util import outside_autocast, remembered, spaced_places
from tensornet.damping import COLUMN_DAMPING, LEAST_DAMPING
from tensornet.errors import FormatError
from tensornet.linalg.svd import check_finite
from tensornet.linalg.weighted_svd import Weighting, closest_shift, times
from tensornet.quantization.feedback import Grid
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.moments import (
    Moment,
    damped_moment,
    rounding_dtype,
)
from tensornet.quantization.rounding import Rounding, fed_back, importance, possible_roundings
from tensornet.quantization.scales import group_ranges, search_scales

#: Number of quadrature nodes for the feedback to an element.
_NODES = 9
#: Up to this number of bits, less feedback may give a smaller loss, since fewer elements are clamped.
_CLAMPED_BITS = 4
#: Largest growth of errors along feedback (see `Moment.growth`) for which predictions are accurate. In layers
#: of a trained language model whose losses were predicted within a quarter, it was at most 14. In a layer
#: with few huge inputs it was 126 to 250, and predicted losses were 10 to 600 times too high.
_LARGEST_GROWTH = 20.0
#: Number of rows of a factor that are sampled to predict its residuals.
SAMPLED_ROWS = 128


@torch.no_grad()
@outside_autocast
def predict_losses(
    weight: Tensor,
    number_formats: Sequence[NumberFormat | str],
    weightings: Sequence[Weighting],
    *,
    row_damping: float = LEAST_DAMPING,
    column_damping: float = COLUMN_DAMPING,
    rounding: Rounding = "two_sided",
    sample: Tensor | None = None,
) -> Tensor:
    """Predict the loss increases of `round_weight` for several formats, under several weightings.

    Rounding is assumed to use the first weighting. Predictions were tested on layers of a trained language
    model: they were too high by 1 to 15 % with 4 or more bits, and wrong by up to a third with 2 bits. For a
    few layers they are far too high (see `is_predictable`).

    Args:
        weight: matrix, shape `(out, in)`.
        number_formats: integer formats without a codebook, or their names.
        weightings: weightings of the loss. From one weighting to the next, the off-diagonal elements of the
            row moment should change only by a common factor; likewise for the column moment.
        row_damping, column_damping: damping of the moments for rounding, as in `round_weight`; losses are
            predicted without damping.
        rounding: rounding method (see `round_weight`).
        sample: indices of the rows from which losses are estimated; all rows if absent.

    Returns:
        Predicted loss increases, shape `(formats, weightings)`.

    Raises:
        FormatError: a format has a codebook; or see `round_weight`.
        NonFiniteError, ShapeError: see `round_weight`.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> from tensornet.quantization import predict_losses
        >>> eight, four = predict_losses(torch.randn(8, 64), ("int8", "int4"), [Weighting()])[:, 0]
        >>> bool(100 < four / eight < 500)
        True
    """
    formats, chosen = [NumberFormat.parse(name) for name in number_formats], weightings[0]
    for number_format in formats:
        number_format.check_real(weight)
        number_format.groups(weight.shape[1])  # raise an error if rows of this length cannot be stored
        if number_format.points.run > 1:
            raise FormatError(
                f"Losses of {number_format.name!r} cannot be predicted from moments, since its codebook "
                "chooses several codes together; round some rows with round_weight."
            )
    check_finite(weight, "The weight")
    if not formats:
        return torch.zeros(0, len(weightings), dtype=torch.float64, device=weight.device)
    # 1. Factorize the moments once for all formats. Only the sampled rows of the weight are converted.
    work = weight.detach()[None]
    part = work if sample is None else work[:, sample]
    part = part.to(rounding_dtype(weight, chosen.rows, chosen.columns))
    rows = damped_moment(chosen.rows, work.shape[1], (), row_damping, part, "rows")
    columns = damped_moment(chosen.columns, work.shape[2], (), column_damping, part, "columns")
    ways = possible_roundings(rounding, rows, columns, work.shape[1])
    losses = []
    for number_format in formats:
        # 2. Predict the residuals for each rounding method that may be the best.
        scales, minima = search_scales(part, number_format, importance(columns, ways[-1]))
        ratios = None if minima is None else number_format.ratios(scales, minima)
        tried = ways if number_format.points.bits <= _CLAMPED_BITS else ways[-1:]
        expected = [
            expect(work, part, number_format, scales, ratios, rows, columns, way, sample)
            for way in reversed(tried)
        ]
        # 3. Compute the losses of these residuals under every weighting.
        found = [
            torch.cat(
                [
                    residuals.loss(
                        unit_losses(residuals.rows, chosen.rows, each.rows, row_damping),
                        unit_losses(residuals.columns, chosen.columns, each.columns, column_damping),
                    )
                    for each in weightings
                ]
            )
            for residuals in expected
        ]
        losses.append(min(found, key=lambda values: float(values[0])))
    return torch.stack(losses)


@torch.no_grad()
def is_predictable(
    weight: Tensor, weighting: Weighting, *, row_damping: float, column_damping: float, rounding: Rounding
) -> bool:
    """Return True if `predict_losses` is accurate for a matrix that is rounded with this weighting.

    Predictions assume that the variance of the residuals of column `k` is in proportion to `1 / D_k`. Then
    the errors of column `j` have `D_j (M^-1)_jj` times the variance of its residuals. If a few inputs are
    correlated and far larger than all others, the `D` of neighbours in the order of rounding differ by orders
    of magnitude. But the residuals of these columns are about equal, so far too much feedback is predicted.

    Args:
        weight: matrix, shape `(out, in)`.
        weighting: the moments that rounding uses.
        row_damping, column_damping, rounding: as in `predict_losses`.
    """
    like = weight.new_empty(0, dtype=rounding_dtype(weight, weighting.rows, weighting.columns))
    rows = damped_moment(weighting.rows, weight.shape[0], (), row_damping, like, "rows")
    columns = damped_moment(weighting.columns, weight.shape[1], (), column_damping, like, "columns")
    way = possible_roundings(rounding, rows, columns, len(weight))[-1]
    fed = [moment for moment in fed_back(way, rows, columns) if moment is not None]
    return all(float(moment.growth.max()) <= _LARGEST_GROWTH for moment in fed)


@torch.no_grad()
def range_losses(
    weight: Tensor,
    number_format: NumberFormat,
    weightings: Sequence[Weighting],
    row_damping: float,
    rounding: Rounding,
) -> Tensor:
    """Compute the losses of a matrix whose residuals are as large as the ranges of their groups.

    The losses of matrices with similar rows are in proportion to these. If rounding has feedback between
    rows, this holds for their residuals, and otherwise for their errors.

    Args:
        weight: matrix, shape `(out, in)`.
        number_format: integer format.
        weightings: weightings of the loss. Rounding uses the first.
        row_damping: damping of the gradient moment for rounding.
        rounding: rounding method (see `round_weight`).

    Returns:
        Losses, shape `(weightings,)`.
    """
    size, chosen = weight.shape[1], weightings[0]
    ranges = group_ranges(weight[None], number_format.group, number_format.minima is not None)[0]
    ranges = ranges.to(rounding_dtype(weight, chosen.rows, chosen.columns)).square()
    residuals = None
    if rounding == "two_sided" and chosen.full:
        moment = damped_moment(chosen.rows, len(weight), (), row_damping, ranges, "rows")
        residuals = _residual_weights(moment, moment is not None, ranges, len(weight))
    found = []
    for each in weightings:
        columns = ranges.new_ones(size) if each.columns is None else _diagonal(each.columns).to(ranges)
        of_rows = (ranges @ number_format.grouped(columns).sum(-1)).double()
        if residuals is not None:
            of_rows = of_rows * unit_losses(residuals, chosen.rows, each.rows, row_damping)[0]
        elif each.rows is not None:
            of_rows = of_rows * _diagonal(each.rows).to(of_rows)
        found.append(0.5 * of_rows.sum())
    return torch.stack(found)


def _diagonal(moment: Tensor) -> Tensor:
    return moment if moment.ndim == 1 else moment.diagonal()


@torch.no_grad()
@outside_autocast
def predict_product_losses(
    left: Tensor,
    right: Tensor,
    number_format: NumberFormat | str,
    weightings: Sequence[Weighting],
    rounding: Rounding = "two_sided",
    *,
    rank: int | None = None,
) -> Tensor:
    """Predict the loss increase of `round_product` at every rank of a whitened SVD `sum_k a_k b_k^T`.

    The terms are orthogonal in the loss, so their expected losses add up. An error of `b_k` is weighted by
    the norm of `a_k` and by the input moment. An error of `a_k` is weighted by the norm of `b_k` and by the
    gradient moment.
    The off-diagonal elements of the moments are assumed to differ between weightings only by a factor.

    Args:
        left: vectors `a_k`, shape `(out, terms)`.
        right: vectors `b_k`, shape `(terms, in)`.
        number_format: integer format of both factors, or its name.
        weightings: weightings of the loss; rounding uses the first.
        rounding: rounding method (see `round_weight`).
        rank: largest rank; the number of terms if absent.

    Returns:
        Predicted loss increases, shape `(weightings, rank)`.
    """
    number_format, chosen = NumberFormat.parse(number_format), weightings[0]
    # Compute the norms of all terms, not only of `rank` terms, since the norms are cached for other formats
    # and ranks.
    seen = [
        (_norms(left, 0, each.rows, chosen.rows)[:rank], _norms(right, 1, each.columns)[:rank])
        for each in weightings
    ]
    left, right = left[:, :rank], right[:rank]
    errors_right = _expect_factor(right, number_format, seen[0][0], chosen.columns, rounding)
    errors_left = _expect_factor(left, number_format, chosen.rows, seen[0][1], rounding)
    found = []
    for weighting, (of_left, of_right) in zip(weightings, seen, strict=True):
        by_column = unit_losses(errors_right.columns, chosen.columns, weighting.columns, COLUMN_DAMPING)
        by_row = unit_losses(errors_left.rows, chosen.rows, weighting.rows, LEAST_DAMPING)
        each = errors_right.by_row(by_column)[0] * of_left + errors_left.by_column(by_row)[0] * of_right
        found.append(each.cumsum(0) / 2)
    return torch.stack(found)


@remembered
def _norms(factor: Tensor, axis: int, moment: Tensor | None, known: Tensor | None = None) -> Tensor:
    """Compute squared norms of a matrix's columns (`axis=0`) or rows (`axis=1`) under a moment, in float64.

    `known` is another moment, whose norms are cached. If `moment` is a diagonal matrix plus a multiple of
    `known`, no further matrix product is needed.
    """
    vectors = factor if axis == 0 else factor.mT
    if moment is not known and moment is not None and known is not None and moment.ndim == known.ndim == 2:
        times_known, shift, exact = closest_shift(known, moment)
        if exact:
            return times_known * _norms(factor, axis, known) + shift.double() @ vectors.double().square()
    return (vectors * times(moment, vectors)).sum(0, dtype=torch.float64)


def _expect_factor(
    factor: Tensor,
    number_format: NumberFormat,
    rows: Tensor | None,
    columns: Tensor | None,
    rounding: Rounding,
) -> "ExpectedResiduals":
    """Predict the residuals of one factor, rounded with the most feedback that its moments allow."""
    work = factor.to(rounding_dtype(factor.float(), rows, columns))[None]
    # The moments are damped as for dense matrices, so that their cached factorization can be reused.
    r = damped_moment(rows, work.shape[1], (), LEAST_DAMPING, work, "rows")
    c = damped_moment(columns, work.shape[2], (), COLUMN_DAMPING, work, "columns")
    sample = spaced_rows(factor, SAMPLED_ROWS)
    part = work if sample is None else work[:, sample]
    way = possible_roundings(rounding, r, c, work.shape[1])[-1]
    scales, minima = search_scales(part, number_format, importance(c, way))
    ratios = None if minima is None else number_format.ratios(scales, minima)
    return expect(work, part, number_format, scales, ratios, r, c, way, sample)


# --- residuals of every element --------------------------------------------------------------------


@dataclass(frozen=True)
class ExpectedResiduals:
    """Expected squared rounding residuals of all elements in a stack of matrices or in a sample of rows.

    Sums over all rows are estimated from sums over the sampled rows. Squared residuals of a group are about
    proportional to the squared range of the group. So a sum over the sampled rows is multiplied by the sum of
    squared ranges of all rows, and divided by that of the sampled rows.

    Args:
        squares: squared residuals, shape `(stack, out, in)`, or `(stack, sampled, in)`.
        rows: `D` and `Moment.growth` of the gradient moment `U D U^T`, both of shape `(stack or 1, out)`.
        columns: `D` and `Moment.growth` of the input moment, both of shape `(stack or 1, in)`.
        format: the number format.
        sample: indices of the sampled rows; None for all rows.
        ranges: squared ranges of all groups, if there is a sample.
    """

    squares: Tensor
    rows: tuple[Tensor, Tensor]
    columns: tuple[Tensor, Tensor]
    format: NumberFormat
    sample: Tensor | None = None
    ranges: Tensor | None = None

    def loss(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Compute half the sum of each matrix's squared residuals, weighted by `rows` and `columns`."""
        found = (self.squares * columns[:, None, :]).sum(2, dtype=torch.float64)
        if self.sample is None:
            return 0.5 * (found * rows).sum(1)
        known = self._range_sums(columns) * rows
        return 0.5 * known.sum(1) * _ratio(found * rows[:, self.sample], known[:, self.sample])

    def by_row(self, columns: Tensor) -> Tensor:
        """Sum the squared residuals of each row, weighted by `columns`; return shape `(stack, out)`."""
        found = (self.squares * columns[:, None, :]).sum(2, dtype=torch.float64)
        if self.sample is None:
            return found
        known = self._range_sums(columns)
        return known * _ratio(found, known[:, self.sample])[:, None]

    def by_column(self, rows: Tensor) -> Tensor:
        """Sum the squared residuals of each column, weighted by `rows`; return shape `(stack, in)`."""
        seen = rows if self.sample is None else rows[:, self.sample]
        found = (self.squares * seen[:, :, None]).sum(1, dtype=torch.float64)
        if self.sample is None:
            return found
        assert self.ranges is not None
        size, weighted = self.squares.shape[2], self.ranges.double() * rows[:, :, None]
        known = self.format.spread(weighted[:, self.sample].sum(1), size)
        return self.format.spread(weighted.sum(1), size) * _ratio(found, known)[:, None]

    def _range_sums(self, columns: Tensor) -> Tensor:
        """Sum the squared group ranges of each row, weighted by `columns`; return shape `(stack, out)`."""
        assert self.ranges is not None
        of_groups = self.format.grouped(columns).sum(-1)
        return (self.ranges * of_groups[:, None, :]).sum(2, dtype=torch.float64)


def expect(
    weight: Tensor,
    part: Tensor,
    number_format: NumberFormat,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Moment | None,
    columns: Moment | None,
    way: Rounding,
    sample: Tensor | None = None,
) -> ExpectedResiduals:
    """Predict the squared rounding residuals of a stack of matrices.

    Args:
        weight: matrices, shape `(stack, out, in)`.
        part: their sampled rows in the dtype of computations, shape `(stack, sampled, in)`.
        number_format: integer format.
        scales: scales of the sampled rows.
        zeros: result of `NumberFormat.ratios` for the same rows; None without minima.
        rows: moment of the gradients.
        columns: moment of the inputs.
        way: rounding method.
        sample: indices of the sampled rows; all rows if absent.
    """
    size = weight.shape[2]
    zero = number_format.points.center if zeros is None else number_format.spread(zeros.to(part.dtype), size)
    grid = Grid.of(number_format, number_format.spread(scales.to(part.dtype), size), zero)
    along = fed_back(way, rows, columns)
    by_row, by_column = (
        _residual_weights(moment, moment is not None and moment is fed, part, n)
        for moment, fed, n in zip((rows, columns), along, weight.shape[1:], strict=True)
    )
    if way == "nearest":
        square = (part - grid.values(grid.codes(part))).square_()
    else:
        growth = by_row[1] if sample is None else by_row[1][:, sample]
        spread = growth[:, :, None] * by_column[1][:, None, :] - 1
        square = expected_residuals(part, grid, number_format, spread.clamp_min_(0))
    ranges = None
    if sample is not None:
        shifted = number_format.minima is not None
        ranges = group_ranges(weight, number_format.group, shifted).to(part).square()
    return ExpectedResiduals(square, by_row, by_column, number_format, sample, ranges)


def _residual_weights(
    moment: Moment | None, feedback: bool, like: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Compute `D` of a moment `U D U^T`, and its `Moment.growth`, both of shape `(stack or 1, size)`.

    Without feedback, `D` is replaced by the diagonal of the moment, and the growth is 1.
    """
    if moment is not None and feedback:
        back = moment.order.argsort(1)
        return moment.feedback[1].gather(1, back), moment.growth.gather(1, back)
    one = like.new_ones(1, size)
    return (one if moment is None else moment.diagonal), one


def expected_residuals(weight: Tensor, grid: Grid, number_format: NumberFormat, spread: Tensor) -> Tensor:
    """Predict squared rounding residuals by Gauss-Hermite quadrature over the feedback to each element.

    The feedback is assumed to be normally distributed. Its variance is `spread` times the mean squared
    residual of the group without feedback. The residuals are smaller than those of uniformly distributed
    weights, since scales were searched for which many elements are close to the grid.

    Args:
        weight: matrices, shape `(stack, out, in)`.
        grid: the rounding grid.
        number_format: integer format.
        spread: variance of the feedback to each element, in units of the group's mean squared residual.
    """
    own = (weight - grid.values(grid.codes(weight))).square_()
    counts = number_format.grouped(torch.ones_like(own[:1, :1])).sum(-1)
    means = number_format.grouped(own).sum(-1) / counts
    sigma = (number_format.spread(means, weight.shape[2]) * spread).sqrt_()
    expected = torch.zeros_like(weight)
    nodes, shares = np.polynomial.hermite_e.hermegauss(_NODES)
    for node, share in zip(nodes.tolist(), (shares / shares.sum()).tolist(), strict=True):
        target = weight + node * sigma
        expected.add_((target - grid.values(grid.codes(target))).square_(), alpha=share)
    return expected


def _ratio(found: Tensor, known: Tensor) -> Tensor:
    """Divide row sums of `found` by row sums of `known`; the result is 0 where the divisor is 0."""
    total = known.sum(1)
    return torch.where(total > 0, found.sum(1) / torch.where(total > 0, total, 1.0), 0.0)


def spaced_rows(weight: Tensor, count: int) -> Tensor | None:
    """Choose a sample of rows, evenly spaced in the order of their norms.

    Args:
        weight: matrix, shape `(out, in)`.
        count: number of rows in the sample.

    Returns:
        Row indices in ascending order, shape `(count,)`; None if the weight has at most `count` rows.
    """
    if len(weight) <= count:
        return None
    order = torch.linalg.vector_norm(weight, dim=1).argsort(descending=True, stable=True)
    return order[spaced_places(len(weight), count)].sort().values


def unit_losses(
    kept: tuple[Tensor, Tensor], chosen: Tensor | None, moment: Tensor | None, damping: float
) -> Tensor:
    """Compute the factor by which the loss weights the squared residuals of each row or column.

    Rounding used the moment `chosen`, but the loss is defined by `moment`. If both are full, their
    off-diagonal elements are assumed to be equal up to a common factor.

    Args:
        kept: `ExpectedResiduals.rows` or `ExpectedResiduals.columns`: two tensors of shape `(1, n)` that
            belong to the moment used for rounding.
        chosen: moment used for rounding, before damping, shape `(n, n)` or `(n,)`, or None for the identity.
        moment: moment that defines the loss, in the same shapes.
        damping: fraction of the mean diagonal that was added for rounding, but is not part of the loss.

    Returns:
        The factors, shape `(1, n)`.
    """
    weights, growth = kept
    if moment is None:
        return growth.expand_as(weights)
    if moment.ndim == 1 or chosen is None or chosen.ndim == 1:
        return growth * (moment if moment.ndim == 1 else moment.diagonal())[None].to(growth)
    factor, shift, _ = closest_shift(chosen, moment)
    shift = shift - factor * damping * chosen.diagonal().mean()
    return (factor * weights + growth * shift[None].to(growth)).clamp_min_(0)
