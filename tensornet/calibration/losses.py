"""Losses of single tokens, the gradients of which calibration collects.

A loss function maps `(model, batch)` to the losses of all tokens that have one, shape `(tokens,)`, padding
left out. Any function of that form can be given to `calibrate`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.calibration.batches import Batch, run_model
from tensornet.errors import TargetError

TokenLosses = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100


def label_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of the labels under the model's logits.

    Labels are `batch["labels"]`, else the unpadded `input_ids`. Causal models (all but encoder-decoder and
    masked ones) are scored on the next token, but not from padding. Where labels and logits do not match
    token by token, the model's own mean loss counts once for each row of the batch. A model that returns one
    tensor `(..., classes)` is scored at each label `(...)` there is; labels that are numbers of the shape of
    that tensor are predicted: the loss of each row is then the mean squared difference.

    Raises:
        TargetError: the model returns neither logits nor a loss, or one tensor that no labels fit.
    """
    labels, logits, output = _predict(model, batch)
    if isinstance(output, Tensor) and logits is None:
        return _squared(model, output, labels)
    if logits is None or labels is None:
        if (loss := getattr(output, "loss", None)) is not None:
            return loss.expand(len(next(iter(batch.values()))))
        raise TargetError(
            f"{type(model).__name__} returns neither logits for each token nor a loss, so nothing says what "
            "an error costs. For hidden states there is tensornet.compression.cosine_losses. Calibrate it "
            "with a loss of your own: stats = tensornet.calibrate(model, batches, loss_fn=...), where "
            "loss_fn is a function (model, batch) -> losses of shape (tokens,), then "
            "tensornet.compress(model, config, calibration=stats)."
        )
    logits, labels = _aligned(model, batch, logits, labels)
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def _squared(model: nn.Module, output: Tensor, labels: Tensor | None) -> Tensor:
    """Mean squared difference of each row of an output from labels of its shape."""
    if labels is None or labels.shape != output.shape or not labels.is_floating_point():
        what = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)} and {labels.dtype}"
        raise TargetError(
            f"{type(model).__name__} returns a tensor of shape {tuple(output.shape)}, and the batch has "
            f"{what}; so nothing says what an error costs. Pass pairs (inputs, labels), where labels are "
            "indices of classes, one for each row of logits, or numbers of the shape of the output; or "
            "choose objective='activation', which needs no loss; or give tensornet.calibrate a loss_fn, a "
            "function (model, batch) -> losses of shape (tokens,), and pass the statistics on."
        )
    return (output - labels).square().reshape(len(output), -1).mean(-1)


def sampled_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of labels drawn from the model itself: gradients then give the true Fisher matrix.

    The Fisher matrix equals the curvature of the divergence from the model's own predictions, so it does
    not shrink where the model already predicts its text well. A classifier of whole rows has one loss for
    each row.
    """
    labels, logits, output = _predict(model, batch)
    if logits is not None and labels is not None:
        logits, _ = _aligned(model, batch, logits, labels)
    elif (logits := _logits(output)) is None or logits.ndim != 2 or logits.shape[1] < 2 or _numbers(labels):
        raise TargetError(
            f"{type(model).__name__} returns no logits for each token or row to draw labels from; use "
            "label_losses or pass a loss function of your own."
        )
    with torch.no_grad():
        drawn = torch.multinomial(logits.float().softmax(-1), 1).squeeze(-1)
    return nn.functional.cross_entropy(logits, drawn, reduction="none")


def cosine_losses(model: nn.Module, batch: Batch) -> Tensor:
    """For encoders: a random projection of each row's mean-pooled, normalised output, shape `(rows,)`.

    With projections drawn from a normal distribution the second moment of the gradients is that of the
    Jacobian, so the predicted rise of this "loss" is half the squared distance between old and new unit
    vectors: one minus their cosine.
    """
    return _projected(pooled(run_model(model, batch), batch))


@torch.no_grad()
def default_losses(model: nn.Module, batch: Batch, fisher: str) -> TokenLosses:
    """What a model is judged by that nobody named a loss for, from what it returns for a batch.

    `cosine_losses` where that is hidden states alone; else `sampled_losses` for `fisher="sampled"`, or
    `label_losses`.
    """
    if _only_hidden(_predict(model, batch)[2]):
        return cosine_losses
    return sampled_losses if fisher == "sampled" else label_losses


def losses_against(teacher: nn.Module) -> TokenLosses:
    """What compressed models are judged by beside a dense one, with the same labels each time.

    `label_losses`; for models that return hidden states alone, one minus the cosine of each row's mean-pooled
    output with the teacher's, shape `(rows,)`.
    """

    judged_by: TokenLosses | None = None

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal judged_by
        if judged_by is None:  # from the first batch; the teacher of a language model then runs no more
            judged_by = default_losses(teacher, batch, "labels")
        if judged_by is not cosine_losses:
            return judged_by(model, batch)
        with torch.no_grad():
            wanted = pooled(run_model(teacher, batch), batch)
        return 1 - (pooled(run_model(model, batch), batch) * wanted).sum(-1)

    return losses


def _only_hidden(output: Any) -> bool:
    judged = (getattr(output, name, None) is not None for name in ("logits", "loss"))
    return getattr(output, "last_hidden_state", None) is not None and not any(judged)


def pooled(output: Any, batch: Batch) -> Tensor:
    """Means of the hidden states of each row, padding left out, as unit vectors."""
    hidden = output.last_hidden_state.float()  # shape: (rows, tokens, width)
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        mask = torch.ones_like(hidden[..., 0])
    weights = mask[..., None].to(hidden)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _projected(unit: Tensor) -> Tensor:
    return (unit * torch.randn_like(unit)).sum(-1)


def token_mask(batch: Batch, shape: torch.Size) -> Tensor | None:
    """Which positions of a tensor with these leading dimensions are tokens; None if all are.

    Padding is what `attention_mask` says, or, for decoders and where there is no such mask, what the labels
    ignore. Where an encoder's and a decoder's mask have one shape, a position counts if either says so.
    Some models (OPT) put all rows of a batch into one dimension inside; masks are put into one likewise.
    """
    encoder, decoder, labels = (
        _in_shape(batch.get(name), shape) for name in ("attention_mask", "decoder_attention_mask", "labels")
    )
    masks = [mask.bool() for mask in (encoder, decoder) if mask is not None and mask.shape == shape]
    if labels is not None and decoder is None and (encoder is None or encoder.shape != shape):
        labelled = labels != IGNORED
        if labelled.shape == shape and bool(labelled.any()):
            masks.append(labelled)
    return torch.stack(masks).any(0) if masks else None


def _in_shape(values: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Values of `(rows, tokens)` in one dimension where that is the shape asked for."""
    if values is not None and len(shape) == 1 and values.ndim == 2 and values.numel() == shape[0]:
        return values.reshape(-1)
    return values


def _logits(output: Any) -> Tensor | None:
    """What a model returns for classes: its logits, or all of it if that is one tensor."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def _numbers(labels: Tensor | None) -> bool:
    """Whether labels are values to be predicted instead of classes."""
    return labels is not None and labels.is_floating_point()


def _predict(model: nn.Module, batch: Batch) -> tuple[Tensor | None, Tensor | None, Any]:
    """`(labels, logits for each label or None, all that the model returns)`."""
    labels = batch.get("labels")
    if labels is None and "input_ids" in batch:
        labels = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:  # others say which tokens see which
            labels = labels.masked_fill(mask == 0, IGNORED)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            batch = {**batch, "labels": labels}
    output = run_model(model, batch)
    if isinstance(output, Tensor):  # it may be hidden states: only labels that were given make logits of it
        labels = batch.get("labels")
    logits = _logits(output)
    matches = logits is not None and labels is not None and logits.shape[:-1] == labels.shape
    matches = matches and not _numbers(labels)
    return labels, logits if matches else None, output


def _aligned(model: nn.Module, batch: Batch, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `(tokens, classes)` beside the labels `(tokens,)` they predict, ignored ones left out."""
    mask = batch.get("attention_mask")
    causal = _is_causal(model) and labels.ndim == 2
    padded = causal and mask is not None and mask.shape == labels.shape
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORED
    if padded:  # on the left: what padding says of the first token is not what the model says of a text
        keep &= batch["attention_mask"][:, :-1] != 0
    return logits[keep].float(), labels[keep].long()  # indices may be of 32 bits, classes may not


def _is_causal(model: nn.Module) -> bool:
    """Hugging Face calls everything with a next-token loss `...CausalLM` or `...LMHeadModel`."""
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name
