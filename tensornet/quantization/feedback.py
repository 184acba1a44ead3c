"""Rounding with error feedback along one side or both, blocked and batched over stacks.

With `M = U D U^T` for both second moments (`U` unit upper triangular) the loss increase of an error
`E = W - Q` is

    1/2 tr(R E C E^T) = 1/2 || D_R^1/2 (U_R^T E U_C) D_C^1/2 ||_F^2.

Going from the first row and column to the last, every element is rounded after the errors of all elements
before it have been added to it, as `U_R^T E U_C` prescribes. What stays in the norm is the bare rounding
residual of each element. With `U_R = 1` this is GPTQ, also known as LDLQ.

To explain how the two-sided loop works: element `(i, j)` depends on all elements above and to the left. So
blocks on one antidiagonal are independent of each other, tiles on one antidiagonal of a block are, and so are
elements on one antidiagonal of a tile. Blocks exchange feedback by large matrix products, tiles by batched
small ones, and within a tile whole antidiagonals are rounded at once. Columns of a block are kept in reverse
order, which makes its antidiagonals diagonals, so that torch has them as views.

Each of these steps is small, so that calls cost as much as arithmetic: tiles of all blocks are rounded
together, in one buffer whose views are made once.

Reference:
    Frantar et al. 2023, "GPTQ"; Chee et al. 2023, "QuIP" (LDLQ); Tseng et al. 2025, "Model-preserving
    adaptive rounding" (YAQA, both sides).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tensornet.quantization.moments import Moment

#: Elements a side of a tile; within it antidiagonals are rounded one after another.
TILE = 32
#: Elements a side of a block; blocks exchange feedback by matrix products.
BLOCK = 128


@dataclass(frozen=True)
class Grid:
    """Rounding grid `scale * (code - zero)` of every element, with `code` from 0 to `top`.

    Args:
        scale: of every element, shape `(stack, out, in)`; where it is zero, zero is the only point.
        zero: of every element, or one number for all.
        top: largest code.
    """

    scale: Tensor
    zero: Tensor | float
    top: int

    def codes(self, target: Tensor) -> Tensor:
        """Compute the nearest codes, as floating-point numbers, of targets with the shape of the scales."""
        return _round(target, self.divisor, self.zero, self.top)

    @property
    def divisor(self) -> Tensor:
        """Scales with zeros replaced by ones."""
        return torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)

    def transposed(self) -> "Grid":
        """Transpose the grid."""
        zero = self.zero.mT if isinstance(self.zero, Tensor) else self.zero
        return Grid(self.scale.mT, zero, self.top)

    def points(self, codes: Tensor) -> Tensor:
        """Convert codes to values."""
        return (codes - self.zero) * self.scale


def _round(target: Tensor, divisor: Tensor, zero: Tensor | float, top: int) -> Tensor:
    return (target / divisor).add_(zero).round_().clamp_(0, top)


def round_with_feedback(weight: Tensor, grid: Grid, rows: Moment | None, columns: Moment | None) -> Tensor:
    """Round a stack of matrices with feedback along the sides whose moments are given, both full.

    Args:
        weight: shape `(stack, out, in)`.
        grid: points to round to.
        rows: moment of the gradients; None rounds rows independently.
        columns: moment of the inputs; None rounds columns independently.

    Returns:
        Codes in the dtype of the weight, shape `(stack, out, in)`.
    """
    if rows is None and columns is None:
        return grid.codes(weight)
    orders = [(moment.order, axis) for moment, axis in ((rows, 1), (columns, 2)) if moment is not None]

    def sorted_by(x: Tensor, *, back: bool = False) -> Tensor:
        """Sort rows and columns by the order of rounding, or undo it."""
        for order, axis in orders:
            order = order.argsort(1) if back else order
            if len(order) == 1:
                x = x.index_select(axis, order[0])
            else:
                x = x.gather(axis, order.unsqueeze(3 - axis).expand(x.shape))
        return x

    zero = sorted_by(grid.zero) if isinstance(grid.zero, Tensor) else grid.zero
    work, points = sorted_by(weight), Grid(sorted_by(grid.scale), zero, grid.top)
    couplings = [
        None if moment is None else moment.feedback[0].expand(len(weight), -1, -1)
        for moment in (rows, columns)
    ]
    if couplings[0] is not None and couplings[1] is not None:
        codes = two_sided(work, points, couplings[0], couplings[1])
    elif couplings[1] is not None:
        codes = one_sided(work, points, couplings[1])
    else:
        assert couplings[0] is not None
        codes = one_sided(work.mT, points.transposed(), couplings[0]).mT
    return sorted_by(codes, back=True)


def one_sided(weight: Tensor, grid: Grid, columns: Tensor) -> Tensor:
    """Round one column after another with feedback, all rows at once.

    Args:
        weight: shape `(stack, out, in)`.
        grid: points to round to.
        columns: `U_C` less its diagonal, strictly upper triangular, shape `(stack, in, in)`.

    Returns:
        Codes in the dtype of the weight, shape `(stack, out, in)`.
    """
    size = weight.shape[2]
    work, scale = weight.mT.contiguous(), grid.scale.mT.contiguous()  # a column lies in one piece
    divisor = Grid(scale, 0.0, 0).divisor
    zero = grid.zero.mT.contiguous() if isinstance(grid.zero, Tensor) else None
    codes, error = torch.empty_like(work), torch.zeros_like(work)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        target = work[:, start:stop].clone()
        if start:
            target.baddbmm_(columns[:, :start, start:stop].mT, error[:, :start])
        for first in range(start, stop, TILE):
            last = min(first + TILE, stop)
            for k in range(first, last):
                z = grid.zero if zero is None else zero[:, k]
                code = _round(target[:, k - start], divisor[:, k], z, grid.top)
                codes[:, k] = code
                e = torch.sub(work[:, k], (code - z).mul_(scale[:, k]), out=error[:, k])
                if k + 1 < last:
                    coupling = columns[:, k, k + 1 : last, None]
                    target[:, k + 1 - start : last - start].addcmul_(coupling, e[:, None])
            if last < stop:
                coupling = columns[:, first:last, last:stop].mT
                target[:, last - start :].baddbmm_(coupling, error[:, first:last])
    return codes.mT


def two_sided(weight: Tensor, grid: Grid, rows: Tensor, columns: Tensor) -> Tensor:
    """Round one antidiagonal after another, with feedback from rows above and columns to the left.

    Args:
        weight: shape `(stack, out, in)`.
        grid: points to round to.
        rows: `U_R` less its diagonal, strictly upper triangular, shape `(stack, out, out)`.
        columns: `U_C` less its diagonal, shape `(stack, in, in)`.

    Returns:
        Codes in the dtype of the weight, shape `(stack, out, in)`.
    """
    m, n = weight.shape[1:]
    high, wide = _block_size(m), _block_size(n)
    tall, long = -m % high, -n % wide  # padding: zero scales keep its errors at zero

    def pad(x: Tensor) -> Tensor:
        return _mirrored(torch.nn.functional.pad(x, (0, long, 0, tall)), wide)

    w, scale = pad(weight), pad(grid.scale)
    zero = pad(grid.zero) if isinstance(grid.zero, Tensor) else grid.zero
    rows = torch.nn.functional.pad(rows, (0, tall, 0, tall))
    columns = torch.nn.functional.pad(columns, (0, long, 0, long))
    columns = _mirrored(_mirrored(columns, wide).mT, wide).mT
    above, left, codes = torch.zeros_like(w), w.clone(), torch.empty_like(w)
    down, across = w.shape[1] // high, w.shape[2] // wide
    tiles = _TileBuffer(grid, w)
    for diagonal in range(down + across - 1):
        places = [
            (slice(i * high, (i + 1) * high), slice((diagonal - i) * wide, (diagonal - i + 1) * wide))
            for i in range(max(0, diagonal - across + 1), min(down, diagonal + 1))
        ]
        parts = [
            _BlockInput(
                w[:, r, c],
                scale[:, r, c],
                zero[:, r, c] if isinstance(zero, Tensor) else None,
                above[:, r, c],
                left[:, r, c],
                rows[:, r, r],
                columns[:, c, c],
            )
            for r, c in places
        ]
        solved = _round_blocks(_joined(parts), tiles).transpose(1, 2)
        for (r, c), (q, e, g) in zip(places, solved.split(len(w), 1), strict=True):
            codes[:, r, c] = q
            # A thin product added to all blocks below is a third faster than collecting from all above.
            above[:, r.stop :, c].baddbmm_(rows[:, r, r.stop :].mT, e)
            left[:, r, c.stop :].baddbmm_(g, columns[:, c, c.stop :])
    return _mirrored(codes, wide)[:, :m, :n]  # reversing blocks twice changes nothing


def _mirrored(x: Tensor, width: int) -> Tensor:
    """Reverse the columns of every block of columns."""
    return x.unflatten(-1, (-1, width)).flip(-1).flatten(-2)


def _block_size(size: int) -> int:
    return min(BLOCK, size + -size % TILE)


@dataclass(frozen=True)
class _BlockInput:
    """Stack of blocks that are rounded together, with the feedback from blocks already rounded.

    Args:
        weight: elements to round.
        scale: of their grid.
        zero: of their grid, None if it is one number.
        above: `F`, feedback from the rows of blocks above.
        left: weight with the feedback from the columns of blocks to the left.
        rows: couplings of the rows of the block with each other.
        columns: couplings of its columns.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    above: Tensor
    left: Tensor
    rows: Tensor
    columns: Tensor


def _joined(parts: list[_BlockInput]) -> _BlockInput:
    """Join several stacks of blocks, the row of a block before its place in the stack."""
    names = ("weight", "scale", "above", "left", "rows", "columns")
    zeros = [p.zero for p in parts if p.zero is not None]
    return _BlockInput(
        zero=torch.cat(zeros).transpose(0, 1) if zeros else None,
        **{name: torch.cat([getattr(p, name).transpose(0, 1) for p in parts], 1) for name in names},
    )


def _round_blocks(given: _BlockInput, tiles: "_TileBuffer") -> Tensor:
    """Round joined blocks, antidiagonals of tiles one after another.

    Returns:
        Codes, errors `E` and half-coupled errors `U_R^T E`, shape `(3, high, count, wide)`.
    """
    high, count, wide = given.weight.shape
    down, across = high // TILE, wide // TILE
    split = (down, TILE, count, across, TILE)
    planes = tiles.planes(given).view(-1, *split)
    solved = planes.new_zeros(3, *split)
    row_panels = given.rows.view(high, count, down, TILE).permute(2, 1, 3, 0)
    column_panels = given.columns.view(wide, count, across, TILE).permute(2, 1, 0, 3)
    row_tiles = torch.stack([row_panels[k, ..., k * TILE : (k + 1) * TILE] for k in range(down)])
    column_tiles = torch.stack([column_panels[k, :, k * TILE : (k + 1) * TILE] for k in range(across)])
    error = solved[1].view(high, count, across, TILE).permute(2, 1, 0, 3)
    half = solved[2].view(down, TILE, count, wide).transpose(1, 2)
    for offset in range(across - 1, -down, -1):  # of the antidiagonal of tiles, whose columns are reversed
        a, b = _diagonal(offset, down, across)
        tile = tiles.of_size((a.stop - a.start) * count)
        size = (TILE, TILE, a.stop - a.start, count)
        stack = tile.values.narrow(-1, 0, size[2] * count).unflatten(-1, size[2:])
        here = planes.diagonal(offset, 1, 4)  # shape: (planes, TILE, count, TILE, tiles)
        if offset < across - 1:
            here[_ABOVE] += (row_panels[a] @ error[b]).permute(2, 1, 3, 0)
            here[_LEFT] += (half[a] @ column_panels[b]).permute(2, 1, 3, 0)
        stack[: len(planes)] = here.permute(0, 1, 3, 4, 2)
        stack[-2] = row_tiles[a].permute(2, 3, 0, 1)
        stack[-1] = column_tiles[b].permute(2, 3, 0, 1)
        _round_tiles(tile, tiles.top)
        solved.diagonal(offset, 1, 4).copy_(stack[-5:-2].permute(0, 1, 4, 2, 3))
    return solved.view(3, high, count, wide)


#: Planes of a stack of blocks: feedback from above; weights with the feedback from the left; weights from
#: which `code * scale` is subtracted; scales; divisors; and, where they differ by element, zeros.
_ABOVE, _LEFT, _ZERO = 0, 1, 5


def _diagonal(offset: int, rows: int, columns: int) -> tuple[slice, slice]:
    """Find the rows and the columns of a diagonal of a matrix."""
    start, stop = max(0, -offset), min(rows, columns - offset)
    return slice(start, stop), slice(start + offset, stop + offset)


class _Step(NamedTuple):
    """Views of one antidiagonal of a stack of tiles, shape `(elements, stack)` each, and what it acts on."""

    above: Tensor
    target: Tensor
    weight: Tensor
    scale: Tensor
    divisor: Tensor
    zero: Tensor
    code: Tensor
    error: Tensor
    half: Tensor
    #: Feedback of the rows below, and of the columns before (they are reversed), with their couplings.
    below: Tensor
    row_couplings: Tensor
    further: Tensor
    column_couplings: Tensor


@dataclass(frozen=True)
class _Tiles:
    """Planes of a stack of tiles, shape `(planes, TILE, TILE, stack)`, and views of their antidiagonals.

    The first planes are those of the blocks. Three that rounding writes follow, of codes, errors and
    half-coupled errors, and two with the couplings of the rows (transposed) and of the columns.
    """

    values: Tensor
    steps: list[_Step]


class _TileBuffer:
    """Memory for stacks of tiles, and the views of it, which take longer to make than to use.

    The place in the stack runs fastest: elements of an antidiagonal do not lie side by side, but those of
    different tiles do.

    Args:
        grid: for the largest code and the zero that all elements share.
        like: tensor of the dtype and the device.
    """

    def __init__(self, grid: Grid, like: Tensor) -> None:
        self.top = grid.top
        self.zero = grid.zero
        self.storage = like.new_empty(0)
        self._known: dict[int, _Tiles] = {}

    def planes(self, given: _BlockInput) -> Tensor:
        """Stack the tensors that rounding the elements of a block reads."""
        zero = self.zero if given.zero is None else given.zero
        divisor = Grid(given.scale, 0.0, 0).divisor
        planes = [given.above, given.left, given.weight + given.scale * zero, given.scale, divisor]
        return torch.stack(planes if given.zero is None else [*planes, given.zero])

    def of_size(self, count: int) -> _Tiles:
        """Return room for a number of tiles, rounded up, so that few sizes occur."""
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


def _round_tiles(tiles: _Tiles, top: int) -> None:
    """Round a stack of tiles in place, one antidiagonal after another."""
    for x in tiles.steps:
        nearest = torch.addcdiv(x.zero, x.target + x.above, x.divisor).round_()
        torch.clamp(nearest, 0, top, out=x.code)
        torch.addcmul(x.weight, x.code, x.scale, value=-1, out=x.error)
        torch.add(x.error, x.above, out=x.half)
        x.below.addcmul_(x.row_couplings, x.error)
        x.further.addcmul_(x.column_couplings, x.half[:, None])
