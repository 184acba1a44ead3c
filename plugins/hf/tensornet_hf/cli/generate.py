"""`tensornet generate`: continue a prompt."""

from typing import Annotated

import typer

from tensornet_hf.checkpoint.load import load, resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.text.tokens import continue_text, load_tokenizer


def run(
    path: shared.Source,
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    as_json: shared.Json = False,
) -> None:
    """Let a model continue a prompt (or answer it, if it is an encoder-decoder)."""
    folder = resolve_folder(path)
    model = load(folder)
    text = continue_text(
        model,
        load_tokenizer(folder),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    if as_json:
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        shared.print_json({"model": path, "prompt": prompt, "text": text, **options})
    elif model.config.is_encoder_decoder:
        shared.print_lines(text)
    else:
        shared.print_lines(prompt + text)
