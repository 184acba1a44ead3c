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

from tensornet.quantization.formats import NumberFormat

#: Columns whose updates of the gradient are collected into one matrix product.
_BLOCK = 64
#: Share of the gains of single moves that moves together must keep.
_KEPT = 0.5
#: Iterations of conjugate gradients for the scales of one group column.
_STEPS = 12


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
    codes = codes.clone()
    error = weight - (codes - zero) * scale
    gradient = _times(rows, error @ columns)
    curvature = rows if rows.ndim == 1 else rows.diagonal()
    size = weight.shape[1]
    for start in range(0, size, _BLOCK):
        block = slice(start, min(start + _BLOCK, size))
        moved = torch.zeros_like(error[:, block])
        here = gradient[:, block].clone()
        for k in range(moved.shape[1]):
            j = start + k
            s, own = scale[:, j], curvature * columns[j, j]
            bend = own * s * s
            wanted = torch.where(bend > 0, here[:, k] * s / bend.clamp_min(1e-300), 0.0)
            steps = (codes[:, j] + wanted).round_().clamp_(0, top) - codes[:, j]
            change = -steps * s
            gain = change * (here[:, k] + 0.5 * own * change)
            if rows.ndim == 1:
                helps = gain < 0
                codes[:, j] += steps * helps
                moved[:, k] = change * helps
                spread = rows * moved[:, k]
            else:
                chosen = _compatible(gain, change, here[:, k], rows, columns[j, j])
                if len(chosen) == 0:
                    continue
                codes[chosen, j] += steps[chosen]
                moved[chosen, k] = change[chosen]
                spread = change[chosen] @ rows[chosen]
            here.addr_(spread, columns[j, block])
        gradient.addmm_(_times(rows, moved), columns[block])
    return codes


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply by `R` from the left, given whole or by its diagonal."""
    return rows[:, None] * matrix if rows.ndim == 1 else rows @ matrix


def _compatible(gain: Tensor, change: Tensor, gradient: Tensor, rows: Tensor, column: Tensor) -> Tensor:
    """Select moves of one column that together lower the loss increase."""
    chosen = (gain < -1e-12 * gain.abs().max()).nonzero()[:, 0]
    if len(chosen) > 1:
        chosen = chosen[gain[chosen].argsort(stable=True)]
    while len(chosen) > 1:
        d = change[chosen]
        joint = d @ gradient[chosen] + 0.5 * column * (d @ (rows[chosen][:, chosen] @ d))
        if joint <= _KEPT * gain[chosen].sum():
            break
        chosen = chosen[: len(chosen) // 2]
    return chosen


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
        right = (_times(rows, product[:, part]) * u).sum(1)
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
        return float((_times(rows, error) * (error @ columns)).sum(dtype=torch.float64))

    for _ in range(sweeps):
        points = codes - zero
        exact = sweep_scales(weight, points, scales.to(weight.dtype), number_format, rows, columns)
        limit = torch.finfo(scales.dtype).max
        moved = exact.clamp(-limit, limit).to(scales.dtype)
        if price(points, moved) < price(points, scales):
            scales = moved
        codes = sweep_codes(weight, codes, spread(scales), zero, number_format.top, rows, columns)
    return codes, scales
