"""`tensornet eval`: perplexity on a text file."""

from typing import Annotated

import typer

from tensornet_hf.checkpoint.load import load, on_device, resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.text.perplexity import perplexity
from tensornet_hf.text.tokens import load_tokenizer, read_text, require_causal, token_ids, usual_context


def run(
    path: shared.Source,
    text: shared.TextFile,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in a window. [default: all positions of the model, at most 1024]"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window. [default: the context, no overlap]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Most windows run at once.")] = 16,
    device: shared.Device = shared.CPU,
    as_json: shared.Json = False,
) -> None:
    """Measure the perplexity of a causal language model on a text file."""
    content = read_text(text)
    folder = resolve_folder(path)
    model = on_device(load(folder), device)
    require_causal(model)
    tokens = token_ids(load_tokenizer(folder), content)
    result = perplexity(
        model,
        tokens,
        context=usual_context(model) if context is None else context,
        stride=stride,
        batch_size=batch,
        progress=True,
    )
    if as_json:
        shared.print_json({"model": path, "text": str(text), **result.to_dict()})
    else:
        shared.print_lines(f"perplexity {result.perplexity:.4f}", f"loss {result.loss:.5f}", result.how)
