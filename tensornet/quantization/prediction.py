"""Expected rounding residuals, from which the loss increase is predicted before rounding.

The bare formula `s^2/24 tr D_R tr D_C` takes every residual as uniform on one step. Feedback also moves
targets out of the range of few bits, where they are clamped; at 4 bits that adds a fifth.
"""

import torch
from torch import Tensor

from tensornet.quantization.feedback import Grid


def expected_residuals(weight: Tensor, grid: Grid, spread: Tensor) -> Tensor:
    """Predict squared rounding residuals with feedback: `s^2/12` inside the grid, more beyond its ends.

    Args:
        weight: shape `(stack, out, in)`.
        grid: of its elements.
        spread: variance of the feedback that is added to each element, in units of `s^2/12`.

    Returns:
        `s^2/12 P(inside) + E[(t - end)^2; t outside]` for normally distributed targets `t` around the weight.
    """
    step = grid.scale.abs()
    variance = step.square() / 12
    sigma = (variance * spread).sqrt_().clamp_min_(torch.finfo(weight.dtype).tiny ** 0.5)
    ends = grid.points(torch.zeros_like(weight)), grid.points(torch.full_like(weight, grid.top))
    expected = variance.clone()
    for beyond in (weight - torch.maximum(*ends), torch.minimum(*ends) - weight):
        start = (step / 2 - beyond) / sigma
        tail = torch.special.erfc(start / 2**0.5) / 2
        density = torch.exp(-start.square() / 2) / (2 * torch.pi) ** 0.5
        outside = (beyond.square() + sigma.square()) * tail
        outside += (2 * beyond + sigma * start) * sigma * density
        expected += outside - variance * tail
    return expected
