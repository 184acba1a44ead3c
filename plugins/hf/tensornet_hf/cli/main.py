"""Entry point of the command line, which reports an error in one line and by a non-zero exit status."""

import os
import re
import shlex
import sys
import warnings
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Annotated

import typer
from transformers.utils import logging

from tensornet.compression.config import CompressionConfig
from tensornet_hf.cli import commands
from tensornet_hf.cli.options import spelled
from tensornet_hf.compress import CompressOptions
from tensornet_hf.report import versions
from tensornet_hf.upcycling import MoEConfig

COMMANDS: dict[str, Callable[..., None]] = {
    "compress": commands.compress,
    "inspect": commands.inspect,
    "eval": commands.evaluate,
    "generate": commands.generate,
    "decompress": commands.decompress,
    "export": commands.export,
    "upcycle": commands.upcycle,
    "demo": commands.demo,
}
#: Dataclasses whose fields are the options of a command.
OPTIONS: dict[str, tuple[type, ...]] = {
    "compress": (CompressionConfig, CompressOptions),
    "upcycle": (MoEConfig,),
}


ALL = "--help-all"
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

# Depending on its version, typer has its own copy of click or uses the installed one.
_click = sys.modules[typer.BadParameter.__module__]


def _program() -> typer.Typer:
    program = typer.Typer(
        no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
    )

    @program.callback()
    def options(
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
        version: Annotated[
            bool,
            typer.Option("--version", is_eager=True, callback=_version, help="Print versions and exit."),
        ] = False,
    ) -> None:
        """Compress language models into tensor networks, and inspect, evaluate and run the result.

        Models are folders written by transformers, or hub ids.
        Destinations are folders, or hf://owner/name to upload.
        """

    for name, function in COMMANDS.items():
        program.command(name)(function)
    return program


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(versions())
        raise typer.Exit


def app() -> None:
    """Run the command line on the arguments of this process and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command.

    Args:
        arguments: arguments without the name of the program. `--debug` and `--help-all` (help with rare
            options) are accepted at any position.

    Returns:
        The exit status: 0 (success), 1 (failed), 2 (wrong usage), 130 (interrupted).
    """
    debug = "--debug" in arguments
    notes = _quiet(debug)
    command = typer.main.get_command(_program())
    rest = [argument for argument in arguments if argument != "--debug"]
    if ALL in rest:
        rest = ["--help" if argument == ALL else argument for argument in rest]
        for parameter in (x for part in command.commands.values() for x in part.params):  # type: ignore[attr-defined]
            parameter.hidden = False
    try:
        status = command.main(args=rest, prog_name="tensornet", standalone_mode=False)
    except _click.ClickException as error:
        advice = "See tensornet --help, or tensornet COMMAND --help."
        if message := error.format_message():  # empty if the help was printed
            _say(f"{message.rstrip('.')}. {advice}")
        return WRONG_USAGE
    except (KeyboardInterrupt, typer.Abort):  # newer versions of typer return the status instead
        status = INTERRUPTED
    except BrokenPipeError:  # the program that reads our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:  # users see one line; --debug shows the traceback
        if debug:
            raise
        _say(as_options(_one_line(error), next((x for x in rest if x in OPTIONS), "")))
        return FAILED
    if status == INTERRUPTED:
        resumable = "compress" in rest and any(x in rest for x in ("--workers", "--heal", "--statistics"))
        kept = "finished parts are kept; run the same command again to continue."
        _say(f"interrupted; {kept if resumable else 'nothing was written.'}")
        return INTERRUPTED
    for note in notes:
        _say(f"note: {note}")
    return status if isinstance(status, int) else 0


def _quiet(debug: bool) -> list[str]:
    """Silence warnings of other libraries, since users of the program cannot act on them.

    Returns:
        A list that collects this library's warnings, to be printed after a success.
    """
    notes: list[str] = []
    if debug:
        return notes

    def keep(message: Warning | str, *_: object, **__: object) -> None:
        notes.append(" ".join(str(message).split()))

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # transformers shows a bar for each file
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module="tensornet")
    warnings.showwarning = keep
    return notes


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    text = " ".join(text.split())
    # Errors of this library say what to do. For other errors, print the class and mention --debug.
    if type(error).__module__.startswith("tensornet") or isinstance(error, OSError | ValueError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (add --debug to see the traceback)"


def as_options(text: str, command: str) -> str:
    """Replace the names of Python arguments in a message by the names of a command's options."""
    described = [x for kind in OPTIONS.get(command, ()) for x in fields(kind)]
    flags = {x.name: spelled(x) for x in described if x.metadata and x.metadata["kind"] != "flag"}

    def replace(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if value is None:
            return flags[name] if "_" in name else name  # a name without underscores may be an ordinary word
        if value.startswith("["):  # a list of patterns: the option is repeated
            return " ".join(f"{flags[name]} {shlex.quote(x)}" for x in literal_eval(value))
        plain = value.strip("\"'")
        return f"{flags[name]} {plain}" if plain else flags[name]

    if not flags:
        return text
    pattern = rf"(?<![\w.'\"-])(?P<name>{'|'.join(flags)})\b(?:=(?P<value>\['[^\]]*'\]|'\w+'|\"\w+\"|\w*))?"
    return re.sub(pattern, replace, text)


def _say(text: str) -> None:
    typer.echo(f"tensornet: {text}", err=True)
