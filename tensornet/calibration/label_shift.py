"""Label convention of a model, tested with its own loss: is a label scored at its position or one before?"""

import math
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode
from tensornet.calibration.batches import IGNORED, Batch, run_model, takes_labels
from tensornet.errors import CalibrationWarning

#: Positions that get a label in a trial.
_POSITIONS = 64

#: Label convention found by the own loss of each model, which is tested once.
_ANSWERS: "WeakKeyDictionary[nn.Module, bool | None]" = WeakKeyDictionary()
#: Label convention assumed for models whose loss does not decide it.
_ASSUMED: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def labels_are_shifted(model: nn.Module, batch: Batch, labels: Tensor, output: Any = None) -> bool:
    """Return True if labels are scored one position earlier, by the model's own loss if it has one.

    Where it has none, labels that are the input tokens are shifted, since every model sees those; labels of
    their own are scored in their place. A `CalibrationWarning` says so once for each model.

    Args:
        model, batch, labels, output: see `predicts_next_token`.

    Example:
        >>> from tensornet.calibration.label_shift import labels_are_shifted
        >>> ids = torch.tensor([[0, 1, 2, 3]])
        >>> labels_are_shifted(torch.nn.Embedding(5, 5), {"input_ids": ids}, ids)  # no loss: the default
        True
    """
    found = predicts_next_token(model, batch, labels, output)
    if found is None and model not in _ASSUMED:
        inputs = batch.get("input_ids")
        counted = labels != IGNORED
        same = isinstance(inputs, Tensor) and inputs.shape == labels.shape
        _ASSUMED[model] = same and bool((inputs == labels)[counted].all())  # type: ignore[index]
        how = "the input tokens, so the next token is scored" if _ASSUMED[model] else "scored in their place"
        warnings.warn(
            f"{type(model).__name__} computes no loss that shows whether it predicts a label at its position "
            f"or at the one before. Assumed: the labels are {how}. If that is wrong, pass loss_fn, a "
            "function (model, batch) -> losses of shape (tokens,).",
            CalibrationWarning,
            stacklevel=3,
        )
    return _ASSUMED[model] if found is None else found


def same_convention(copy: nn.Module, model: nn.Module) -> None:
    """Copy the known label convention of a model to its copy, so that both are scored alike."""
    if model in _ANSWERS:
        _ANSWERS[copy] = _ANSWERS[model]
    if model in _ASSUMED:
        _ASSUMED[copy] = _ASSUMED[model]


def predicts_next_token(model: nn.Module, batch: Batch, labels: Tensor, output: Any = None) -> bool | None:
    """Compare the loss that a model computes from labels with the cross entropy of each convention.

    To explain how this works: the model is run on labels that tell the two conventions apart as far as its
    logits allow, once on labels that are likely where they stand and unlikely one position earlier, and once
    on the opposite. The difference of its two losses then lies near that of one convention. What a model
    adds to its loss whatever the labels (a router's balance) cancels, and a factor leaves the sign.

    Args:
        model: any model; nothing is asked of its class or its name.
        batch: one batch.
        labels: shape `(rows, tokens)`; positions it ignores stay ignored.
        output: of the model for this batch with logits, which saves a run of it.

    Returns:
        True where the logits of position `t` are scored on label `t + 1`, False where on label `t`; None
        where the model computes no loss from labels, or one that fits neither.

    Example:
        >>> from torch import nn
        >>> from tensornet.calibration.label_shift import predicts_next_token
        >>> class Counts(nn.Module):
        ...     def forward(self, input_ids, labels=None):
        ...         logits = nn.functional.one_hot(input_ids, 5).float()
        ...         loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        ...         return {"logits": logits, "loss": loss}
        >>> ids = torch.tensor([[0, 1, 2, 3]])
        >>> predicts_next_token(Counts(), {"input_ids": ids}, ids)
        False
    """
    if model in _ANSWERS:
        return _ANSWERS[model]
    chosen = _positions(batch, labels)
    if len(chosen[0]) == 0:  # another batch may tell
        return None
    with in_eval_mode(model):
        _ANSWERS[model] = _ask(model, batch, labels, chosen, output)
    return _ANSWERS[model]


@torch.no_grad()
def _ask(
    model: nn.Module, batch: Batch, labels: Tensor, chosen: tuple[Tensor, Tensor], first: Any
) -> bool | None:
    if not takes_labels(model):
        return None
    if first is None:
        first = run_model(model, {**batch, "labels": labels})
    likely = _trial(model, batch, labels, chosen, first, 1)
    unlikely = None if likely is None else _trial(model, batch, labels, chosen, first, -1)
    if likely is None or unlikely is None:
        return None
    own, here, before = (a - b for a, b in zip(likely, unlikely, strict=True))
    # 0 where labels are scored in their place, 1 where shifted; NaN answers nothing.
    place = (own - here) / (before - here) if before != here else math.nan
    return place > 0.5 if abs(place - 0.5) >= 0.25 else None


def _positions(batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select rows and columns of scored labels that have a token before them."""
    counted = labels != IGNORED
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        counted = counted & (mask != 0) & (mask.roll(1, 1) != 0)
    rows, columns = counted[:, 1:].nonzero(as_tuple=True)
    return rows[:_POSITIONS], columns[:_POSITIONS] + 1


def _trial(
    model: nn.Module, batch: Batch, labels: Tensor, chosen: tuple[Tensor, Tensor], output: Any, sign: int
) -> tuple[float, float, float] | None:
    """Score labels that are likely under one convention and unlikely under the other.

    Returns:
        The model's own loss, the cross entropy in place, and that with labels shifted; None without a loss.
    """
    rows, columns = chosen
    here, before = _log_probabilities(output, chosen)
    tried = torch.full_like(labels, IGNORED)
    tried[rows, columns] = (sign * (here - before)).argmax(-1).to(labels.dtype)
    output = run_model(model, {**batch, "labels": tried})  # labels may be what a decoder reads
    if field(output, "loss") is None:
        return None
    wanted = tried[rows, columns, None].long()
    in_place, shifted = (-float(x.gather(-1, wanted).mean()) for x in _log_probabilities(output, chosen))
    return float(field(output, "loss").float().mean()), in_place, shifted


def _log_probabilities(output: Any, chosen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute log probabilities at the chosen positions and one before, shape `(positions, classes)`."""
    rows, columns = chosen
    logits = field(output, "logits")
    here, before = (logits[rows, places].float().log_softmax(-1) for places in (columns, columns - 1))
    return here, before


def field(output: Any, name: str) -> Any:
    """Return a named field of a model output, an object or a mapping; None if the field is missing."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
