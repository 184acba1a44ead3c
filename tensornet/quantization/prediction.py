"""Expected rounding residuals, from which the loss increase is predicted before rounding.

The bare formula `s^2/24 tr D_R tr D_C` takes every residual as uniform on one step. Feedback also moves
targets out of the range of few bits, where they are clamped; at 4 bits that adds a fifth.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class ExpectedResiduals:
    """Expected squared residuals of rounding a stack of matrices with feedback.

    Args:
        squares: shape `(stack, out, in)`.
        rows: `D` of the gradient moment and the growth of errors over residuals, each `(stack or 1, out)`.
        columns: the same of the input moment, each `(stack or 1, in)`.
    """

    squares: Tensor
    rows: tuple[Tensor, Tensor]
    columns: tuple[Tensor, Tensor]

    def loss(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Sum the losses of all residuals, shape `(stack,)`."""
        return 0.5 * (self.squares * rows[:, :, None] * columns[:, None, :]).sum((1, 2), dtype=torch.float64)


def unit_losses(kept: tuple[Tensor, Tensor], chosen: Tensor | None, moment: Tensor | None) -> Tensor:
    """Predict the loss of a unit residual at every position, under a moment other than the rounding's.

    Args:
        kept: `D` and error growth of one side, each `(1, n)`.
        chosen: moment that is rounded with, `(n, n)`, `(n,)` or None for the identity.
        moment: moment that errors cost by; two full ones are taken to differ on the diagonal alone.

    Returns:
        Shape `(1, n)`.
    """
    weights, growth = kept
    if moment is None:
        return growth.expand_as(weights)
    if moment.ndim == 1 or chosen is None or chosen.ndim == 1:
        return growth * (moment if moment.ndim == 1 else moment.diagonal())[None].to(growth)
    return weights + growth * (moment.diagonal() - chosen.diagonal())[None].to(growth)
