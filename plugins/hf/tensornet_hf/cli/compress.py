"""`tensornet compress`: compress a model folder into a new folder."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from tensornet.compression import CompressionConfig
from tensornet.errors import BudgetError
from tensornet_hf.cli import options as shared
from tensornet_hf.cli.values import parse_share, parse_size
from tensornet_hf.compress_options import CompressOptions
from tensornet_hf.folder_compression import FolderReport, compress_folder, plan_folder
from tensornet_hf.report.page import display_command


def run(
    source: shared.Source,
    destination: shared.NewFolder = None,
    param_ratio: Annotated[
        float | None,
        typer.Option(parser=parse_share, metavar="SHARE", help="Share of parameters to keep, such as 0.5."),
    ] = None,
    max_bond: Annotated[int | None, typer.Option(help="Largest bond.")] = None,
    rel_error: Annotated[float | None, typer.Option(help="Largest relative error of each weight.")] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option("--bits", help="Bits of a weight, scales included; needs --calibration.")
    ] = None,
    byte_ratio: Annotated[
        float | None,
        typer.Option(parser=parse_share, metavar="SHARE", help="Share of the whole model's bytes to keep."),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="Number formats that layers may have, as float,int8,int4; default with --bits."),
    ] = None,
    loss_increase: Annotated[
        float | None, typer.Option(help="Predicted rise of the loss to allow, in nats; needs --calibration.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Size of the chosen layers, or with --formats of the whole model, as 60MB; needs "
            "--calibration.",
        ),
    ] = None,
    max_milliseconds: Annotated[
        float | None,
        typer.Option(
            help="Predicted time of a forward pass of --tokens tokens through the chosen layers; needs "
            "--calibration."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of that forward pass: 1 for generating, more for reading.")
    ] = None,
    topology: Annotated[str, typer.Option(help="Family of networks; auto: the best of each layer.")] = "auto",
    topology_option: shared.KeyValues = None,
    sites: Annotated[int | None, typer.Option(help="Cores of a chain.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Layers to compress: name, end of a name, glob, or re:REGEX; repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave alone; repeatable.")] = None,
    objective: Annotated[
        str,
        typer.Option(help="What decides: auto, weight; activation, curvature, which need --calibration."),
    ] = "auto",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text like the model will see: far better than weights alone. Repeatable: pieces of several "
            "texts are taken by turns."
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How much of it to use.")] = 32_768,
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Text of another source than --calibration, on which the loss is measured at a few sizes: "
            "corrects what is predicted, and with it what --loss-increase buys. Not for classifiers."
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Text that the model has not seen: measures the loss of the original, the result, and plain "
            "methods of the same bytes. Not for classifiers."
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Afterwards fit each layer again to the dense model's outputs, behind the layers before it, "
            "on what --calibration holds beyond --calibration-tokens. Minutes, no training.",
        ),
    ] = False,
    heal: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps of training the cores to the dense model's outputs afterwards, on --calibration. An "
            "interrupted run of the same command goes on where it was.",
        ),
    ] = 0,
    dtype: shared.Dtype = None,
    device: shared.Device = shared.CPU,
    plan: Annotated[
        Path | None, typer.Option(help="Carry out this plan (the output of --dry-run --json, edited or not).")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Never load the model: compress weight by weight in this many processes; resumable."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with an interrupted run of --workers or --heal, or start again.")
    ] = True,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page about it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the sizes, write nothing.")
    ] = False,
    force: shared.Force = False,
    as_json: shared.Json = False,
) -> None:
    """Compress a model: replace its linear layers within a budget, and save the result.

    Budgets may be combined, the tightest decides for each layer.
    """
    budget = {
        "param_ratio": param_ratio,
        "max_bond": max_bond,
        "rel_error": rel_error,
        "loss_increase": loss_increase,
        "bits_per_weight": bits_per_weight,
        "byte_ratio": byte_ratio,
        "max_bytes": max_bytes,
        "max_milliseconds": max_milliseconds,
    }
    others: dict[str, object] = {"sites": sites, "target": target, "exclude": exclude, "tokens": tokens}
    others |= {"topology": topology != "auto", "objective": objective != "auto"}
    others |= {"topology-option": topology_option, "formats": formats}
    with shared.usage_errors():
        config = CompressionConfig(
            target_modules=target or None,
            exclude_modules=exclude or None,
            topology=topology,
            topology_options=shared.key_values("--topology-option", topology_option),
            sites=sites,
            formats=None if formats is None else tuple(formats.split(",")),
            tokens=tokens,
            objective=objective,  # type: ignore[arg-type]  # checked by the class
            **budget,  # type: ignore[arg-type]
        )
        given = CompressOptions(
            config=None if plan is not None else config,
            plan=plan,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            validation=validation,
            held_out=held_out,
            refine=refine,
            heal=heal,
            dtype=dtype,
            device=device,
            workers=workers,
            resume=resume,
            report=report,
            force=force,
            command=display_command(["tensornet", *sys.argv[1:]]),
            progress=True,
        )
        _check_usage(budget, others, plan)
        if dry_run:
            shared.print_result(plan_folder(source, given), as_json)
            return
        if destination is None:
            raise typer.BadParameter("Name a destination, or ask for --dry-run.")
        done = compress_folder(source, destination, given)
    if done.memory is not None and not as_json:
        shared.note(done.memory)
    shared.print_result(done, as_json)
    for line in (*done.notes, *_advice(done, given)):
        shared.note(line)


def _check_usage(budget: Mapping[str, object], others: Mapping[str, object], plan: Path | None) -> None:
    """Raise BudgetError unless there is a budget or a plan, and not both."""
    spelled = {"bits_per_weight": "--bits"}
    given = [
        spelled.get(name, f"--{name.replace('_', '-')}")
        for name, value in budget.items()
        if value is not None
    ]
    chosen = [*given, *(f"--{name}" for name, value in others.items() if value)]
    if plan is not None and chosen:
        raise BudgetError(f"--plan says already what every layer becomes; leave out {' and '.join(chosen)}.")
    if plan is None and not given:
        raise BudgetError(
            "Say how far to compress: --bits 4.25, --byte-ratio 0.25, --max-bytes, --param-ratio 0.5, "
            "--max-bond, --rel-error, --loss-increase or --max-milliseconds, or --plan with a file."
        )


def _advice(done: FolderReport, given: CompressOptions) -> list[str]:
    """Return a line that recommends the user's own calibration text, if there was none."""
    plan, config = done.report.plan, given.config
    if not given.calibration_files and plan.objective != "weight":
        return [f"calibrated on {plan.calibration}; --calibration with text of your own serves it better"]
    if config is None or given.calibration_files:
        return []
    if config.objective == "auto" and config.rel_error is None:
        return ["the weights alone decided; --calibration TEXT makes a far better model"]
    return []
