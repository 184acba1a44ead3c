"""Integer codes that are trained: floating-point numbers, rounded in each pass.

The gradient of a code is that of its value, as if it were not rounded.

Reference:
    Bengio, Leonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"
    (straight-through estimator).
"""

from typing import Any

import torch
from torch import Tensor, nn

from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.scales import as_groups


class TrainedCodes(nn.Parameter):
    """Codes of an integer matrix while they are trained, shape `(..., out, in)`; see `rounded_values`.

    Example:
        >>> from tensornet.quantization import TrainedCodes
        >>> TrainedCodes(torch.zeros(2, 3)).requires_grad
        True
    """


def rounded_values(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, number_format: NumberFormat, dtype: torch.dtype
) -> Tensor:
    """Compute the values of codes rounded to whole numbers, differentiable as if they were not rounded.

    Args:
        codes: floating-point, shape `(..., out, in)`.
        scales: shape `(..., out, groups)`.
        zeros: integers of the same shape; None without zero points.
        number_format: of the codes.
        dtype: of the result.

    Example:
        >>> from tensornet.quantization import NumberFormat, rounded_values
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
        # In place where that may be: a step of healing passes over every code several times, and new memory
        # takes longer than arithmetic.
        points = as_groups(codes.round().clamp_(0, number_format.top), number_format)
        points.sub_(number_format.center if zeros is None else zeros.to(points).unsqueeze(-1))
        factor = scales.to(points)
        # The points are held for the gradient of the scales alone.
        held = points if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(factor, held)
        ctx.number_format, ctx.kinds = number_format, (codes.dtype, scales.dtype)
        values = torch.mul(points, factor.unsqueeze(-1), out=None if held is not None else points)
        return values.flatten(-2)[..., : codes.shape[-1]].to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, points = ctx.saved_tensors
        grouped = as_groups(grad.to(factor), ctx.number_format)
        by_codes = by_scales = None
        if points is not None:
            by_scales = (grouped * points).sum(-1).to(ctx.kinds[1])
        if ctx.needs_input_grad[0]:
            own = grouped.data_ptr() != grad.data_ptr()  # else it is the gradient of others as well
            values = torch.mul(grouped, factor.unsqueeze(-1), out=grouped if own else None)
            by_codes = values.flatten(-2)[..., : grad.shape[-1]].to(ctx.kinds[0])
        return by_codes, by_scales, None, None, None
