"""Expected rounding residuals, from which the loss increase is predicted before rounding.

The bare formula `s^2/24 tr D_R tr D_C` takes every residual as uniform on one step. Feedback also moves
targets out of the range of few bits, where they are clamped; at 4 bits that adds a fifth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.linalg.weighted_svd import closest_shift
from tensornet.quantization.feedback import Grid
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.scales import as_groups, spread_groups

#: Standard deviations beyond which a normal distribution counts as zero.
_FAR = 12.0


def expected_residuals(weight: Tensor, grid: Grid, spread: Tensor) -> Tensor:
    """Predict squared rounding residuals with feedback: `s^2/12` inside the grid, more beyond its ends.

    Args:
        weight: shape `(stack, out, in)`.
        grid: of its elements.
        spread: variance of the feedback that is added to each element, in units of `s^2/12`.

    Returns:
        `s^2/12 P(inside) + E[(t - end)^2; t outside]` for normally distributed targets `t` around the weight.
    """
    step = grid.scale.abs()
    variance = step.square() / 12
    sigma = (variance * spread).sqrt_().clamp_min_(torch.finfo(weight.dtype).tiny ** 0.5)
    ends = grid.points(torch.zeros_like(weight)), grid.points(torch.full_like(weight, grid.top))
    expected = variance.clone()
    for beyond in (weight - torch.maximum(*ends), torch.minimum(*ends) - weight):
        # Farther out nothing changes, but numbers too small to be normal ones take very long.
        start = ((step / 2 - beyond) / sigma).clamp_(-_FAR, _FAR)
        tail = torch.special.erfc(start / 2**0.5) / 2
        density = torch.exp(-start.square() / 2) / (2 * torch.pi) ** 0.5
        outside = (beyond.square() + sigma.square()) * tail
        outside += (2 * beyond + sigma * start) * sigma * density
        expected += outside - variance * tail
    return expected


@remembered
def group_ranges(weight: Tensor, number_format: NumberFormat) -> Tensor:
    """Square the range of every group, to which its squared residuals are about proportional.

    Args:
        weight: shape `(stack, out, in)`.
        number_format: an integer format; its groups and zero points count.

    Returns:
        Shape `(stack, out, groups)`.
    """
    groups = as_groups(weight, number_format)
    if number_format.zero_point:
        return (groups.amax(-1) - groups.amin(-1)).square_()
    return groups.abs().amax(-1).square_()


@dataclass(frozen=True)
class ExpectedResiduals:
    """Expected squared residuals of rounding a stack of matrices with feedback.

    To explain how a sample stands for all rows: residuals of a group are about proportional to its squared
    range, at any number of bits. So sums over the sample are scaled by the ratio of the same sums of ranges
    over all rows and over the sample.

    Args:
        squares: shape `(stack, out, in)`, or `(stack, sampled, in)`.
        rows: `D` of the gradient moment and the growth of errors over residuals, each `(stack or 1, out)`.
        columns: the same of the input moment, each `(stack or 1, in)`.
        format: that is rounded to.
        sample: indices of the sampled rows; None if all are there.
        ranges: of all groups by `group_ranges`, if there is a sample.
    """

    squares: Tensor
    rows: tuple[Tensor, Tensor]
    columns: tuple[Tensor, Tensor]
    format: NumberFormat
    sample: Tensor | None = None
    ranges: Tensor | None = None

    def loss(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Sum the losses of all residuals, shape `(stack,)`, by weights `(stack or 1, n)` of both sides."""
        found = (self.squares * columns[:, None, :]).sum(2, dtype=torch.float64)
        if self.sample is None:
            return 0.5 * (found * rows).sum(1)
        known = self._range_sums(columns) * rows
        return 0.5 * known.sum(1) * _ratio(found * rows[:, self.sample], known[:, self.sample])

    def by_row(self, columns: Tensor) -> Tensor:
        """Sum the weighted residuals of each row, shape `(stack, out)`, in double precision."""
        found = (self.squares * columns[:, None, :]).sum(2, dtype=torch.float64)
        if self.sample is None:
            return found
        known = self._range_sums(columns)
        return known * _ratio(found, known[:, self.sample])[:, None]

    def by_column(self, rows: Tensor) -> Tensor:
        """Sum the weighted residuals of each column, shape `(stack, in)`, in double precision."""
        seen = rows if self.sample is None else rows[:, self.sample]
        found = (self.squares * seen[:, :, None]).sum(1, dtype=torch.float64)
        if self.sample is None:
            return found
        assert self.ranges is not None
        size, weighted = self.squares.shape[2], self.ranges.double() * rows[:, :, None]
        known = spread_groups(weighted[:, self.sample].sum(1), self.format, size)
        return spread_groups(weighted.sum(1), self.format, size) * _ratio(found, known)[:, None]

    def _range_sums(self, columns: Tensor) -> Tensor:
        """Sum the weighted ranges of each row, shape `(stack, out)`."""
        assert self.ranges is not None
        of_groups = as_groups(columns, self.format).sum(-1)
        return (self.ranges * of_groups[:, None, :]).sum(2, dtype=torch.float64)


def _ratio(found: Tensor, known: Tensor) -> Tensor:
    """Divide the sums of two stacks of vectors, shape `(stack,)`; 0 where the second is 0."""
    total = known.sum(1)
    return torch.where(total > 0, found.sum(1) / torch.where(total > 0, total, 1.0), 0.0)


def spaced_rows(weight: Tensor, count: int) -> Tensor | None:
    """Choose rows that stand for all: evenly spaced in the order of their norms, the largest one included.

    Args:
        weight: shape `(out, in)`.
        count: of rows; None is returned if the weight has no more.

    Returns:
        Indices in ascending order, shape `(count,)`.
    """
    if len(weight) <= count:
        return None
    order = torch.linalg.vector_norm(weight, dim=1).argsort(descending=True, stable=True)
    places = torch.linspace(0, len(weight) - 1, count, device=weight.device).long()
    return order[places].sort().values


def unit_losses(
    kept: tuple[Tensor, Tensor], chosen: Tensor | None, moment: Tensor | None, damping: float
) -> Tensor:
    """Predict the loss of a unit residual at every position, under a moment other than the rounding's.

    Args:
        kept: `D` and error growth of one side, each `(1, n)`.
        chosen: moment that is rounded with, before damping, `(n, n)`, `(n,)` or None for the identity.
        moment: moment that errors cost by; of two full ones it is taken to be a multiple of the other, but
            for the diagonal.
        damping: fraction of the mean diagonal that was added to round, but costs nothing.

    Returns:
        Shape `(1, n)`.
    """
    weights, growth = kept
    if moment is None:
        return growth.expand_as(weights)
    if moment.ndim == 1 or chosen is None or chosen.ndim == 1:
        return growth * (moment if moment.ndim == 1 else moment.diagonal())[None].to(growth)
    factor, shift, _ = closest_shift(chosen, moment)
    shift = shift - factor * damping * chosen.diagonal().mean()
    return (factor * weights + growth * shift[None].to(growth)).clamp_min_(0)
