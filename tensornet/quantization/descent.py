"""Descent on the exact loss increase after rounding: codes column by column, scales group by group.

Error feedback fixes an element once and for all. With `P = R E C` at hand, moving one element by `d` raises
the loss by `d P_ij + 1/2 d^2 R_ii C_jj`, so that a sweep over the columns finds the elements that should
move. Rows of one column are coupled by `R`: of all moves that help by themselves the best are taken, as many
as together still keep half of their gains. Scales of one group column are coupled by `R` in the same way and
solve a linear system. No step raises the loss increase. Where only the diagonal of `R` is known, as of a
vocabulary, rows are independent: all moves that help are taken, and every scale has a closed form.

Reference:
    Behdin et al. 2023, "QuantEase" (coordinate descent on codes, inputs only).
"""

import torch
from torch import Tensor

from tensornet.linalg.weighted_svd import times
from tensornet.quantization.formats import NumberFormat

#: Columns whose updates of the gradient are collected into one matrix product.
_BLOCK = 64
#: Share of the gains of single moves that moves together must keep.
_KEPT = 0.5
#: A product reads single rows of a moment if at most one in so many is needed.
_FEW = 6
#: Iterations of conjugate gradients for the scales of one group column.
_STEPS = 6


def sweep_codes(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    top: int,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Move codes to lower the loss increase, in one pass over all columns.

    Args:
        weight: shape `(out, in)`.
        codes: current codes, as floating-point numbers of the same shape.
        scale: of every element.
        zero: of every element, or one number.
        top: largest code.
        rows: `R`, shape `(out, out)`, or its diagonal `(out,)`.
        columns: `C`, shape `(in, in)`.

    Returns:
        New codes.
    """
    # Everything is transposed: a column of the weight lies in one piece.
    codes, scale = codes.mT.clone(memory_format=torch.contiguous_format), scale.mT.contiguous()
    error = weight.mT - (codes - (zero.mT if isinstance(zero, Tensor) else zero)) * scale
    gradient = times(rows, (columns @ error).mT).mT.contiguous()
    curvature = rows if rows.ndim == 1 else rows.diagonal()
    for start in range(0, len(codes), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(codes)))
        s, here = scale[block], gradient[block].clone()
        bend = curvature * columns.diagonal()[block, None]
        pull = torch.where(bend * s * s > 0, 1 / (bend * s), 0.0)
        moved = torch.zeros_like(here)
        for k in range(len(here)):
            column = codes[start + k]
            steps = torch.addcmul(column, here[k], pull[k]).round_().clamp_(0, top).sub_(column)
            change = (steps * s[k]).neg_()
            gain = change * torch.addcmul(here[k], bend[k], change, value=0.5)
            coupling = columns[start + k]
            chosen = _compatible(gain, change, here[k], rows, coupling[start + k])
            if chosen is None:
                continue
            which, spread = chosen
            moved[k] = change * which
            column.add_(steps.mul_(which))
            here[k + 1 :].addr_(coupling[start + k + 1 : block.stop], spread)
        gradient[block.stop :].addmm_(columns[block.stop :, block], times(rows, moved.mT).mT)
    return codes.mT.contiguous()


def _compatible(
    gain: Tensor, change: Tensor, gradient: Tensor, rows: Tensor, column: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Select moves of one column that together lower the loss increase.

    Returns:
        A mask of the moves, and `R` times them; None if no move helps.
    """
    which = gain < -1e-12 * gain.abs().max()
    count = int(which.count_nonzero())
    if count == 0:
        return None
    if rows.ndim == 1:
        return which, rows * change * which
    while True:
        moves = change * which
        spread = _times_few(rows, moves, which, count)
        if count == 1 or moves @ gradient + 0.5 * column * (moves @ spread) <= _KEPT * (
            gain @ which.to(gain)
        ):
            return which, spread
        count //= 2
        best = torch.where(which, gain, torch.inf).argsort(stable=True)[:count]
        which = torch.zeros_like(which).index_fill_(0, best, True)


def _times_few(rows: Tensor, moves: Tensor, which: Tensor, count: int) -> Tensor:
    """Multiply a vector by `R`, reading only the rows that count where these are few."""
    if count * _FEW > len(rows):
        return rows @ moves
    places = which.nonzero()[:, 0]
    return moves[places] @ rows[places]


def sweep_scales(
    weight: Tensor, points: Tensor, scales: Tensor, number_format: NumberFormat, rows: Tensor, columns: Tensor
) -> Tensor:
    """Refit the scales under both moments, in one pass over all group columns.

    Args:
        weight: shape `(out, in)`.
        points: codes less their zeros, of the same shape.
        scales: current scales, shape `(out, groups)`.
        number_format: an integer format.
        rows: `R`, shape `(out, out)`, or its diagonal `(out,)`.
        columns: `C`, shape `(in, in)`.

    Returns:
        New scales, not rounded to the dtype of scales yet.
    """
    scales = scales.clone()
    size = weight.shape[1]
    width = number_format.group or size
    values = points * scales.repeat_interleave(width, 1)[:, :size]
    product = (weight - values) @ columns
    for group in range(scales.shape[1]):
        part = slice(group * width, min((group + 1) * width, size))
        u = points[:, part]
        right = (times(rows, product[:, part]) * u).sum(1)
        if rows.ndim == 1:
            bend = rows * ((u @ columns[part, part]) * u).sum(1)
            step = torch.where(bend > 0, right / bend.clamp_min(1e-300), 0.0)
        else:
            step = _conjugate_gradients(rows * (u @ columns[part, part] @ u.mT), right)
        scales[:, group] += step
        product.addmm_(u * step[:, None], columns[part], alpha=-1)
    return scales


def _conjugate_gradients(matrix: Tensor, right: Tensor) -> Tensor:
    """Approximate `matrix^-1 right` by a few conjugate gradient steps, each lowering the quadratic."""
    diagonal = matrix.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-300), 0.0)
    solution = torch.zeros_like(right)
    residual, direction = right * (inverse > 0), inverse * right
    square = residual @ direction
    for _ in range(_STEPS):
        image = matrix @ direction
        bend = direction @ image
        if not bend > 0 or not square > 0:
            break
        solution = solution + (square / bend) * direction
        residual = residual - (square / bend) * image * (inverse > 0)
        nearer = inverse * residual
        after = residual @ nearer
        direction, square = nearer + (after / square) * direction, after
    return solution


def descend(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero: Tensor | float,
    number_format: NumberFormat,
    rows: Tensor,
    columns: Tensor,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """Alternate `sweep_scales` and `sweep_codes`, with the same arguments.

    Returns:
        Codes, and scales in the dtype they are stored in.
    """
    size = weight.shape[1]
    width = number_format.group or size

    def spread(x: Tensor) -> Tensor:
        return x.to(weight.dtype).repeat_interleave(width, 1)[:, :size]

    def price(points: Tensor, tried: Tensor) -> float:
        error = weight - points * spread(tried)
        return float((times(rows, error) * (error @ columns)).sum(dtype=torch.float64))

    for _ in range(sweeps):
        points = codes - zero
        exact = sweep_scales(weight, points, scales.to(weight.dtype), number_format, rows, columns)
        limit = torch.finfo(scales.dtype).max
        moved = exact.clamp(-limit, limit).to(scales.dtype)
        if price(points, moved) < price(points, scales):
            scales = moved
        codes = sweep_codes(weight, codes, spread(scales), zero, number_format.top, rows, columns)
    return codes, scales
