"""Options, output and errors that several commands share."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console
from rich.table import Table

from tensornet_hf.cli.values import parse_device
from tensornet_hf.compress_options import OptionError

Source = Annotated[str, typer.Argument(help="Model folder, or hub id where no folder has that name.")]
Destination = Annotated[str, typer.Argument(help="Folder to write, or hf://owner/name to upload.")]
NewFolder = Annotated[
    str | None,
    typer.Argument(help="Folder to write, or hf://owner/name to upload; not needed for --dry-run."),
]
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


def print_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(data, indent=1))


def print_lines(*lines: str) -> None:
    """Print plain text on stdout, without interpreting markup."""
    for line in lines:
        typer.echo(line)


class Printable(Protocol):
    """A result that prints itself, for people and for machines."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        ...


def print_result(result: Printable, as_json: bool) -> None:
    """Print a result on stdout, as text or as JSON."""
    if as_json:
        print_json(result.to_dict())
    else:
        print_lines(str(result))


def note(text: str) -> None:
    """Print a remark on stderr."""
    typer.echo(f"tensornet: note: {text}", err=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, the first column aligned left, the others right."""
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


@contextmanager
def usage_errors() -> Iterator[None]:
    """Report options that exclude one another as wrong usage, by their names on the command line."""
    try:
        yield
    except OptionError as error:
        raise typer.BadParameter(error.for_command_line) from error
