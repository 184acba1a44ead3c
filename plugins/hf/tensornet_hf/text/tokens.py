"""Tokenization of texts, and text generation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from tensornet.errors import FormatError, TargetError


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


def has_chat_template(tokenizer: Any) -> bool:
    """Return True if a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


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
    inputs = _prompt(tokenizer, prompt, chat).to(model.device)
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


def _prompt(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Tokenize a prompt: ids and mask of one row."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if not has_chat_template(tokenizer):
        raise TargetError(
            f"The {type(tokenizer).__name__} has no chat template, which chat=True (--chat) needs; leave it "
            "out to continue the prompt as it is, or put the chat_template.jinja of the model beside it."
        )
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def first_line(error: BaseException) -> str:
    """Return the first line of a message; with many libraries it is the informative one."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
