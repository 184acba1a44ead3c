"""Entry point of the command line; an error is reported in one line and by a non-zero exit status."""

import ast
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging

from tensornet.gone import advice
from tensornet_hf.cli import commands
from tensornet_hf.compress import OptionError
from tensornet_hf.report import versions
from tensornet_hf.staging import staging_folder

COMMANDS: dict[str, Callable[..., None]] = {
    "compress": commands.compress,
    "plan": commands.plan,
    "recipe": commands.recipe,
    "inspect": commands.inspect,
    "verify": commands.verify,
    "eval": commands.evaluate,
    "generate": commands.generate,
    "decompress": commands.decompress,
    "export": commands.export,
    "upcycle": commands.upcycle,
    "specialize": commands.specialize,
    "pack": commands.pack,
    "demo": commands.demo,
}
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
        arguments: arguments without the name of the program. `--debug` is accepted at any position.

    Returns:
        The exit status: 0 (success), 1 (failed), 2 (wrong usage), 130 (interrupted).
    """
    debug = "--debug" in arguments
    notes = _quiet(debug)
    command = typer.main.get_command(_program())
    rest = [argument for argument in arguments if argument != "--debug"]
    try:
        status = command.main(args=rest, prog_name="tensornet", standalone_mode=False)
    except _click.ClickException as error:
        if message := error.format_message():  # empty if the help was printed
            name = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
            gone = as_options(advice([name]), options_of(_command_of(rest)))
            _say(f"{message.rstrip('.')}.{gone} See tensornet --help, or tensornet COMMAND --help.")
        return WRONG_USAGE
    except (KeyboardInterrupt, typer.Abort):  # newer versions of typer return the status instead
        status = INTERRUPTED
    except BrokenPipeError:  # the program that reads our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OptionError as error:
        known = options_of(_command_of(rest))
        _say(f"{as_options(str(error), known)} See tensornet --help, or tensornet COMMAND --help.")
        return WRONG_USAGE
    except Exception as error:  # users see one line; --debug shows the traceback
        if debug:
            raise
        _say(as_options(_one_line(error), options_of(_command_of(rest))))
        return FAILED
    if status == INTERRUPTED:
        folders = (staging_folder(Path(x).absolute()) for x in rest if not x.startswith("-"))
        kept = next((f"finished parts are kept in {x}" for x in folders if x.is_dir()), "")
        again = f"{kept}; run the same command again to continue."
        _say(f"interrupted; {again if kept else 'nothing was written.'}")
        return INTERRUPTED
    for note in notes:
        _say(f"note: {note}")
    return status if isinstance(status, int) else 0


def _command_of(arguments: Sequence[str]) -> str:
    return next((x for x in arguments if x in COMMANDS), "")


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


def as_options(text: str, options: Mapping[str, Any]) -> str:
    """Translate the Python arguments that a message names to options of the command line.

    Three forms are translated: assignments (`formats=('int4',)`), names with underscores (`max_bond`), and
    names before the word "must" (`damping must be`). Other words that equal the name of an option, such as
    `report`, stay as they are.

    Args:
        text: the message.
        options: options of the command by the name of their argument.
    """
    if not options:
        return text
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    value = r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|'[^']*'|\"[^\"]*\"|[\w.]*\w|"
    outside = r"(?<![\w.'\"/-])"  # not a part of a path, a quotation or another word
    text = re.sub(
        rf"{outside}(?P<name>{names})=(?P<value>{value})",
        lambda x: _assigned(options[x["name"]], x["value"]),
        text,
    )
    spoken = "|".join(re.escape(x) for x in options if "_" in x) or "$."  # `$.` matches nothing
    pattern = rf"{outside}(?:(?P<rule>{names})(?= must )|(?P<spoken>{spoken})\b(?![/'(]))"
    return re.sub(pattern, lambda x: options[x["rule"] or x["spoken"]].opts[0], text)


def _assigned(option: Any, value: str) -> str:
    """Return an option of the command line with the value that a message writes as in Python."""
    flag = option.opts[0]
    if option.is_flag:
        return option.secondary_opts[0] if value == "False" and option.secondary_opts else flag
    try:
        given = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # not a literal, but a placeholder such as `batches`
        given = option.metavar if option.metavar == "FILE" and value else value
    if isinstance(given, dict):
        return " ".join(f"{flag} {key}={each}" for key, each in given.items())
    if not isinstance(given, (list, tuple)):
        return f"{flag} {given}".rstrip()
    if option.multiple:
        return " ".join(f"{flag} {shlex.quote(str(each))}" for each in given)
    return f"{flag} {','.join(map(str, given))}"


def options_of(command: str) -> dict[str, Any]:
    """Map the parameter names of a command to its options; the result is empty for an unknown command."""
    program: Any = typer.main.get_command(_program())
    parameters = program.commands[command].params if command in COMMANDS else []
    return {x.name: x for x in parameters if x.param_type_name == "option" and x.name != "help"}


def _say(text: str) -> None:
    typer.echo(f"tensornet: {text}", err=True)
