"""Training of integer codes, as floating-point numbers that are rounded in each pass.

The gradient of a code is computed as if it were not rounded.

Reference:
    Bengio, Leonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"
    (straight-through estimator).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tensornet.quantization.formats import NumberFormat

#: Number of elements that are rounded at a time on a CPU.
_CACHED = 1 << 16


class TrainedCodes(nn.Parameter):
    """Codes of an integer matrix while they are trained, shape `(..., out, in)`; see `rounded_values`.

    Example:
        >>> from tensornet.quantization.trained_codes import TrainedCodes
        >>> TrainedCodes(torch.zeros(2, 3)).requires_grad
        True
    """


def rounded_values(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, number_format: NumberFormat, dtype: torch.dtype
) -> Tensor:
    """Compute the values of codes rounded to whole numbers, differentiable as if they were not rounded.

    Args:
        codes: floating-point codes, shape `(..., out, in)`.
        scales: shape `(..., out, groups)`.
        zeros: integers of the same shape; None without zero points.
        number_format: format of the codes.
        dtype: dtype of the result.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> from tensornet.quantization.trained_codes import rounded_values
        >>> codes = torch.tensor([[-3.0, 8.4, 9.0]], requires_grad=True)
        >>> number_format = NumberFormat.parse("int4")
        >>> values = rounded_values(codes, torch.tensor([[0.5]]), None, number_format, torch.float32)
        >>> values.sum().backward()
        >>> values.detach(), codes.grad
        (tensor([[-4.0000,  0.0000,  0.5000]]), tensor([[0.5000, 0.5000, 0.5000]]))
    """
    return _Rounded.apply(codes, scales, zeros, number_format, dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        number_format: NumberFormat,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, zeros)
        ctx.number_format = number_format
        values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        new, code, scale = (x.flatten(0, -2) for x in (values, codes, scales))
        zero = None if zeros is None else zeros.flatten(0, -2)
        for rows in _blocks(code):
            points = _points(code[rows], None if zero is None else zero[rows], number_format)
            new[rows] = _scale(points, scale[rows], number_format)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, zeros = ctx.saved_tensors
        by_codes, by_scales = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (codes, scales))
        arriving, code, scale, to_code, to_scale = (
            x.flatten(0, -2) for x in (grad, codes, scales, by_codes, by_scales)
        )
        zero = None if zeros is None else zeros.flatten(0, -2)
        needs_code, needs_scale, *_ = ctx.needs_input_grad
        for rows in _blocks(code):
            values = to_code[rows].copy_(arriving[rows])  # cast once, not in each product
            if needs_scale:
                points = _points(code[rows], None if zero is None else zero[rows], ctx.number_format)
                to_scale[rows] = ctx.number_format.grouped(points.mul_(values)).sum(-1)
            if needs_code:
                _scale(values, scale[rows], ctx.number_format)
        return by_codes if needs_code else None, by_scales if needs_scale else None, None, None, None


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """List blocks of rows, small enough for the cache of a CPU.

    A step of healing passes over every code several times, and memory accesses take longer than arithmetic.
    """
    step = max(1, _CACHED // max(matrix.shape[1], 1)) if matrix.is_cpu else max(1, len(matrix))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _points(codes: Tensor, zeros: Tensor | None, number_format: NumberFormat) -> Tensor:
    """Round codes and subtract their zeros, shape `(rows, in)`."""
    points = codes.round().clamp_(0, number_format.top)
    if zeros is None:
        return points.sub_(number_format.center)
    return points.sub_(number_format.spread(zeros.to(points), points.shape[1]))


def _scale(x: Tensor, scales: Tensor, number_format: NumberFormat) -> Tensor:
    """Multiply the elements of every group by its scale, in place, shape `(rows, in)`."""
    width = number_format.group or max(x.shape[1], 1)
    if x.shape[1] % width:  # otherwise broadcasting avoids repeating the scales
        return x.mul_(number_format.spread(scales.to(x), x.shape[1]))
    x.unflatten(1, (-1, width)).mul_(scales.to(x).unsqueeze(-1))
    return x
