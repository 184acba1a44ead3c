"""Coordinate descent after rounding: change codes and refit scales to lower the exact loss increase.

Let `P = R E C` for the error `E`. Changing the error of one element by `d` changes the loss by `d P_ij + 1/2
d^2 R_ii C_jj`, so a sweep over the columns finds the codes that should be changed. Changes in a column
interact through `R`. So only the best changes are made: as many as together lower the loss most. The scales
of one group of columns in all rows interact too, so they are found by solving a linear system. No step
increases the loss. If only the diagonal of `R` is known, as in output layers with a large vocabulary, rows
are independent. Then all changes that lower the loss are made, and every scale has a closed form.

With a codebook, the codes of a run of 8 columns change together: `d` is a vector, and `C_jj` a block of `C`.

Small matrices are processed in stacks, since a function call takes longer than the arithmetic on one of them.

Reference:
    Behdin et al. 2023, "QuantEase" (coordinate descent on codes, inputs only).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tensornet.linalg.weighted_svd import cholesky
from tensornet.quantization.codebooks import RUN, Codebook
from tensornet.quantization.feedback import Grid
from tensornet.quantization.formats import NumberFormat

#: Number of columns after which the gradient of all later columns is updated by one matrix product.
_BLOCK = 64
#: Largest number of changes that are made together in one column, or in one run: every pair of changes needs
#: the coupling between them. After rounding with feedback, about one row in 100 changes.
_MOST = 64
#: Number of columns after which the product of all later columns is updated while scales are refitted.
_SCALE_BLOCK = 256
#: Number of conjugate gradient steps that solve for the scales of one group of columns in all rows. With two
#: steps, the loss of layers of a small trained model is less than 0.1 % higher; with random moments, 4 %.
_STEPS = 4


def sweep_codes(
    weight: Tensor,
    codes: Tensor,
    grid: Grid,
    rows: Tensor,
    columns: Tensor,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower the loss increase by changing codes, in one pass over all columns.

    Args:
        weight: matrices, shape `(stack, out, in)`.
        codes: current codes (or levels) as floating-point numbers, shape `(stack, out, in)`.
        grid: the rounding grid.
        rows: moment `R`, shape `(stack, out, out)`, or its diagonal, shape `(stack, out)`.
        columns: moment `C`, shape `(stack, in, in)`.
        gradient: product `R E C` for the error of these codes, if known.

    Returns:
        The new codes, and by how much the loss increase of each matrix changes, shape `(stack,)`.
    """
    # Everything is transposed to `(in, stack, out)`, so that a column of the weights is contiguous.
    if gradient is None:
        gradient = times_rows(rows, (weight - grid.values(codes)) @ columns)
    codes, scale, gradient = _by_column(codes), _by_column(grid.scale), _by_column(gradient)
    curvature = rows if rows.ndim == 2 else rows.diagonal(dim1=1, dim2=2)
    couplings = columns.transpose(0, 1)[..., None]  # shape: (in, stack, in, 1)
    own = columns.diagonal(dim1=1, dim2=2).mT[..., None]  # shape: (in, stack, 1)
    total = weight.new_zeros(len(weight), dtype=torch.float64)
    for start in range(0, len(codes), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(codes)))
        s, here = scale[block], gradient[block].clone()
        bend = curvature * own[block]
        pull = torch.where(bend * s * s > 0, 1 / (bend * s), 0.0)
        moved = torch.zeros_like(here)
        for k in range(len(here)):
            column = codes[start + k]
            steps = grid.points.nearest(torch.addcmul(column, here[k], pull[k])).sub_(column)
            change = (steps * s[k]).neg_()
            gain = change * torch.addcmul(here[k], bend[k], change, value=0.5)
            curve = own[start + k, :, :, None]
            chosen = _compatible(gain, change[..., None], rows, curve)
            if chosen is None:
                continue
            which, spread, gained = chosen
            total += gained
            moved[k] = change * which
            column.add_(steps.mul_(which))
            further = couplings[start + k, :, start + k + 1 : block.stop].transpose(0, 1)
            here[k + 1 :].addcmul_(further, spread[..., 0])
        later = columns[:, block.stop :, block]
        gradient[block.stop :] += _along_columns(later, _times(rows, moved))
    return codes.permute(1, 2, 0).contiguous(), total


def sweep_runs(
    weight: Tensor,
    codes: Tensor,
    grid: Grid,
    rows: Tensor,
    columns: Tensor,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower the loss increase by changing the codes of whole runs, for grids with a codebook.

    For the arguments and the results see `sweep_codes`.
    """
    book = grid.points
    assert isinstance(book, Codebook)
    if gradient is None:
        gradient = times_rows(rows, (weight - grid.values(codes)) @ columns)
    codes, scale, gradient = _by_column(codes), _by_column(grid.scale), _by_column(gradient)
    curvature = rows if rows.ndim == 2 else rows.diagonal(dim1=1, dim2=2)
    # Blocks of C on the diagonal, shape (stack, runs, RUN, RUN), and upper triangular `F` with `C = F F^T`.
    blocks = columns.unflatten(1, (-1, RUN)).unflatten(3, (-1, RUN)).diagonal(0, 1, 3).permute(0, 3, 1, 2)
    lower, positive = cholesky(blocks.flip(2, 3).flatten(0, 1))
    total = weight.new_zeros(len(weight), dtype=torch.float64)
    if not positive:
        return codes.permute(1, 2, 0).contiguous(), total
    factors = lower.to(blocks.dtype).flip(1, 2).view(blocks.shape)
    inverses = torch.cholesky_inverse(lower).to(blocks.dtype).flip(1, 2).view(blocks.shape)
    for start in range(0, len(codes), _BLOCK):
        stop = min(start + _BLOCK, len(codes))
        here, moved = gradient[start:stop].clone(), torch.zeros_like(gradient[start:stop])
        for k in range(0, stop - start, RUN):
            part, run = slice(start + k, start + k + RUN), (start + k) // RUN
            g, levels, s = here[k : k + RUN].permute(1, 2, 0), codes[part].permute(1, 2, 0), scale[start + k]
            bend = curvature * s
            pull = torch.where(bend * s > 0, 1 / bend, 0.0)[..., None]
            steps = book.choose(levels + pull * (g @ inverses[:, run]), factors[:, run]) - levels
            change = -s[..., None] * steps
            curve = blocks[:, run]
            gain = (change * (g + 0.5 * curvature[..., None] * (change @ curve))).sum(2)
            chosen = _compatible(gain, change, rows, curve)
            if chosen is None:
                continue
            which, spread, gained = chosen
            total += gained
            moved[k : k + RUN] = (change * which[..., None]).permute(2, 0, 1)
            codes[part] += (steps * which[..., None]).permute(2, 0, 1)
            if (later := part.stop) < stop:
                here[k + RUN :] += _along_columns(columns[:, later:stop, part], spread.permute(2, 0, 1))
        gradient[stop:] += _along_columns(columns[:, stop:, start:stop], _times(rows, moved))
    return codes.permute(1, 2, 0).contiguous(), total


def _by_column(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def _times(rows: Tensor, x: Tensor) -> Tensor:
    """Multiply `x: (n, stack, out)` by row moments, given as matrices or as diagonals."""
    if rows.ndim == 2:
        return x * rows
    if len(rows) == 1:
        return (x[:, 0] @ rows[0])[:, None]
    return torch.bmm(x.transpose(0, 1), rows).transpose(0, 1).contiguous()


def _along_columns(columns: Tensor, x: Tensor) -> Tensor:
    """Multiply `columns: (stack, m, n)` by `x: (n, stack, out)`; the result has shape `(m, stack, out)`."""
    if len(columns) == 1:
        return (columns[0] @ x[:, 0])[:, None]
    return torch.bmm(columns, x.transpose(0, 1)).transpose(0, 1).contiguous()


def _compatible(
    gain: Tensor, change: Tensor, rows: Tensor, column: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Select the rows of one column, or of one run, whose changes together lower the loss of each matrix.

    These are the best changes, up to the one with which their common gain is largest.

    Args:
        gain: change of the loss if only one row changes, shape `(stack, out)`.
        change: changes of the errors, shape `(stack, out, n)` for `n` columns.
        rows: moment of the gradients, or its diagonal.
        column: block of the moment of the inputs, shape `(stack, n, n)`.

    Returns:
        A mask of the rows, shape `(stack, out)`; `R` times the changes, shape `(stack, out, n)`; and by how
        much they change the loss of each matrix, shape `(stack,)`. None if no change helps.
    """
    which = gain < -1e-12 * gain.abs().amax(1, keepdim=True)
    most = int(which.sum(1).max())
    if most == 0:
        return None
    if rows.ndim == 2:
        return which, rows[..., None] * change * which[..., None], (gain * which).sum(1)
    apart, places = torch.where(which, gain, 0.0).topk(min(most, _MOST), 1, largest=False)
    near, moves = _at(rows, places), _at(change, places) * (apart < 0)[..., None]
    coupled = near.gather(2, places[:, None].expand(-1, places.shape[1], -1)) * (moves @ column @ moves.mT)
    together = (apart + coupled.tril_(-1).sum(2)).cumsum(1)
    gained, last = together.min(1)
    kept = (torch.arange(len(moves[0]), device=last.device) <= last[:, None]) & (apart < 0)
    which = torch.zeros_like(which).scatter_(1, places, kept)
    return which, near.mT @ (moves * kept[..., None]), gained


def _at(x: Tensor, places: Tensor) -> Tensor:
    """Select rows of each matrix of `x: (stack, m, n)`; the result has shape `(stack, places, n)`."""
    if len(x) == 1:
        return x[:, places[0]]
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def sweep_scales(
    weight: Tensor,
    points: Tensor,
    scales: Tensor,
    number_format: NumberFormat,
    rows: Tensor,
    columns: Tensor,
    product: Tensor | None = None,
) -> Tensor:
    """Refit the scales to lower the loss increase, one group of columns at a time, for all rows together.

    Args:
        weight: matrices, shape `(stack, out, in)`.
        points: codes minus `Points.center`, or levels, shape `(stack, out, in)`.
        scales: current scales, shape `(stack, out, groups)`.
        number_format: integer format.
        rows: moment `R`, shape `(stack, out, out)`, or its diagonal, shape `(stack, out)`.
        columns: moment `C`, shape `(stack, in, in)`.
        product: product `E C` for the error of these codes and scales, if known; it is overwritten.

    Returns:
        The new scales, not yet rounded to the dtype in which they are stored.
    """
    scales, size = scales.clone(), weight.shape[2]
    width = number_format.group or size
    if product is None:
        product = (weight - points * number_format.spread(scales, size)) @ columns
    block = width * max(1, _SCALE_BLOCK // width)
    for start in range(0, size, block):
        stop = min(start + block, size)
        here, moved = product[..., start:stop].clone(), torch.zeros_like(product[..., start:stop])
        for first in range(start, stop, width):
            part = slice(first, min(first + width, stop))
            inside = slice(part.start - start, part.stop - start)
            u = points[..., part]
            step = _scale_steps(u, here[..., inside], rows, columns[:, part, part])
            scales[..., first // width] += step
            torch.mul(u, step[..., None], out=moved[..., inside])
            later = columns[:, part, part.stop : stop]
            here[..., inside.stop :].baddbmm_(moved[..., inside], later, alpha=-1)
        product[..., stop:].baddbmm_(moved, columns[:, start:stop, stop:], alpha=-1)
    return scales


def _scale_steps(points: Tensor, product: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute by how much the scales of one group should change, shape `(stack, out)`.

    Args:
        points: points of the group, shape `(stack, out, n)`.
        product: product `E C` in the columns of the group, in the same shape.
        rows: moment `R`, or its diagonal.
        columns: block of the moment of the inputs, shape `(stack, n, n)`.
    """
    weighed = points @ columns
    right = (times_rows(rows, product) * points).sum(2)
    own = (weighed * points).sum(2)
    if rows.ndim == 2:
        bend = rows * own
        return torch.where(bend > 0, right / bend.clamp_min(1e-300), 0.0)
    # The matrix of the system, `R * (U C U^T)`, is as large as `R`, and is never formed.
    return _conjugate_gradients(
        lambda x: ((rows @ (weighed * x[..., None])) * points).sum(2),
        rows.diagonal(dim1=1, dim2=2) * own,
        right,
    )


def _conjugate_gradients(times: Callable[[Tensor], Tensor], diagonal: Tensor, right: Tensor) -> Tensor:
    """Approximate the solution of a linear system by a few conjugate gradient steps.

    Args:
        times: product of a positive semi-definite matrix with vectors of shape `(stack, n)`.
        diagonal: diagonal of the matrix, shape `(stack, n)`.
        right: right-hand sides, shape `(stack, n)`.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-300), 0.0)
    solution = torch.zeros_like(right)
    residual, direction = right * (inverse > 0), inverse * right
    square = (residual * direction).sum(1, keepdim=True)
    for _ in range(_STEPS):
        image = times(direction)
        bend = (direction * image).sum(1, keepdim=True)
        goes_on = (bend > 0) & (square > 0)
        if not bool(goes_on.any()):
            break
        length = torch.where(goes_on, square / torch.where(goes_on, bend, 1.0), 0.0)
        solution = solution + length * direction
        residual = residual - length * image * (inverse > 0)
        nearer = inverse * residual
        after = (residual * nearer).sum(1, keepdim=True)
        direction = nearer + torch.where(goes_on, after / torch.where(goes_on, square, 1.0), 0.0) * direction
        square = torch.where(goes_on, after, 0.0)
    return solution


def times_rows(rows: Tensor, x: Tensor) -> Tensor:
    """Multiply `x: (stack, out, in)` from the left by row moments, given as matrices or as diagonals."""
    return rows[..., None] * x if rows.ndim == 2 else rows @ x


def descend(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero: Tensor | float,
    number_format: NumberFormat,
    rows: Tensor,
    columns: Tensor,
    sweeps: int,
    loss: Tensor,
    *,
    refit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower the loss increase by alternating `sweep_scales` and `sweep_codes`.

    For arguments that are not listed here, see these functions.

    Products of a moment and the error take most of the time, so each step reuses those of the previous step.

    Args:
        zero: code of the value 0 for each element, or one number for all.
        sweeps: number of alternations.
        loss: loss increase of the current codes, shape `(stack,)`.
        refit: whether scales may change.

    Returns:
        Codes (or levels), scales in the dtype in which they are stored, and the loss increase.
    """
    size = weight.shape[2]

    def spread(x: Tensor) -> Tensor:
        return number_format.spread(x.to(weight.dtype), size)

    def passed(points: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the error `E` and the product `E C`."""
        error = weight - points * spread(tried)
        return error, error @ columns

    for _ in range(sweeps):
        points = codes - zero
        _, product = passed(points, scales)
        if not refit:
            gradient = times_rows(rows, product)
        else:
            own = scales.to(weight.dtype)
            exact = sweep_scales(weight, points, own, number_format, rows, columns, product)
            moved = number_format.storable(exact)
            error, product = passed(points, moved)
            gradient = times_rows(rows, product)
            found = 0.5 * (error * gradient).sum((1, 2), dtype=torch.float64)
            better = found < loss
            scales = torch.where(better[:, None, None], moved, scales)
            loss = torch.where(better, found, loss)
            if not bool(better.all()):
                gradient = times_rows(rows, passed(points, scales)[1])
        grid = Grid.of(number_format, spread(scales), zero)
        sweep = sweep_codes if grid.points.run == 1 else sweep_runs
        codes, gained = sweep(weight, codes, grid, rows, columns, gradient)
        loss = loss + gained
    return codes, scales, loss
