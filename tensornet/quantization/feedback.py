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

Reference:
    Frantar et al. 2023, "GPTQ"; Chee et al. 2023, "QuIP" (LDLQ); Tseng et al. 2025, "Model-preserving
    adaptive rounding" (YAQA, both sides).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    mirror = torch.arange(n + long, device=weight.device).reshape(-1, wide).flip(1).flatten()

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, long, 0, tall))[..., mirror]

    w, scale = pad(weight), pad(grid.scale)
    zero = pad(grid.zero) if isinstance(grid.zero, Tensor) else grid.zero
    rows = torch.nn.functional.pad(rows, (0, tall, 0, tall))
    columns = torch.nn.functional.pad(columns, (0, long, 0, long))[:, mirror][..., mirror]
    error, half, codes = torch.zeros_like(w), torch.zeros_like(w), torch.empty_like(w)
    down, across = w.shape[1] // high, w.shape[2] // wide
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
                rows[:, : r.start, r].mT @ error[:, : r.start, c],
                half[:, r, : c.start] @ columns[:, : c.start, c],
                rows[:, r, r],
                columns[:, c, c],
            )
            for r, c in places
        ]
        solved = _round_blocks(_joined(parts), grid)
        for (r, c), q, e, g in zip(places, *(x.split(len(w)) for x in solved), strict=True):
            codes[:, r, c], error[:, r, c], half[:, r, c] = q, e, g
    return codes[..., mirror][:, :m, :n]  # reversing blocks twice changes nothing


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
        left: feedback from the columns of blocks to the left.
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
    """Concatenate several stacks of blocks."""
    names = ("weight", "scale", "above", "left", "rows", "columns")
    zeros = [p.zero for p in parts if p.zero is not None]
    return _BlockInput(
        zero=torch.cat(zeros) if zeros else None,
        **{name: torch.cat([getattr(p, name) for p in parts]) for name in names},
    )


def _round_blocks(given: _BlockInput, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round a stack of blocks; return codes, errors `E` and half-coupled errors `U_R^T E`."""
    count, high, wide = given.weight.shape
    down, across = high // TILE, wide // TILE

    def tiles(x: Tensor) -> Tensor:  # shape: (count, down, across, TILE, TILE)
        return x.reshape(count, down, TILE, across, TILE).transpose(2, 3)

    weight, scale, above = tiles(given.weight), tiles(given.scale), tiles(given.above)
    base = tiles(given.weight + given.above + given.left)
    zero = None if given.zero is None else tiles(given.zero)
    codes = torch.empty_like(base)
    error = base.new_zeros(count, across, high, TILE)  # columns of tiles
    half = base.new_zeros(count, down, TILE, wide)  # rows of tiles
    row_panels = given.rows.mT.reshape(count, down, TILE, high)
    column_panels = given.columns.reshape(count, wide, across, TILE).transpose(1, 2)
    row_tiles = torch.stack([given.rows.mT[:, k : k + TILE, k : k + TILE] for k in range(0, high, TILE)], 1)
    column_tiles = torch.stack(
        [given.columns.mT[:, k : k + TILE, k : k + TILE] for k in range(0, wide, TILE)], 1
    )
    for diagonal in range(down + across - 1):
        i = torch.arange(max(0, diagonal - across + 1), min(down, diagonal + 1), device=base.device)
        first, last = int(i[0]), int(i[-1]) + 1
        j = i + across - 1 - diagonal  # reversed
        a, b = slice(first, last), slice(int(j[0]), int(j[-1]) + 1)
        extra = row_panels[:, a] @ error[:, b]
        f = above[:, i, j] + extra
        t = (base[:, i, j] + extra).add_(half[:, a] @ column_panels[:, b])
        z = None if zero is None else _flat(zero[:, i, j])
        tile = _BlockInput(
            weight=_flat(weight[:, i, j]),
            scale=_flat(scale[:, i, j]),
            zero=z,
            above=_flat(f),
            left=_flat(t),
            rows=_flat(row_tiles[:, a]),
            columns=_flat(column_tiles[:, b]),
        )
        q, e, g = (x.reshape(count, -1, TILE, TILE) for x in _round_tiles(tile, grid))
        codes[:, i, j] = q
        for k in range(last - first):
            error[:, b.start + k, (first + k) * TILE : (first + k + 1) * TILE] = e[:, k]
            half[:, first + k, :, (b.start + k) * TILE : (b.start + k + 1) * TILE] = g[:, k]
    whole = (codes.transpose(2, 3), error.transpose(1, 2), half)
    done = [x.reshape(count, high, wide) for x in whole]
    return done[0], done[1], done[2]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def _round_tiles(tile: _BlockInput, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round a stack of tiles; `tile.left` holds the targets with all feedback from outside the tile."""
    size = tile.weight.shape[-1]
    divisors = Grid(tile.scale, 0.0, 0).divisor
    given = torch.stack([tile.weight, tile.scale, divisors, tile.above, tile.left])
    codes = torch.empty_like(tile.left)
    error = torch.zeros_like(tile.left)  # transposed: a row of it is a column of the tile
    half = torch.zeros_like(tile.left)
    for step in range(2 * size - 1):
        offset = size - 1 - step
        a = slice(max(0, -offset), size - max(0, offset))
        c = slice(a.start + offset, a.stop + offset)
        weight, scale, divisor, above, target = given.diagonal(offset, 2, 3).unbind()
        z = grid.zero if tile.zero is None else tile.zero.diagonal(offset, 1, 2)
        down = (error[:, c] * tile.rows[:, a]).sum(2)
        across = (half[:, a] * tile.columns[:, c]).sum(2)
        code = _round(across.add_(down).add_(target), divisor, z, grid.top)
        codes.diagonal(offset, 1, 2).copy_(code)
        e = torch.addcmul(weight, code.sub_(z), scale, value=-1)
        error.diagonal(-offset, 1, 2).copy_(e)
        half.diagonal(offset, 1, 2).copy_(e.add_(above).add_(down))
    return codes, error.mT, half
