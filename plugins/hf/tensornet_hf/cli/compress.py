"""`tensornet compress`: a model folder becomes a smaller one."""

import copy
import math
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from tensornet.calibration import CalibrationStats
from tensornet.compression import CompressionConfig, CompressionPlan, CompressionReport, prepare
from tensornet.compression.compress import gather_statistics
from tensornet.errors import BudgetError, DestinationError, TargetError
from tensornet_hf import pipeline as conversion
from tensornet_hf.checkpoint.hub import HUB, require_free, save_to
from tensornet_hf.checkpoint.inspection import weight_bytes
from tensornet_hf.checkpoint.load import on_device, resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.cli.healing import HealingFile, check_correction, correct
from tensornet_hf.cli.values import parse_share, parse_size
from tensornet_hf.report import ModelFacts, Page, versions, write_report
from tensornet_hf.report.page import compact_bytes
from tensornet_hf.streaming import compress_checkpoint
from tensornet_hf.streaming.text_statistics import statistics_of_text


def run(
    source: shared.Source,
    destination: Annotated[
        str | None,
        typer.Argument(help="Folder to write, or hf://owner/name to upload; not needed for --dry-run."),
    ] = None,
    param_ratio: Annotated[
        float | None,
        typer.Option(parser=parse_share, metavar="SHARE", help="Share of parameters to keep, such as 0.5."),
    ] = None,
    max_bond: Annotated[int | None, typer.Option(help="Largest bond.")] = None,
    rel_error: Annotated[float | None, typer.Option(help="Largest relative error of each weight.")] = None,
    loss_increase: Annotated[
        float | None, typer.Option(help="Predicted rise of the loss to allow, in nats; needs --calibration.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="Size of the chosen layers, as 60MB; needs --calibration."
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
        Path | None, typer.Option(help="Text like the model will see: far better than weights alone.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How much of it to use.")] = 32_768,
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Text of another source than --calibration, on which the loss is measured at a few sizes: "
            "corrects what is foreseen, and with it what --loss-increase buys. Not for classifiers."
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
    int8: Annotated[bool, typer.Option("--int8", help="Keep cores as eight-bit integers.")] = False,
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
    """Compress a model: decompose its linear layers within a budget and save what is left.

    Budgets may be combined, the tightest decides for each layer.
    """
    progress = True
    started = time.perf_counter()
    budget = {
        "param_ratio": param_ratio,
        "max_bond": max_bond,
        "rel_error": rel_error,
        "loss_increase": loss_increase,
        "max_bytes": max_bytes,
        "max_milliseconds": max_milliseconds,
    }
    _check_validation(validation, calibration, objective, plan)
    others = {"sites": sites, "target": target, "exclude": exclude, "tokens": tokens, "int8": int8}
    others["topology-option"] = topology_option
    others |= {"topology": topology != "auto", "objective": objective != "auto"}
    _check_usage(destination, budget, others, plan, dry_run)
    check_correction(refine, heal, calibration, int8)
    _check_report(report, dry_run)
    if workers is not None:
        needs_model: dict[str, object] = {"--dtype": dtype, "--report": report, "--dry-run": dry_run}
        needs_model |= {"--refine": refine, "--heal": heal, "--validation": validation}
        _check_usage_of_workers(destination, needs_model)
    text = None if calibration is None else shared.read_text(calibration)
    other_text = None if validation is None else shared.read_text(validation)
    config = CompressionConfig(
        target_modules=target or None,
        exclude_modules=exclude or None,
        topology=topology,
        topology_options=shared.key_values("--topology-option", topology_option),
        sites=sites,
        int8=int8,
        tokens=tokens,
        objective=objective,  # type: ignore[arg-type]  # checked by the class
        **budget,  # type: ignore[arg-type]
    )
    stored = conversion.dtype_of(dtype)
    folder = resolve_folder(source)
    if destination is not None and not dry_run:
        require_free(destination, source=folder, force=force)
    planned = None if plan is None else CompressionPlan.load(plan)
    observed = config if planned is None else _observed(planned)
    stats = None
    if workers is not None and destination is not None:
        statistics = None
        if calibration is not None and text is not None:
            statistics = statistics_of_text(
                folder,
                destination,
                text,
                name=calibration.name,
                config=observed,
                tokens=calibration_tokens,
                resume=resume,
                progress=progress,
            )
        if planned is not None:
            _check_calibration(planned, None if statistics is None else CalibrationStats.load(statistics))
        streamed = compress_checkpoint(
            folder,
            destination,
            config,
            workers=workers,
            device=str(device),
            resume=resume,
            plan=planned,
            stats=statistics,
            force=force,
            progress=progress,
        )
        if not as_json:
            shared.note(streamed.memory)
        _finish(source, destination, streamed.compression, weight_bytes(folder), as_json)
        if streamed.compression.plan.objective == "weight":
            _note_blindness(text, plan, config)
        return
    model = on_device(conversion.open_dense(folder), device)
    validated = None if other_text is None else conversion.validation_data(model, folder, other_text)
    if calibration is not None and text is not None:
        stats = conversion.collect_stats(
            model,
            folder,
            text,
            name=calibration.name,
            config=observed,
            tokens=calibration_tokens,
            progress=progress,
        )
    stats = gather_statistics(model, observed, stats, progress=progress)
    if planned is None:
        prepared = prepare(model, config, stats, progress=progress)
        if validation is not None and validated is not None:
            if stats is None:
                raise TargetError("--validation corrects what calibration foresees; give --calibration too.")
            seen = f"{validated.tokens:,} tokens of {validation.name}"
            batches = validated.batches
            prepared = prepared.measured(model, stats, batches, source=seen, progress=progress)
        planned = prepared.plan(progress=progress)
    else:
        _check_calibration(planned, stats)
    if dry_run:
        _show_plan(model, planned, as_json)
        return
    assert destination is not None
    spectra = conversion.plan_spectra(model, planned, progress=progress) if report is not None else {}
    teacher = copy.deepcopy(model) if heal or refine else None
    done = conversion.carry_out(model, planned, stats, started=started, progress=progress)
    options = [config.to_dict(), planned.to_dict() if plan else None, text, calibration_tokens, other_text]
    healing = HealingFile(destination, folder, [*options, refine, heal]) if heal else None
    notes: tuple[str, ...] = ()
    if teacher is not None and text is not None:
        notes = correct(
            model,
            teacher,
            folder,
            text,
            stats,
            refine=refine,
            heal=heal,
            file=healing,
            resume=resume,
            progress=progress,
        )
        done = replace(done, seconds=time.perf_counter() - started)
    save_to(conversion.stored_as(model, stored), destination, source=folder, force=force)
    if healing is not None:
        healing.end()
    before = weight_bytes(folder)
    if report is not None:
        models = (
            ModelFacts("original", done.model_params_before, before),
            ModelFacts("compressed", done.model_params_after, _written_bytes(destination, done)),
        )
        made = (("Command", shlex.join(["tensornet", *sys.argv[1:]])), ("Versions", versions()))
        write_report(Page(f"{source}, compressed", models, done, spectra, made=made, notes=notes), report)
    _finish(source, destination, done, before, as_json)
    for line in notes:
        shared.note(line)
    if text is None and planned.objective != "weight":
        shared.note(
            f"calibrated on {planned.calibration}; --calibration with text of your own serves it better"
        )
    else:
        _note_blindness(text, plan, config)


def _note_blindness(text: str | None, plan: Path | None, config: CompressionConfig) -> None:
    if text is None and plan is None and config.objective == "auto" and config.rel_error is None:
        shared.note("the weights alone decided; --calibration TEXT makes a far better model")


def _check_calibration(planned: CompressionPlan, stats: CalibrationStats | None) -> None:
    if planned.objective != "weight" and (stats is None or stats.source != planned.calibration):
        raise BudgetError(
            f"The plan was made with {planned.calibration}, on which the cores depend; give the same with "
            "--calibration and --calibration-tokens."
        )


def _observed(planned: CompressionPlan) -> CompressionConfig:
    """Names the layers and the objective of a plan for calibration; the budget is never read."""
    names = [layer.name for layer in planned]
    return CompressionConfig(target_modules=names, objective=planned.objective, max_bond=1)  # type: ignore[arg-type]


def _check_validation(
    validation: Path | None, calibration: Path | None, objective: str, plan: Path | None
) -> None:
    if validation is None:
        return
    if plan is not None:
        raise typer.BadParameter("--plan holds a forecast already; leave out --validation.")
    if objective in ("weight", "activation"):
        raise typer.BadParameter(
            f"--validation corrects a forecast of the loss, which --objective {objective} does not make; "
            "leave one of them out."
        )
    there = validation.exists() and calibration is not None and calibration.exists()
    if there and calibration is not None and validation.samefile(calibration):
        raise typer.BadParameter("--validation is the text of --calibration; give one of another source.")


def _check_report(report: Path | None, dry_run: bool) -> None:
    """Before the work that it tells of, not after."""
    if report is not None and dry_run:
        raise typer.BadParameter("--dry-run writes nothing; leave out --report.")
    if report is not None and (report.is_dir() or not report.absolute().parent.is_dir()):
        raise DestinationError(
            f"The report cannot be written to {report}: name a file in a folder that exists."
        )


def _check_usage_of_workers(destination: str | None, needs_model: Mapping[str, object]) -> None:
    if given := [name for name, value in needs_model.items() if value]:
        raise typer.BadParameter(
            f"--workers never loads the model, which {' and '.join(given)} would need; leave one of them out."
        )
    if destination is None or destination.startswith(HUB):
        raise typer.BadParameter("--workers writes to a local folder; name one.")


def _check_usage(
    destination: str | None,
    budget: dict[str, float | None],
    others: Mapping[str, object],
    plan: Path | None,
    dry_run: bool,
) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in budget.items() if value is not None]
    chosen = [*given, *(f"--{name}" for name, value in others.items() if value)]
    if plan is not None and chosen:
        raise BudgetError(f"--plan says already what every layer becomes; leave out {' and '.join(chosen)}.")
    if plan is None and not given:
        raise BudgetError(
            "Say how far to compress: --param-ratio 0.5, --max-bond, --rel-error, --loss-increase, "
            "--max-bytes or --max-milliseconds, or --plan with a file."
        )
    if destination is None and not dry_run:
        raise typer.BadParameter("Name a destination, or ask for --dry-run.")


def _show_plan(model: PreTrainedModel, planned: CompressionPlan, as_json: bool) -> None:
    sizes = conversion.plan_summary(model, planned)
    reach = conversion.planned_reach(model, planned)
    if as_json:
        shared.print_json({**planned.to_dict(), **planned.predictions(), **sizes, "reach": reach.to_dict()})
        return
    shared.print_lines(
        str(planned),
        f"layers: {compact_bytes(sizes['layers_bytes_before'])} -> "
        f"{compact_bytes(sizes['layers_bytes_after'])}",
        f"model: {sizes['model_params_before']:,} -> {sizes['model_params_after']:,} parameters, "
        f"{compact_bytes(sizes['model_bytes_before'])} -> {compact_bytes(sizes['model_bytes_after'])}",
        str(reach),
    )


def _finish(source: str, destination: str, done: CompressionReport, before: int, as_json: bool) -> None:
    after = _written_bytes(destination, done)
    if as_json:
        sizes = {"file_bytes_before": before, "file_bytes_after": after}
        shared.print_json({"source": source, "destination": destination, **sizes, **done.to_dict()})
        return
    dense = sum(layer.form == "dense" for layer in done.layers)
    left = f" ({dense} of them stay dense)" if dense else ""
    shared.print_lines(
        f"layers      {len(done.layers)}{left}, kept {done.param_ratio:.1%} of their parameters",
        f"reach       {str(done.reach).removeprefix('reached ')}",
        f"parameters  {done.model_params_before:,} -> {done.model_params_after:,}, whole model",
        f"files       {compact_bytes(before)} -> {compact_bytes(after)}",
        *_foreseen(done.plan),
        f"seconds     {done.seconds:.1f}",
        f"written to  {destination}",
    )


def _foreseen(planned: CompressionPlan) -> list[str]:
    """What the compression alone was predicted to cost; healing is not foreseen."""
    rise, perplexity = planned.predicted_loss_increase, planned.predicted_perplexity
    if rise is None:
        return []
    where = f"measured on {planned.forecast.source}" if planned.forecast.source else planned.calibration
    if planned.dense_loss is None or perplexity is None:  # an encoder
        return [f"foreseen    cosine with the original {1 - rise:.4f} ({where})"]
    before = math.exp(planned.dense_loss)
    return [f"foreseen    loss +{rise:.4f}, perplexity {before:.4g} -> {perplexity:.4g} ({where})"]


def _written_bytes(destination: str, done: CompressionReport) -> int:
    """Size of the weight files; of an upload, which is not here any more, that of the weights."""
    return done.model_bytes_after if destination.startswith(HUB) else weight_bytes(destination)
