"""Load a model from a folder, compress it, and save the result: the functions behind `tensornet compress`."""

# ruff: noqa: RUF009 (`option` returns a `dataclasses.field`)

import copy
import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import tensornet as tn
from tensornet.calibration.batches import as_batch, tokens_of
from tensornet.calibration.blockwise import calibrate
from tensornet.calibration.calibrate import ENOUGH_LOSSES
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import Loaded, in_memory
from tensornet.compression.config import AUTO, BYTE_BUDGETS, DEFAULT_FORMATS, CompressionConfig, option
from tensornet.compression.loss_increase import light_copy
from tensornet.compression.plan import NO_CHOICE, CompressionPlan
from tensornet.compression.prices import PriceList
from tensornet.compression.report import CompressionReport, Coverage, measure_coverage, model_size
from tensornet.compression.survey import survey_or_load
from tensornet.compression.write import WRITE_TOKENS, moment_of
from tensornet.errors import BudgetError, TargetError
from tensornet.healing import refine
from tensornet.healing.heal import heal
from tensornet.io import check_place
from tensornet.nn.extension import ProvidedData
from tensornet.nn.targets import find_targets, list_weights
from tensornet.nn.unfuse import unfused
from tensornet_hf.checkpoint import (
    HUB,
    check_free,
    load,
    on_device,
    read_dense,
    resolve_folder,
    save,
    weight_bytes,
)
from tensornet_hf.embedded import calibration_text
from tensornet_hf.evaluate import ModelFacts, record_held_out
from tensornet_hf.exporters.base import NETWORKS, Networks, refuse_mixtures
from tensornet_hf.exporters.export import TARGETS, export, find_target
from tensornet_hf.exporters.folder import list_stacks
from tensornet_hf.exporters.gguf import check_files
from tensornet_hf.lazy_model import ConvertedWeightError, LazyModel, open_model
from tensornet_hf.report import Page, compact_bytes, compare_methods, display_name, versions, write_report
from tensornet_hf.rotation import rotate
from tensornet_hf.streaming import StatesOnDisk, compress_checkpoint, digest, file_marks
from tensornet_hf.text import calibration_data, mix_texts, read_text
from tensornet_moe import ExpertsReport, compress_experts

#: Name that stands for the package's calibration text, as in `--calibration default`.
DEFAULT = "default"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class OptionError(ValueError):
    """Raised if two options exclude each other, or an option needs another one.

    Args:
        template: message with the names of options in braces, which the command line replaces by `--name`.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        super().__init__(template.replace("{", "").replace("}", ""))


@dataclass(frozen=True)
class CompressOptions:
    """Options of `compress_folder` that `CompressionConfig` does not have: texts, corrections, files.

    Args:
        calibration: file with text like the model's later input; 'default' is the embedded text, the King
            James Bible. Pieces of several files alternate. Not needed with `objective="weight"`.
        calibration_tokens: number of calibration tokens on which the loss is differentiated (default: 4,096
            or 1,024 passages; with effort thorough 32,768).
        prices: file with the predicted loss of every number format of every layer: read if it exists, written
            otherwise. With it, a plan for another budget takes seconds.
        weights: floating-point GGUF file with the weights of the model; the folder then only needs the
            configuration and the tokenizer.
        held_out: text that the model has not seen; the losses of the original, of the result and of simple
            baselines of equal size are measured on it. Only for language models; needs memory for two models.
        refine: after compression, refit each layer to the dense model's outputs on unused calibration text.
        heal: after compression, train the cores for this many steps to match the dense model's outputs on the
            calibration text.
        share_experts: let the experts of each layer share cores where this lowers the predicted loss
            increase. See `tensornet_moe.compress_experts`.
        rotate: rotate a Llama-like model before compression, which spreads outliers of the weights but does
            not change the outputs; this does not always help, so compare with and without. A tied output head
            becomes a separate weight. See `tensornet_hf.rotate`.
        dtype: store weights in this dtype (default: keep their dtype).
        device: device on which the model runs: cpu, cuda, cuda:1, mps.
        workers: compress block by block with this many processes, without loading the whole model; an
            interrupted run can be continued.
        resume: continue an interrupted run that used `workers` or `heal`.
        export: write the model for another runtime (default: gguf if the destination ends in .gguf). Only
            number formats of this target are planned.
        report: write a report as an HTML page.
        networks: how an export writes tensor networks: as dense weights (dense); low-rank matrices that are
            added to integers as a LoRA adapter, all others as dense weights (lora); or not at all, with an
            error (refuse).
        force: replace an existing destination.
        command: command line to show in the report.
        progress: show progress bars.

    Raises:
        OptionError: two options exclude each other, or an option needs another one.
        DestinationError: the report or the statistics cannot be written.
        ValueError: an unknown dtype.

    Example:
        >>> th.CompressOptions(calibration="text.txt").calibration
        ('text.txt',)
    """

    calibration: str | Path | Sequence[str | Path] = option((), "data", "paths")
    calibration_tokens: int | None = option(None, "advanced", "integer")
    prices: str | Path | None = option(None, "data", "path")
    weights: str | Path | None = option(None, "data", "path")
    held_out: str | Path | None = option(None, "data", "path")
    refine: bool = option(False, "after", "flag")
    heal: int = option(0, "after", "integer")
    share_experts: bool = option(False, "layers", "flag")
    rotate: bool = option(False, "layers", "flag")
    dtype: str | None = option(None, "output", choices=tuple(DTYPES))
    device: torch.device | str = option("cpu", "run", "device")
    workers: int | None = option(None, "run", "integer")
    resume: bool = option(True, "advanced", "flag")
    export: str | None = option(None, "output", choices=tuple(TARGETS))
    report: str | Path | None = option(None, "output", "path")
    networks: Networks = option("dense", "advanced", choices=NETWORKS)
    force: bool = option(False, "output", "flag")
    command: str = "tensornet_hf.compress_folder"
    progress: bool = False

    def __post_init__(self) -> None:
        given = self.calibration
        texts = (given,) if isinstance(given, (str, Path)) else tuple(given)
        object.__setattr__(self, "calibration", texts)
        for name, what in (("refine", "refits layers on"), ("heal", "trains on")):
            if getattr(self, name) and not texts:
                raise OptionError(f"{{{name}}} {what} the calibration text; add {{calibration}}.")
        used = {Path(x).resolve() for x in texts}
        if self.held_out is not None and Path(self.held_out).resolve() in used:
            raise OptionError("{held_out} is the file of {calibration}; give a text from another source.")
        dtype_of(self.dtype)
        for what, place in (("The report", self.report), ("The price list", self.prices)):
            if place is not None:
                check_place(what, Path(place))
        if not texts and self.calibration_tokens is not None:
            raise OptionError("{calibration_tokens} counts tokens of a text; add {calibration}.")
        layerwise = ("refine", "report", "held_out")
        if self.share_experts and (asked := [f"{{{x}}}" for x in layerwise if getattr(self, x)]):
            raise OptionError(
                f"{{share_experts}} cannot be combined with {' and '.join(asked)}: layers that share a core "
                "cannot be processed one by one. Leave out one or the other."
            )
        if self.workers is not None and (asked := [f"{{{x}}}" for x in self.needing_model]):
            raise OptionError(
                f"{{workers}} never loads the whole model, but {' and '.join(asked)} would need it. Leave "
                "out one or the other."
            )

    @property
    def needing_model(self) -> list[str]:
        """Names of the given options that need the whole model in memory."""
        names = ("dtype", "report", "refine", "heal", "held_out", "share_experts", "rotate")
        return [name for name in names if getattr(self, name)]

    @property
    def text(self) -> str | None:
        """The calibration text, in which pieces of several files alternate; None if no file is given."""
        texts = [calibration_text() if x == DEFAULT else read_text(Path(x)) for x in self.calibration]  # type: ignore[union-attr]
        return mix_texts(texts) if texts else None

    @property
    def source(self) -> str:
        """Names of the calibration texts, for reports."""
        embedded = "the embedded text (King James Bible)"
        return " and ".join(embedded if x == DEFAULT else Path(x).name for x in self.calibration)  # type: ignore[union-attr]


@dataclass(frozen=True)
class PlannedFolder:
    """Result of `plan_folder`.

    Args:
        plan: the plan; it can be edited, saved, and applied by `compress_folder`.
        sizes: parameters and bytes of the whole model, before and after (`model_params_before`, ...).
        coverage: counts of the parameters that the plan covers and of those that it skips.
    """

    plan: CompressionPlan
    sizes: Mapping[str, int]
    coverage: Coverage

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, which `CompressionPlan.load` can read too."""
        plan = {**self.plan.to_dict(), **self.plan.predictions()}
        return {**plan, **self.sizes, "coverage": self.coverage.to_dict()}

    def __str__(self) -> str:
        params = [f"{self.sizes[f'model_params_{when}']:,}" for when in ("before", "after")]
        sizes = [compact_bytes(self.sizes[f"model_bytes_{when}"]) for when in ("before", "after")]
        whole = f"whole model: {' -> '.join(params)} parameters, {' -> '.join(sizes)}"
        return f"{self.plan}\n{whole}\n{self.coverage}"


@dataclass(frozen=True)
class FolderReport:
    """Result of `compress_folder`.

    Args:
        source, destination: the arguments of `compress_folder`.
        report: report of the compression.
        file_bytes_before, file_bytes_after: total size of the weight files in bytes.
        notes: lines about refitting, healing and the export.
        models: facts about the original model, the compressed model and baselines of equal size, if a report
            or a held-out text was requested.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> done = th.compress_folder(th.embedded.gpt2_path(), "small", config)
        >>> print(str(done).splitlines()[-1])
        written to  small
    """

    source: str
    destination: str
    report: CompressionReport | ExpertsReport
    file_bytes_before: int
    file_bytes_after: int
    notes: tuple[str, ...] = ()
    models: tuple[ModelFacts, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        models = {"models": [model.to_dict() for model in self.models], "notes": list(self.notes)}
        sizes = {"file_bytes_before": self.file_bytes_before, "file_bytes_after": self.file_bytes_after}
        return {
            "source": self.source,
            "destination": self.destination,
            **sizes,
            **models,
            **self.report.to_dict(),
        }

    def __str__(self) -> str:
        sizes = f"{compact_bytes(self.file_bytes_before)} -> {compact_bytes(self.file_bytes_after)}"
        if isinstance(self.report, ExpertsReport):
            return f"{self.report}\nfiles       {sizes}\nwritten to  {self.destination}"
        done, plan = self.report, self.report.plan
        dense = sum(layer.scheme == "dense" for layer in done.layers)
        left = f" ({dense} of them stay dense)" if dense else ""
        lines = [
            f"files       {sizes}",
            f"layers      {len(done.layers)}{left}, {plan.bits_per_weight:.2f} bits a weight of these layers",
            f"parameters  {done.model_params_before:,} -> {done.model_params_after:,}, scales included",
            f"coverage    {str(done.coverage).removeprefix('covers ')}",
        ]
        if (predicted := plan.predicted_loss_increase) is not None:
            kl = "" if plan.predicted_kl is None else f", KL {plan.predicted_kl:.4f}"
            what = f"{predicted:.4f}{plan.predicted_change()}{kl}"
            lines.append(f"predicted   loss increase {what} (on {plan.calibration})")
        if plan.has_no_choice:
            lines.append(f"note        {NO_CHOICE}")
        if done.measured is not None:
            lines.append(f"measured    loss increase {done.measured}")
        for model in self.models:
            if (found := model.quality) is not None:
                divergence = "" if found.kl_mean is None else f", KL {found.kl_mean:.4f}"
                more = f"loss increase {found.mean:+.4f}{divergence}, perplexity {model.perplexity:.4g}"
                scheme = f"{model.scheme}, " if model.scheme else ""
                lines.append(f"held out    {model.name} ({scheme}{model.bits:.2f} bits): {more}")
        return "\n".join([*lines, f"seconds     {done.seconds:.1f}", f"written to  {self.destination}"])


def compress_folder(
    source: str | Path,
    destination: str | Path,
    config: CompressionConfig | CompressionPlan,
    options: CompressOptions | None = None,
) -> FolderReport:
    """Compress the model in a folder and save the result as another folder or a GGUF file.

    In an export, `max_bytes` limits the size of the written files, and only number formats of the target are
    planned unless `config` lists formats.

    Args:
        source: model folder, or hub id if there is no folder of that name.
        destination: folder to write, `hf://owner/name` to upload, or a file name that ends in `.gguf`.
        config: compression options, or a plan (which may have been edited or loaded).
        options: further options, such as the calibration text.

    Returns:
        A report; `print` shows a short summary.

    Raises:
        FormatError: the source is not a model folder, or is damaged.
        TargetError: the model is already compressed, or cannot be calibrated on text alone.
        BudgetError: the budget cannot be met or needs calibration, or the plan was made with other data.
        DestinationError: the destination exists already, or cannot be written.
        OptionError: two options exclude each other, or an option needs another one.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> done = th.compress_folder(th.embedded.gpt2_path(), "small", config)
        >>> round(done.report.param_ratio, 2), done.file_bytes_after < done.file_bytes_before
        (0.5, True)
    """
    options = options or CompressOptions()
    uploaded = str(destination).startswith(HUB)
    target = find_target(destination, options.export)
    if uploaded and target is not None:
        raise OptionError("{export} writes local files; name a local folder, and upload it afterwards.")
    if options.networks != "dense" and target is None:
        raise OptionError("{networks} is an option of {export}; model folders store networks unchanged.")
    config = _check_data(config, options)
    if options.workers is not None and uploaded:
        raise OptionError("{workers} writes to a local folder; name a local folder as the destination.")
    text = options.text
    held_out = None if options.held_out is None else read_text(Path(options.held_out))
    folder = resolve_folder(source)
    before = weight_bytes(folder) if options.weights is None else Path(options.weights).stat().st_size
    if target == "gguf":
        check_files(Path(destination), force=options.force)
    else:
        check_free(destination, force=options.force, sources=(folder,))
    alone = reads_text(config, options) and not options.needing_model and not uploaded
    alone = alone and options.networks == "dense"
    lazy = None
    if options.workers is not None or alone:
        try:
            lazy = open_model(folder, options.weights)
        except ConvertedWeightError:
            # The weights of a block cannot be read without those of all others. `workers` needs only those of
            # the planned layers, unless it runs the model.
            if options.workers is not None and (text is not None or target is not None):
                raise
            alone = False
    if alone and lazy is not None and target is not None and target != "gguf":
        with unfused(lazy.model):
            alone = not list_stacks(lazy.model)  # tensors of several matrices are packed in memory
    if not options.resume and options.workers is None and not options.heal and not alone:
        raise OptionError("This run loads the whole model, so it cannot be resumed; leave out {resume}.")
    if options.workers is not None or alone:
        streamed = _compress_streamed(lazy, folder, Path(destination), config, options, text, target)
        written = Path(destination).stat().st_size if target == "gguf" else weight_bytes(destination)
        sizes = before, written
        return FolderReport(str(source), str(destination), streamed, *sizes)

    # Load the model, and collect statistics on the calibration text.
    started = time.perf_counter()
    model = on_device(open_dense(folder, options.weights), options.device)
    if target is not None and isinstance(config, CompressionConfig):
        config = for_target(target, config, model, folder)
    if options.rotate:
        rotate(model)
    if held_out is not None:
        record_held_out(model, folder, held_out, tokens=2)  # raises early if no loss can be measured
    calibration = calibration_batches(model, folder, config, options, text)
    teacher = None
    if options.refine or options.heal or options.report is not None or held_out is not None:
        teacher = copy.deepcopy(model)

    stats = None
    if calibration is not None and (options.report or held_out):  # reports compare with one-sided rounding
        batches, tokens = list(calibration.batches), WRITE_TOKENS["fast"]
        stats = calibrate(model, batches, loss_fn=calibration.loss_fn, tokens=tokens, gradients=False)

    # Compress, refit and train.
    done: CompressionReport | ExpertsReport
    if options.share_experts:
        assert isinstance(config, CompressionConfig)  # `_check_data` refuses plans with this option
        done = compress_experts(model, config, calibration=calibration, progress=options.progress)
    else:
        prices = None
        if isinstance(config, CompressionConfig) and calibration is not None and reads_text(config, options):
            prices = find_prices(model, config, options, calibration)
        elif options.prices is not None:
            prices = PriceList.load(options.prices)
        done = tn.compress(
            model,
            config,
            calibration=calibration,
            prices=prices,
            progress=options.progress,
        )
    notes: tuple[str, ...] = ()
    checkpoint = None
    if options.heal and not uploaded:
        key: list[Any] = [config.to_dict(), text]
        key += [options.calibration_tokens, options.refine, options.heal, options.rotate]
        key.append(sorted(file_marks(folder, options.weights).items()))
        checkpoint = _healing_file(Path(destination), key, resume=options.resume)
    if teacher is not None and text is not None and (options.refine or options.heal):
        read = () if calibration is None else calibration.batches
        seen = sum(tokens_of(as_batch(x, model, torch.device("cpu"))) for x in read)
        notes = _correct(model, teacher, folder, text, prices, seen, options, checkpoint)
    stored = model if options.dtype is None else torch.nn.Module.to(model, dtype=dtype_of(options.dtype))
    done = replace(done, seconds=time.perf_counter() - started)

    # Save the model, compare it with the baselines, and write the report.
    if target is not None:
        exported = export(
            stored,
            destination,
            target=target,
            source=folder,
            force=options.force,
            networks=options.networks,
        )
        notes += exported.adapter_lines
        notes += tuple(f"{name} is dense in the file: {why}" for name, why in exported.dense.items())
        written = exported.num_bytes + exported.adapter_bytes
    else:
        save(stored, destination, source=folder, force=options.force)
        written = done.model_bytes_after if uploaded else weight_bytes(destination)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    sizes = before, written
    models: list[ModelFacts] = []
    if (options.report or held_out) and teacher is not None and isinstance(done, CompressionReport):
        models, losses, prompt = compare_methods(
            teacher,
            stored,
            folder,
            done,
            stats,
            sizes,
            text=held_out,
            name="" if options.held_out is None else Path(options.held_out).name,
            predicted=not (options.refine or options.heal),
            progress=options.progress,
        )
        if options.report is not None:
            made = (("Command", options.command), ("Versions", versions()))
            title = f"{display_name(source)}, compressed"
            write_report(Page(title, done, models, losses, made, notes, prompt), options.report)
    return FolderReport(str(source), str(destination), done, *sizes, notes, tuple(models))


def for_target(
    target: str, config: CompressionConfig, model: PreTrainedModel, folder: Path
) -> CompressionConfig:
    """Adapt compression options to an export target: number formats, layers that stay dense, byte budget.

    Args:
        target: name of the target.
        config: the compression options; if these list number formats, the list is kept.
        model: the dense model.
        folder: folder of the dense model.

    Returns:
        New options. Bytes of metadata in the exported files are subtracted from `max_bytes`.

    Raises:
        BudgetError: `max_bytes` is not larger than the metadata.
        TargetError: the exporter does not support this model or tokenizer, or can pack none of the selected
            layers.
    """
    refuse_mixtures(model)
    overhead, dense = TARGETS[target].constraints(model, folder)
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
            others = " or ".join(name for name in TARGETS if name != target)
            raise TargetError(
                f"The target {target!r} can pack none of the layers that the options select: it does not "
                f"support the types of {len(dense)} layers of this {type(model).__name__}, such as "
                f"{dense[0]}. Export to {others}, or write a model folder without a target."
            ) from error
    if config.max_bytes is not None:
        if config.max_bytes <= overhead:
            raise BudgetError(
                f"max_bytes={config.max_bytes:,} is too small: names, vocabulary and metadata alone take "
                f"{overhead:,} bytes. Allow more."
            )
        changes["max_bytes"] = config.max_bytes - overhead
    return replace(config, **changes)


def plan_folder(
    source: str | Path, config: CompressionConfig, options: CompressOptions | None = None
) -> PlannedFolder:
    """Plan the compression of the model in a folder, without writing files.

    With a calibration text, the weights of one block are in memory at a time.

    Args:
        source: model folder, or hub id if there is no folder of that name.
        config: compression options.
        options: further options; those that need a compressed model are not allowed.

    Raises:
        OptionError: an option needs a compressed model.
        FormatError, TargetError, BudgetError: see `compress_folder`.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> planned = th.plan_folder(th.embedded.gpt2_path(), config)
        >>> planned.plan.save("plan.json")  # edit it, load it, and pass it to compress_folder
    """
    options = options or CompressOptions()
    needing = ("report", "held_out", "refine", "heal", "share_experts")
    if asked := [f"{{{name}}}" for name in needing if getattr(options, name)]:
        raise OptionError(
            f"{{dry_run}} only plans, but {' and '.join(asked)} would need a compressed model. Leave out one "
            "or the other."
        )
    checked = _check_data(config, options)
    assert isinstance(checked, CompressionConfig)
    folder = resolve_folder(source)
    loaded: Loaded = in_memory
    if reads_text(checked, options) and not options.rotate:
        model, loaded = open_to_survey(folder, options)
    else:
        model = on_device(open_dense(folder, options.weights), options.device)
    if options.export is not None:
        checked = for_target(options.export, checked, model, folder)
    if options.rotate:
        rotate(model)
    calibration = calibration_batches(model, folder, checked, options, options.text)
    if calibration is not None and reads_text(checked, options):
        plan = find_prices(model, checked, options, calibration, loaded).plan()
    else:
        plan = tn.plan(model, checked, progress=options.progress)
    with unfused(model):
        weights = list_weights(model)

    # Compute sizes before and after compression, and the coverage.
    params, size = model_size(model)
    sizes = {
        "model_params_before": params,
        "model_params_after": params - plan.params_before + plan.params_after,
        "model_bytes_before": size,
        "model_bytes_after": size - plan.bytes_before + plan.bytes_after,
    }
    names = [layer.name for layer in plan]
    return PlannedFolder(plan, sizes, measure_coverage(weights, names, unseen=plan.unseen))


def find_prices(
    model: PreTrainedModel,
    config: CompressionConfig,
    options: CompressOptions,
    data: ProvidedData,
    loaded: Loaded = in_memory,
    **more: Any,
) -> PriceList:
    """Read the prices of a model from the file `options.prices`, or survey the model and write this file.

    Args:
        model: the dense model.
        config: the compression options.
        options: further options.
        data: batches of the calibration text.
        loaded, more: see `survey`. If the model is not in memory, hidden states are stored in a temporary
            folder.
    """
    with tempfile.TemporaryDirectory() as work:
        return survey_or_load(
            model,
            list(data.batches),
            config,
            options.prices,
            tokens=options.calibration_tokens,
            loss_fn=data.loss_fn,
            source=data.source,
            states=None if loaded is in_memory else StatesOnDisk(Path(work)),
            loaded=loaded,
            device=torch.device(options.device),
            progress=options.progress,
            **more,
        )


def open_to_survey(folder: Path, options: CompressOptions) -> tuple[PreTrainedModel, Loaded]:
    """Open a model without its weights, or load it if these can only be read all together.

    Returns:
        The model, and a function that loads the weights of some modules (see `survey`).
    """
    try:
        lazy = open_model(folder, options.weights)
    except ConvertedWeightError:
        return on_device(open_dense(folder, options.weights), options.device), in_memory
    return lazy.model, lazy.loaded_on(options.device)


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
        The configuration. Without texts, the objective "auto" becomes "weight" if the only budget is
        `rel_error`.

    Raises:
        BudgetError: the budget needs calibration data.
        OptionError: a finished plan is given with an option that would change it.
    """
    has_data = bool(options.calibration)
    if options.prices is not None and not reads_text(config, options):
        raise OptionError(
            "{prices} contains losses that were predicted on a {calibration} text. Leave out {prices}, or "
            "the options that use no text or need more than prices, such as objective='weight'."
        )
    if isinstance(config, CompressionPlan):
        if options.share_experts:
            raise OptionError("{plan} already fixes the scheme of every layer; leave out {share_experts}.")
        if config.objective != "weight" and not has_data:
            raise BudgetError(
                f"The plan was made with {config.calibration}, which the cores depend on too. Give the same "
                "text and number of tokens (calibration=)."
            )
        return config
    config.check_says_how_far()
    if config.whole_model is not None and all(getattr(config, name) is None for name in BYTE_BUDGETS):
        budgets = ", ".join(f"{{{name}}}" for name in BYTE_BUDGETS)
        raise OptionError(
            f"{{whole_model}} says which bytes a budget counts; add {budgets}, or leave it out."
        )
    weighted = has_data and config.objective not in ("weight", "activation")
    if config.damping != CompressionConfig.damping and not weighted:
        raise OptionError(
            "{damping} changes moments of gradients, which need {calibration} and the objective curvature or "
            "auto; leave it out."
        )
    if has_data or config.objective == "weight":
        return config
    if config.objective == "auto" and config.rel_error is not None and not config.needs_curvature:
        return replace(config, objective="weight")
    raise BudgetError(
        "A calibration text is needed, to measure how errors of the weights affect the loss. Give text like "
        "the model's later input with calibration=FILE, or use the embedded text with calibration='default'. "
        "objective='weight' needs no text, but loses more quality than necessary."
    )


def reads_text(config: CompressionConfig | CompressionPlan, options: CompressOptions) -> bool:
    """Return True if blocks are surveyed and compressed one by one, on batches of the calibration text."""
    return bool(options.calibration) and config.reads_data and not options.share_experts


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
    if text is None:
        return None
    tokens = max(WRITE_TOKENS[config.survey_kind], options.calibration_tokens or 0)
    data = calibration_data(model, folder, text, tokens=tokens, rows=ENOUGH_LOSSES)
    # Without labels no loss is measured, which needs no moments.
    batches = data.batches if data.labelled or config.reads_data else ()
    said = f"{data.tokens:,} tokens of {options.source}"
    return ProvidedData(batches, said, loss_fn=data.loss_fn)


def _compress_streamed(
    lazy: LazyModel | None,
    folder: Path,
    destination: Path,
    config: CompressionConfig | CompressionPlan,
    options: CompressOptions,
    text: str | None,
    target: str | None,
) -> CompressionReport:
    """Compress a folder block by block, without loading the whole model."""
    data = None
    if lazy is not None and target is not None and isinstance(config, CompressionConfig):
        config = for_target(target, config, lazy.model, folder)
    if lazy is not None and reads_text(config, options):
        data = calibration_batches(lazy.model, folder, config, options, text)
    return compress_checkpoint(
        folder,
        destination,
        config,
        workers=1 if options.workers is None else options.workers,
        device=str(options.device),
        resume=options.resume,
        calibration=data,
        prices=options.prices,
        tokens=options.calibration_tokens,
        weights=options.weights,
        target=target,
        force=options.force,
        progress=options.progress,
    )


def _correct(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    text: str,
    prices: PriceList | None,
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
        rows = {} if prices is None else {n: moment_of(x, model.device) for n, x in prices.factors.items()}
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


def _healing_file(destination: Path, options: Sequence[Any], *, resume: bool) -> Path:
    """Return the path of the healing checkpoint, and delete checkpoints of runs with other options.

    Args:
        destination: destination of the model.
        options: JSON-ready list of everything that the healed model depends on; a hash of it is the KEY in
            the file name `.NAME.heal-KEY.safetensors`.
        resume: keep an existing checkpoint of a run with the same options, instead of deleting it.
    """
    target = destination.expanduser().absolute()
    key = digest([*options, tn.__version__, torch.__version__])[:16]
    path = target.with_name(f".{target.name}.heal-{key}.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    for other in target.parent.glob(f".{target.name}.heal-*"):
        if other != path or not resume:
            other.unlink(missing_ok=True)
    return path
