"""Rounding with error feedback along one side or both, blocked and batched over stacks.

With `M = U D U^T` for both second moments (`U` unit upper triangular) the loss increase of an error
`E = W - Q` is

    1/2 tr(R E C E^T) = 1/2 || D_R^1/2 (U_R^T E U_C) D_C^1/2 ||_F^2.

Going from the first row and column to the last, every element is rounded after the errors of all elements
before it have been added to it, as `U_R^T E U_C` prescribes. What stays in the norm is the bare rounding
residual of each element. With `U_R = 1` this is GPTQ, also known as LDLQ.

To explain how the two-sided loop works: element `(i, j)` depends on all elements above and to the left. So
tiles on one antidiagonal of the matrix are independent of each other, and so are elements on one antidiagonal
of a tile. Tiles collect the feedback of all tiles before them by batched matrix products. Within a tile whole
antidiagonals are rounded at once, and each sends its errors on to the later ones. Tiles are kept skewed, with
element `(i, j)` in row `i + j`, which makes an antidiagonal one contiguous row. Matrices larger than a block
are rounded block by block in the same order.

Reference:
    Frantar et al. 2023, "GPTQ"; Chee et al. 2023, "QuIP" (LDLQ); Tseng et al. 2025, "Model-preserving
    adaptive rounding" (YAQA, both sides).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements a side of a tile; within it antidiagonals are rounded one after another.
TILE = 32
#: Columns of a block in the one-sided loop; blocks exchange feedback by matrix products.
BLOCK = 128
#: Largest side of a block in the two-sided loop. One block needs fewest steps, several fewer products.
LARGEST_BLOCK = 2048


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

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, long, 0, tall))

    w, scale = pad(weight), pad(grid.scale)
    zero = pad(grid.zero) if isinstance(grid.zero, Tensor) else grid.zero
    rows = torch.nn.functional.pad(rows, (0, tall, 0, tall))
    columns = torch.nn.functional.pad(columns, (0, long, 0, long))
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
    return codes[:, :m, :n]


def _block_size(size: int) -> int:
    """Divide a side into equal blocks, as few as their largest size allows, of whole tiles."""
    each = -(-size // -(-size // LARGEST_BLOCK))
    return each + -each % TILE


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

    def tiles(x: Tensor) -> Tensor:
        # shape: (count, down, across, TILE, TILE), from right to left: antidiagonals become diagonals
        return x.reshape(count, down, TILE, across, TILE).transpose(2, 3).flip(2)

    above, base = tiles(given.above), tiles(given.weight + given.left)
    elements = _elements(*(None if x is None else tiles(x) for x in (given.weight, given.scale, given.zero)))
    codes = torch.empty_like(base)
    error = base.new_zeros(count, across, high, TILE)  # columns of tiles, from right to left
    half = base.new_zeros(count, down, TILE, wide)  # rows of tiles
    row_panels = given.rows.mT.reshape(count, down, TILE, high)
    column_panels = given.columns.reshape(count, wide, across, TILE).transpose(1, 2).flip(1)
    row_steps, column_steps = _row_couplings(given.rows), _column_couplings(given.columns)
    for diagonal in range(down + across - 1):
        first, last = max(0, diagonal - across + 1), min(down, diagonal + 1)
        shift = across - 1 - diagonal
        a, b = slice(first, last), slice(first + shift, last + shift)
        known = (last - 1) * TILE, (diagonal - first) * TILE  # rows above, columns to the left
        extra = row_panels[:, a, :, : known[0]] @ error[:, b, : known[0]]
        left = half[:, a, :, : known[1]] @ column_panels[:, b, : known[1]]
        tile = _TileInput(
            elements[:, :, :, a, b].diagonal(0, 3, 4).movedim(-1, 3).flatten(2, 3).contiguous(),
            (_diagonal(above[:, a, b]) + extra).flatten(0, 1),
            (_diagonal(base[:, a, b]) + left).flatten(0, 1),
            row_steps[:, :, a].flatten(1, 2),
            column_steps[:, :, b].flatten(1, 2),
        )
        q, e, g = (x.unflatten(0, (count, -1)) for x in _round_tiles(tile, grid))
        for k, i in enumerate(range(first, last)):
            row, column = (
                slice(i * TILE, (i + 1) * TILE),
                slice((diagonal - i) * TILE, (diagonal - i + 1) * TILE),
            )
            codes[:, i, i + shift], error[:, i + shift, row], half[:, i, :, column] = (
                q[:, k],
                e[:, k],
                g[:, k],
            )
    whole = (codes.flip(2).transpose(2, 3), error.flip(1).transpose(1, 2), half)
    done = [x.reshape(count, high, wide) for x in whole]
    return done[0], done[1], done[2]


def _diagonal(tiles: Tensor) -> Tensor:
    """Select the tiles on the diagonal of a square of tiles, shape `(count, tiles, TILE, TILE)`."""
    return tiles.diagonal(0, 1, 2).movedim(-1, 1)


def _elements(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Skew weights, scales, divisors and zeros, shape `(3 or 4, steps, count, down, across, TILE)`."""
    scales = _skewed(scale)
    found = [_skewed(weight), scales, Grid(scales, 0.0, 0).divisor]
    if zero is not None:
        found.append(_skewed(zero))
    return torch.stack(found).movedim(-1, 1)


def _skewed(x: Tensor) -> Tensor:
    """Move element `(i, j)` of square tiles to `(i, i + j)`; the rest is zero."""
    size = x.shape[-1]
    flat = torch.nn.functional.pad(x, (0, size)).flatten(-2)
    return flat[..., :-size].unflatten(-1, (size, 2 * size - 1))


def _straight(x: Tensor) -> Tensor:
    """Undo `_skewed`."""
    size = x.shape[-2]
    return torch.nn.functional.pad(x.flatten(-2), (0, size)).unflatten(-1, (size, 2 * size))[..., :size]


def _bands(couplings: Tensor) -> Tensor:
    """Read `U_{k, k + d}` off the diagonal tiles of `U`, zero outside of them.

    Returns:
        Shape `(TILE - 1, count, tiles, TILE)`, by `d - 1` and `k`.
    """
    starts = range(0, couplings.shape[1], TILE)
    tiles = torch.stack([couplings[:, k : k + TILE, k : k + TILE] for k in starts], 1)
    flat = torch.nn.functional.pad(tiles, (0, TILE)).flatten(-2)
    found = torch.nn.functional.pad(flat, (0, TILE)).unflatten(-1, (TILE, 2 * TILE + 1))
    return found[..., 1:TILE].movedim(-1, 0)


def _row_couplings(rows: Tensor) -> Tensor:
    """Arrange the couplings of rows by distance, shape `(TILE - 1, count, down, TILE)`."""
    return _bands(rows).contiguous()


def _column_couplings(columns: Tensor) -> Tensor:
    """Arrange the couplings of columns by distance, shape `(TILE - 1, count, across, 3 * TILE - 2)`.

    Columns run backwards, as they do along an antidiagonal: step `t` reads `TILE` of them from
    `2 * TILE - 2 - t` on.
    """
    return torch.nn.functional.pad(_bands(columns).flip(2, 3), (TILE - 1, TILE - 1)).contiguous()


@dataclass(frozen=True)
class _TileInput:
    """Stack of tiles that are rounded together, with the feedback from all tiles before them.

    Args:
        elements: weight, scale, divisor and, unless it is one number, zero, by antidiagonals and rows, shape
            `(3 or 4, 2 * TILE - 1, tiles, TILE)`.
        above: `F`, feedback from the rows of tiles above, shape `(tiles, TILE, TILE)`.
        left: weight and feedback from the columns of tiles to the left, likewise.
        rows: couplings of rows, shape `(TILE - 1, tiles, TILE)`.
        columns: couplings of columns, shape `(TILE - 1, tiles, 3 * TILE - 2)`.
    """

    elements: Tensor
    above: Tensor
    left: Tensor
    rows: Tensor
    columns: Tensor


def _round_tiles(tile: _TileInput, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round a stack of tiles, one antidiagonal a step; each sends its errors on to all later ones."""
    count, size = tile.above.shape[:2]
    steps = 2 * size - 1
    # Errors leave the tile at its end and its bottom: there is room for them that nobody reads.
    down = tile.above.new_zeros(steps + size, count, 2 * size)
    down[:steps, :, :size] = _skewed(tile.above).movedim(-1, 0)
    across = tile.left.new_zeros(steps + size, count, size)
    across[:steps] = _skewed(tile.left).movedim(-1, 0)
    weights, scales, divisors, *zeros = (x.unbind() for x in tile.elements)
    found = tile.above.new_empty(3, steps, count, size)
    codes, errors, halves = (x.unbind() for x in found)
    strides = (2 * size * count + 1, 2 * size, 1)  # one step later and one row further down
    for t in range(steps):
        z = zeros[0][t] if zeros else grid.zero
        target = torch.add(across[t], down[t, :, :size]).div_(divisors[t]).add_(z).round_()
        code = torch.clamp(target, 0, grid.top, out=codes[t])
        error = torch.addcmul(weights[t], code - z, scales[t], value=-1, out=errors[t])
        half = torch.add(error, down[t, :, :size], out=halves[t])
        later = down.as_strided((size - 1, count, size), strides, (t + 1) * strides[0] - t)
        later.addcmul_(tile.rows, error)
        start = steps - 1 - t
        across[t + 1 : t + size].addcmul_(tile.columns[:, :, start : start + size], half)
    done = [_straight(x.movedim(0, -1)) for x in found]
    return done[0], done[1], done[2]
