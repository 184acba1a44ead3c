"""Divergence of predicted distributions, computed in blocks of tokens together with its gradient.

Log-probabilities of a whole vocabulary for a few hundred tokens are far larger than a processor's cache, and
automatic differentiation would store several copies. The gradient with respect to the student's logits is the
difference of the distributions. So one pass over a block computes the value and the gradient, and only the
gradient is stored, in the dtype of the logits.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Number of logits in a block on a CPU, where a block fits into the cache, and on other devices.
_BLOCK, _BLOCK_ON_DEVICE = 2**18, 2**26


def divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Compute the mean of `KL(teacher || student)` over tokens in nats, times the squared temperature.

    The result can be differentiated once with respect to the student's logits; the teacher's logits are
    constants. Computations are in float32, or in float64 for float64 logits.

    Args:
        student: logits of the compressed model, shape `(..., classes)`.
        teacher: logits of the dense model, of the same shape.
        mask: True at the tokens to average over, shape `(...)`; all tokens if absent.
        temperature: number by which both logits are divided.

    Returns:
        The divergence, a scalar; NaN if the mask selects no token.

    Reference:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", equation 2.
    """
    rows = None if mask is None or bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(-1)
    new, old = (x.reshape(-1, x.shape[-1]) for x in (student, teacher.detach()))
    value: Tensor = _Divergence.apply(new, old, rows, temperature)
    return value


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor | None, temperature: float
    ) -> Tensor:
        count, classes = len(student) if rows is None else len(rows), student.shape[1]
        gap = None
        if ctx.needs_input_grad[0]:
            gap = torch.empty_like(student) if rows is None else torch.zeros_like(student)
        step = max(1, (_BLOCK if student.is_cpu else _BLOCK_ON_DEVICE) // max(classes, 1))
        sums = [student.new_zeros((), dtype=_work_dtype(student))]
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            index = part if rows is None else rows[part]
            found, difference = _block(student[index], teacher[index], temperature, gap is not None)
            sums.append(found)
            if gap is not None:
                gap[index] = difference.to(gap.dtype)
        ctx.save_for_backward(gap)
        # The gradient is divided by the number of tokens in `backward`, together with the factor of a
        # gradient scaler: a division here could underflow in 16 bits.
        ctx.factor = temperature / max(count, 1)
        return torch.stack(sums).sum() * (temperature**2 / count if count else math.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gap,) = ctx.saved_tensors
        return (None if gap is None else gap * (gradients[0] * ctx.factor)), None, None, None


def _work_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _block(
    student: Tensor, teacher: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the summed divergence of a block, and the student's probabilities minus the teacher's."""
    dtype = _work_dtype(student)
    new, old = (x.to(dtype, copy=True).div_(temperature) for x in (student, teacher))
    for logits in (new, old):
        logits.sub_(logits.amax(-1, keepdim=True))
    p, q = new.exp(), old.exp()
    p_sum, q_sum = (x.sum(-1, keepdim=True) for x in (p, q))
    q.div_(q_sum)
    value = old.sub_(new).mul_(q).sum() + (p_sum.log() - q_sum.log()).sum()
    return value, p.div_(p_sum).sub_(q) if with_gradient else p
