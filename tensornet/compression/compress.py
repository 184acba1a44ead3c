"""Compression in one call: calibrate, plan, check the predicted losses, replace layers, run, report."""

import time
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tensornet._util import in_eval_mode, uncompiled, without_cache
from tensornet.calibration.batches import Batch, BatchLike, BatchSample, as_batch, run_model, some_rows
from tensornet.calibration.calibrate import calibrate
from tensornet.calibration.losses import PROJECTIONS, sampled_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan, put_back
from tensornet.compression.config import CompressionConfig, check_config
from tensornet.compression.loss_check import check_loss, correct_by_measuring
from tensornet.compression.loss_increase import measure, record_losses, warn_of_loss
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planning import Prepared, prepare
from tensornet.compression.report import CompressionReport, measure_coverage, model_size
from tensornet.errors import BudgetError, CalibrationWarning, TargetError
from tensornet.nn.extension import ProvidedData, provided_data, round_others, sample_batch
from tensornet.nn.targets import READ, check_model, list_weights
from tensornet.nn.unfuse import unfused

#: Calibration data of `compress`: batches, batches with a name and a loss, or statistics.
Calibration = Iterable[BatchLike] | ProvidedData | CalibrationStats


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
def compress(
    model: nn.Module,
    config: CompressionConfig | CompressionPlan,
    *,
    calibration: Calibration | None = None,
    validation: Collection[BatchLike] | ProvidedData | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compress a model in place: replace the targeted layers by tensor-network layers.

    If there are batches, predicted losses of number formats are checked by measuring (see `verify` of
    `CompressionConfig`), and the loss is measured before and after compression, on at most 2,048 tokens. A
    `CalibrationWarning` is given if the loss increase is far above its prediction, or above the allowed one.

    After the replacement the model is run on one batch. If code outside of a layer reads its weight, the
    layer becomes dense again (`CompressionReport.put_back`).

    Args:
        model: any module.
        config: the options; or a plan, which may have been edited or loaded and is applied unchanged.
        calibration: batches, see `calibrate`; or `ProvidedData`, which has batches with a name for reports
            and possibly a loss or saved statistics; or only statistics. If absent, an installed plugin may
            provide text; without any data, plans minimize the error of the weights. A `CalibrationWarning`
            reports both cases.
        validation: batches like those of `calibration`, preferably from another source, or `ProvidedData`.
            Before anything is replaced, the loss is measured on them at a few sizes of the model, to correct
            predicted losses; a budget of `loss_increase` then uses the corrected predictions. This needs
            calibrated gradients.
        progress: whether to show progress bars.

    Returns:
        A report of every layer, with certified error, predicted loss, and the error of a plain SVD.

    Raises:
        TargetError, BudgetError, NonFiniteError, TopologyError: raised before any layer is replaced, or after
            all replaced layers are dense again.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        >>> batches = [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(4)]
        >>> config = tn.CompressionConfig(param_ratio=0.5)
        >>> report = tn.compress(model, config, calibration=batches, progress=False)
        >>> report.param_ratio <= 0.5, report.plan.predicted_loss_increase > 0
        (True, True)
    """
    start = time.perf_counter()
    check_model(model)
    options = observing(config) if isinstance(config, CompressionPlan) else config
    check_config(options)
    options.check_says_how_far()
    held_out = None if validation is None else _measurable(_named(validation, "validation data"))
    if held_out is not None and iter(held_out.batches) is held_out.batches:
        raise TargetError("validation is iterated over several times: pass a list, not an iterator.")
    params_before, bytes_before = model_size(model)

    # Calibrate, unless statistics are given or not needed.
    data = gather(model, options, calibration, progress=progress)
    stats = data.statistics

    # Find candidates, and check their predicted losses by measuring before anything is replaced.
    prepared: Prepared | None = None
    if not isinstance(config, CompressionPlan):
        prepared = prepare_checked(model, config, data, held_out, progress=progress)
        weights = list(prepared.weights)
    elif held_out is not None:
        raise TargetError(
            "validation corrects predictions during planning, but a finished plan was given: leave it out."
        )
    elif config.objective != "weight" and (stats is None or stats.source != config.calibration):
        raise BudgetError(
            f"The plan was made with {config.calibration}, on which the cores depend; pass the same data "
            "with the same number of tokens, or the statistics that were collected on them."
        )
    else:
        with unfused(model):
            weights = list_weights(model)

    # Plan, apply the plan, and run one batch. If other code reads weights of layers, make these layers dense
    # again and plan the others again.
    seen = held_out or data
    before = record_losses(model, seen.batches, loss_fn=seen.loss_fn, source=seen.source)
    batch = _batch_to_run(model, data.batches)
    returned: dict[str, str] = {}
    while True:
        plan = config if isinstance(config, CompressionPlan) else prepared.plan(progress=progress)  # type: ignore[union-attr]
        made = {} if prepared is None else dict(prepared.made)
        dense: dict[str, nn.Module] = {}
        errors = apply_plan(model, plan, stats, progress=progress, made=made, dense=dense)
        read = {} if batch is None else _put_back_readers(model, batch, plan, weights, dense)
        returned |= read
        if prepared is None or not read:
            break
        put_back(model, dense)
        prepared = prepared.without(read, READ)
    kept = [layer.name for layer in plan if layer.name not in returned]
    for name in returned.keys() & {layer.name for layer in plan}:
        plan = plan.replace_layer(name, None)
    del dense
    rounded = {} if isinstance(config, CompressionPlan) else round_others(model, config)

    # Measure and report. If extensions have rounded parameters, there is no prediction of the whole loss.
    measured = None if before is None else measure(model, before)
    if measured is not None:
        warn_of_loss(measured, None if rounded else plan.predicted_loss_increase, options.loss_increase)
    params_after, bytes_after = model_size(model)
    weights = [replace(x, skip=READ) if x.name in returned else x for x in weights]
    return CompressionReport(
        model_params_before=params_before,
        model_params_after=params_after,
        model_bytes_before=bytes_before,
        model_bytes_after=bytes_after,
        seconds=time.perf_counter() - start,
        plan=plan.with_errors({name: errors[name] for name in errors if name not in returned}),
        coverage=measure_coverage(weights, [*kept, *rounded], unseen=plan.unseen),
        measured=measured,
        put_back=returned,
        was_run=batch is not None,
        rounded=rounded,
    )


def gather(
    model: nn.Module, config: CompressionConfig, calibration: Calibration | None, *, progress: bool
) -> ProvidedData:
    """Collect the statistics that a configuration needs, and a few of the batches.

    Warns if an extension provides the data. Also warns if there is no data, since plans then minimize the
    error of the weights.

    Returns:
        Batches and loss function for measurements, and `statistics`, which are None if they are not needed or
        there is no data.
    """
    if isinstance(calibration, CalibrationStats):
        return ProvidedData([], calibration.source, statistics=calibration)
    bounded = config.needs_curvature or config.formats or not config.budget.unlimited
    needed = config.objective != "weight" and bool(bounded or config.fixed)
    data = None if calibration is None else _named(calibration, "calibration data")
    name, advice = type(model).__name__, "Pass calibration=batches (about 30 of 1,000 tokens)"
    warning = ""
    if data is None and needed and (data := provided_data(model)) is not None:
        warning = f"using {data.source}. Text from the intended use gives a better model. {advice}."
    elif data is None and needed and config.objective == "auto" and config.one_format_keeps:
        warning = (
            f"all layers of {name} get one number format, int8 unless formats= names others, rounded to "
            f"nearest. {advice} for fewer bits with less loss, or objective='weight' to confirm."
        )
    elif data is None and needed and config.objective == "auto" and not config.needs_curvature:
        warning = (
            f"{name} is compressed by the error of its weights alone, which increases the loss much more "
            f"than necessary. {advice}, or objective='weight' to confirm."
        )
    if warning:
        warnings.warn(f"No calibration data: {warning}", CalibrationWarning, stacklevel=3)
    if data is None:
        return ProvidedData([], "")
    sample, stats = BatchSample(data.batches), data.statistics if needed else None
    if needed and stats is None:
        stats = calibrate(
            model,
            sample,
            config=config,
            loss_fn=data.loss_fn,
            gradients=config.objective != "activation",
            source=data.source,
            progress=progress,
        )
    else:
        for _ in sample:  # stores a few batches, since some loaders can be iterated over only once
            pass
    return _measurable(replace(data, batches=sample.kept, statistics=stats))


def prepare_checked(
    model: nn.Module,
    config: CompressionConfig,
    data: ProvidedData,
    validation: ProvidedData | None = None,
    *,
    progress: bool = False,
) -> Prepared:
    """Find the candidates of all layers, and correct their predicted losses by measuring.

    Args:
        model: the dense model; it is not changed.
        config: the options.
        data: calibration data from `gather`; if it has no batches, the loss check uses `validation`.
        validation: validation data, see `compress`.
        progress: whether to show progress bars.

    Raises:
        TargetError: validation data is given, but there are no predicted losses to correct.
        BudgetError: the budget cannot be met, see `Prepared.plan`.
    """
    stats = data.statistics
    prepared = prepare(model, config, stats, progress=progress)
    if config.verify and stats is not None:
        measured = data if data.batches or validation is None else replace(validation, loss_fn=data.loss_fn)
        prepared = check_loss(
            prepared, model, list(measured.batches), loss_fn=measured.loss_fn, progress=progress
        )
    if validation is None:
        return prepared
    if stats is None:
        raise TargetError(
            "validation corrects the losses that calibration predicts: pass calibration=batches too, and not "
            "objective='weight'."
        )
    return correct_by_measuring(
        prepared,
        model,
        list(validation.batches),
        loss_fn=validation.loss_fn,
        source=validation.source,
        progress=progress,
    )


def observing(plan: CompressionPlan) -> CompressionConfig:
    """Make a configuration for calibrating the layers of a plan; the configuration's budget is not used."""
    names: Any = [layer.name for layer in plan]
    return CompressionConfig(target_modules=names, objective=plan.objective, max_bond=1)  # type: ignore[arg-type]


def _named(data: Iterable[BatchLike] | ProvidedData, source: str) -> ProvidedData:
    """Convert batches to `ProvidedData` with the name `source`, unless they are `ProvidedData` already."""
    return data if isinstance(data, ProvidedData) else ProvidedData(data, source)


def _measurable(data: ProvidedData) -> ProvidedData:
    """Remove the loss function from the data if its values are random and so cannot be compared."""
    return replace(data, loss_fn=None) if data.loss_fn in (*PROJECTIONS, sampled_losses) else data


# --- code that reads the weight of a replaced layer -----------------------------------------------------


def run_once(model: nn.Module, batch: Batch, *, training: bool = False) -> None:
    """Run a model once without gradients; modes, buffers and the random state do not change."""
    buffers = {name: x.clone() for name, x in model.named_buffers()} if training else {}
    with ExitStack() as stack:
        for each in (torch.no_grad(), torch.random.fork_rng(devices=[]), in_eval_mode(model), uncompiled()):
            stack.enter_context(each)
        stack.enter_context(without_cache(model))
        stack.callback(model.eval)
        stack.callback(lambda: [model.get_buffer(name).copy_(x) for name, x in buffers.items()])
        model.train(training)
        run_model(model, batch)


def _batch_to_run(model: nn.Module, batches: Iterable[BatchLike]) -> Batch | None:
    """Find a batch on which the dense model runs: one row of a batch, a whole batch, or `sample_batch`.

    Returns:
        The batch; None if the model runs on none of them.
    """
    kept = list(batches)
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    choices: list[Any] = []
    if kept:
        choices = [lambda: some_rows(kept, model, 1)[0], lambda: as_batch(kept[0], model, device)]
    for choice in (*choices, lambda: sample_batch(model)):
        try:
            if (batch := choice()) is not None:
                run_once(model, batch)
                return batch
        except Exception:
            continue
    return None


def _put_back_readers(
    model: nn.Module,
    batch: Batch,
    plan: CompressionPlan,
    weights: Iterable[Any],
    dense: Mapping[str, nn.Module],
) -> dict[str, str]:
    """Run a compressed model, and put back dense layers whose weight is read by code outside of the layer.

    Some code reads weights only in training mode, so the model is run in both modes.

    Args:
        model: the compressed model.
        batch: a batch on which the dense model runs.
        plan: the plan that was applied.
        weights: all weights of the model, see `find_targets`.
        dense: the replaced modules, by name.

    Returns:
        Reasons why planned layers were put back, by layer name.

    Raises:
        Exception: the compressed model fails on the batch for another reason; all layers are put back first.
    """
    planned = {layer.name for layer in plan}
    names_of = {x: (target.names[0], target.names) for target in weights for x in target.names}
    returned: dict[str, str] = {}
    for training in (False, True):
        while True:
            try:
                run_once(model, batch, training=training)
                break
            except BaseException as error:
                reader = getattr(error, "layer", None)
                read = [x for x, module in model.named_modules(remove_duplicate=False) if module is reader]
                found = [x for x in read if x in dense and names_of[x][0] in planned - returned.keys()]
                if reader is not None and found:
                    name, names = names_of[found[0]]
                    put_back(model, {x: dense[x] for x in names})
                    returned[name] = str(error).partition(" on the weight")[0] + " outside of the layer"
                elif training and isinstance(error, Exception):  # some models cannot be trained on one row
                    break
                else:
                    put_back(model, dense)
                    raise
    if returned:
        warnings.warn(
            f"Put back dense, because other code of the model reads their weights: {', '.join(returned)}.",
            stacklevel=2,
        )
    return returned
