"""`tensornet compare`: model folders side by side."""

from pathlib import Path
from typing import Annotated

import typer

from tensornet_hf.cli import options as shared
from tensornet_hf.evaluation.side_by_side import FolderFacts, SideBySide, check_picture, compare_folders
from tensornet_hf.report.facts import compact_bytes
from tensornet_hf.text.tokens import read_text


def run(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Model folders or hub ids, the dense one first: dense, ours, or of another quantizer."
        ),
    ],
    text: Annotated[Path | None, typer.Option(help="Text to measure the loss on, UTF-8.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="To continue greedily. [default: the beginning of the text]")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation.")] = 40,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it: a file that ends in .png, .svg or .pdf.")
    ] = None,
    device: shared.Device = shared.CPU,
    as_json: shared.Json = False,
) -> None:
    """Compare models: bytes on disk, bits a weight, time of a token or an image, loss and samples."""
    if plot is not None:
        check_picture(plot)
    content = None if text is None else read_text(text)
    found = compare_folders(
        paths, text=content, prompt=prompt, new_tokens=new_tokens, device=device, progress=True
    )
    if plot is not None:
        found.plot().savefig(plot)
    if as_json:
        shared.print_json(found.to_dict())
    else:
        _print(found, plot)


def _print(found: SideBySide, plot: Path | None) -> None:
    first = found.folders[0].quality
    header = ["", "form", "bytes", "bits a weight", "parameters", f"ms {found.timed}"]
    if first is not None:
        header += ["perplexity" if first.of_tokens else first.measure, "rise"]
    shared.print_table(header, [_row(found, folder) for folder in found.folders])
    shared.print_lines("", "Bytes, bits a weight and parameters are those of the whole model.")
    if first is not None:
        shared.print_lines("", f"{first.measure.capitalize()}: {first.how}.")
    for folder in found.folders:
        if folder.sample is not None:
            text = f"{found.prompt}{folder.sample}".replace("\n", "\n  ")
            shared.print_lines("", f"{folder.name} writes:", f"  {text}")
    if plot is not None:
        shared.print_lines("", f"picture: {plot}")


def _row(found: SideBySide, folder: FolderFacts) -> list[str]:
    row = [
        folder.name,
        folder.method,
        compact_bytes(folder.bytes),
        f"{folder.bits:.2f}",
        f"{folder.params:,}",
        f"{folder.milliseconds:.2f}",
    ]
    quality, rise = folder.quality, found.rise(folder)
    if quality is not None:
        row.append(f"{quality.loss:.4f}" if quality.perplexity is None else f"{quality.perplexity:.3f}")
        row.append("" if folder is found.folders[0] or rise is None else f"{rise:+.4f}")
    return row
