"""Losses of predicted distributions: cross entropies and Kullback-Leibler divergences of rows of logits.

Log-probabilities of a whole vocabulary for a few hundred tokens are far larger than a processor's cache, and
automatic differentiation would store several copies. The gradient of both losses with respect to the logits
is the predicted distribution minus the target distribution. So one pass over a block of rows computes losses
and gradients, and only the gradients are stored, in the dtype of the logits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Number of logits in a block: on a CPU, so that a block fits into its cache, and on other devices.
_BLOCK, _BLOCK_ON_DEVICE = 1 << 18, 1 << 26


def cross_entropies(logits: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
    """Compute the cross entropy `-log p(label)` of each label in nats, with `p = softmax(logits)`.

    Args:
        logits: shape `(rows, classes)`.
        labels: class indices, shape `(tokens,)`.
        rows: index of the row of `logits` for each label, without duplicates, shape `(tokens,)`; all rows in
            order if absent.

    Returns:
        The losses, shape `(tokens,)`, in float32, or in float64 for float64 logits. They can be
        differentiated once with respect to the logits.
    """
    found: Tensor = _SoftmaxLosses.apply(logits, labels, rows, 1.0)
    return found


def kl_divergences(
    logits: Tensor, reference: Tensor, rows: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Compute `KL(q || p)` of each row in nats, with `p = softmax(logits / T)`, `q = softmax(reference / T)`.

    Args:
        logits: shape `(rows, classes)`.
        reference: logits of the reference model, of the same shape; they are treated as constants.
        rows: indices of the rows to compute, without duplicates, shape `(tokens,)`; all rows if absent.
        temperature: the temperature `T`.

    Returns:
        The divergences, shape `(tokens,)`, with the dtype and the derivatives of `cross_entropies`.
    """
    found: Tensor = _SoftmaxLosses.apply(logits, reference.detach(), rows, temperature)
    return found


def row_blocks(count: int, logits: Tensor) -> Iterator[slice]:
    """Split `count` rows of logits `(rows, classes)` into slices that are processed together."""
    step = max(1, (_BLOCK if logits.is_cpu else _BLOCK_ON_DEVICE) // max(logits.shape[1], 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class _SoftmaxLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, rows: Tensor | None, temperature: float) -> Tensor:
        count = len(logits) if rows is None else len(rows)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        losses = logits.new_empty(count, dtype=dtype)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(logits) if count == len(logits) else torch.zeros_like(logits)
        for part in row_blocks(count, logits):
            index = part if rows is None else rows[part]
            log_p = _log_softmax(logits[index].to(dtype), temperature)
            if target.ndim == 1:
                label = target[part, None]
                losses[part] = -log_p.gather(1, label)[:, 0]
                q = torch.zeros_like(log_p).scatter_(1, label, 1.0) if gradient is not None else log_p
            else:
                log_q = _log_softmax(target[index].to(dtype), temperature)
                q = log_q.exp()
                losses[part] = log_q.sub_(log_p).mul_(q).sum(1)
            if gradient is not None:
                gradient[index] = log_p.exp_().sub_(q).to(gradient.dtype)
        ctx.save_for_backward(gradient, rows)
        ctx.temperature = temperature
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient, rows = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None
        # For a mean over tokens, `outer` is `1 / tokens`, possibly times the factor of a gradient scaler.
        # It is multiplied only here, since a gradient stored in 16 bits could underflow.
        factor = outer / ctx.temperature
        if rows is not None:
            factor = factor.new_zeros(len(gradient)).index_copy_(0, rows, factor)
        found = torch.empty_like(gradient)
        for part in row_blocks(len(found), found):
            found[part] = gradient[part].to(factor.dtype) * factor[part, None]
        return found, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(1)
