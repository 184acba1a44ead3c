"""Rounding with error feedback to formats with a codebook, in which a run of 8 codes is chosen at once.

Let `M = U D U^T` for both second moments, as in `feedback`. The blocks `U_b` and `D_b` of a run on the
diagonals of the factors of `C` measure the rounding residual of the run: its codes `q` make
`|(t - q) U_b D_b^1/2|^2` small for the target `t = w + f U_b^-1`, where `f` is the feedback of the errors of
previous columns.

In two-sided rounding, the errors of previous rows are added to `w`, too. A run depends on the runs above and
to the left of it, so all runs on one antidiagonal of a tile are rounded at once, and so are all tiles on one
antidiagonal of the matrix. Tiles exchange feedback by matrix products. Within a tile, row `i` of the run `j`
is stored at `i + j`, so that an antidiagonal is contiguous in memory.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from tensornet.quantization.codebooks import RUN, Codebook
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.moments import Moment

#: Number of rows and columns of a tile, and number of runs in a row of a tile.
TILE = 32
RUNS = TILE // RUN
#: Number of rows and columns of a block of tiles; feedback to other blocks is one product per block.
BLOCK = 128


def one_sided_by_run(
    weight: Tensor, scales: Tensor, number_format: NumberFormat, columns: Moment
) -> tuple[Tensor, Tensor]:
    """Round one run of a codebook after another, with feedback from all previous columns.

    Args:
        weight: matrices, shape `(stack, out, in)`.
        scales: scales of all groups, shape `(stack, out, groups)`.
        number_format: format with a codebook.
        columns: full moment of the inputs, which keeps the columns of a run together (`Moment.in_runs`).

    Returns:
        Levels, shape `(stack, out, in)`, and the diagonal of `E C E^T`, shape `(stack, out)`.
    """
    book, (stack, out, size) = number_format.points, weight.shape
    assert isinstance(book, Codebook)
    assert columns.run == RUN
    couplings, factors = (x.expand(stack, *x.shape[1:]) for x in columns.feedback_between_runs)
    # 1. Sort the columns, and transpose the matrices, so that each step reads contiguous memory.
    places = columns.order.expand(stack, -1)
    work = weight.mT.gather(1, places[..., None].expand(-1, -1, out))
    groups = places[:, ::RUN] // (number_format.group or size)
    scale = scales.to(weight.dtype).mT.gather(1, groups[..., None].expand(-1, -1, out))
    divisor = torch.where(scale == 0, 1.0, scale)
    levels, losses = torch.empty_like(work), torch.zeros_like(work[:, 0])
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        target = work[:, start:stop].clone()
        if start:
            target.baddbmm_(couplings[:, :start, start:stop].mT, work[:, :start])
        for first in range(start, stop, TILE):
            last = min(first + TILE, stop)
            for k in range(first, last, RUN):
                # 2. Choose the codes of one run in all rows.
                part, b = slice(k, k + RUN), k // RUN
                aim = (target[:, k - start : k - start + RUN] / divisor[:, b, None]).mT.contiguous()
                found = book.choose(aim, factors[:, b])
                levels[:, part] = found.mT
                residual = ((aim - found) @ factors[:, b]).square_().sum(-1)
                losses.addcmul_(residual, scale[:, b].square())
                # 3. Feed its error back to the later columns of the tile.
                work[:, part].addcmul_(levels[:, part], scale[:, b, None], value=-1)
                if k + RUN < last:
                    later = target[:, k + RUN - start : last - start]
                    later.baddbmm_(couplings[:, part, k + RUN : last].mT, work[:, part])
            if last < stop:
                target[:, last - start :].baddbmm_(
                    couplings[:, first:last, last:stop].mT, work[:, first:last]
                )
    back = places.argsort(1)
    return levels.gather(1, back[..., None].expand(-1, -1, out)).mT, losses


def two_sided_by_run(
    weight: Tensor, scales: Tensor, number_format: NumberFormat, rows: Moment, columns: Moment
) -> tuple[Tensor, Tensor]:
    """Round one antidiagonal of runs after another, with feedback from rows above and columns to the left.

    Args:
        weight: matrices, shape `(stack, out, in)`.
        scales: scales of all groups, shape `(stack, out, groups)`.
        number_format: format with a codebook.
        rows: full moment of the gradients.
        columns: full moment of the inputs, which keeps the columns of a run together (`Moment.in_runs`).

    Returns:
        Levels, shape `(stack, out, in)`, and `tr(R E C E^T)`, shape `(stack,)`.
    """
    stack, out, size = weight.shape
    upper, kept = (x.expand(stack, *x.shape[1:]) for x in rows.feedback)
    couplings, factors = (x.expand(stack, *x.shape[1:]) for x in columns.feedback_between_runs)
    # 1. Sort rows and columns in the order of rounding, and pad the rows to whole tiles. Columns are whole
    # super-blocks. Scales of padding are zero, so it has no errors.
    down, across = rows.order.expand(stack, -1), columns.order.expand(stack, -1)
    groups = across[:, ::RUN] // (number_format.group or size)
    tall = -out % TILE

    def in_order(x: Tensor, places: Tensor) -> Tensor:
        x = x.gather(1, down[..., None].expand(-1, -1, x.shape[2]))
        return pad(x.gather(2, places[:, None].expand(-1, out, -1)), (0, 0, 0, tall))

    work, scale = in_order(weight, across), in_order(scales.to(weight.dtype), groups)
    upper, kept = pad(upper, (0, tall, 0, tall)), pad(kept, (0, tall))
    above, left, levels = (torch.zeros_like(work) for _ in range(3))  # feedback, and the result
    losses = work.new_zeros(stack, dtype=torch.float64)
    last_row, last_column = work.shape[1] // TILE - 1, work.shape[2] // TILE - 1
    for offset in range(last_row + last_column + 1):
        # 2. Round all tiles of an antidiagonal together.
        places = range(max(0, offset - last_column), min(offset, last_row) + 1)
        r = [slice(k * TILE, (k + 1) * TILE) for k in places]
        c = [slice((offset - k) * TILE, (offset - k + 1) * TILE) for k in places]
        runs = [slice(x.start // RUN, x.stop // RUN) for x in c]
        count = range(len(places))
        found, error, half, residual = _round_tiles(
            number_format,
            torch.stack([work[:, r[k], c[k]] for k in count]),
            torch.stack([above[:, r[k], c[k]] for k in count]),
            torch.stack([left[:, r[k], c[k]] for k in count]),
            torch.stack([scale[:, r[k], runs[k]] for k in count]),
            torch.stack([upper[:, r[k], r[k]] for k in count]),
            torch.stack([couplings[:, c[k], c[k]] for k in count]),
            torch.stack([factors[:, runs[k]] for k in count]),
        )
        # 3. Feed the errors of these tiles back to the rows below, and `U_R^T E` to the columns on the right.
        for k in count:
            levels[:, r[k], c[k]] = found[k]
            losses += (residual[k] * kept[:, r[k]]).sum(1)
            above[:, r[k].stop :, c[k]].baddbmm_(upper[:, r[k], r[k].stop :].mT, error[k])
            left[:, r[k], c[k].stop :].baddbmm_(half[k], couplings[:, c[k], c[k].stop :])
    levels = levels[:, :out].gather(2, across.argsort(1)[:, None].expand(-1, out, -1))
    return levels.gather(1, down.argsort(1)[..., None].expand(-1, -1, size)), losses


def _round_tiles(
    number_format: NumberFormat,
    work: Tensor,
    above: Tensor,
    left: Tensor,
    scale: Tensor,
    upper: Tensor,
    couplings: Tensor,
    factors: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round tiles that do not depend on each other.

    Args:
        number_format: format with a codebook.
        work, above, left: weights, and feedback from above and from the left, shape `(tiles, stack, TILE,
            TILE)`.
        scale: scales of the runs, shape `(tiles, stack, TILE, RUNS)`.
        upper: block of `U_R`, shape `(tiles, stack, TILE, TILE)`.
        couplings: block of `U_C`, in which the columns of each run are divided by `U_b`, in the same shape.
        factors: `U_b D_b^1/2` of each run, shape `(tiles, stack, RUNS, RUN, RUN)`.

    Returns:
        Levels, errors `E`, and `U_R^T E`, shape `(tiles, stack, TILE, TILE)`, and the sum of the squared
        residuals of each row, shape `(tiles, stack, TILE)`.
    """
    book, lead = number_format.points, work.shape[:2]
    assert isinstance(book, Codebook)
    work, above, left = (_skewed(x.unflatten(-1, (RUNS, RUN))) for x in (work, above, left))
    s = _skewed(scale[..., None])
    divisor = torch.where(s == 0, 1.0, s)
    # Coefficients of feedback to later antidiagonals: of a row to the rows below, for each run, and of a run
    # to the runs on the right.
    down = s.new_zeros(len(s), *s.shape)
    for j in range(RUNS):
        down[j : j + TILE, j : j + TILE, j] = upper.flatten(0, 1).permute(1, 2, 0)[..., None]
    blocks = couplings.flatten(0, 1).unflatten(1, (RUNS, RUN)).unflatten(3, (RUNS, RUN))
    across = {j: blocks.diagonal(j, 1, 3).permute(3, 0, 1, 2).contiguous() for j in range(1, RUNS)}
    factors = factors.flatten(0, 1).transpose(0, 1).flatten(0, 1)
    levels, error, half, residual = (torch.empty_like(x) for x in (work, work, work, s))
    for k in range(len(s)):
        # Choose the codes of one run of each row.
        aim = (work[k] + above[k] + left[k]) / divisor[k]
        levels[k] = book.choose(aim.view(-1, 1, RUN), factors).view(aim.shape)
        gap = (aim - levels[k]).view(-1, 1, RUN) @ factors
        residual[k] = (gap.view(aim.shape) * s[k]).square().sum(-1, keepdim=True)
        torch.addcmul(work[k], levels[k], s[k], value=-1, out=error[k])
        torch.add(error[k], above[k], out=half[k])
        # Feed its error back to the rows below, and `U_R^T E` to the runs on the right.
        above[k + 1 :].addcmul_(down[k, k + 1 :], error[k])
        for j in range(1, min(RUNS, len(s) - k)):
            left[k + j, j:] += (half[k, :-j, :, None] @ across[j])[..., 0, :]
    tiles = [_unskewed(x).unflatten(0, lead).flatten(-2) for x in (levels, error, half)]
    return tiles[0], tiles[1], tiles[2], _unskewed(residual).unflatten(0, lead)[..., 0].sum(-1)


def _skewed(x: Tensor) -> Tensor:
    """Store row `i` of run `j` at `i + j`: from `(..., TILE, RUNS, m)` to `(TILE + RUNS - 1, RUNS, n, m)`."""
    x = x.flatten(0, -4)
    found = x.new_zeros(TILE + RUNS - 1, RUNS, len(x), x.shape[-1])
    for j in range(RUNS):
        found[j : j + TILE, j] = x[:, :, j].transpose(0, 1)
    return found


def _unskewed(x: Tensor) -> Tensor:
    """Undo `_skewed`; the result has shape `(n, TILE, RUNS, m)`."""
    return torch.stack([x[j : j + TILE, j].transpose(0, 1) for j in range(RUNS)], 2)
