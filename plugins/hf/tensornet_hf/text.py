"""Convert text to tokens and calibration batches, and generate text.

- Causal language models read windows of the text and predict each next token.
- Encoder-decoders read one example per line: the input, a tab and the target. Unless every line has exactly
  one tab, each whole line is an input, and the model generates the targets.
- Encoders read passages. Masked language models are scored on masked tokens, classifiers on labels drawn from
  their own predictions, and encoders without a head by the cosine of pooled outputs.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from tensornet.calibration import cosine_losses, label_losses, sampled_losses
from tensornet.calibration.batches import Batch, BatchLike, as_batch
from tensornet.calibration.losses import IGNORED, TokenLosses
from tensornet.errors import FormatError, TargetError
from tensornet.nn.extension import ProvidedData
from tensornet_hf.embedded import dialogues, mixed_text


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 text, or is empty.
    """
    if not path.is_file():
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder; give a text file.")
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8, or give another file."
        ) from error
    if not text.strip():
        raise ValueError(f"{path} contains no text; give text like what the model will read.")
    return text


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder or a GGUF file.

    Raises:
        FormatError: transformers cannot read a tokenizer from the folder.
    """
    try:
        if folder.suffix == ".gguf":
            tokenizer = AutoTokenizer.from_pretrained(folder.parent, gguf_file=folder.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FormatError(
            f"{folder} has no tokenizer that can be read: {first_line(error)}. "
            "Copy the tokenizer files of the original model into the folder."
        ) from error
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
        # If the files are missing, transformers creates a tokenizer that returns no tokens for any text.
        raise FormatError(
            f"{folder} has no tokenizer files. Copy those of the original model into the folder."
        )
    return tokenizer


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Tokenize a text without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text; it may be longer than the model's context.

    Returns:
        Token ids, shape `(length,)`.
    """
    # verbose=False silences the warning that a text is longer than the context; callers cut it into windows.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.long)


def bos_token(tokenizer: Any) -> int | None:
    """Return the id of the token (BOS) that a tokenizer puts before every text, or None.

    Windows of a text must begin with it too. Without it, some models, such as Gemma, predict far worse.
    """
    bos: int | None = tokenizer.bos_token_id
    return bos if tokenizer("a").input_ids[:1] == [bos] else None


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text model, which may be a part of the configuration of a model.

    It is that of a model for images and text, such as Gemma 3. The result is None without a configuration.
    """
    config = getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


def usual_context(model: PreTrainedModel, limit: int = 1024) -> int:
    """Return the default window length: the number of positions of the model, at most `limit`."""
    known = getattr(text_config(model), "max_position_embeddings", None) or limit
    return min(limit, known) if known > 0 else limit  # -1 stands for any number


def require_causal(model: PreTrainedModel) -> None:
    """Raise TargetError if a model is not a causal language model."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} is not a causal language model, which is needed here (such as "
            "GPT2LMHeadModel or LlamaForCausalLM)."
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
    """Let a model continue a prompt; an encoder-decoder or a chat model answers the prompt instead.

    Args:
        model: a transformers model with a method `generate`.
        tokenizer: the model's tokenizer.
        prompt: text of at least one token.
        max_new_tokens: largest length of the continuation in tokens, at least 1.
        temperature: with 0 each token is the most likely one; above 0 tokens are sampled.
        seed: seed for sampling; the state of the global generator is restored afterwards.
        chat: format the prompt as a user message with the tokenizer's chat template.

    Returns:
        The new text, without the prompt.

    Raises:
        TargetError: the model cannot generate text, or the tokenizer has no chat template.
        ValueError: the prompt is empty or too long, or a value is out of range.
    """
    if not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} cannot generate text; use a causal language model or an encoder-decoder."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}.")
    if chat and not tokenizer.chat_template:
        raise TargetError(
            f"The {type(tokenizer).__name__} has no chat template, which chat=True needs. Leave out "
            "this option to continue the prompt unchanged, or copy chat_template.jinja into the folder."
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
        raise ValueError("The prompt is empty; give at least one token.")
    decoder_only = not model.config.is_encoder_decoder
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if decoder_only and positions is not None and length + max_new_tokens > positions:
        raise ValueError(
            f"The prompt has {length} tokens and {max_new_tokens} new tokens are requested, but this model "
            f"has {positions} positions. Shorten the prompt, or request at most "
            f"{max(0, positions - length)} new tokens."
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
    """Return the first line of an error message, which in many libraries is the most informative line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


#: Longest line or passage in tokens; longer lines and passages are truncated.
PASSAGE = 128
#: Longest answer of an encoder-decoder in tokens.
ANSWER = 64
#: Number of passages in a batch.
BATCH_PASSAGES = 16
#: Fraction of the tokens that are masked for a masked language model, as in its training.
HIDDEN = 0.15


@dataclass(frozen=True)
class CalibrationData:
    """Calibration batches of a model, and the loss whose curvature measures how much errors matter.

    Args:
        batches: each batch is a mapping of keyword arguments of the model, or a tensor of token ids, shape
            `(windows, context)`.
        loss_fn: function that computes the losses of a batch (see `tensornet.calibration.losses`).
        tokens: number of tokens in all batches, without padding.
    """

    batches: tuple[BatchLike, ...]
    loss_fn: TokenLosses
    tokens: int

    @property
    def labelled(self) -> bool:
        """True if a loss can be measured on the batches; False for classifiers, since text has no labels."""
        labelled = all(isinstance(batch, Tensor) or "labels" in batch for batch in self.batches)
        return labelled or self.loss_fn is cosine_losses


def calibration_data(
    model: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    tokens: int | None = None,
    rows: int = 0,
    window: int = 512,
    window_batch: int = 1024,
) -> CalibrationData:
    """Make calibration batches from a text: random windows for causal models, otherwise its first passages.

    If the tokenizer puts a token (BOS) before every text, it replaces the first token of each window.

    Args:
        model: the dense model.
        folder: folder with the model's tokenizer.
        text: text similar to the model's later input.
        tokens: approximate number of tokens to use; None uses the whole text.
        rows: smallest number of passages to use if the model is not causal.
        window: largest window of a causal model in tokens.
        window_batch: number of tokens in a batch of a causal model.

    Raises:
        TargetError: text alone is not enough to calibrate this model; the message says what to do.
        ValueError: the text is too short.
    """
    if model.main_input_name != "input_ids":
        raise TargetError(
            f"{type(model).__name__} reads {model.main_input_name}, not text. In Python, pass batches of "
            "these inputs to tensornet.compress."
        )
    if model.can_generate() and not model.config.is_encoder_decoder:
        context, tokenizer = usual_context(model, limit=window), load_tokenizer(folder)
        windows = random_windows(token_ids(tokenizer, text), context, tokens, bos_token(tokenizer))
        batches = windows.split(max(1, window_batch // windows.shape[1]))
        return CalibrationData(tuple(batches), label_losses, windows.numel())
    tokenizer = load_tokenizer(folder)
    labelled = model.config.is_encoder_decoder or type(model).__name__.endswith("ForMaskedLM")
    loss_fn = sampled_losses if labelled else _losses_of(model, tokenizer)
    kept, count = [], 0
    for batch in _passages(model, tokenizer, text):
        kept.append(batch)
        count += int(batch["attention_mask"].sum())
        if tokens is not None and count >= tokens and len(kept) * BATCH_PASSAGES >= rows:
            break
    if not kept:
        raise ValueError("The text contains no line that the model can read; give more text.")
    return CalibrationData(tuple(kept), loss_fn, count)


def random_windows(ids: Tensor, context: int, tokens: int | None = None, bos: int | None = None) -> Tensor:
    """Draw random windows of a text without replacement, the same windows in every call.

    Args:
        ids: token ids of the text, shape `(length,)`.
        context: number of tokens in a window.
        tokens: largest number of tokens to draw; None draws all windows.
        bos: see `whole_windows`.

    Returns:
        Token ids of the windows, shape `(windows, context)`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    count = len(ids) // context
    if (wanted := count if tokens is None else min(count, tokens // context)) == 0:
        got = len(ids) if tokens is None else min(len(ids), tokens)
        raise ValueError(f"The text has {got} tokens, fewer than a window of {context}; give more text.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]
    return whole_windows(ids, context, bos)[order]


def whole_windows(ids: Tensor, context: int, bos: int | None = None) -> Tensor:
    """Cut a text into windows of equal length, without its last tokens, which fill no window.

    Args:
        ids: token ids of the text, shape `(length,)`.
        context: number of tokens in a window.
        bos: token that replaces the first one of each window (see `bos_token`).

    Returns:
        Token ids of the windows, shape `(windows, context)`.
    """
    windows = ids[: len(ids) // context * context].reshape(-1, context).clone()
    if bos is not None:
        windows[:, 0] = bos
    return windows


def _losses_of(model: PreTrainedModel, tokenizer: Any) -> TokenLosses:
    """Choose the loss function of an encoder or classifier by the kind of its outputs.

    Raises:
        TargetError: the model does not run on text alone, or returns neither classes nor hidden states.
    """
    try:
        with torch.no_grad():
            output = model(**as_batch(_read(model, tokenizer, ["word"]), model, model.device))
    except Exception as error:
        raise TargetError(
            f"{type(model).__name__} does not run on text alone: {first_line(error)}. In Python, pass "
            "batches with all of its inputs to tensornet.compress."
        ) from error
    logits = getattr(output, "logits", None)
    if logits is not None and logits.shape[-1] > 1:
        return sampled_losses
    if logits is None and getattr(output, "last_hidden_state", None) is not None:
        return cosine_losses
    raise TargetError(
        f"{type(model).__name__} returns neither classes nor hidden states, so it has no loss on text. "
        "In Python, pass the result of tensornet.calibrate(model, batches, loss_fn=...) to "
        "tensornet.compress as its calibration data."
    )


def _passages(model: PreTrainedModel, tokenizer: Any, text: str) -> Iterator[Batch]:
    """Yield batches of the lines (encoder-decoder) or paragraphs (encoder) of a text, with labels.

    Labels of an encoder-decoder are the text after the tab if every line has exactly one tab, otherwise the
    model's own answers. Labels of a masked language model are the masked tokens, which are the same in every
    call. If there are no blank lines, every line is a paragraph.
    """
    answers = model.config.is_encoder_decoder
    masks = type(model).__name__.endswith("ForMaskedLM")
    if masks and tokenizer.mask_token_id is None:
        raise TargetError(
            "The tokenizer of this masked language model has no mask token. Calibrate the model in Python "
            "with suitable batches: tensornet.calibrate(model, batches)."
        )
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if answers or len(parts) < 2:
        parts = [line.strip() for line in text.splitlines() if line.strip()]
    given = answers and all(part.count("\t") == 1 for part in parts)
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(tokenizer.all_special_ids, device="cpu")
    for start in range(0, len(parts), BATCH_PASSAGES):
        some = parts[start : start + BATCH_PASSAGES]
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
    """Return an encoder-decoder's greedy answers as labels, with `IGNORED` after the end of each answer."""
    generate: Any = model.generate
    inputs = as_batch(batch, model, model.device)
    labels = generate(
        **inputs, max_new_tokens=min(ANSWER, usual_context(model) - 1), do_sample=False, num_beams=1
    )[:, 1:].cpu()
    end = model.generation_config.eos_token_id
    ends = torch.tensor(end if isinstance(end, list) else [-1 if end is None else end], device=labels.device)
    ended = torch.isin(labels, ends).cumsum(1)
    return labels.masked_fill(ended - torch.isin(labels, ends).long() > 0, IGNORED)


def _read(model: PreTrainedModel, tokenizer: Any, parts: list[str]) -> dict[str, Tensor]:
    """Tokenize passages into a padded batch of keyword arguments for a model, including `attention_mask`."""
    length = min(usual_context(model, limit=PASSAGE), tokenizer.model_max_length)
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


#: Number of texts that a model writes at a time, and their length in tokens.
_WRITTEN_BATCH, _WRITTEN_LENGTH = 32, 512
#: Text is refused if its loss is above this share of that of random tokens, or if less than this share of its
#: sequences of four tokens are distinct.
_RANDOM_SHARE, _DISTINCT_SHARE = 0.8, 0.2


@torch.no_grad()
def own_text(model: PreTrainedModel, tokenizer: Any, *, tokens: int = 16_384, seed: int = 0) -> str:
    """Let a causal language model write text on which it can be calibrated, by sampling.

    Half of the texts begin with the start of a conversation if the tokenizer has a chat template; the others
    begin with the token that begins or ends a text. Writing goes on after a text or a message has ended.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tokens: approximate number of tokens to write.
        seed: seed for sampling; the state of the global generator is restored afterwards.

    Raises:
        TargetError: the model is no causal language model, or what it writes is random or repeats itself.

    Reference:
        Xu et al. 2024, "Magpie" (a chat template without a message).
    """
    require_causal(model)
    first = next((x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id) if x is not None), 0)
    starts = [torch.tensor([first])]
    if tokenizer.chat_template:
        mark = "MESSAGE"
        said = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
        starts.append(token_ids(tokenizer, said.partition(mark)[0]))
    generate: Any = model.generate
    written: list[Tensor] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while sum(x.numel() for x in written) < tokens:
            start = starts[len(written) % len(starts)]
            length = usual_context(model, limit=_WRITTEN_LENGTH)
            rows = min(_WRITTEN_BATCH, math.ceil(tokens / (length * len(starts))))
            prompt = start.to(model.device).expand(rows, -1)
            # No token has the number -1, so that the end of a message does not end the text.
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": -1}
            found = generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max(1, length - prompt.shape[1]),
                pad_token_id=first,
                **options,
            )
            written.append(found.cpu())
    some = torch.cat([x[:4, : min(y.shape[1] for y in written)] for x in written]).to(model.device)
    loss = float(model(input_ids=some, labels=some).loss)
    random = math.log(text_config(model).vocab_size)
    runs = torch.cat([x.unfold(1, min(4, x.shape[1]), 1).flatten(0, 1) for x in written])
    distinct = len(runs.unique(dim=0)) / len(runs)
    if not loss < _RANDOM_SHARE * random or distinct < _DISTINCT_SHARE:
        raise TargetError(
            f"{type(model).__name__} writes no text that can be used for calibration: its loss on it is "
            f"{loss:.2f} nats a token (random tokens: {random:.2f}), and {distinct:.0%} of the sequences of "
            "four tokens are distinct. Give a text file like the model's later input (calibration=FILE)."
        )
    return "\n\n".join(tokenizer.decode(row[1:]) for batch in written for row in batch)


#: Number of characters in a piece of text, enough for a few windows.
PIECE = 6_000


def mix_texts(texts: Sequence[str]) -> str:
    r"""Interleave several texts: cut each text into pieces at line ends, and take one piece of each in turn.

    Args:
        texts: one or more texts; a single text is returned unchanged.
    """
    if len(texts) == 1:
        return texts[0]
    return "".join(chain.from_iterable(zip_longest(*map(_pieces, texts), fillvalue="")))


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of about `PIECE` characters, at line ends where possible."""
    piece = ""
    for part in re.findall(rf"[^\n]{{1,{PIECE}}}\n?|\n", text):
        piece += part
        if len(piece) >= PIECE:
            yield piece if piece.endswith("\n") else piece + "\n"
            piece = ""
    if piece:
        yield piece if piece.endswith("\n") else piece + "\n"


def default_text(tokenizer: Any) -> str:
    """Return the package's text of many kinds for calibration.

    It contains novels, one text in 16 languages, code and documentation; and dialogues, in the chat template
    of the tokenizer if it has one.
    """

    def transcript(messages: list[dict[str, str]]) -> str:
        if tokenizer.chat_template:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        return "".join(f"{x['role'].capitalize()}: {x['content']}\n\n" for x in messages)

    return mix_texts([mixed_text(), "\n".join(map(transcript, dialogues()))])


#: Number of tokens of the package's text that are used for calibration if no other data is given.
DEFAULT_TOKENS = 16_384


def default_batches(model: nn.Module) -> ProvidedData | None:
    """Make calibration batches from the package's text for a causal language model.

    Returns:
        The batches; None for other models, or if the model's folder or hub cache has no tokenizer.
    """
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
        return None
    if not model.name_or_path:
        return None
    try:
        folder = Path(model.name_or_path)
        data = calibration_data(model, folder, default_text(load_tokenizer(folder)), tokens=DEFAULT_TOKENS)
    except FormatError:
        return None
    return ProvidedData(data.batches, f"{data.tokens:,} tokens of the package's text")
