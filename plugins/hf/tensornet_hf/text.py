"""Text of a model folder: tokens, batches to calibrate and heal on, and generation.

* Causal language models read windows of the text and are scored on the next token.
* Encoder-decoders read the lines of the text. The answer follows a tab, or is the model's own.
* Encoders read passages. With a masked language model's head they are scored on hidden tokens, with a
  classifier's on their own predictions, and without a head by the cosine of their pooled outputs.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from tensornet.calibration import cosine_losses, label_losses, sampled_losses
from tensornet.calibration.batches import Batch, BatchLike, as_batch
from tensornet.calibration.losses import IGNORED, TokenLosses
from tensornet.errors import FormatError, TargetError
from tensornet.nn.extension import ProvidedData
from tensornet_hf.embedded import calibration_text


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text.")
    return text


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        FormatError: transformers can read no tokenizer there.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FormatError(
            f"{folder} has no tokenizer that can be read: {first_line(error)}. "
            "Copy the tokenizer files of the original model into it."
        ) from error
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
        # transformers makes such a tokenizer if the files are missing; every text is empty to it.
        raise FormatError(
            f"{folder} has no tokenizer: its files are missing. Copy them from the original model."
        )
    return tokenizer


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Return the ids of a whole text, shape `(length,)`, without special tokens.

    Args:
        tokenizer: of transformers.
        text: may be longer than the model's context.
    """
    # verbose=False: the length is not a mistake here, windows are cut from it.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.long)


def usual_context(model: PreTrainedModel, limit: int = 1024) -> int:
    """Return the default window length: all positions of the model, at most `limit`."""
    return min(limit, getattr(model.config, "max_position_embeddings", None) or limit)


def require_causal(model: PreTrainedModel) -> None:
    """Raise TargetError unless a model continues text.

    Raises:
        TargetError: another kind of model; the message names its class, and suitable ones.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} is not a causal language model, which this needs; one is, for "
            "example, GPT2LMHeadModel or LlamaForCausalLM."
        )


def continue_text(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """Continue a prompt, or answer it with an encoder-decoder or a chat model.

    Args:
        model: anything that can `generate`.
        tokenizer: its tokenizer.
        prompt: at least one token.
        max_new_tokens: length of the continuation, at least 1.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the drawing; the state of the global generator is put back afterwards.
        chat: give the prompt as a message of the user, in the chat template of the tokenizer.

    Raises:
        TargetError: the model cannot generate, or its tokenizer has no chat template to use.
        ValueError: an empty prompt, or a value out of range.
    """
    if not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} cannot generate text; use a causal language model or an encoder-decoder."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}.")
    if chat and not tokenizer.chat_template:
        raise TargetError(
            f"The {type(tokenizer).__name__} has no chat template, which chat=True (--chat) needs; leave it "
            "out to continue the prompt as it is, or copy chat_template.jinja into the folder."
        )
    if chat:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    length = inputs.input_ids.shape[1]
    if length == 0:
        raise ValueError("The prompt is empty; give the model at least one token to go on from.")
    decoder_only = not model.config.is_encoder_decoder
    positions = getattr(model.config, "max_position_embeddings", None)
    if decoder_only and positions is not None and length + max_new_tokens > positions:
        raise ValueError(
            f"The prompt has {length} tokens and {max_new_tokens} more are asked for, but this model has "
            f"{positions} positions; shorten the prompt or ask for at most {max(0, positions - length)}."
        )
    drawing: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature}
    generate: Any = model.generate
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        tokens = generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **drawing
        )
    new = tokens[0, length if decoder_only else 0 :]
    return tokenizer.decode(new, skip_special_tokens=True)


def first_line(error: BaseException) -> str:
    """Return the first line of a message; with many libraries it is the informative one."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


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

    @property
    def labelled(self) -> bool:
        """True if a loss can be measured on the batches: a text has no labels for a classifier."""
        labelled = all(isinstance(batch, Tensor) or "labels" in batch for batch in self.batches)
        return labelled or self.loss_fn is cosine_losses


def calibration_data(
    model: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    tokens: int | None = None,
    window: int = 512,
    window_batch: int = 1024,
) -> CalibrationData:
    """Make batches of a text for a model: of random windows for causal models, else of its beginning.

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
    if model.can_generate() and not model.config.is_encoder_decoder:
        context = usual_context(model, limit=window)
        windows = random_windows(token_ids(load_tokenizer(folder), text), context, tokens)
        batches = windows.split(max(1, window_batch // windows.shape[1]))
        return CalibrationData(tuple(batches), label_losses, windows.numel())
    if model.main_input_name != "input_ids":
        raise TargetError(
            f"{type(model).__name__} reads {model.main_input_name}, not text. Calibrate it in Python with "
            "batches of its own: stats = tensornet.calibrate(model, batches, loss_fn=...), then "
            "tensornet.compress(model, config, calibration=stats)."
        )
    tokenizer = load_tokenizer(folder)
    labelled = model.config.is_encoder_decoder or type(model).__name__.endswith("ForMaskedLM")
    loss_fn = sampled_losses if labelled else _losses_of(model, tokenizer)
    kept, count = [], 0
    for batch in _passages(model, tokenizer, text):
        kept.append(batch)
        count += int(batch["attention_mask"].sum())
        if tokens is not None and count >= tokens:
            break
    if not kept:
        raise ValueError("The text holds no line that the model can read; give more text.")
    return CalibrationData(tuple(kept), loss_fn, count)


def random_windows(ids: Tensor, context: int, tokens: int | None = None) -> Tensor:
    """Draw windows of a text without replacement, the same in each call.

    Args:
        ids: shape `(tokens of the text,)`.
        context: tokens of a window.
        tokens: draw at most so many; all if absent.

    Returns:
        Shape `(windows, context)`.

    Raises:
        ValueError: less than one window.

    Example:
        >>> from tensornet_hf.text import random_windows
        >>> random_windows(torch.arange(100), context=8, tokens=30).shape
        torch.Size([3, 8])
    """
    count = len(ids) // context
    if (wanted := count if tokens is None else min(count, tokens // context)) == 0:
        got = len(ids) if tokens is None else min(len(ids), tokens)
        raise ValueError(f"The text has {got} tokens, less than one window of {context}; give more text.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]
    return ids[: count * context].reshape(count, context)[order]


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


def _passages(model: PreTrainedModel, tokenizer: Any, text: str) -> Iterator[Batch]:
    """Read the lines of a text for an encoder-decoder, its paragraphs for an encoder; add what is predicted.

    An encoder-decoder predicts what follows a tab, or its own answer. A masked language model predicts some
    tokens that are masked, the same in each call. Paragraphs are lines where there is no blank line.
    """
    answers = model.config.is_encoder_decoder
    masks = type(model).__name__.endswith("ForMaskedLM")
    if masks and tokenizer.mask_token_id is None:
        raise TargetError(
            "The tokenizer of this masked language model has no mask token; calibrate it in Python with "
            "batches of its own, tensornet.calibrate(model, batches)."
        )
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if answers or len(parts) < 2:
        parts = [line.strip() for line in text.splitlines() if line.strip()]
    given = answers and all(part.count("\t") == 1 for part in parts)
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(tokenizer.all_special_ids, device="cpu")
    for start in range(0, len(parts), ROWS):
        some = parts[start : start + ROWS]
        batch = _read(model, tokenizer, [x.partition("\t")[0] if given else x for x in some])
        ids = batch["input_ids"]
        if given:
            wanted = _read(model, tokenizer, [x.partition("\t")[2] for x in some])
            batch["labels"] = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, IGNORED)
        elif answers:
            batch["labels"] = _own_answers(model, batch)
        elif masks:
            free = (batch["attention_mask"] == 1) & ~torch.isin(ids, special)
            chosen = (torch.rand(ids.shape, generator=generator, device="cpu") < HIDDEN) & free
            if not bool(chosen.any()):
                continue
            batch["labels"] = ids.masked_fill(~chosen, IGNORED)
            batch["input_ids"] = ids.masked_fill(chosen, tokenizer.mask_token_id)
        yield batch


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


#: Characters of one text at a time: some windows of a model, and a small part of what calibration reads.
PIECE = 6_000


def mix_texts(texts: Sequence[str]) -> str:
    r"""Take pieces of texts by turns, cut at ends of lines, until all are used up.

    Args:
        texts: one or more; a single one comes back as it is.

    Example:
        >>> from tensornet_hf.text import PIECE, mix_texts
        >>> mixed = mix_texts(["a" * 3 * PIECE, "b"])
        >>> mixed[0], mixed[PIECE : PIECE + 5]
        ('a', '\nb\naa')
    """
    if len(texts) == 1:
        return texts[0]
    return "".join(chain.from_iterable(zip_longest(*map(_pieces, texts), fillvalue="")))


def _pieces(text: str) -> Iterator[str]:
    """Cut a text at the first end of a line after every `PIECE` characters; longer lines are cut as well."""
    piece = ""
    for part in re.findall(rf"[^\n]{{1,{PIECE}}}\n?|\n", text):
        piece += part
        if len(piece) >= PIECE:
            yield piece if piece.endswith("\n") else piece + "\n"
            piece = ""
    if piece:
        yield piece if piece.endswith("\n") else piece + "\n"


#: Tokens of the embedded text that a model is calibrated on without other data.
TOKENS = 16_384


def embedded_text(model: nn.Module) -> ProvidedData | None:
    """Tokenize the embedded chapters of the King James Bible for a causal language model.

    Returns None for models of other kinds, and if neither the model's folder nor the cache of the hub holds a
    tokenizer.
    """
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
        return None
    if not model.name_or_path:
        return None
    try:
        data = calibration_data(model, Path(model.name_or_path), calibration_text(), tokens=TOKENS)
    except FormatError:
        return None
    return ProvidedData(data.batches, f"{data.tokens:,} tokens of the embedded text (King James Bible)")
