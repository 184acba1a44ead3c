"""`tensornet generate`: continue a prompt."""

from typing import Annotated

import typer

from tensornet_hf.checkpoint import load, on_device, resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.text.tokens import continue_text, has_chat_template, load_tokenizer


def run(
    path: shared.Source,
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    chat: Annotated[
        bool | None,
        typer.Option(
            help="Give the prompt as a message of the user, in the chat template of the tokenizer; without "
            "either, where it has one.",
            show_default=False,
        ),
    ] = None,
    device: shared.Device = shared.CPU,
    as_json: shared.Json = False,
) -> None:
    """Let a model continue a prompt (or answer it, if it is an encoder-decoder or a chat model)."""
    folder = resolve_folder(path)
    model = on_device(load(folder), device)
    tokenizer = load_tokenizer(folder)
    chat = has_chat_template(tokenizer) if chat is None else chat
    text = continue_text(
        model,
        tokenizer,
        prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    if as_json:
        options = {"chat": chat, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        shared.print_json({"model": path, "prompt": prompt, "text": text, **options})
    elif chat or model.config.is_encoder_decoder:
        shared.print_lines(text)
    else:
        shared.print_lines(prompt + text)
