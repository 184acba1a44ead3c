"""Option types, parsers and printing functions that several commands share."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}{end}": 1000**k for k, prefix in enumerate("KMGT", start=1) for end in ("", "B")}
_UNITS |= {f"{prefix}IB": 1024**k for k, prefix in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_size(text: str | int) -> int:
    """Convert a size such as `60MB`, `1.5 GiB` or `60000` to bytes.

    Args:
        text: a number and a unit: B, KB, MB, GB, TB are powers of 1,000; KiB, MiB, GiB, TiB are powers of
            1,024. Case does not matter, and the B is optional.

    Raises:
        typer.BadParameter: the text is not a size, or the size is less than one byte.
    """
    match = _SIZE.fullmatch(str(text).strip())
    factor = None if match is None else _UNITS.get(match[2].upper())
    if match is None or factor is None:
        raise typer.BadParameter(
            f"{text!r} is not a size; write bytes, such as 60000, or a unit: 60MB, 1.5GiB."
        )
    size = int(Fraction(match[1].replace("_", "")) * factor)
    if size < 1:
        raise typer.BadParameter(f"{text!r} is less than one byte.")
    return size


def parse_share(text: str | float) -> float:
    """Parse a fraction in `(0, 1]`, such as a parameter ratio.

    Raises:
        typer.BadParameter: the text is not a number, or the number is out of range. For a number above 1, the
            message explains how to write a percentage.
    """
    try:
        share = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; write a share such as 0.5.") from None
    if 1 < share <= 100:
        raise typer.BadParameter(
            f"{text} is above 1, but a share is at most 1; if it is a percentage, write {share / 100:g} for "
            f"{share:g} %."
        )
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text} is not in (0, 1]; write a share such as 0.5 for one half.")
    return share


def parse_pool(text: str | int) -> str | int:
    """Parse `all`, or the number of neighbouring layers that use the same pool of experts.

    Raises:
        typer.BadParameter: the text is neither `all` nor a number.
    """
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(
            f"Expected 'all' or a number of neighbouring layers, such as 2; got {text!r}."
        ) from None


def parse_device(text: str | torch.device) -> torch.device:
    """Parse the name of a device that is available on this machine.

    Raises:
        typer.BadParameter: the device is unknown or not available; the message lists the available ones.
    """
    try:
        device = torch.device(text)
        usable = device.type != "meta"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # unknown, absent, or not supported by this build of torch
        usable = False
    if not usable:
        found = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            found += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
        raise typer.BadParameter(
            f"{text!s:.60} is not available on this machine; choose one of {', '.join(found)}."
        )
    return device


def parse_pairs(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """Parse `KEY=VALUE` options; values are JSON or, if they are not valid JSON, strings.

    Args:
        option: name of the option, for error messages.
        given: the values of the option, one for each time that it was given.

    Raises:
        typer.BadParameter: a value has no `=`, or a key is given twice.
    """
    found: dict[str, Any] = {}
    for text in given or ():
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise typer.BadParameter(f"{option} takes KEY=VALUE, such as sites=3; got {text!r}.")
        if key.strip() in found:
            raise typer.BadParameter(f"{option} sets {key.strip()} twice; leave out one of the two.")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value
    return found


Source = Annotated[str, typer.Argument(help="Model folder, or hub id if there is no such folder.")]
Destination = Annotated[str, typer.Argument(help="Folder to write, or hf://owner/name to upload.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing destination.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Store weights in this dtype: float32, bfloat16, float16 (default: keep their dtype)."),
]
Device = Annotated[
    torch.device,
    typer.Option(
        parser=parse_device,
        metavar="DEVICE",
        help="Device on which the model runs: cpu, cuda, cuda:1, mps.",
    ),
]
CPU = torch.device("cpu")

#: Maps the `group` of a field to the title of its option group in the help, which shows groups in this order.
GROUPS = {
    "budget": "Budget (several can be combined; the tightest decides)",
    "data": "Texts for calibration and measurement",
    "layers": "Layers",
    "after": "Correction after compression",
    "output": "Output",
    "run": "Execution",
    "advanced": "Advanced",
}
#: `Json` for commands whose options have groups.
JsonOutput = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print JSON and nothing else on stdout.",
        metavar=" ",
        rich_help_panel=GROUPS["output"],
    ),
]
#: Maps the `kind` of a field to the type of its option and further arguments of `typer.Option`.
_KINDS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "number": (float, {"metavar": "NUMBER"}),
    "integer": (int, {"metavar": "N"}),
    "share": (float, {"metavar": "SHARE", "parser": parse_share}),
    "size": (int, {"metavar": "SIZE", "parser": parse_size}),
    "text": (str, {"metavar": "NAME"}),
    "names": (str, {"metavar": "A,B,..."}),
    "pairs": (list[str], {"metavar": "KEY=VALUE"}),
    "patterns": (list[str], {"metavar": "PATTERN"}),
    "path": (Path, {"metavar": "FILE"}),
    "paths": (list[str], {"metavar": "FILE"}),
    "device": (torch.device, {"metavar": "DEVICE", "parser": parse_device}),
}


def spelled(described: Field[Any]) -> str:
    """Return the name of a field's option on the command line: `--no-...` if its default is True."""
    prefix = "--no-" if described.default is True else "--"
    return prefix + (described.metadata["name"] or described.name).replace("_", "-")


def with_options(
    *classes: type, only: Sequence[str] = (), without: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds options to a command, one for each dataclass field that has metadata.

    The metadata of a field (see `tensornet.compression.config.option`) determines the type and group of its
    option; the docstring of the class contains the help text. The command gets the values as keyword
    arguments with the names of the fields; `collect` converts them to arguments of the dataclass.

    Args:
        classes: the dataclasses.
        only: fields that are options of the command; all if empty.
        without: fields that are not.
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        given = [x for x in signature.parameters.values() if x.kind is not inspect.Parameter.VAR_KEYWORD]
        own = [x for x in given if x.kind is not inspect.Parameter.KEYWORD_ONLY]
        described = [
            (x, help_of(kind, x.name))
            for kind in classes
            for x in fields(kind)
            if x.metadata and x.name not in without and (not only or x.name in only)
        ]
        described.sort(key=lambda pair: list(GROUPS).index(pair[0].metadata["group"]))
        own += [_parameter(*pair) for pair in described]
        own += [x for x in given if x.kind is inspect.Parameter.KEYWORD_ONLY]
        function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        function.__annotations__ = {x.name: x.annotation for x in own} | {"return": None}
        return function

    return wrap


def help_of(kind: Any, name: str) -> str:
    """Return the first sentence about an argument in the docstring of a class or function, as a help text."""
    _, _, entry = (inspect.getdoc(kind) or "").partition(f"\n    {name}: ")
    entry, _, _ = re.sub(r"\n {8}", " ", entry).partition("\n")
    text = entry.partition(". ")[0].rstrip(".")
    text = re.sub(r"`(\w+)`", lambda x: f"--{x[1].replace('_', '-')}", text)
    return f"{text[:1].upper()}{text[1:]}."


def _parameter(described: Field[Any], text: str) -> inspect.Parameter:
    """Convert a field of a dataclass to a parameter of a command, with None as the default."""
    metadata, flag = described.metadata, spelled(described)
    kind, more = _KINDS.get(metadata["kind"], (str, {"metavar": "NAME"}))
    more = dict(more)
    default = described.default
    if metadata["kind"] == "flag":
        kind, more = bool, {"metavar": " "}
        text = text.removeprefix("Whether to ")
        text = f"Do not {text[0].lower()}{text[1:]}" if default else f"{text[0].upper()}{text[1:]}"
    if kind == list[str]:
        text += " Repeatable."
    if metadata["choices"]:
        text += f" One of {', '.join(metadata['choices'])}."
    if type(default) in (int, float, str) and default not in (0, ""):
        text += f" (default: {default})"
    more |= {"rich_help_panel": GROUPS[metadata["group"]]}
    option = typer.Option(flag, help=text, show_default=False, **more)
    return inspect.Parameter(
        described.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def collect(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert option values to the arguments of a dataclass; options that were not given are skipped."""
    found = {}
    for described in fields(kind):
        value: Any = given.get(described.name)
        if not described.metadata or value is None or value == []:
            continue
        if described.default is True:  # the command line only has the option `--no-...`
            value = False
        if described.metadata["kind"] == "names":
            value = tuple(value.split(","))
        elif described.metadata["kind"] == "pairs":
            value = parse_pairs(spelled(described), value)
        found[described.name] = value
    return found


def print_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(data, indent=1))


def print_lines(*lines: str) -> None:
    """Print lines of text on stdout, without interpreting markup."""
    for line in lines:
        typer.echo(line)


def print_result(result: Any, as_json: bool) -> None:
    """Print a result on stdout, as text or as JSON (from its method `to_dict`)."""
    if as_json:
        print_json(result.to_dict())
    else:
        print_lines(str(result))


def note(text: str) -> None:
    """Print a remark on stderr."""
    typer.echo(f"tensornet: {text}", err=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is aligned left, the others are aligned right."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
