"""Measure the loss increase of a compressed model over its dense model.

Losses are compared token by token on the same text. If a model predicts tokens, the Kullback-Leibler
divergence of the predictions is measured too. First-order effects dominate the change of a single token's
loss, but cancel when losses with the errors +E and -E are averaged. So if the dense model is available, the
compressed model is also run with opposite errors. The output of each compressed layer is then replaced by
twice the output of the dense layer minus the output of the compressed layer.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode, uncompiled, without_cache
from tensornet.calibration.batches import Batch, BatchLike, BatchSample, as_batch, some_rows
from tensornet.calibration.losses import TokenLosses, field, losses_against
from tensornet.errors import CalibrationWarning, TargetError
from tensornet.nn.module import NetworkModule
from tensornet.softmax_losses import kl_divergences

#: Largest number of tokens (or of rows, for models without tokens) on which the loss for a report is
#: measured, and largest number of batches from which these tokens are taken.
REPORT_TOKENS, REPORT_BATCHES = 2048, 8
#: Largest number of logits of the dense model that are stored for the divergence (128 MB in float32).
_LOGITS = 1 << 25
#: A loss increase is far above its prediction if the increase minus `_ERRORS` standard errors exceeds
#: both `_FLOOR` and `_TIMES` times the prediction. Standard errors need at least `_LEAST` losses.
_TIMES, _FLOOR, _ERRORS, _LEAST = 3.0, 0.02, 3.0, 8
#: Exceptions that a model raises if it has no loss or does not run on a part of a batch; then nothing is
#: measured.
_NOT_MEASURED = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True)
class LossIncrease:
    """Measured loss increase of a compressed model.

    Args:
        mean: mean loss increase, in nats if losses are cross entropies.
        stderr: standard error of `mean`.
        tokens: number of losses, one for each token (for each row in models without tokens).
        source: name of the data.
        dense_loss: mean loss of the dense model; 0 if losses are distances from its outputs.
        kl_mean: mean Kullback-Leibler divergence of the predictions from those of the dense model, in nats;
            None if the model does not predict tokens.
        kl_stderr: standard error of `kl_mean`.

    Example:
        >>> from tensornet.compression.loss_increase import LossIncrease
        >>> print(LossIncrease(0.0312, 0.002, 2048, "calibration data", kl_mean=0.034, kl_stderr=0.001))
        0.0312 (standard error 0.002, 2,048 losses on calibration data; KL divergence 0.0340)
    """

    mean: float
    stderr: float
    tokens: int
    source: str = "calibration data"
    dense_loss: float = 0.0
    kl_mean: float | None = None
    kl_stderr: float | None = None

    @classmethod
    def of(cls, increases: Tensor, **fields: Any) -> "LossIncrease":
        """Make a `LossIncrease` from the loss increases of single tokens, shape `(tokens,)`.

        `fields` are the values of the remaining fields.
        """
        return cls(*mean_and_error(increases), len(increases), **fields)

    def __str__(self) -> str:
        noise = f"standard error {self.stderr:.2g}, {self.tokens:,} losses on {self.source}"
        divergence = "" if self.kl_mean is None else f"; KL divergence {self.kl_mean:.4f}"
        return f"{self.mean:.4f} ({noise}{divergence})"

    @property
    def loss(self) -> float:
        """Mean loss of the compressed model."""
        return self.dense_loss + self.mean

    @property
    def significant(self) -> bool:
        """True if the mean exceeds twice its standard error."""
        return self.mean > 2 * self.stderr

    @property
    def least(self) -> float:
        """Mean minus three standard errors; infinite if the loss is not finite."""
        least = self.mean - _ERRORS * self.stderr
        return least if math.isfinite(least) else math.inf

    def exceeds(self, predicted: float) -> bool:
        """Return True if the loss increase is far above a predicted one."""
        return self.least > max(_TIMES * predicted, _FLOOR)


@dataclass(frozen=True)
class RecordedLosses:
    """Losses of a dense model, recorded before the model is compressed in place, for later comparison.

    Args:
        batches: keyword arguments of the model for each batch.
        loss_fn: the loss function; it may have stored outputs of the dense model.
        losses: losses of all batches, shape `(losses,)`.
        logits: logits of the dense model for the first tokens, one tensor of shape `(tokens, vocabulary)` for
            each batch.
        source: name of the text, for reports.
    """

    batches: Sequence[Batch]
    loss_fn: TokenLosses
    losses: Tensor
    logits: Sequence[Tensor]
    source: str


def record_losses(
    model: nn.Module,
    batches: Iterable[BatchLike],
    *,
    loss_fn: TokenLosses | None = None,
    source: str = "calibration data",
    tokens: int | None = REPORT_TOKENS,
) -> RecordedLosses | None:
    """Record the losses of a dense model before it is compressed in place, as a reference for `measure`.

    Args:
        model: the dense model.
        batches: batches as for `calibrate`.
        loss_fn: loss function (see `tensornet.calibration.losses`); `losses_against(model)` if absent.
        source: name of the text, for reports.
        tokens: approximate number of tokens, from the first rows of a few batches; None uses all batches.

    Returns:
        The losses, for `measure`; None if there are no batches, or if the model has no loss or does not run
        on a part of a batch.

    Example:
        >>> from tensornet.compression.loss_increase import measure, record_losses
        >>> model = torch.nn.Linear(4, 3)
        >>> before = record_losses(model, [(torch.randn(16, 4), torch.arange(16) % 3)])
        >>> with torch.no_grad():
        ...     _ = model.weight.mul_(10)
        >>> measure(model, before).tokens
        16
    """
    sample = BatchSample(batches)
    every: list[BatchLike] = []
    for batch in sample:  # iterate only once, since some loaders cannot be iterated over again
        every += [batch] if tokens is None else []
    if not sample.kept:
        return None
    loss_fn = loss_fn or losses_against(model, remember=True)
    try:
        device = next(model.parameters()).device
        if tokens is None:
            parts = [as_batch(batch, model, device) for batch in every]
        else:
            parts = some_rows(sample.kept, model, tokens, parts=REPORT_BATCHES)
        losses, logits = _run(model, parts, loss_fn, _LOGITS)
    except _NOT_MEASURED:
        return None
    return RecordedLosses(parts, loss_fn, losses, logits, source) if len(losses) else None


def measure(
    model: nn.Module,
    reference: nn.Module | RecordedLosses,
    batches: Iterable[BatchLike] = (),
    *,
    loss_fn: TokenLosses | None = None,
    source: str = "validation data",
) -> LossIncrease:
    """Measure the loss increase of a compressed model over its dense model.

    Args:
        model: the compressed model.
        reference: the dense model, or the result of `record_losses`. With the dense model, first-order
            effects are removed as described at the top of this module, unless they exceed twice their
            standard error.
        batches: batches as for `calibrate`, all of which are used; ignored if `reference` is a result of
            `record_losses`, which contains its batches.
        loss_fn: loss function without random numbers (see `tensornet.calibration.losses`);
            `losses_against(reference)` if absent.
        source: name of the text, for reports.

    Raises:
        TargetError: the model has no loss on the batches.

    Example:
        >>> import copy
        >>> from tensornet.compression import measure
        >>> dense = torch.nn.Sequential(torch.nn.Linear(8, 3))
        >>> batches = [(torch.randn(32, 8), torch.arange(32) % 3)]
        >>> measure(copy.deepcopy(dense), dense, batches).mean
        0.0
    """
    recorded: RecordedLosses | None
    if isinstance(reference, RecordedLosses):
        recorded = reference
    else:
        recorded = record_losses(reference, batches, loss_fn=loss_fn, source=source, tokens=None)
    if recorded is None:
        raise TargetError(
            "No loss can be measured: pass batches on which the model has a loss, as a list or another "
            "collection that can be iterated over again."
        )
    losses, logits = _run(model, recorded.batches, recorded.loss_fn, _LOGITS)
    if isinstance(reference, nn.Module):
        with opposite_errors(reference, model):
            mirrored, _ = _run(model, recorded.batches, recorded.loss_fn, 0)
        odd = (losses - mirrored) / 2
        mean, error = mean_and_error(odd)
        if abs(mean) <= 2 * error:
            losses = losses - odd
    divergences = [
        kl_divergences(new, old).double().cpu()
        for new, old in zip(logits, recorded.logits, strict=False)
        if new.shape == old.shape
    ]
    kl = mean_and_error(torch.cat(divergences)) if divergences else (None, None)
    return LossIncrease.of(
        losses - recorded.losses,
        source=recorded.source,
        dense_loss=float(recorded.losses.mean()),
        kl_mean=kl[0],
        kl_stderr=kl[1],
    )


@torch.no_grad()
def _run(
    model: nn.Module, batches: Sequence[Batch], loss_fn: TokenLosses, numbers: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the losses of all tokens, and the logits of the first tokens: at most `numbers` values."""
    losses, first = [], []
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        logits = field(output, "logits")
        if not seen and isinstance(logits, Tensor) and logits.ndim == 3:
            seen.append(logits)

    # Calibration has already warned about these batches, so the same warnings are not given again.
    with in_eval_mode(model), uncompiled(), without_cache(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        for batch in batches:
            handle = model.register_forward_hook(keep) if numbers else None
            try:
                losses.append(loss_fn(model, batch).double().flatten().cpu())
            finally:
                if handle is not None:
                    handle.remove()
            for logits in seen:
                ids, mask, width = batch.get("input_ids"), batch.get("attention_mask"), logits.shape[-1]
                if isinstance(ids, Tensor) and ids.shape == logits.shape[:2] and numbers >= width:
                    masked = isinstance(mask, Tensor) and mask.shape == ids.shape
                    kept = (logits[mask != 0] if masked else logits).reshape(-1, width)[: numbers // width]
                    first.append(kept.clone())  # a view would keep all logits in memory
                    numbers -= kept.numel()
            seen.clear()
    return torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float64), first


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Compute the mean of a vector of values, and the standard error of this mean."""
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), error


@contextmanager
def opposite_errors(model: nn.Module, compressed: nn.Module) -> Iterator[None]:
    """Return a context in which the output errors of all compressed layers have the opposite sign.

    Args:
        model: the dense model.
        compressed: the same model with some layers replaced.
    """
    dense = dict(model.named_modules())

    def mirror(module: nn.Module) -> Any:
        return lambda _, args, kwargs, output: 2 * module(*args, **kwargs) - output

    handles = [
        module.register_forward_hook(mirror(dense[name]), with_kwargs=True)
        for name, module in compressed.named_modules()
        if isinstance(module, NetworkModule) and name in dense
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def light_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model; the copy shares all parameters and buffers with the model."""
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def warn_of_loss(measured: LossIncrease, predicted: float | None, allowed: float | None) -> None:
    """Warn if a measured loss increase is far above the predicted one or significantly above the allowed one.

    Args:
        measured: loss increase of the compressed model.
        predicted: loss increase that the plan predicts; None if there is no prediction.
        allowed: the budget `loss_increase`; None if there is none.
    """
    few = measured.tokens < _LEAST and math.isfinite(measured.mean)
    far = predicted is not None and measured.exceeds(predicted)
    over = allowed is not None and measured.least > allowed
    if few or not (far or over):
        return
    larger = "allow more bytes" if allowed is None else "set a budget of bytes (bits_per_weight=)"
    said = f"predicted {predicted:.2g}" if predicted is not None else "no prediction"
    budget = "" if allowed is None else f", loss_increase={allowed:g} allowed"
    text = (
        f"Compression increased the loss by {measured.mean:.3g} on {measured.source} "
        f"(before {measured.dense_loss:.2g}, {said}{budget})"
    )
    if far and measured.dense_loss and measured.source == "calibration data":
        text += (
            ": the model was probably trained on these data and fits them, so that their gradients are too "
            f"small to predict the loss. Calibrate with other data, or {larger}."
        )
    else:
        text += f": predictions are too low for errors this large. To allow smaller errors, {larger}."
    warnings.warn(text, CalibrationWarning, stacklevel=2)
