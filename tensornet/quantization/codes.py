"""Conversion of integer codes to values."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.scales import as_groups


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    number_format: NumberFormat,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `scale * (code - zero)`, differentiable by the scales.

    Args:
        codes: `torch.uint8`, shape `(..., out, in)`.
        scales: shape `(..., out, groups)`.
        zeros: `torch.uint8` of the same shape; None without zero points.
        number_format: of the codes.
        dtype: of the result.

    Example:
        >>> from tensornet.quantization import NumberFormat, dequantize
        >>> codes = torch.tensor([[0, 8, 9]], dtype=torch.uint8)
        >>> dequantize(codes, torch.tensor([[0.5]]), None, NumberFormat.parse("int4"))
        tensor([[-4.0000,  0.0000,  0.5000]])
    """
    grouped = as_groups(codes, number_format)
    factor = scale_factors(scales, dtype)
    # Differences of small integers are exact and fast in 8 bits; two bits count halves.
    if zeros is not None:
        kind = torch.int16 if number_format.bits == 8 else torch.int8
        points = grouped.to(kind) - zeros.to(kind).unsqueeze(-1)
    elif number_format.center % 1:
        points = 2 * _signed(grouped) - int(2 * number_format.center)
        factor = factor / 2
    elif number_format.bits == 8:
        points = grouped.to(torch.int16) - 128 if is_compiling() else (grouped ^ 128).view(torch.int8)
    else:
        points = _signed(grouped) - int(number_format.center)
    values = scaled(points, factor.unsqueeze(-1), dtype)
    return values.flatten(-2)[..., : codes.shape[-1]]


def scale_factors(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert scales to the dtype in which `scaled` multiplies by them.

    Args:
        scales: as they are stored.
        dtype: of the values. In `torch.float16` scales of bfloat16 would be subnormal or zero, so that they
            become `torch.float32`.
    """
    return scales.to(torch.float32 if dtype == torch.float16 else dtype)


def scaled(points: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply small integers by scales; the product is rounded once.

    Args:
        points: integers of any dtype.
        factor: `scale_factors`, whose shape broadcasts to that of the points.
        dtype: of the result.
    """
    if dtype == torch.float16 or (dtype == torch.bfloat16 and points.is_cpu):
        # Processors have no arithmetic in 16 bits: operations in float32 take half the time.
        return (points * factor.float()).to(dtype)
    return points.to(dtype) * factor


def _signed(codes: Tensor) -> Tensor:
    """Convert codes below 128 to signed bytes, without a copy; ONNX cannot express that view."""
    return codes.to(torch.int8) if is_compiling() else codes.view(torch.int8)
