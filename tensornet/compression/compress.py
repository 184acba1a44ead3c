"""Compression in one call: survey, plan, compress block by block, replace layers, report."""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from tensornet.calibration.batches import (
    Batch,
    BatchLike,
    as_batch,
    check_batches,
    device_of,
    first_rows,
    run_model,
)
from tensornet.calibration.losses import comparable_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import run_once
from tensornet.compression.config import WITHOUT_DATA, CompressionConfig, check_config
from tensornet.compression.coverage import measure_coverage
from tensornet.compression.loss_increase import measure, record_losses, warn_of_loss
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.report import CompressionReport, model_size
from tensornet.compression.road import Source, calibration_config, make_plan, run
from tensornet.compression.sinks import ReplacedLayers
from tensornet.compression.survey import Survey
from tensornet.compression.write import read_enough
from tensornet.errors import CalibrationWarning, TargetError
from tensornet.nn.extension import ProvidedData, provided_data, round_others
from tensornet.nn.targets import check_model

#: Forms of calibration data for `compress`: batches; batches with a name and a loss function; or statistics.
Calibration = Iterable[BatchLike] | ProvidedData | CalibrationStats


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
def compress(
    model: nn.Module,
    config: CompressionConfig | CompressionPlan,
    *,
    calibration: Calibration | None = None,
    survey: Survey | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compress a model in place: replace the targeted layers by tensor-network layers.

    If there are batches, the loss is measured before and after compression, on at most 2,048 tokens. A
    `CalibrationWarning` is given if the measured loss increase is far above the predicted one, or above the
    allowed one.

    After the replacement the model is run on one row of a batch. If other code of the model reads the weight
    of a replaced layer, all layers become dense again, and an error names the layers to exclude.

    Args:
        model: any module.
        config: the options; or a plan, possibly edited or loaded from a file, that is applied unchanged.
        calibration: batches (see `calibrate`); or `ProvidedData`, which has batches, a name for reports, and
            possibly a loss function; or statistics from `calibrate`. If absent, an installed plugin may
            provide text; without any data, plans minimize the error of the weights. A `CalibrationWarning`
            reports both cases. The model is walked over block by block (see `survey` and `compress_blocks`),
            unless statistics are given.
        survey: survey of this model, from `survey`; the model is then not surveyed again.
        progress: whether to show progress bars.

    Returns:
        A report with the error and the predicted loss of every layer; a thorough plan also has the error of a
        plain SVD of the same size.

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
    options = calibration_config(config) if isinstance(config, CompressionPlan) else config
    check_config(options)
    options.check_says_how_far()
    params_before, bytes_before = model_size(model)

    # Survey and plan, compress block by block, and replace all layers.
    data = gather(model, config, calibration)
    stats = calibration if isinstance(calibration, CalibrationStats) else None
    source = Source(model)
    planned = make_plan(source, config, data, stats=stats, survey=survey, progress=progress)
    before = record_losses(
        model, data.batches, loss_fn=comparable_losses(data.loss_fn, labelled=False), source=data.source
    )
    call = data.loss_fn or run_model
    row = _row_to_run(model, data.batches, call) if data.batches else None
    open_sink = partial(ReplacedLayers, model, stats=stats, batch=row, call=call, progress=progress)
    done = run(source, planned, open_sink, data, stats=stats, progress=progress)
    plan = done.plan
    measured = measured_layers = None if before is None else measure(model, before)
    if measured is not None:
        warn_of_loss(measured, plan.predicted_loss_increase, options.loss_increase)

    # Round parameters that do not belong to layers, such as the cores of experts. Plans do not predict the
    # loss increase of this rounding, so it is measured.
    rounded = {} if isinstance(config, CompressionPlan) else round_others(model, config)
    if rounded and before is not None:
        measured = measure(model, before)
        warn_of_loss(measured, None, options.loss_increase)
    predicted = plan.predicted_loss_increase if rounded else None
    if predicted is not None and (measured is None or measured.exceeds(predicted)):
        known = "Pass calibration=batches to measure it"
        if measured is not None and measured_layers is not None:
            known = (
                f"Measured: {measured_layers.mean:.2g} before, {measured.mean:.2g} after they were rounded"
            )
        warnings.warn(
            f"The predicted loss increase of {predicted:.2g} leaves out {len(rounded)} parameters that were "
            f"rounded but belong to no layer, such as the cores of experts. {known}.",
            CalibrationWarning,
            stacklevel=2,
        )

    # Report.
    params_after, bytes_after = model_size(model)
    return CompressionReport(
        model_params_before=params_before,
        model_params_after=params_after,
        model_bytes_before=bytes_before,
        model_bytes_after=bytes_after,
        seconds=time.perf_counter() - start,
        plan=plan,
        coverage=measure_coverage(planned.weights, [*planned.names, *rounded], unseen=plan.unseen),
        measured=measured,
        measured_layers=measured_layers,
        rounded=rounded,
        uncorrected=done.uncorrected,
    )


def gather(
    model: nn.Module, config: CompressionConfig | CompressionPlan, calibration: Calibration | None
) -> ProvidedData:
    """Read the batches on which a model is surveyed and compressed, or those on which its loss is measured.

    Warns if an extension provides the data. Also warns if there is no data, since plans then minimize the
    error of the weights.
    """
    if isinstance(calibration, CalibrationStats):
        return ProvidedData([], calibration.source)
    blind = isinstance(config, CompressionConfig) and config.method in WITHOUT_DATA
    needed, missing = config.reads_data and not blind, calibration is None
    data = ProvidedData([], "") if calibration is None else calibration
    data = data if isinstance(data, ProvidedData) else ProvidedData(data, "calibration data")
    name, advice = type(model).__name__, "Pass calibration=batches (about 30 of 1,000 tokens)"
    warning = ""
    if missing and needed and (provided := provided_data(model)) is not None:
        data = provided
        warning = f"using {data.source}. Text from the intended use gives a better model. {advice}."
    elif missing and needed and isinstance(config, CompressionConfig) and config.method == "auto":
        if config.one_format_keeps:
            warning = (
                f"all layers of {name} get one number format, int8 unless formats= names others, rounded to "
                f"nearest. {advice} for fewer bits with less loss, or method='nearest' to confirm."
            )
        elif not config.needs_curvature:
            warning = (
                f"{name} is compressed by the error of its weights alone, which increases the loss much more "
                f"than necessary. {advice}, or method='svd' to confirm."
            )
    if warning:
        warnings.warn(f"No calibration data: {warning}", CalibrationWarning, stacklevel=3)
    check_batches(data.batches, "compress")
    batches = read_enough(data.batches, model, config.survey_kind)
    if isinstance(config, CompressionConfig) and config.share_experts and not batches:
        raise TargetError(
            "share_experts compares separate and shared networks by their predicted loss, which needs "
            "gradients: pass calibration=batches, or leave it out."
        )
    if needed and not missing and not batches:
        raise TargetError("compress got no batches; pass at least one, better 16 of 1,000 tokens.")
    return replace(data, batches=batches)


def _row_to_run(
    model: nn.Module, batches: Iterable[BatchLike], call: Callable[[nn.Module, Batch], object]
) -> Batch:
    """Return the first row of a batch, or the whole batch if the model or the loss needs several rows.

    Args:
        model: the dense model.
        batches: at least one batch.
        call: function that runs a model on a batch. Batches that are made for a loss function, and are not
            arguments of the model, are run by this loss function.
    """
    whole = as_batch(next(iter(batches)), model, device_of(model))
    row = first_rows(whole, 1)
    try:
        run_once(model, row, call)
        return row
    except Exception:  # the error of the whole batch, if any, is raised
        run_once(model, whole, call)
        return whole
