"""What several commands need: options with their help, output for people and for machines."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from tensornet_hf.cli.values import parse_device

Source = Annotated[str, typer.Argument(help="Model folder, or hub id where no folder has that name.")]
Destination = Annotated[str, typer.Argument(help="Folder to write, or hf://owner/name to upload.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a destination that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Store weights in this dtype: float32, bfloat16, float16. [default: as they are]"),
]
Device = Annotated[
    torch.device,
    typer.Option(
        parser=parse_device,
        metavar="DEVICE",
        help="Where the model runs: cpu, cuda, cuda:1, mps.",
    ),
]
CPU = torch.device("cpu")
KeyValues = Annotated[
    list[str] | None,
    typer.Option(help="Option of the family, KEY=VALUE with a value in JSON: out_dims=[8,96]; repeatable."),
]
TextFile = Annotated[Path, typer.Option(help="Text file, UTF-8.")]


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(data, indent=1))


def print_lines(*lines: str) -> None:
    """Plain text on stdout, nothing of it read as markup."""
    for line in lines:
        typer.echo(line)


def note(text: str) -> None:
    """A remark on stderr."""
    typer.echo(f"tensornet: note: {text}", err=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, first column left, the others right; as wide as it needs when piped."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def key_values(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """Parse `KEY=VALUE` options, with values in JSON or else plain words.

    Args:
        option: as the user wrote it, for errors.
        given: what came with it, once for each use.

    Raises:
        typer.BadParameter: no `=`, or a key twice.

    Example:
        >>> key_values("--topology-option", ["out_dims=[8, 96]", "sites=2"])
        {'out_dims': [8, 96], 'sites': 2}
    """
    found: dict[str, Any] = {}
    for text in given or ():
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise typer.BadParameter(f"{option} takes KEY=VALUE, such as sites=3; got {text!r}.")
        if key.strip() in found:
            raise typer.BadParameter(f"{option} gives {key.strip()} twice; leave one of them out.")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value
    return found


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        FileNotFoundError: there is none.
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
