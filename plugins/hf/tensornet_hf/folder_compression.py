"""Compression of whole model folders: the functions behind `tensornet compress`."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tensornet.calibration import CalibrationStats
from tensornet.calibration.batches import BatchLike
from tensornet.compression import (
    CompressionConfig,
    CompressionPlan,
    CompressionReport,
    check_loss,
    correct_by_measuring,
    prepare,
)
from tensornet.compression.apply import MadeLayers
from tensornet.compression.compress import gather
from tensornet.compression.report import Coverage
from tensornet.errors import BudgetError, TargetError
from tensornet_hf import pipeline
from tensornet_hf.checkpoint import HUB, check_free, on_device, resolve_folder, save
from tensornet_hf.comparison import Comparison, compare_baselines, folder_page
from tensornet_hf.compress_options import CompressOptions, OptionError
from tensornet_hf.inspect import weight_bytes
from tensornet_hf.report import ModelFacts, write_report
from tensornet_hf.report.facts import compact_bytes
from tensornet_hf.report.page import display_name
from tensornet_hf.streamed_calibration import statistics_of_text
from tensornet_hf.streaming import compress_checkpoint
from tensornet_hf.text.mixing import mix_texts
from tensornet_hf.text.quality import Quality
from tensornet_hf.text.tokens import read_text
from tensornet_hf.training.correction import HealingFile, correct


@dataclass(frozen=True)
class PlannedFolder:
    """Plan for a model folder.

    Args:
        plan: can be edited, saved, and carried out with `CompressOptions(plan=...)`.
        sizes: parameters and bytes before and after, see `tensornet_hf.pipeline.plan_summary`.
        coverage: which of the model's parameters the plan covers.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> planned = th.plan_folder(th.embedded.gpt2_path(), th.CompressOptions(config))
        >>> planned.plan.save("plan.json")  # edit it, and pass it as CompressOptions(plan="plan.json")
    """

    plan: CompressionPlan
    sizes: Mapping[str, int]
    coverage: Coverage

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form, which `CompressionPlan.load` reads as well."""
        plan = {**self.plan.to_dict(), **self.plan.predictions()}
        return {**plan, **self.sizes, "coverage": self.coverage.to_dict()}

    def __str__(self) -> str:
        sizes = {name: compact_bytes(size) for name, size in self.sizes.items() if "bytes" in name}
        before, after = self.sizes["model_params_before"], self.sizes["model_params_after"]
        return (
            f"{self.plan}\n"
            f"these layers: {sizes['layers_bytes_before']} -> {sizes['layers_bytes_after']}\n"
            f"whole model: {before:,} -> {after:,} parameters, {sizes['model_bytes_before']} -> "
            f"{sizes['model_bytes_after']}\n{self.coverage}"
        )


@dataclass(frozen=True)
class FolderReport:
    """Result of `compress_folder`.

    Args:
        source, destination: as they were given.
        report: what was done to each layer.
        file_bytes_before, file_bytes_after: size of the weight files.
        notes: results of refitting and healing, in words.
        memory: remark on the memory of workers, if there were any.
        models: original, compressed and plain methods of the same bytes, where a report or a held-out text
            was asked for.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> report = th.compress_folder(th.embedded.gpt2_path(), "small", th.CompressOptions(config))
        >>> report.file_bytes_after < report.file_bytes_before
        True
    """

    source: str
    destination: str
    report: CompressionReport
    file_bytes_before: int
    file_bytes_after: int
    notes: tuple[str, ...] = ()
    memory: str | None = None
    models: tuple[ModelFacts, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        models = {"models": [model.to_dict() for model in self.models]}
        sizes = {"file_bytes_before": self.file_bytes_before, "file_bytes_after": self.file_bytes_after}
        names = {"source": self.source, "destination": self.destination}
        return {**names, **sizes, **models, **self.report.to_dict()}

    def __str__(self) -> str:
        done = self.report
        bits, dense = done.plan.bits_per_weight, sum(layer.scheme == "dense" for layer in done.layers)
        left = f" ({dense} of them stay dense)" if dense else ""
        lines = (
            f"files       {compact_bytes(self.file_bytes_before)} -> {compact_bytes(self.file_bytes_after)}",
            f"layers      {len(done.layers)}{left}, {bits:.2f} bits a weight of these layers",
            f"parameters  {done.model_params_before:,} -> {done.model_params_after:,}, whole model",
            f"covers      {str(done.coverage).removeprefix('covers ')}",
            *self._predicted(),
            *([] if done.measured is None else [f"measured    {done.measured}"]),
            *self._measured(),
            f"seconds     {done.seconds:.1f}",
            f"written to  {self.destination}",
        )
        return "\n".join(lines)

    def _predicted(self) -> list[str]:
        """Return the predicted loss increase of compression alone; refitting and healing are excluded."""
        plan = self.report.plan
        loss = plan.predicted_loss_increase
        if loss is None:
            return []
        where = (
            f"corrected by measuring on {plan.forecast.source}" if plan.forecast.source else plan.calibration
        )
        if plan.dense_loss is None:  # an encoder
            return [f"predicted   cosine with the original {1 - loss:.4f} ({where})"]
        return [f"predicted   loss +{loss:.4f}{plan.predicted_change()} ({where})"]

    def _measured(self) -> list[str]:
        """Return the measured loss of the original, the compressed model and the plain methods."""
        if not self.models or self.models[0].quality is None:
            return []
        original = self.models[0].quality
        lines = [f"measured    {original.measure} {original.loss:.4f} ({original.how})"]
        for model in self.models[1:]:
            if model.quality is None:
                continue
            rise = f"{model.quality.loss - original.loss:+.4f}"
            perplexity = model.quality.perplexity
            much = "" if perplexity is None else f", perplexity {original.perplexity:.4g} -> {perplexity:.4g}"
            lines.append(f"            {model.name} {rise}{much} ({model.form}, {model.bits:.2f} bits)")
        return lines


def compress_folder(source: str | Path, destination: str | Path, options: CompressOptions) -> FolderReport:
    """Compress a model folder and save the result as another one.

    Args:
        source: model folder, or hub id if there is no folder of that name.
        destination: folder to write, or `hf://owner/name` to upload.
        options: see there.

    Returns:
        What was done; printed, it is a short summary.

    Raises:
        FormatError: the source is not a model, or damaged.
        TargetError: it is compressed already, or text says too little about models of its kind.
        BudgetError: the budget cannot be met, or a plan was made with another calibration.
        DestinationError: the destination exists already, or cannot be written.
        OptionError: `workers` with a destination on the hub.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> done = th.compress_folder(th.embedded.gpt2_path(), "small", th.CompressOptions(config))
        >>> round(done.report.param_ratio, 2)
        0.5
    """
    started = time.perf_counter()
    if options.workers is not None and str(destination).startswith(HUB):
        raise OptionError("{workers} writes to a local folder; name one.")
    texts = _Texts.read(options)
    folder = resolve_folder(source)
    check_free(destination, force=options.force, sources=(folder,))
    if options.workers is not None:
        return _streamed(str(source), folder, str(destination), options, texts)
    work = _plan(folder, options, texts)
    spectra, comparison = {}, None
    if options.report is not None:
        spectra = pipeline.plan_spectra(work.model, work.plan, progress=options.progress)
    if options.report is not None or texts.held_out is not None:
        before = time.perf_counter()
        comparison = _compared(work, options, texts)
        started += time.perf_counter() - before  # is no part of compressing
    done, found, notes = _carried_out(work, str(destination), options, texts, started, comparison)
    sizes = (weight_bytes(folder), _written_bytes(str(destination), done))
    predicted = not (options.refine or options.heal)
    rows = () if comparison is None else comparison.rows(done, sizes, found, predicted=predicted)
    if options.report is not None and comparison is not None:
        page = folder_page(
            display_name(source),
            comparison,
            rows,
            done,
            spectra=spectra,
            command=options.command,
            notes=notes,
        )
        write_report(page, options.report)
    return FolderReport(str(source), str(destination), done, *sizes, notes, models=rows)


def plan_folder(source: str | Path, options: CompressOptions) -> PlannedFolder:
    """Plan the compression of a model folder and write nothing.

    Args:
        source: model folder, or hub id if there is no folder of that name.
        options: without `report`, `held_out` and `workers`.

    Raises:
        OptionError: `report`, `held_out` or `workers` is given.
        FormatError, TargetError, BudgetError: as `compress_folder`.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> planned = th.plan_folder(th.embedded.gpt2_path(), th.CompressOptions(config))
        >>> planned.plan.params_after < planned.plan.params_before
        True
    """
    if options.report is not None:
        raise OptionError("{dry_run} writes nothing; leave out {report}.")
    if options.held_out is not None:
        raise OptionError("{dry_run} compresses nothing that could be measured; leave out {held_out}.")
    if options.workers is not None:
        options.check_needs_no_model({"dry_run": True})
    work = _plan(resolve_folder(source), options, _Texts.read(options))
    coverage = pipeline.planned_coverage(work.model, work.plan)
    return PlannedFolder(work.plan, pipeline.plan_summary(work.model, work.plan), coverage)


@dataclass(frozen=True)
class _Texts:
    """Contents of the text files."""

    calibration: str | None
    validation: str | None
    held_out: str | None

    @classmethod
    def read(cls, options: CompressOptions) -> "_Texts":
        several = [read_text(file) for file in options.calibration_files]
        files = (options.validation, options.held_out)
        others = (None if file is None else read_text(Path(file)) for file in files)
        return cls(mix_texts(several) if several else None, *others)


@dataclass(frozen=True)
class _Work:
    """Dense model, its plan, statistics and batches it was made with, and layers rounded to verify it."""

    folder: Path
    model: PreTrainedModel
    plan: CompressionPlan
    stats: CalibrationStats | None
    made: MadeLayers | None = None
    batches: Sequence[BatchLike] = ()


def _plan(folder: Path, options: CompressOptions, texts: _Texts) -> _Work:
    """Load the model, calibrate it, and make or check the plan."""
    progress, planned = options.progress, options.load_plan()
    config = options.config or _observed(planned)
    model = on_device(pipeline.open_dense(folder), options.device)
    validated = None
    if texts.validation is not None:
        validated = pipeline.validation_data(model, folder, texts.validation)
    stats = None
    if texts.calibration is not None:
        stats = pipeline.collect_stats(
            model,
            folder,
            texts.calibration,
            name=" and ".join(file.name for file in options.calibration_files),
            config=config,
            tokens=options.calibration_tokens,
            progress=progress,
        )
    stats, data = gather(model, config, stats, progress=progress)
    batches = list(data.batches)
    if texts.calibration is not None:
        tokens = options.calibration_tokens
        batches = pipeline.verification_batches(model, folder, texts.calibration, tokens=tokens)
    if planned is not None:
        _check_calibration(planned, stats)
        return _Work(folder, model, planned, stats, batches=batches)
    prepared = prepare(model, config, stats, progress=progress)
    if config.verify and stats is not None:
        prepared = check_loss(prepared, model, stats, batches, progress=progress)
    if options.validation is not None and validated is not None:
        if stats is None:
            raise TargetError(
                "The validation text corrects what calibration predicts; give a calibration text too."
            )
        seen = f"{validated.tokens:,} tokens of {Path(options.validation).name}"
        prepared = correct_by_measuring(
            prepared, model, stats, list(validated.batches), source=seen, progress=progress
        )
    made = prepared.plan(progress=progress)
    return _Work(folder, model, made, stats, prepared.made, batches)


def _compared(work: _Work, options: CompressOptions, texts: _Texts) -> Comparison:
    """Compare the dense model with plain methods at the bytes of the plan."""
    return compare_baselines(
        work.model,
        work.folder,
        work.plan,
        work.stats,
        text=texts.held_out,
        name="" if options.held_out is None else Path(options.held_out).name,
        progress=options.progress,
    )


def _carried_out(
    work: _Work,
    destination: str,
    options: CompressOptions,
    texts: _Texts,
    started: float,
    comparison: Comparison | None,
) -> tuple[CompressionReport, tuple[Quality | None, str | None], tuple[str, ...]]:
    """Execute a plan, refit and heal if requested, measure and save the model."""
    model, progress = work.model, options.progress
    teacher = copy.deepcopy(model) if options.heal or options.refine else None
    done = pipeline.carry_out(
        model,
        work.plan,
        work.stats,
        started=started,
        progress=progress,
        made=work.made,
        batches=work.batches,
        allowed=None if options.config is None else options.config.loss_increase,
    )
    file = None
    if options.heal:
        config = options.config or CompressionConfig()
        plan = work.plan.to_dict() if options.plan is not None else None
        key = [config.to_dict(), plan, texts.calibration, options.calibration_tokens, texts.validation]
        file = HealingFile(destination, work.folder, [*key, options.refine, options.heal])
    notes: tuple[str, ...] = ()
    if teacher is not None and texts.calibration is not None:
        notes = correct(
            model,
            teacher,
            work.folder,
            texts.calibration,
            work.stats,
            refine=options.refine,
            heal=options.heal,
            checkpoint=None if file is None else file.begin(resume=options.resume),
            progress=progress,
        )
        done = replace(done, seconds=time.perf_counter() - started)
    stored = pipeline.stored_as(model, pipeline.dtype_of(options.dtype))
    found = (None, None) if comparison is None else comparison.of(stored)
    save(stored, destination, source=work.folder, force=options.force)
    if file is not None:
        file.end()
    return done, found, notes


def _streamed(
    source: str, folder: Path, destination: str, options: CompressOptions, texts: _Texts
) -> FolderReport:
    """Compress a folder weight by weight, without loading the model."""
    planned, progress = options.load_plan(), options.progress
    statistics = None
    if texts.calibration is not None:
        statistics = statistics_of_text(
            folder,
            destination,
            texts.calibration,
            name=" and ".join(file.name for file in options.calibration_files),
            config=options.config or _observed(planned),
            tokens=options.calibration_tokens,
            resume=options.resume,
            progress=progress,
        )
    if planned is not None:
        _check_calibration(planned, None if statistics is None else CalibrationStats.load(statistics))
    streamed = compress_checkpoint(
        folder,
        destination,
        options.config or CompressionConfig(),
        workers=options.workers or 1,
        device=str(options.device),
        resume=options.resume,
        plan=planned,
        stats=statistics,
        force=options.force,
        progress=progress,
    )
    done = streamed.compression
    sizes = (weight_bytes(folder), _written_bytes(destination, done))
    return FolderReport(source, destination, done, *sizes, memory=str(streamed).splitlines()[-1])


def _observed(planned: CompressionPlan | None) -> CompressionConfig:
    """Build a configuration with the layers and objective of a plan; its budget is never read."""
    assert planned is not None  # the options have a config or a plan
    names = [layer.name for layer in planned]
    return CompressionConfig(target_modules=names, objective=planned.objective, max_bond=1)  # type: ignore[arg-type]


def _check_calibration(planned: CompressionPlan, stats: CalibrationStats | None) -> None:
    """Raise BudgetError if the plan was made with other statistics."""
    if planned.objective != "weight" and (stats is None or stats.source != planned.calibration):
        raise BudgetError(
            f"The plan was made with {planned.calibration}, on which the cores depend; give the same text "
            "and number of tokens (--calibration and --calibration-tokens on the command line)."
        )


def _written_bytes(destination: str, done: CompressionReport) -> int:
    """Return the size of the weight files; for an upload, the size of the weights."""
    return done.model_bytes_after if destination.startswith(HUB) else weight_bytes(destination)
