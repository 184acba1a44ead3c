"""`tensornet compress`: load, `tensornet.compress`, save. The options are the fields of two dataclasses."""

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import CompressionPlan
from tensornet_hf.cli import options as shared
from tensornet_hf.compress import CompressOptions, OptionError, compress_folder, plan_folder
from tensornet_hf.report import display_command

_FIELDS = {x.name: x for kind in (CompressionConfig, CompressOptions) for x in fields(kind)}


@shared.with_options(CompressionConfig, CompressOptions)
def run(
    source: shared.Source,
    destination: shared.NewFolder = None,
    *,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Apply this plan (the output of --dry-run --json, edited or not).",
            metavar="FILE",
            rich_help_panel=shared.GROUPS["budget"],
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the plan and the sizes, write nothing.",
            metavar=" ",
            rich_help_panel=shared.GROUPS["output"],
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print JSON, and nothing else, on stdout.",
            metavar=" ",
            rich_help_panel=shared.GROUPS["output"],
        ),
    ] = False,
    **given: Any,
) -> None:
    """Compress a model: replace its linear layers within a budget, and save the result.

    For example: tensornet compress MODEL SMALL --bits 4.25 --calibration text.txt
    """
    try:
        command = display_command(["tensornet", *sys.argv[1:]])
        chosen = shared.collect(CompressOptions, given)
        options = CompressOptions(**chosen, command=command, progress=sys.stderr.isatty())
        wanted = shared.collect(CompressionConfig, given)
        if plan is not None and wanted:
            names = " and ".join(shared.spelled(_FIELDS[name]) for name in wanted)
            raise OptionError(f"{{plan}} says already what every layer becomes; leave out {names}.")
        config = CompressionConfig(**wanted) if plan is None else CompressionPlan.load(plan)
        if dry_run:
            if isinstance(config, CompressionPlan):
                raise OptionError("{dry_run} makes a plan; leave out {plan}.")
            shared.print_result(plan_folder(source, config, options), as_json)
            return
        if destination is None:
            raise OptionError("Name a destination, or ask for {dry_run}.")
        done = compress_folder(source, destination, config, options)
    except OptionError as error:  # shows options as they are spelled on the command line
        raise typer.BadParameter(re.sub(r"\{(\w+)\}", _spelled, error.template)) from error
    shared.print_result(done, as_json)
    for line in done.notes:
        shared.note(f"note: {line}")


def _spelled(match: re.Match[str]) -> str:
    name = match[1]
    return shared.spelled(_FIELDS[name]) if name in _FIELDS else f"--{name.replace('_', '-')}"
