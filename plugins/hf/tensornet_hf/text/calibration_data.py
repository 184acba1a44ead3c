"""Batches of a text to calibrate and heal on: windows, pairs or passages, by kind of model.

* Causal language models read windows of the text and are scored on the next token.
* Encoder-decoders read the lines of the text. The answer follows a tab, or is the model's own.
* Encoders read passages. With a masked language model's head they are scored on hidden tokens, with a
  classifier's on their own predictions, and without a head by the cosine of their pooled outputs.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensornet.calibration import cosine_losses, label_losses, sampled_losses
from tensornet.calibration.batches import Batch, BatchLike, as_batch
from tensornet.calibration.losses import IGNORED, TokenLosses
from tensornet.errors import TargetError
from tensornet_hf.text.tokens import load_tokenizer, token_ids, usual_context

#: Longest line or passage, in tokens; longer ones are truncated.
PASSAGE = 128
#: Longest answer of an encoder-decoder, in tokens.
ANSWER = 64
#: Passages of a batch.
ROWS = 16
#: Fraction of the tokens that are masked for a masked language model, as in its training.
HIDDEN = 0.15


@dataclass(frozen=True)
class CalibrationData:
    """Calibration batches of a model, and the loss whose curvature gives the sensitivity to errors.

    Args:
        batches: keyword arguments of the model, or token indices.
        loss_fn: see `tensornet.calibration.losses`.
        tokens: number of tokens that the model reads, without padding.
    """

    batches: tuple[BatchLike, ...]
    loss_fn: TokenLosses
    tokens: int


def calibration_data(
    model: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    tokens: int | None = None,
    window: int = 512,
    window_batch: int = 1024,
) -> CalibrationData:
    """Make batches of the beginning of a text for a model.

    Args:
        model: dense.
        folder: holds its tokenizer.
        text: similar to what the model will read.
        tokens: about how much of it to use; all if absent.
        window: longest window of a causal model.
        window_batch: tokens of a batch of a causal model.

    Raises:
        TargetError: a model for which text alone says too little; names what to do instead.
        ValueError: the text is too short.
    """
    if model.config.is_encoder_decoder:
        tokenizer = _tokenizer_of(model, folder)
        return _collected(_pairs(model, tokenizer, _lines(text)), sampled_losses, tokens)
    if model.can_generate():
        windows = text_windows(model, folder, text, limit=window, tokens=tokens)
        batches = windows.split(max(1, window_batch // windows.shape[1]))
        return CalibrationData(tuple(batches), label_losses, windows.numel())
    tokenizer = _tokenizer_of(model, folder)
    passages = _passages(model, tokenizer, text)
    if scores_tokens(type(model)):
        return _collected(_hidden(passages, tokenizer), sampled_losses, tokens)
    return _collected(passages, _losses_of(model, tokenizer), tokens)


def scores_tokens(kind: type[PreTrainedModel]) -> bool:
    """Return True if models of a class are scored on tokens, so that a perplexity describes them."""
    return kind.can_generate() or kind.__name__.endswith("ForMaskedLM")


def text_windows(
    model: PreTrainedModel, folder: Path, text: str, *, limit: int, tokens: int | None = None
) -> Tensor:
    """Split the beginning of a text into windows of at most `limit` tokens, one in each row.

    Raises:
        ValueError: the text is shorter than one window.
    """
    context = usual_context(model, limit=limit)
    ids = token_ids(load_tokenizer(folder), text)[:tokens]
    count = len(ids) // context
    if count == 0:
        raise ValueError(
            f"The text has {len(ids)} tokens, less than one window of {context}; give more text."
        )
    return ids[: count * context].reshape(count, context)


def _tokenizer_of(model: PreTrainedModel, folder: Path) -> Any:
    if model.main_input_name != "input_ids":
        raise TargetError(
            f"{type(model).__name__} reads {model.main_input_name}, not text. Calibrate it in Python with "
            "batches of its own: stats = tensornet.calibrate(model, batches, loss_fn=...), then "
            "tensornet.compress(model, config, calibration=stats)."
        )
    return load_tokenizer(folder)


def _losses_of(model: PreTrainedModel, tokenizer: Any) -> TokenLosses:
    """Choose the loss of an encoder from its output for one word.

    Raises:
        TargetError: neither classes nor hidden states.
    """
    with torch.no_grad():
        output = model(**as_batch(_read(model, tokenizer, ["word"]), model, model.device))
    logits = getattr(output, "logits", None)
    if logits is not None and logits.shape[-1] > 1:
        return sampled_losses
    if logits is None and getattr(output, "last_hidden_state", None) is not None:
        return cosine_losses
    raise TargetError(
        f"{type(model).__name__} returns neither classes nor hidden states, so a text does not say what an "
        "error costs. Calibrate it in Python with a loss of your own: stats = tensornet.calibrate(model, "
        "batches, loss_fn=...), then tensornet.compress(model, config, calibration=stats)."
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _passages(model: PreTrainedModel, tokenizer: Any, text: str) -> Iterator[Batch]:
    """Read paragraphs, or lines if there is no blank line."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    parts = parts if len(parts) > 1 else _lines(text)
    for start in range(0, len(parts), ROWS):
        yield _read(model, tokenizer, parts[start : start + ROWS])


def _pairs(model: PreTrainedModel, tokenizer: Any, lines: Sequence[str]) -> Iterator[Batch]:
    """Read lines with their answers: the text after the tab, or the model's own output."""
    given = all(line.count("\t") == 1 for line in lines)
    for start in range(0, len(lines), ROWS):
        part = lines[start : start + ROWS]
        batch = _read(model, tokenizer, [line.partition("\t")[0] if given else line for line in part])
        if given:
            answers = _read(model, tokenizer, [line.partition("\t")[2] for line in part])
            labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, IGNORED)
        else:
            labels = _own_answers(model, batch)
        yield {**batch, "labels": labels}


@torch.no_grad()
def _own_answers(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Generate greedy answers as labels; tokens after the end of an answer are ignored."""
    generate: Any = model.generate
    inputs = as_batch(batch, model, model.device)
    labels = generate(**inputs, max_new_tokens=ANSWER, do_sample=False, num_beams=1)[:, 1:].cpu()
    end = model.generation_config.eos_token_id
    ends = torch.tensor(end if isinstance(end, list) else [-1 if end is None else end], device=labels.device)
    ended = torch.isin(labels, ends).cumsum(1)
    return labels.masked_fill(ended - torch.isin(labels, ends).long() > 0, IGNORED)


def _hidden(passages: Iterator[Batch], tokenizer: Any) -> Iterator[Batch]:
    """Mask some tokens of passages reproducibly; only masked tokens have labels."""
    if tokenizer.mask_token_id is None:
        raise TargetError(
            "The tokenizer of this masked language model has no mask token; calibrate it in Python with "
            "batches of its own, tensornet.calibrate(model, batches)."
        )
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(tokenizer.all_special_ids, device="cpu")
    for batch in passages:
        ids = batch["input_ids"]
        free = (batch["attention_mask"] == 1) & ~torch.isin(ids, special)
        chosen = (torch.rand(ids.shape, generator=generator, device="cpu") < HIDDEN) & free
        if not bool(chosen.any()):
            continue
        labels = ids.masked_fill(~chosen, IGNORED)
        yield {**batch, "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id), "labels": labels}


def _read(model: PreTrainedModel, tokenizer: Any, parts: list[str]) -> dict[str, Tensor]:
    """Tokenize passages to a padded batch of model arguments, `attention_mask` among them."""
    length = usual_context(model, limit=PASSAGE)
    return dict(
        tokenizer(
            parts,
            padding=True,
            truncation=True,
            max_length=length,
            return_attention_mask=True,
            return_tensors="pt",
        )
    )


def _collected(batches: Iterator[Batch], loss_fn: TokenLosses, tokens: int | None) -> CalibrationData:
    """Collect batches until they hold enough tokens."""
    kept, count = [], 0
    for batch in batches:
        kept.append(batch)
        count += int(batch["attention_mask"].sum())
        if tokens is not None and count >= tokens:
            break
    if not kept:
        raise ValueError("The text holds no line that the model can read; give more text.")
    return CalibrationData(tuple(kept), loss_fn, count)
