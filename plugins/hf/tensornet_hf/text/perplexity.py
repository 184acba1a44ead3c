"""Perplexity of a causal language model over windows of a long text."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode, progress_bar
from tensornet.calibration.losses import field, scores_next_token
from tensornet.errors import NonFiniteError, ShapeError, TargetError

#: Logits of one batch held at a time, in elements: 64 MB in float32, whatever the vocabulary.
_LOGITS = 16_000_000


@dataclass(frozen=True)
class Perplexity:
    """Perplexity together with the windows over which it was measured.

    Args:
        perplexity: `exp(loss)`.
        loss: mean negative log-likelihood of a scored token, in nats.
        tokens: tokens scored. A token is scored once, in the first window that holds its predecessor too.
        windows: number of windows.
        context: tokens in a window (the last window may be shorter).
        stride: tokens from the start of one window to the start of the next.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    context: int
    stride: int

    def __str__(self) -> str:
        return f"{self.perplexity:.3f} ({self.how})"

    @property
    def how(self) -> str:
        """Measurement protocol in a few words."""
        return (
            f"{self.tokens:,} tokens scored in {self.windows:,} window{'s' if self.windows > 1 else ''} "
            f"of {self.context}, stride {self.stride}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """Window of the tokens `start` to `end` of a text; those before `first_scored` are context only."""

    start: int
    end: int
    first_scored: int


def windows(length: int, *, context: int, stride: int) -> Iterator[Window]:
    """Split a text into windows of `context` tokens, `stride` apart, that score each token once.

    The first token of a window has no predecessor there, so non-overlapping windows
    (`stride == context`) leave one token each unscored; with a smaller stride every token but the first
    of the text is scored, most of them with at least `context - stride` tokens before them.

    Args:
        length: tokens of the text.
        context: tokens of a window, at least 2.
        stride: from 1 to `context`.

    Raises:
        ValueError: a value is out of its range.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, one to see and one to predict, got {context}.")
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride must lie between 1 and the context {context}, got {stride}: a larger one skips tokens."
        )
    scored = 0  # tokens before this one are done
    for start in range(0, length - 1, stride):
        end = min(start + context, length)
        yield Window(start, end, max(scored, start + 1))
        scored = end
        if end == length:
            return


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Perplexity:
    """Measure the perplexity of a text, `exp(-1/N sum log p(token | tokens before it in its window))`.

    No token is added; the model sees the windows as they are cut, each from position 0. The loss is summed
    in float64 from float32 log-probabilities, whatever the model's dtype.

    Args:
        model: maps `input_ids: (batch, length)` to an object or mapping whose `logits` have the shape
            `(batch, length, vocabulary)`, causally. Its training flag is put back afterwards.
        tokens: the text, shape `(length,)`, integers.
        context: tokens of a window.
        stride: step between windows; `context` (no overlap) if absent.
        batch_size: most windows run at once; fewer where their logits would exceed 64 MB.
        progress: show a progress bar.

    Raises:
        ShapeError: `tokens` is not a vector of at least two tokens.
        ValueError: context, stride or batch size out of range, or more context than the model has positions.
        TargetError: the model's own loss scores a label at its own position, so the model may see it.
        NonFiniteError: the model's loss is NaN or infinite.
    """
    if tokens.ndim != 1 or len(tokens) < 2 or tokens.is_floating_point():
        raise ShapeError(
            "perplexity needs at least two token ids of shape (length,), "
            f"got {tuple(tokens.shape)} {tokens.dtype}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    _check_next_token(model)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise ValueError(f"context {context} is more than the {positions} positions this model has.")
    stride = context if stride is None else stride
    cut = list(windows(len(tokens), context=context, stride=stride))
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    loss, count = 0.0, 0
    bar = progress_bar(total=len(cut), desc="perplexity", unit="window", disable=not progress)
    with in_eval_mode(model), bar:
        for batch in _batches(cut, _fitting(model, context, batch_size)):
            ids = torch.stack([tokens[w.start : w.end] for w in batch])
            logits = field(model(input_ids=ids), "logits")
            for row, window in enumerate(batch):
                first = window.first_scored - window.start
                predicted = logits[row, first - 1 : -1].float()  # shape: (scored, vocabulary)
                losses = nn.functional.cross_entropy(predicted, ids[row, first:], reduction="none")
                loss += float(losses.double().sum())
                count += len(losses)
            bar.update(len(batch))
    if not math.isfinite(loss):
        raise NonFiniteError(f"The model's loss over this text is {loss}: its weights or dtype are broken.")
    mean = loss / count
    return Perplexity(math.exp(min(mean, 700.0)), mean, count, len(cut), context, stride)


def _check_next_token(model: nn.Module) -> None:
    """Raise TargetError if a model is of a class that scores each label at its own position."""
    if scores_next_token(model) is False:
        raise TargetError(
            f"The loss of {type(model).__name__} scores each label at its own position, so its logits are no "
            "predictions of the next token and have no perplexity. Compare such models by their own loss, or "
            "pass a causal language model."
        )


def _batches(cut: list[Window], size: int) -> Iterator[list[Window]]:
    """Group neighbouring windows of one length; only the last can be shorter."""
    batch: list[Window] = []
    for window in cut:
        if batch and (len(batch) == size or window.end - window.start != batch[0].end - batch[0].start):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _fitting(model: nn.Module, context: int, batch_size: int) -> int:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return max(1, min(batch_size, _LOGITS // (context * vocabulary)))
