"""Rounding with error feedback between columns, between rows, or both.

Let `M = U D U^T` for both second moments `R` and `C`, with `U` unit upper triangular. The loss increase of an
error `E = W - Q` is

    1/2 tr(R E C E^T) = 1/2 || D_R^1/2 (U_R^T E U_C) D_C^1/2 ||_F^2.

Elements are rounded from the first row and column to the last. Before an element is rounded, the errors of
all previous elements are added to it, with the coefficients of `U_R^T E U_C`. Then only the rounding residual
of each element contributes to the norm. With `U_R = 1` this is GPTQ, also known as LDLQ.

In two-sided rounding, element `(i, j)` depends on the elements above and to the left of it. So elements on
one antidiagonal are independent, and so are tiles on one antidiagonal of the matrix. The same antidiagonal of
all these tiles is rounded at once; tiles exchange feedback by matrix products. Columns are stored in reverse
order, so that antidiagonals become diagonals, of which torch can make views.

Function calls take as long as the arithmetic of a step, so tiles are rounded in one buffer whose views are
created only once.

With a codebook, all codes of a run of 8 neighbouring inputs are chosen in one step (`codebook_feedback`).

Reference:
    Frantar et al. 2023, "GPTQ"; Chee et al. 2023, "QuIP" (LDLQ); Tseng et al. 2025, "Model-preserving
    adaptive rounding" (YAQA, feedback between rows and between columns).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tensornet.quantization.codebook_feedback import BLOCK, TILE, one_sided_by_run, two_sided_by_run
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.moments import Moment
from tensornet.quantization.parts import Points


@dataclass(frozen=True)
class Grid:
    """Rounding grid: the values `scale * (code - zero)`, or `scale * level`, that each element may have.

    With a table of levels, `zero` is 0, and levels take the place of codes in all rounding functions.

    Args:
        scale: scale of each element, shape `(stack, out, in)`; if it is zero, the only value is zero.
        zero: code of the value 0 for each element, or one number for all.
        points: what the codes mean.
    """

    scale: Tensor
    zero: Tensor | float
    points: Points

    @classmethod
    def of(cls, number_format: NumberFormat, scale: Tensor, zero: Tensor | float | None = None) -> "Grid":
        """Return the grid of a number format with these scales; by default without minima."""
        points = number_format.points
        return cls(scale, points.center if zero is None else zero, points)

    def codes(self, target: Tensor) -> Tensor:
        """Compute the nearest codes (or levels) of values, as floating-point numbers."""
        return self.points.closest((target / self.divisor).add_(self.zero))

    @property
    def divisor(self) -> Tensor:
        """Scales with zeros replaced by ones."""
        return _without_zeros(self.scale)

    def transposed(self) -> "Grid":
        """Return the transposed grid, with contiguous scales and codes of zero."""
        zero = self.zero.mT.contiguous() if isinstance(self.zero, Tensor) else self.zero
        return Grid(self.scale.mT.contiguous(), zero, self.points)

    def values(self, codes: Tensor) -> Tensor:
        """Convert codes (or levels) to values."""
        return (codes - self.zero) * self.scale


def _without_zeros(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def round_with_feedback(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    number_format: NumberFormat,
    rows: Moment | None,
    columns: Moment | None,
) -> tuple[Tensor, Tensor | None]:
    """Round a stack of matrices with error feedback between rows, between columns, or both.

    Args:
        weight: matrices, shape `(stack, out, in)`.
        scales: scales of all groups, shape `(stack, out, groups)`.
        zeros: codes of the value 0 of all groups (`NumberFormat.ratios`), in the same shape; None without
            minima.
        number_format: integer format.
        rows: full moment of the gradients; None for no feedback between rows.
        columns: full moment of the inputs; None for no feedback between columns. For a format with a
            codebook, the result of `Moment.in_runs`.

    Returns:
        Codes (or levels) in the dtype of the weight, shape `(stack, out, in)`, and a sum of squared rounding
        residuals. With feedback between columns only, this is `diag(E C E^T)`, shape `(stack, out)`. With
        feedback between rows only, it is `diag(E^T R E)`, shape `(stack, in)`. With both, it is
        `tr(R E C E^T)`, shape `(stack,)`. Without feedback, it is None.
    """
    size, dtype = weight.shape[2], weight.dtype
    if number_format.points.run > 1 and columns is not None:
        if rows is None:
            return one_sided_by_run(weight, scales, number_format, columns)
        return two_sided_by_run(weight, scales, number_format, rows, columns)
    if rows is None and columns is not None and len(columns.order) == 1:
        # Transpose the matrices, so that each step reads and writes contiguous memory. A row of scales is
        # used by all columns of a group.
        order = columns.order[0]
        zero = None if zeros is None else zeros.to(dtype).mT.contiguous()
        grid = Grid.of(number_format, scales.to(dtype).mT.contiguous(), zero)
        groups = (order // (number_format.group or size)).tolist()
        codes, losses = one_sided(weight.mT.index_select(1, order), grid, *columns.feedback, groups)
        return codes.index_select(1, order.argsort()).mT, losses

    spread = number_format.spread(scales.to(dtype), size)
    grid = Grid.of(
        number_format, spread, None if zeros is None else number_format.spread(zeros.to(dtype), size)
    )
    if rows is None and columns is None:
        return grid.codes(weight), None
    orders = [(moment.order, axis) for moment, axis in ((rows, 1), (columns, 2)) if moment is not None]

    def sorted_by(x: Tensor, *, back: bool = False) -> Tensor:
        """Permute rows and columns to the order of rounding or, if `back`, to the original order."""
        for order, axis in orders:
            order = order.argsort(1) if back else order
            if len(order) == 1:
                x = x.index_select(axis, order[0])
            else:
                x = x.gather(axis, order.unsqueeze(3 - axis).expand(x.shape))
        return x

    each = sorted_by(grid.zero) if isinstance(grid.zero, Tensor) else None
    work, ordered = sorted_by(weight), Grid.of(number_format, sorted_by(spread), each)
    del spread, grid  # as large as the weight
    if rows is not None and columns is not None:
        couplings = (moment.feedback[0].expand(len(weight), -1, -1) for moment in (rows, columns))
        codes, residuals = two_sided(work, ordered, *couplings)
        above, across = (moment.feedback[1].expand(len(weight), -1) for moment in (rows, columns))
        losses = (above * (residuals.square_() @ across[:, :, None])[..., 0]).sum(1, dtype=torch.float64)
        return sorted_by(codes, back=True), losses
    if columns is not None:
        codes, losses = one_sided(work.mT.contiguous(), ordered.transposed(), *columns.feedback)
        return sorted_by(codes.mT, back=True), losses
    assert rows is not None
    codes, losses = one_sided(work.clone(memory_format=torch.contiguous_format), ordered, *rows.feedback)
    return sorted_by(codes, back=True), losses


def one_sided(
    work: Tensor, grid: Grid, couplings: Tensor, kept: Tensor, groups: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Round one row after another, with feedback from all previous rows; the columns are independent.

    For feedback between the columns of a weight, `work` is its transpose.

    Args:
        work: matrices with rows in the order of rounding, shape `(stack, n, m)`; they are overwritten by the
            errors.
        grid: the rounding grid; its scales and codes of zero have shape `(stack, n, m)`, or `(stack, groups,
            m)`.
        couplings: strictly upper triangular part of `U`, for the moment `M = U D U^T` of the rows of `work`;
            shape `(stack or 1, n, n)`.
        kept: the diagonal `D`, shape `(stack or 1, n)`.
        groups: for each row, the index of its scales and codes of zero; by default, each row has its own.

    Returns:
        Codes (or levels), shape `(stack, n, m)`, and the diagonal of `E^T M E`, shape `(stack, m)`.
    """
    couplings, kept = (x.expand(len(work), *x.shape[1:]) for x in (couplings, kept))
    size = work.shape[1]
    groups = range(size) if groups is None else groups
    # With a center that is not an integer, and with minima, shift values before they are rounded.
    # Otherwise, round values directly to points, and add the center afterwards.
    whole = 0.0 if isinstance(grid.zero, Tensor) else float(math.floor(grid.zero))
    shifts = grid.zero.unbind(1) if isinstance(grid.zero, Tensor) else None
    half = 0.0 if isinstance(grid.zero, Tensor) else grid.zero - whole
    scales, divisors = grid.scale.unbind(1), grid.divisor.unbind(1)
    codes, losses = torch.empty_like(work), torch.zeros_like(work[:, 0])
    errors, points = work.unbind(1), codes.unbind(1)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        target = work[:, start:stop].clone()
        if start:
            target.baddbmm_(couplings[:, :start, start:stop].mT, work[:, :start])
        targets = target.unbind(1)
        for first in range(start, stop, TILE):
            last = min(first + TILE, stop)
            for k in range(first, last):
                scale, point, t = scales[groups[k]], points[k], targets[k - start]
                torch.div(t, divisors[groups[k]], out=point)
                shift = half if shifts is None else shifts[groups[k]]
                if shifts is not None or half:
                    point.add_(shift)
                grid.points.nearest(point, point, whole)
                if shifts is not None or half:
                    point.sub_(shift)
                errors[k].addcmul_(point, scale, value=-1)
                t.addcmul_(point, scale, value=-1)  # the rounding residual, a row of `U^T E`
                if k + 1 < last:
                    later = target[:, k + 1 - start : last - start]
                    later.addcmul_(couplings[:, k, k + 1 : last, None], errors[k][:, None])
            if last < stop:
                coupling = couplings[:, first:last, last:stop].mT
                target[:, last - start :].baddbmm_(coupling, work[:, first:last])
        losses += (kept[:, None, start:stop] @ target.square_())[:, 0]
    codes += grid.zero[:, list(groups)] if isinstance(grid.zero, Tensor) else grid.zero
    return codes, losses


def two_sided(weight: Tensor, grid: Grid, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Round one antidiagonal after another, with feedback from rows above and columns to the left.

    Args:
        weight: matrices, shape `(stack, out, in)`.
        grid: the rounding grid.
        rows: strictly upper triangular part of `U_R`, shape `(stack, out, out)`.
        columns: strictly upper triangular part of `U_C`, shape `(stack, in, in)`.

    Returns:
        Codes (or levels) in the dtype of the weight, and the rounding residuals `U_R^T E U_C`, both of shape
        `(stack, out, in)`.
    """
    # 1. Pad the matrices to whole tiles, with scales of zero, so that padding has no errors. Reverse the
    # columns.
    stack, m, n = weight.shape
    tall, long = -m % TILE, -n % TILE

    def padded(x: Tensor, down: int = tall, right: int = long) -> Tensor:
        return torch.nn.functional.pad(x, (0, right, 0, down)) if right or down else x

    w, scale = padded(weight).flip(2), padded(grid.scale).flip(2)
    zero = padded(grid.zero).flip(2) if isinstance(grid.zero, Tensor) else grid.zero
    rows, columns = padded(rows, tall, tall), padded(columns, long, long).flip(1, 2)
    size, width = w.shape[1:]
    down, across = size // TILE, width // TILE

    # 2. Stack the tensors that rounding reads (listed at `_ABOVE`), and split the stack into tiles.
    divisor = _without_zeros(scale)
    parts = [torch.zeros_like(w), w, w + scale * zero, scale, divisor]
    planes = torch.stack([*parts, zero] if isinstance(zero, Tensor) else parts)
    del parts, scale, divisor, zero  # each may be as large as the weight
    above, left = planes[_ABOVE], planes[_LEFT]
    by_tile = planes.view(-1, stack, down, TILE, across, TILE)
    row_tiles = rows.view(stack, down, TILE, down, TILE).diagonal(0, 1, 3).permute(2, 1, 0, 3)
    column_tiles = columns.view(stack, across, TILE, across, TILE).diagonal(0, 1, 3).permute(1, 2, 0, 3)
    row_tiles, column_tiles = row_tiles.contiguous(), column_tiles.contiguous()
    solved = torch.empty_like(planes[:3])  # codes, errors `E`, and `half = U_R^T E`
    solved_by_tile = solved.view(3, stack, down, TILE, across, TILE)
    codes, error, half = solved
    buffer = _TileBuffer(grid, w)

    for offset in range(across - 1, -down, -1):  # antidiagonals of tiles; columns are reversed
        # 3. Round all tiles of an antidiagonal together.
        a, b = _diagonal(offset, down, across)
        count = a.stop - a.start
        tiles = buffer.of_size(count * stack)
        values = tiles.values.narrow(-1, 0, count * stack).unflatten(-1, (stack, count))
        values[: len(planes)] = by_tile.diagonal(offset, 2, 4).permute(0, 2, 3, 1, 4)
        values[-2], values[-1] = row_tiles[..., a], column_tiles[..., b]
        _round_tiles(tiles, grid)
        solved_by_tile.diagonal(offset, 2, 4).copy_(values[-5:-2].permute(0, 3, 1, 2, 4))
        by_tile[_LEFT].diagonal(offset, 1, 3).copy_(values[_LEFT].permute(2, 0, 1, 3))

        # 4. Feed the errors of these tiles back to the tiles below, and their `half` to the tiles on the
        # left. Tiles of other blocks get the feedback of a whole block in one product.
        for i, j in zip(range(a.start, a.stop), range(b.start, b.stop), strict=True):
            r, c = slice(i * TILE, (i + 1) * TILE), slice(j * TILE, (j + 1) * TILE)
            start = r.start - r.start % BLOCK
            stop = min(start + BLOCK, size)
            if r.stop < stop:
                above[:, r.stop : stop, c].baddbmm_(rows[:, r, r.stop : stop].mT, error[:, r, c])
            elif stop < size:
                above[:, stop:, c].baddbmm_(rows[:, start:stop, stop:].mT, error[:, start:stop, c])
            end = width - (width - c.stop) // BLOCK * BLOCK  # the first block is at the right edge
            begin = max(end - BLOCK, 0)
            if c.start > begin:
                left[:, r, begin : c.start].baddbmm_(half[:, r, c], columns[:, c, begin : c.start])
            elif begin:
                left[:, r, :begin].baddbmm_(half[:, r, begin:end], columns[:, begin:end, :begin])
    residuals = half.add_(left).sub_(w)
    return codes.flip(2)[:, :m, :n], residuals.flip(2)[:, :m, :n]


#: Positions of three inputs of each tile. The inputs are, in this order: feedback from above; weights plus
#: feedback from the left; `weight + scale * zero`; scales; divisors; codes of zero, unless they are one
#: number.
_ABOVE, _LEFT, _ZERO = 0, 1, 5


def _diagonal(offset: int, rows: int, columns: int) -> tuple[slice, slice]:
    """Return slices of the row and column indices of a diagonal of a matrix `(rows, columns)`."""
    start, stop = max(0, -offset), min(rows, columns - offset)
    return slice(start, stop), slice(start + offset, stop + offset)


class _Step(NamedTuple):
    """Views of the elements on one antidiagonal of a stack of tiles, and of the elements that it affects.

    The views of the antidiagonal have shape `(elements, stack)`.
    """

    above: Tensor
    target: Tensor
    weight: Tensor
    scale: Tensor
    divisor: Tensor
    zero: Tensor
    code: Tensor
    error: Tensor
    half: Tensor
    #: Views of the rows below, and of the columns that are rounded later, each followed by its feedback
    #: coefficients.
    below: Tensor
    row_couplings: Tensor
    further: Tensor
    column_couplings: Tensor


@dataclass(frozen=True)
class _Tiles:
    """Data of a stack of tiles, shape `(planes, TILE, TILE, stack)`, and views of their antidiagonals.

    The planes are the inputs (see `_ABOVE`), the results (codes, errors and `half`), and the feedback
    coefficients between rows (transposed) and between columns.
    """

    values: Tensor
    steps: list[_Step]


class _TileBuffer:
    """Memory for stacks of tiles, with cached views of the antidiagonals.

    The tile index is the last one, so that the same element of all tiles is contiguous in memory.

    Args:
        grid: the rounding grid.
        like: tensor with the dtype and device to use.
    """

    def __init__(self, grid: Grid, like: Tensor) -> None:
        self.zero = grid.zero
        self.storage = like.new_empty(0)
        self._known: dict[int, _Tiles] = {}

    def of_size(self, count: int) -> _Tiles:
        """Return memory for `count` tiles, rounded up to a few more, so that cached views can be reused."""
        unit = max(8, 1 << max(count.bit_length() - 3, 0))
        count += -count % unit
        if count not in self._known:
            planes = 10 + isinstance(self.zero, Tensor)
            needed = planes * TILE * TILE * count
            if needed > len(self.storage):
                self.storage = self.storage.new_ones(needed)
                self._known.clear()
            values = self.storage[:needed].view(planes, TILE, TILE, count)
            steps = [self._step(values, offset) for offset in range(TILE - 1, -TILE, -1)]
            self._known[count] = _Tiles(values, steps)
        return self._known[count]

    def _step(self, values: Tensor, offset: int) -> _Step:
        a, c = _diagonal(offset, TILE, TILE)
        rows, columns = values[-2:].unbind()
        views = [x.mT for x in values[:-2].diagonal(offset, 1, 2).unbind()]
        if not isinstance(self.zero, Tensor):
            views.insert(_ZERO, values.new_tensor(self.zero))
        below, further = slice(a.start + 1, None), slice(c.stop - 1)
        targets = values[_ABOVE][below, c], rows[below, a], values[_LEFT][a, further], columns[c, further]
        return _Step._make([*views, *targets])


def _round_tiles(tiles: _Tiles, grid: Grid) -> None:
    for x in tiles.steps:
        grid.points.nearest(torch.addcdiv(x.zero, x.target + x.above, x.divisor), out=x.code)
        torch.addcmul(x.weight, x.code, x.scale, value=-1, out=x.error)
        torch.add(x.error, x.above, out=x.half)
        x.below.addcmul_(x.row_couplings, x.error)
        x.further.addcmul_(x.column_couplings, x.half[:, None])
