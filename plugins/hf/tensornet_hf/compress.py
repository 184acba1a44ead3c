"""Load a model from a folder, compress it, and save the result: the functions behind `tensornet compress`."""

# ruff: noqa: RUF009 (`option` returns a `dataclasses.field`)

import hashlib
import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tensornet._util import compact_bytes
from tensornet.calibration.batches import as_batch, check_batches, tokens_of
from tensornet.calibration.blockwise import calibrate
from tensornet.calibration.calibrate import ENOUGH_LOSSES
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.candidates import format_fits
from tensornet.compression.config import AUTO, DEFAULT_FORMATS, WITHOUT_DATA, CompressionConfig, option
from tensornet.compression.coverage import measure_coverage
from tensornet.compression.loss_increase import LossIncrease, light_copy
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.report import CompressionReport, ModelFacts, model_size
from tensornet.compression.road import Done, Planned, Source, calibration_config, make_plan, run
from tensornet.compression.survey import Survey, untargeted_sizes
from tensornet.compression.surveying import tensor_digest
from tensornet.compression.tasks import one_thread, worker_processes
from tensornet.compression.write import WRITE_TOKENS, moment_of, read_enough
from tensornet.errors import BudgetError, DestinationError, FormatError, TargetError
from tensornet.gone import explains_gone
from tensornet.healing import refine
from tensornet.healing.heal import heal
from tensornet.io import FLOATS, check_place, write_file
from tensornet.nn.extension import ProvidedData
from tensornet.nn.targets import find_targets
from tensornet.nn.unfuse import unfused
from tensornet.quantization.menus import bytes_for
from tensornet_hf.checkpoint import (
    HUB,
    check_free,
    load,
    on_device,
    read_dense,
    resolve_folder,
    save,
    upload,
    weight_bytes,
)
from tensornet_hf.evaluate import held_out_batches
from tensornet_hf.exporters.base import NETWORKS, Networks, refuse_mixtures
from tensornet_hf.exporters.gguf import adapter_file, file_runtime
from tensornet_hf.exporters.gguf_memory import CACHE_BITS, MemoryUse, check_cache_type
from tensornet_hf.exporters.target import EXPORT_TARGETS, check_destination, export, find_target
from tensornet_hf.file_sink import MAX_SHARD_BYTES, FileSink, PlannedModel
from tensornet_hf.lazy_model import LazyModel, open_lazily, open_model, read_source
from tensornet_hf.manifest import list_tensors, warn_of_left_out
from tensornet_hf.model_folder import lay_out_folder
from tensornet_hf.receipts import Receipt, digests_of, source_paths, written_paths
from tensornet_hf.report import Page, compare_methods, display_name, versions, write_report
from tensornet_hf.rotation import ROTATED, rotated_folder
from tensornet_hf.staging import (
    SURVEYED,
    StatesOnDisk,
    begin,
    check_unchanged,
    file_marks,
    json_digest,
    reading_or_writing,
    staging,
)
from tensornet_hf.text import calibration_data, default_text, load_tokenizer, mix_texts, own_text, read_text

#: Files in a staging folder: the survey, the plan of a run without data, and the checkpoint of healing.
SURVEY, PLAN, HEALING = "survey.safetensors", "plan.json", "healing.safetensors"
#: The compressed model as a folder, if it is still to be changed or measured, and its plan and measured loss.
COMPRESSED, DONE = "compressed", "done.json"
#: Names that stand for the package's calibration text, and for text that the model writes itself.
DEFAULT, OWN = "default", "own"
#: Options that do not change the result, or that the plan contains; receipts leave them out.
_NOT_RECORDED = (
    "survey",
    "workers",
    "resume",
    "report",
    "force",
    "executor",
    "command",
    "progress",
    "export",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class OptionError(ValueError):
    """Raised if two options exclude each other, or an option needs another one."""


@explains_gone
@dataclass(frozen=True)
class CompressOptions:
    """Options of `compress_folder` that `CompressionConfig` does not have: texts, corrections, files.

    Args:
        calibration: file with text like the model's later input; 'own' is text that a causal language model
            writes itself (which needs memory for the model), 'default' is the package's text of many kinds
            (prose, 16 languages, code, dialogues). Pieces of several files alternate. For models that do not
            read text alone, batches (`tn.nn.ProvidedData`). Not needed with `method="nearest"` or `"svd"`.
        calibration_tokens: number of calibration tokens on which the loss is differentiated (default: 4,096
            or 1,024 passages; with effort thorough 32,768).
        survey: file with the predicted loss of every number format of every layer: read if it exists, written
            otherwise. With it, a plan for another budget takes seconds.
        weights: floating-point GGUF file with the weights of the model; the folder then only needs the
            configuration and the tokenizer.
        held_out: text that the model has not seen; the losses of the original, of the result and of simple
            baselines of equal size are measured on it. Only for language models; needs memory for two models.
        refine: after compression, refit each layer to the dense model's outputs on unused calibration text.
        heal: after compression, train the cores for this many steps to match the dense model's outputs on the
            calibration text.
        rotate: rotate a Llama-like model before compression, which spreads outliers of the weights but does
            not change the outputs; this does not always help, so compare with and without. A tied output head
            becomes a separate weight. See `tensornet_hf.rotate`.
        dtype: store weights in this dtype (default: keep their dtype).
        device: device on which the model runs: cpu, cuda, cuda:1, mps.
        workers: number of processes that survey and compress layers (default: all cores on the command line,
            1 in scripts). The result does not depend on it. With more than one, protect the code of a script
            by `if __name__ == "__main__":`, as usual with multiprocessing.
        executor: executor that surveys and compresses the layers; `workers` is then ignored. Any
            `concurrent.futures.Executor` can be used, such as
            `dask.distributed.Client(...).get_executor()`.
        resume: continue an interrupted run. If False, its files are deleted.
        export: write the model for another runtime (default: gguf if the destination ends in .gguf). Only
            number formats of this target are planned.
        report: write a report as an HTML page.
        networks: how an export writes tensor networks: as dense weights (dense); low-rank matrices that are
            added to integers as a LoRA adapter, all others as dense weights (lora); or not at all, with an
            error (refuse).
        memory: memory that llama.cpp may use for weights and context together, such as 16GB; the file gets
            what the context leaves. Only for GGUF files.
        context: number of tokens in the context that `memory` is for (default: that of the model).
        cache_type: type of keys and values in the context that `memory` is for (default: f16).
        max_shard_bytes: largest size of a weight file of a folder, in bytes; a larger tensor becomes a file
            of its own.
        force: replace an existing destination.
        command: command line to show in the report.
        progress: show progress bars.

    Raises:
        OptionError: two options exclude each other, or an option needs another one.
        DestinationError: the report or the statistics cannot be written.
        ValueError: an unknown dtype, or a number below 1.

    Example:
        >>> th.CompressOptions(calibration="text.txt").calibration
        ('text.txt',)
    """

    calibration: str | Path | Sequence[str | Path] | ProvidedData = option((), "data", "paths")
    calibration_tokens: int | None = option(None, "advanced", "integer")
    survey: str | Path | None = option(None, "data", "path")
    weights: str | Path | None = option(None, "data", "path")
    held_out: str | Path | None = option(None, "data", "path")
    refine: bool = option(False, "after", "flag")
    heal: int = option(0, "after", "integer")
    rotate: bool = option(False, "layers", "flag")
    dtype: str | None = option(None, "output", choices=tuple(DTYPES))
    device: torch.device | str = option("cpu", "run", "device")
    workers: int | None = option(None, "run", "integer")
    resume: bool = option(True, "advanced", "flag")
    export: str | None = option(None, "output", name="to", choices=tuple(EXPORT_TARGETS))
    report: str | Path | None = option(None, "output", "path")
    networks: Networks = option("dense", "advanced", choices=NETWORKS)
    memory: int | None = option(None, "budget", "size")
    context: int | None = option(None, "budget", "integer")
    cache_type: str | None = option(None, "budget", choices=tuple(CACHE_BITS))
    force: bool = option(False, "output", "flag")
    executor: Executor | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    command: str = "tensornet_hf.compress_folder"
    progress: bool = False

    def __post_init__(self) -> None:
        given = self.calibration
        if not isinstance(given, ProvidedData):
            given = (given,) if isinstance(given, (str, Path)) else tuple(given)
            object.__setattr__(self, "calibration", given)
        texts = () if isinstance(given, ProvidedData) else given
        for name in ("workers", "max_shard_bytes"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}.")
        for name, what in (("refine", "refits layers on"), ("heal", "trains on")):
            if getattr(self, name) and not texts:
                raise OptionError(f"{name}= {what} the calibration text; add calibration=.")
        used = {Path(x).resolve() for x in texts}
        if self.held_out is not None and Path(self.held_out).resolve() in used:
            raise OptionError("held_out= is the file of calibration=; give a text from another source.")
        dtype_of(self.dtype)
        for name in ("context", "cache_type"):
            if getattr(self, name) is not None and self.memory is None:
                raise OptionError(f"{name}= says what a budget of memory is for; add memory=.")
        if self.cache_type is not None:
            check_cache_type(self.cache_type)
        for what, place in (("The report", self.report), ("The survey", self.survey)):
            if place is not None:
                check_place(what, Path(place))
        if not given and self.calibration_tokens is not None:
            raise OptionError("calibration_tokens= counts tokens of a text; add calibration=.")

    @property
    def loads_result(self) -> bool:
        """True if the result is loaded again, to change it, to measure it or to write adapters."""
        names = ("dtype", "report", "refine", "heal", "held_out")
        return any(getattr(self, x) for x in names) or self.networks == "lora"

    @property
    def texts(self) -> tuple[str | Path, ...]:
        """The calibration files; empty if there are none, or batches are given."""
        return () if isinstance(self.calibration, ProvidedData) else tuple(self.calibration)  # type: ignore[arg-type]

    @property
    def source(self) -> str:
        """Names of the calibration texts, for reports."""
        names = {DEFAULT: "the package's text", OWN: "text that the model wrote itself"}
        return " and ".join(names.get(str(x)) or Path(x).name for x in self.texts)


def text_of(options: CompressOptions, folder: Path) -> str | None:
    """Return the calibration text, in which pieces of several texts alternate; None if no text is given.

    Args:
        options: the options.
        folder: folder of the model, which writes its own text if asked for.

    Raises:
        FileNotFoundError: there is no such file; the message lists the other possibilities.
        TargetError: the model cannot write text.
    """
    texts = []
    for name in options.texts:
        if name == OWN:
            model = on_device(open_dense(folder, options.weights), options.device)
            texts.append(own_text(model.eval(), load_tokenizer(folder)))
            del model
        elif name == DEFAULT:
            texts.append(default_text(load_tokenizer(folder)))
        elif not Path(name).exists():
            raise FileNotFoundError(
                f"There is no file {name}. Give a text file, '{OWN}' for text that the model writes itself, "
                f"or '{DEFAULT}' for the package's text."
            )
        else:
            texts.append(read_text(Path(name)))
    return mix_texts(texts) if texts else None


def compress_folder(
    source: str | Path,
    destination: str | Path,
    config: CompressionConfig | CompressionPlan,
    options: CompressOptions | None = None,
) -> CompressionReport:
    """Compress the model in a folder and save the result as another folder or a GGUF file.

    In an export, `max_bytes` limits the size of the written files, and only number formats of the target are
    planned unless `config` lists formats.

    Args:
        source: model folder, or hub id if there is no folder of that name.
        destination: folder to write, `hf://owner/name` to upload, or a file name that ends in `.gguf`.
        config: compression options, or a plan (which may have been edited or loaded).
        options: further options, such as the calibration text.

    Returns:
        A report; `print` shows a short summary. A receipt is written with the result (see `verify`).

    Raises:
        FormatError: the source is not a model folder, or is damaged.
        TargetError: the model is already compressed, or cannot be calibrated on text alone.
        BudgetError: the budget cannot be met or needs calibration, or the plan was made with other data.
        DestinationError: the destination exists already, or cannot be written.
        OptionError: two options exclude each other, or an option needs another one.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd")
        >>> done = th.compress_folder(th.embedded.gpt2_path(), "small", config)
        >>> round(done.param_ratio, 2), done.file_bytes_after < done.file_bytes_before
        (0.5, True)
        >>> print(str(done).splitlines()[-1])
        written to  small
    """
    options = options or CompressOptions()
    target = find_target(destination, options.export)
    if str(destination).startswith(HUB) and target is not None:
        raise OptionError("export= writes local files; name a local folder, and upload it afterwards.")
    config = _check_data(_with_memory(config, options, target), options)
    if options.networks != "dense" and target is None:
        raise OptionError("networks= is an option of export=; model folders store networks unchanged.")
    if str(destination).startswith(HUB):
        check_free(destination, force=options.force)
        with tempfile.TemporaryDirectory(prefix="tensornet-") as parent:
            made = Path(parent) / "model"
            done = compress_folder(source, made, config, options)
            upload(made, str(destination), force=options.force)
        return replace(done, destination=str(destination))

    folder = resolve_folder(source)
    path = Path(destination).expanduser().resolve()
    check = partial(check_destination, path, target, force=options.force, sources=(folder,))
    check()
    if (target is None or not EXPORT_TARGETS[target].suffix) and path.is_relative_to(folder.resolve()):
        raise DestinationError(f"{path} is inside the source {folder}; choose another destination.")
    read_source(folder, options.weights)  # an invalid folder raises before anything is locked
    marks = file_marks(folder, options.weights)
    with reading_or_writing(folder, path), staging(path) as work:
        check()  # another run may have written the destination since the first check
        done = _compress(folder, path, config, options, target, work, marks, check)
        _receipt(done, folder, path, options, target).save(path)
        shutil.rmtree(work, ignore_errors=True)  # another run may have opened the lock file in this folder
    return replace(done, source=str(source), destination=str(destination))


def _compress(
    folder: Path,
    path: Path,
    config: CompressionConfig | CompressionPlan,
    options: CompressOptions,
    target: str | None,
    work: Path,
    marks: Mapping[str, str],
    check: Callable[[], None],
) -> CompressionReport:
    """Compress a model block by block into files, and correct, measure and export the result.

    Args:
        folder, path: the source and the destination.
        config, options: checked options.
        target: name of the export target, or None.
        work: the staging folder, locked by this process.
        marks: size and modification time of each file of the source, by path.
        check: function that raises an error if the destination may not be written.
    """
    started = time.perf_counter()
    text, reads_data = text_of(options, folder), reads_text(config, options)
    held_out = None if options.held_out is None else read_text(Path(options.held_out))

    # Open the model and make its batches: an invalid model or text raises before anything is written.
    lazy = _open(folder, options.weights, runs=reads_data)
    warn_of_left_out(lazy)
    needed = None
    if target is not None and isinstance(config, CompressionConfig):
        needed = _needed(lazy.model, folder, options)
        config = for_target(target, config, lazy.model, folder, needed)
    if held_out is not None:
        held_out_batches(lazy.model, folder, held_out, tokens=2)
    data = ProvidedData([], "")
    if reads_data:
        data = calibration_batches(lazy.model, folder, config, options, text) or data

    # Keep what an interrupted run has made, and delete the files of other runs.
    kept = ("refine", "heal", "dtype", "networks", "max_shard_bytes")
    survey_of = [str(options.device), options.calibration_tokens, options.rotate]
    rest = [config.to_dict(), target, options.loads_result, {x: getattr(options, x) for x in kept}]
    texts = [tensor_digest(data.batches) if reads_data else "", text]
    reusable = {SURVEY: [texts[0], survey_of], ROTATED: options.rotate, PLAN: rest}
    begin(
        work,
        marks,
        {"texts": texts, "options": [survey_of, rest]},
        resume=options.resume,
        reusable=reusable,
    )

    # Plan, and compress block by block. A result that is still to be changed or measured is a model folder.
    place = work / COMPRESSED if options.loads_result else path
    lazy, opened = open_source(folder, options, work, runs=reads_data)
    with workers_of(options) as executor:
        planned = _plan(lazy, opened, config, data, options, work, executor)
        if options.loads_result and (work / DONE).is_file():
            plan, measured, uncorrected = _read_done(work / DONE)
        else:

            def finishing() -> None:
                check_unchanged(marks, file_marks(folder, options.weights))
                check()

            def open_sink(plan: CompressionPlan) -> FileSink:
                # A model that ran may have left states in its modules, which cannot be copied.
                about = {"networks": options.networks, "max_shard_bytes": options.max_shard_bytes}
                title = folder.resolve().name
                model = PlannedModel.of(open_lazily(lazy.source), plan, folder=folder, title=title, **about)
                exports = None if target is None or options.loads_result else EXPORT_TARGETS[target]
                files = lay_out_folder(model) if exports is None else exports.lay_out(model)
                stored = {name for layout in files.layouts.values() for name in layout.places}
                for name, why in files.dense.items():
                    if name in stored:
                        warnings.warn(f"{name} is not stored as integers: {why}.", stacklevel=2)
                key = json_digest([plan.to_dict(), options.max_shard_bytes, target])
                # Without its record, the result of a run that was killed at its end is written again.
                force = options.force or options.loads_result
                return FileSink(files, place, work, key=key, force=force, check=finishing)

            done = run(opened, planned, open_sink, data, executor=executor, progress=options.progress)
            plan, measured, uncorrected = done.plan, done.measured, done.uncorrected
            if options.loads_result:
                _write_done(work / DONE, done)
    # Report.
    parts = [part for key, part in lazy.source.tensors.items() if key not in lazy.surplus]
    params, size = sum(part.numel for part in parts), sum(part.nbytes for part in parts)
    report = CompressionReport(
        model_params_before=params,
        model_params_after=params - plan.params_before + plan.params_after,
        model_bytes_before=size,
        model_bytes_after=size - plan.bytes_before + plan.bytes_after,
        seconds=time.perf_counter() - started,
        plan=plan,
        coverage=measure_coverage(planned.weights, planned.names, unseen=plan.unseen),
        measured=measured,
        measured_layers=measured,
        tensors=list_tensors(lazy, plan, planned.weights),
        uncorrected=uncorrected,
    )
    if needed is not None:
        command = f"run it with: {needed.command(path.name)}"
        report = replace(report, memory=needed.to_dict(), notes=(command,))
    before = weight_bytes(folder if options.weights is None else options.weights)
    if not options.loads_result:
        written = weight_bytes(path)
        if target is not None:
            report = replace(report, model_bytes_after=written)
        return replace(report, file_bytes_before=before, file_bytes_after=written)
    seen = sum(tokens_of(as_batch(x, lazy.model, torch.device("cpu"))) for x in data.batches)
    survey = planned.survey

    # Refit and train the result, write it, and compare it with the dense model and with baselines.
    model = on_device(load(place), options.device)
    corrected, compared = options.refine or options.heal, options.report or held_out
    teacher: Any = None
    if corrected or compared:
        weights = None if options.rotate else options.weights
        teacher = on_device(open_dense(lazy.source.folder, weights), options.device)
    notes: tuple[str, ...] = report.notes
    if corrected and text is not None:
        notes += _correct(model, teacher, folder, text, survey, seen, options, work / HEALING)
    stored = model if options.dtype is None else torch.nn.Module.to(model, dtype=dtype_of(options.dtype))
    report = replace(report, seconds=time.perf_counter() - started)
    if target is not None:
        exported = export(
            stored, path, target=target, source=folder, force=options.force, networks=options.networks
        )
        notes += exported.adapter_lines
        notes += tuple(f"{name} is dense in the file: {why}" for name, why in exported.dense.items())
        written = exported.num_bytes + exported.adapter_bytes
        report = replace(report, model_bytes_after=written)
    else:
        save(stored, path, source=folder, force=options.force)
        written = weight_bytes(path)
    models: list[ModelFacts] = []
    if compared:
        # Baselines are rounded with error feedback along the inputs of the dense model.
        tokens = WRITE_TOKENS["fast"]
        batches = list(data.batches)
        stats = None
        if batches:
            stats = calibrate(teacher, batches, loss_fn=data.loss_fn, tokens=tokens, gradients=False)
        models, losses, prompt = compare_methods(
            teacher,
            stored,
            folder,
            report,
            stats,
            (before, written),
            text=held_out,
            name="" if options.held_out is None else Path(options.held_out).name,
            predicted=not corrected,
            progress=options.progress,
        )
        if options.report is not None:
            made = (("Command", options.command), ("Versions", versions()))
            title = f"{display_name(folder)}, compressed"
            write_report(Page(title, report, models, losses, made, notes, prompt), options.report)
    return replace(
        report, file_bytes_before=before, file_bytes_after=written, notes=notes, models=tuple(models)
    )


def _receipt(
    report: CompressionReport, folder: Path, path: Path, options: CompressOptions, target: str | None
) -> Receipt:
    """Make the receipt of a written model.

    Args:
        report: report of the compression.
        folder, path: the source and the destination.
        options: the options; those that do not change the result are left out.
        target: name of the export target, or None.
    """
    chosen = {
        x.name: getattr(options, x.name)
        for x in fields(options)
        if x.name not in ("calibration", *_NOT_RECORDED) and getattr(options, x.name) != x.default
    }
    shown: dict[str, Any] = {
        k: x if isinstance(x, bool | int) else Path(str(x)).name for k, x in chosen.items()
    }
    if options.calibration:
        given = options.calibration
        # Text that the model writes follows from the model and would have to be written again.
        text = None if OWN in options.texts else text_of(options, folder)
        name = given.source if isinstance(given, ProvidedData) else options.source
        digest = {} if text is None else {"sha256": hashlib.sha256(text.encode()).hexdigest()}
        shown["calibration"] = {"name": name, **digest}
    return Receipt(
        digests_of(written_paths(path, adapter_file(path) if options.networks == "lora" else None)),
        display_name(folder),
        digests_of(source_paths(folder, options.weights)),
        target,
        report.plan.to_dict(),
        shown,
        options.command,
        versions(),
        report.plan.predicted_loss_increase,
        None if report.measured is None else asdict(report.measured),
    )


@contextmanager
def workers_of(options: CompressOptions) -> Iterator[Executor | None]:
    """Yield the executor that the options give or ask for; None for a single worker."""
    with worker_processes(1 if options.executor is not None else options.workers or 1) as own:
        yield options.executor or own


def _plan(
    lazy: LazyModel,
    opened: Source,
    config: CompressionConfig | CompressionPlan,
    data: ProvidedData,
    options: CompressOptions,
    work: Path,
    executor: Executor | None,
) -> Planned:
    """Plan the compression of a model that is opened lazily.

    The survey is stored in `work`; if the plan depends on the weights alone, the plan is stored instead.
    """
    reads_data, finished = bool(data.batches), isinstance(config, CompressionPlan)
    wanted = calibration_config(config) if isinstance(config, CompressionPlan) else config
    _check_readable(lazy, wanted)
    survey: str | Path | None = options.survey
    if reads_data and survey is None and (not finished or config.objective == "curvature"):
        survey = work / SURVEY
        _forget_other_survey(survey, wanted)
    plan_file = None if reads_data or finished else work / PLAN
    if plan_file is not None and plan_file.is_file():
        config = CompressionPlan.load(plan_file)
    # Matrices that cannot be mapped are in memory while a plan is made by their errors alone.
    unmapped = [
        x
        for x in lazy.model.modules()
        if not reads_data and any(map(lazy.only_read, x.parameters(recurse=False)))
    ]
    tokens = options.calibration_tokens
    with one_thread() if not reads_data else nullcontext(), lazy.loaded(unmapped, dtype=None):
        planned = make_plan(
            opened,
            config,
            data,
            survey=survey,
            tokens=tokens,
            executor=executor,
            progress=options.progress,
        )
    shutil.rmtree(work / SURVEYED, ignore_errors=True)
    if plan_file is not None:
        write_file(plan_file, [json.dumps(planned.plan.to_dict()).encode()])
    return planned


def _write_done(path: Path, done: Done) -> None:
    """Write what a report needs, for a run that is interrupted in a later step."""
    measured = None if done.measured is None else asdict(done.measured)
    found = {"plan": done.plan.to_dict(), "measured": measured, "uncorrected": list(done.uncorrected)}
    write_file(path, [json.dumps(found).encode()])


def _read_done(path: Path) -> tuple[CompressionPlan, LossIncrease | None, tuple[str, ...]]:
    found = json.loads(path.read_bytes())
    measured = None if found["measured"] is None else LossIncrease(**found["measured"])
    return CompressionPlan.from_dict(found["plan"]), measured, tuple(found["uncorrected"])


def _with_memory(
    config: CompressionConfig | CompressionPlan, options: CompressOptions, target: str | None
) -> CompressionConfig | CompressionPlan:
    """Convert a budget of memory to one of bytes, from which `for_target` subtracts what the context needs.

    Raises:
        OptionError: the target is not GGUF, or a plan or a budget of bytes is given too.
    """
    if options.memory is None:
        return config
    if target != "gguf":
        raise OptionError(
            "memory= counts what llama.cpp needs, so it plans GGUF files only: name a destination that ends "
            "in .gguf, or use export='gguf'. For other runtimes, give max_bytes=."
        )
    if isinstance(config, CompressionPlan):
        raise OptionError("A plan already fixes the size of the file; leave out memory=.")
    if config.max_bytes is not None:
        raise OptionError(
            "memory= determines the size of the file, as max_bytes= does; leave out one of them."
        )
    return replace(config, max_bytes=options.memory)


def _needed(model: PreTrainedModel, folder: Path, options: CompressOptions) -> MemoryUse | None:
    """Predict the memory that llama.cpp needs besides the weights; None without a budget of memory."""
    if options.memory is None:
        return None
    runtime = file_runtime(model, folder)
    return runtime.use(options.context or runtime.longest, options.cache_type or "f16")


def smallest_file(config: CompressionConfig, model: PreTrainedModel, overhead: int) -> int:
    """Return a lower bound of the bytes of an exported file: each layer in its smallest number format.

    Args:
        config: compression options for the target.
        model: the dense model.
        overhead: bytes of the file in addition to the weights.
    """
    with unfused(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # planning repeats these warnings
        targets = [x for x in find_targets(model, config) if not x.skip]
        found = overhead + untargeted_sizes(model, targets)[1]
        for matrix in (x.matrix for x in targets):
            fitting = [x for x in config.number_formats if format_fits(x, matrix, config)]
            sizes = (bytes_for(config.menu, x, matrix.shape, matrix.dtype) for x in fitting)
            found += min(sizes, default=0)
    return found


def for_target(
    target: str,
    config: CompressionConfig,
    model: PreTrainedModel,
    folder: Path,
    needed: MemoryUse | None = None,
) -> CompressionConfig:
    """Adapt compression options to an export target: number formats, layers that stay dense, byte budget.

    Args:
        target: name of the target.
        config: the compression options; if these list number formats, the list is kept.
        model: the dense model.
        folder: folder of the dense model.
        needed: what the model needs in memory besides its weights, if `max_bytes` is a budget of memory.

    Returns:
        New options. Bytes of metadata in the exported files are subtracted from `max_bytes`.

    Raises:
        BudgetError: `max_bytes` is not larger than the metadata; or no file fits into the memory.
        TargetError: the exporter does not support this model or tokenizer, or can pack none of the selected
            layers.
    """
    refuse_mixtures(model)
    overhead, dense = EXPORT_TARGETS[target].constraints(model, folder)
    changes: dict[str, Any] = {}
    if config.topology == AUTO and config.formats in (None, DEFAULT_FORMATS):
        changes["formats"] = target
        taken = config.target_modules
        changes["target_modules"] = None if taken == "all" else taken
    if dense:
        given = config.exclude_modules or ()
        changes["exclude_modules"] = (*((given,) if isinstance(given, str) else given), *dense)
        try:
            with unfused(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # planning repeats these warnings
                find_targets(model, replace(config, **changes))
        except TargetError as error:
            others = " or ".join(name for name in EXPORT_TARGETS if name != target)
            raise TargetError(
                f"The target {target!r} can pack none of the layers that the options select: it does not "
                f"support the types of {len(dense)} layers of this {type(model).__name__}, such as "
                f"{dense[0]}. Export to {others}, or write a model folder without a target."
            ) from error
    if needed is not None and config.max_bytes is not None:
        least = smallest_file(replace(config, **changes), model, overhead)
        if config.max_bytes < least + needed.total:
            longest = needed.runtime.longest_fitting(config.max_bytes - least, needed.cache_type)
            fits = f"a context of {longest:,} tokens would fit" if longest else "no context would fit"
            raise BudgetError(
                f"memory={compact_bytes(config.max_bytes)} is too small: the smallest file has "
                f"{compact_bytes(least)}, and a context of {needed.context:,} tokens ({needed.cache_type}) "
                f"needs {compact_bytes(needed.total)} more; {fits}. Allow more memory, or choose a shorter "
                "context or a smaller cache_type."
            )
        changes["max_bytes"] = config.max_bytes - needed.total - overhead
    elif config.max_bytes is not None:
        if config.max_bytes <= overhead:
            raise BudgetError(
                f"max_bytes={config.max_bytes:,} is too small: names, vocabulary and metadata alone take "
                f"{overhead:,} bytes. Allow more."
            )
        changes["max_bytes"] = config.max_bytes - overhead
    return replace(config, **changes)


def plan_folder(
    source: str | Path, config: CompressionConfig, options: CompressOptions | None = None
) -> CompressionPlan:
    """Plan the compression of the model in a folder, without writing files.

    With a calibration text, the weights of one block are in memory at a time.

    Args:
        source: model folder, or hub id if there is no folder of that name.
        config: compression options.
        options: further options; those that need a compressed model are not allowed.

    Returns:
        The plan, with the sizes of the whole model; it can be edited, saved, and applied by
        `compress_folder`.

    Raises:
        OptionError: an option needs a compressed model.
        FormatError, TargetError, BudgetError: see `compress_folder`.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd")
        >>> plan = th.plan_folder(th.embedded.gpt2_path(), config)
        >>> plan.save("plan.json")  # edit it, load it, and pass it to compress_folder
    """
    options = options or CompressOptions()
    needing = ("report", "held_out", "refine", "heal")
    if asked := [f"{name}=" for name in needing if getattr(options, name)]:
        raise OptionError(
            f"plan_folder only plans, but {' and '.join(asked)} would need a compressed model. Leave out one "
            "or the other."
        )
    checked = _check_data(_with_memory(config, options, options.export), options)
    assert isinstance(checked, CompressionConfig)
    folder = resolve_folder(source)
    with tempfile.TemporaryDirectory() as found:
        work, runs = Path(found), reads_text(checked, options)
        lazy, opened = open_source(folder, options, work, runs=runs)
        model: Any = lazy.model
        warn_of_left_out(lazy)
        if options.export is not None:
            needed = _needed(model, folder, options)
            checked = for_target(options.export, checked, model, folder, needed)
        text = text_of(options, folder) if runs else None
        data = calibration_batches(model, folder, checked, options, text) if runs else None
        with workers_of(options) as executor:
            planned = _plan(lazy, opened, checked, data or ProvidedData([], ""), options, work, executor)
    plan = planned.plan

    params, size = model_size(model)
    coverage = measure_coverage(planned.weights, planned.names, unseen=plan.unseen)
    return replace(plan, model_params_before=params, model_bytes_before=size, coverage=coverage)


def open_source(
    folder: Path, options: CompressOptions, work: Path, *, runs: bool
) -> tuple[LazyModel, Source]:
    """Open the model of a folder without its weights, after rotation if this is asked for.

    Args:
        folder: folder of the model.
        options: further options.
        work: folder for hidden states, and for a rotated model.
        runs: whether the model runs, for which all its weights and buffers must be known.

    Raises:
        FormatError, TargetError: see `open_model`; or the model cannot be rotated.
    """
    weights = options.weights
    if options.rotate:
        folder, weights = rotated_folder(folder, weights, work), None
    lazy, device = _open(folder, weights, runs=runs), torch.device(options.device)
    return lazy, Source(lazy.model, lazy.loaded_on(device), device, lambda name: StatesOnDisk(work / name))


def _open(folder: Path, weights: str | Path | None, *, runs: bool) -> LazyModel:
    return open_model(folder, weights) if runs else open_lazily(read_source(folder, weights))


def open_dense(folder: Path, weights: str | Path | None = None) -> PreTrainedModel:
    """Load a model for compression, in the dtype in which it is stored.

    Args:
        folder: folder of the model.
        weights: GGUF file with the weights of the model; by default, the files of the folder.

    Raises:
        FormatError: the path is not a model folder, or the folder or the file is damaged.
        TargetError: the model is compressed already.
    """
    if weights is None:
        read_dense(folder)
        return load(folder)
    lazy = open_model(folder, weights)
    dtype: Any = lazy.model.config.dtype
    with lazy.loaded(lazy.model.modules(), dtype=dtype):
        model = light_copy(lazy.model)
    assert isinstance(model, PreTrainedModel)
    return model.requires_grad_()


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of this name, or None if the name is None.

    Raises:
        ValueError: an unknown name; the message lists the known names.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"Unknown dtype {name!r}; choose one of {', '.join(DTYPES)}.")
    return None if name is None else DTYPES[name]


def _check_data(
    config: CompressionConfig | CompressionPlan, options: CompressOptions
) -> CompressionConfig | CompressionPlan:
    """Check, before any slow step, that the texts needed for the options are given.

    Returns:
        The configuration. Without texts, the method "auto" becomes one that needs none if the only limit is
        `rel_error`.

    Raises:
        BudgetError: the budget needs calibration data.
        OptionError: a finished plan is given with an option that would change it.
    """
    has_data = bool(options.calibration)
    if options.survey is not None and not reads_text(config, options):
        raise OptionError(
            "survey= contains losses that were predicted on a text, calibration=. Leave out survey=, or "
            "the options that use no text or need more than a survey, such as method='nearest'."
        )
    if isinstance(config, CompressionPlan):
        if config.objective != "weight" and not has_data:
            raise BudgetError(
                f"The plan was made with {config.calibration}, which the cores depend on too. Give the same "
                "text and number of tokens (calibration=)."
            )
        return config
    config.check_says_how_far()
    if has_data or config.method in WITHOUT_DATA:
        return config
    if config.method == "auto" and config.rel_error is not None and not config.needs_curvature:
        return replace(config, method="nearest" if config.formats else "svd")
    raise BudgetError(
        "A calibration text is needed, to measure how errors of the weights affect the loss. Give text like "
        "the model's later input with calibration=FILE, let the model write it with calibration='own', or "
        "use the package's text with calibration='default'. "
        "method='nearest' (formats) and method='svd' (networks) need no text, but lose more quality."
    )


def reads_text(config: CompressionConfig | CompressionPlan, options: CompressOptions) -> bool:
    """Return True if blocks are surveyed and compressed one by one, on batches of the calibration text."""
    return bool(options.calibration) and config.reads_data


def calibration_batches(
    model: PreTrainedModel,
    folder: Path,
    config: CompressionConfig | CompressionPlan,
    options: CompressOptions,
    text: str | None,
) -> ProvidedData | None:
    """Make batches of the calibration text.

    Args:
        model: the dense model.
        folder: folder with the model's tokenizer.
        config: the compression options, or a plan.
        options: further options.
        text: calibration text.

    Raises:
        TargetError: this model cannot be calibrated on text alone.
        ValueError: the text is too short.
    """
    if isinstance(options.calibration, ProvidedData):
        given = options.calibration
        check_batches(given.batches, "compress_folder")
        kind, tokens = config.survey_kind, options.calibration_tokens
        read = read_enough(given.batches, model, kind, tokens)
        if not read:
            raise TargetError("The calibration has no batches; pass at least one, better 16 of 1,000 tokens.")
        return replace(given, batches=read)
    if text is None:
        return None
    tokens = max(WRITE_TOKENS[config.survey_kind], options.calibration_tokens or 0)
    data = calibration_data(model, folder, text, tokens=tokens, rows=ENOUGH_LOSSES)
    # Without labels no loss can be measured, so batches are needed only if the plan depends on data.
    batches = data.batches if data.labelled or config.reads_data else ()
    said = f"{data.tokens:,} tokens of {options.source}"
    enough = read_enough(batches, model, config.survey_kind, options.calibration_tokens) if batches else []
    return ProvidedData(enough, said, loss_fn=data.loss_fn)


def _correct(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    text: str,
    survey: Survey | None,
    seen: int,
    options: CompressOptions,
    checkpoint: Path | None,
    *,
    refine_tokens: int = 16_384,
) -> tuple[str, ...]:
    """Refit and train a compressed model on the calibration text, in place.

    Returns:
        Lines that describe the results.
    """
    notes = []
    if options.refine:
        # Spread batches over the text that calibration has not read, or over all text if little is left.
        data = calibration_data(teacher, folder, text)
        each = data.tokens / len(data.batches)
        fresh = data.batches[math.ceil(seen / each) :]
        batches = fresh if len(fresh) * each >= refine_tokens / 2 else data.batches
        count = min(len(batches), max(8, round(refine_tokens / each)))
        places = torch.linspace(0, len(batches) - 1, count).long().tolist()
        chosen = [batches[k] for k in places]
        rows = {} if survey is None else {n: moment_of(x, model.device) for n, x in survey.factors.items()}
        refined = refine(model, teacher, chosen, CalibrationStats(rows, {}, 0), progress=options.progress)
        before, after = refined.distances
        left = f", {len(refined.left)} unchanged" if refined.left else ""
        kept = "" if refined.kept else "; the distance grew, so the old cores were restored"
        notes.append(
            f"{len(refined.after)} layers refitted{left}: distance from the dense model's outputs "
            f"{before:.4f} -> {after:.4f} on text that was not fitted{kept}"
        )
    if options.heal:
        # Train on one batch in each step, with batches in random order.
        batches = calibration_data(teacher, folder, text, window=256, window_batch=512).batches
        generator = torch.Generator("cpu").manual_seed(0)
        order = torch.randperm(len(batches), generator=generator, device="cpu").tolist()
        healed = heal(
            model,
            teacher,
            [batches[k] for k in order],
            steps=options.heal,
            checkpoint=checkpoint,
            progress=options.progress,
        )
        part = max(1, len(healed.losses) // 10)
        if healed.losses:
            first, last = (sum(x) / part for x in (healed.losses[:part], healed.losses[-part:]))
            notes.append(
                f"healed for {healed.steps:,} steps, {len(healed.losses):,} of them in this run: divergence "
                f"from the dense model {first:.4f} -> {last:.4f} nats per token"
            )
        else:
            notes.append(f"healed for {healed.steps:,} steps, all of them in an earlier run")
    return (*notes, "the predicted and measured loss increase are those before refitting or healing")


def _forget_other_survey(survey: Path, config: CompressionConfig) -> None:
    """Delete the survey of an interrupted run if it was made with other options than budgets."""
    if survey.is_file():
        try:
            Survey.load(survey).with_config(config)
        except (BudgetError, FormatError):
            survey.unlink()


def _check_readable(lazy: LazyModel, config: CompressionConfig) -> None:
    """Check that the weight of each layer to compress can be read from the files.

    Raises:
        TargetError: a weight cannot be read.
    """
    with unfused(lazy.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # planning repeats these warnings
        targets = [x for x in find_targets(lazy.model, config) if not x.skip]
    for target in targets:
        origin = lazy.origins.get(f"{target.name}.weight")
        dtypes = set() if origin is None else {part.dtype for part in origin.parts}
        if target.weight.is_meta and not target.owners and not (dtypes and dtypes <= FLOATS.keys()):
            form = (
                f"stored as {', '.join(dtypes)}" if dtypes else "stored in another form than the model uses"
            )
            raise TargetError(
                f"The weight of {target.name!r} is {form}, so it cannot be read. Use the model before "
                f"quantization, exclude the layer (exclude_modules=[{target.name!r}]), or load the model and "
                "use tensornet.compress."
            )
