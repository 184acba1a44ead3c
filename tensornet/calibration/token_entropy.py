"""Cross entropy of many tokens under many classes, without a second copy of the logits.

The logits of a vocabulary are the largest tensor of a language model. Torch writes their logarithms in single
precision, and reads and writes as much again for the gradient. Here a few rows at a time stay in the cache,
and the gradient `softmax - label` is written once, in the dtype of the logits.
"""

from typing import Any

import torch
from torch import Tensor

from tensornet.calibration.draws import draws_on

#: Logits that are looked at together: on a CPU they stay in its cache.
_CACHED, _CHUNK = 1 << 18, 1 << 27


def token_entropies(logits: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy of labels at some rows of the logits, in single precision.

    Args:
        logits: shape `(rows, classes)`.
        places: rows that have a label, each at most once, shape `(tokens,)`.
        labels: their classes, shape `(tokens,)`.

    Returns:
        Shape `(tokens,)`; differentiable once by the logits.

    Example:
        >>> from tensornet.calibration.token_entropy import token_entropies
        >>> token_entropies(torch.zeros(3, 4), torch.tensor([0, 2]), torch.tensor([1, 3])).tolist()
        [1.3862943649291992, 1.3862943649291992]
    """
    found: Tensor = _TokenEntropies.apply(logits, places, labels)
    return found


@torch.no_grad()
def drawn_labels(logits: Tensor, places: Tensor) -> Tensor:
    """Draw a label from the probabilities at some rows of the logits, shape `(tokens,)`.

    Args:
        logits: shape `(rows, classes)`.
        places: rows, shape `(tokens,)`.

    Example:
        >>> from tensornet.calibration.token_entropy import drawn_labels
        >>> drawn_labels(torch.tensor([[0.0, 100.0], [100.0, 0.0]]), torch.tensor([0, 1])).tolist()
        [1, 0]
    """
    like: Any = {"dtype": torch.float64, "device": logits.device}
    shares = torch.rand(len(places), 1, generator=draws_on(logits.device), **like)
    drawn = torch.empty_like(places)
    for part in _parts(places, logits):
        sums = logits[places[part]].float().softmax(1).cumsum(1, dtype=torch.float64)
        # The first class whose sum exceeds the share of the total: none without probability.
        drawn[part] = torch.searchsorted(sums, shares[part] * sums[:, -1:], right=True)[:, 0]
    return drawn.clamp_max_(logits.shape[1] - 1)


class _TokenEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        sums, losses = (logits.new_empty(len(places), dtype=torch.float32) for _ in range(2))
        for part in _parts(places, logits):
            some = logits[places[part]].float()
            torch.logsumexp(some, 1, out=sums[part])
            losses[part] = sums[part] - some.gather(1, labels[part, None])[:, 0]
        ctx.save_for_backward(logits, places, labels, sums)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, places, labels, sums = ctx.saved_tensors
        whole = len(places) == len(logits)  # each place is there at most once
        found = torch.empty_like(logits) if whole else torch.zeros_like(logits)
        for part in _parts(places, logits):
            some = logits[places[part]].float().sub_(sums[part, None]).exp_()
            some[torch.arange(len(some), device=some.device), labels[part]] -= 1
            found[places[part]] = some.mul_(gradient[part, None]).to(logits.dtype)
        return found, None, None


def _parts(places: Tensor, logits: Tensor) -> list[slice]:
    """Split the tokens into runs whose logits are looked at together."""
    step = max(1, (_CACHED if logits.is_cpu else _CHUNK) // max(logits.shape[1], 1))
    return [slice(k, k + step) for k in range(0, len(places), step)]
