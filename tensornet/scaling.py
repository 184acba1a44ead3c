"""Numbers as `mantissa * 2^exponent`, so that long products neither overflow nor underflow.

Multiplying by a power of two is exact. Exponents are 0-dimensional float64 tensors without gradient.
"""

import torch
from torch import Tensor


def split_exponent(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Split a tensor into one whose largest element lies in `[1/2, 1)`, and a power of two.

    The exponent of zeros, and of a tensor with NaN or infinity in it, is 0. The first result has a gradient.
    """
    size = tensor.detach().abs().amax().double()
    exponent = torch.frexp(size).exponent.double()
    exponent = torch.where(torch.isfinite(size) & (size > 0), exponent, torch.zeros_like(exponent))
    return times_power_of_two(tensor, -exponent), exponent


def times_power_of_two(tensor: Tensor, exponent: Tensor) -> Tensor:
    """Compute `tensor * 2^exponent` without an intermediate result outside the range of the dtype."""
    limit = 1000 if tensor.dtype in (torch.float64, torch.complex128) else 120
    first = exponent.clamp(-limit, limit)
    second = (exponent - first).clamp(-limit, limit)  # beyond, a mantissa becomes 0 or infinite anyhow
    dtype = tensor.real.dtype
    return tensor * torch.exp2(first).to(dtype) * torch.exp2(second).to(dtype)
