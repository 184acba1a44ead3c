"""Compression in one call: calibrate or survey, plan, replace layers, report."""

import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tensornet.calibration.batches import (
    Batch,
    BatchLike,
    BatchSample,
    check_batches,
    read_batches,
    some_rows,
)
from tensornet.calibration.calibrate import ENOUGH_LOSSES, MOST_TOKENS, calibrate
from tensornet.calibration.losses import PROJECTIONS, sampled_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import LayerCache, apply_plan, run_once
from tensornet.compression.config import CompressionConfig, check_config
from tensornet.compression.loss_increase import measure, record_losses, warn_of_loss
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planning import plan as plan_model
from tensornet.compression.prices import PriceList
from tensornet.compression.report import CompressionReport, measure_coverage, model_size
from tensornet.compression.survey import survey
from tensornet.compression.write import WRITE_TOKENS, compress_blocks, factors_of
from tensornet.errors import BudgetError, CalibrationWarning, TargetError
from tensornet.nn.extension import ProvidedData, provided_data, round_others
from tensornet.nn.targets import check_model, list_weights
from tensornet.nn.unfuse import unfused

#: Forms of calibration data for `compress`: batches; batches with a name and a loss function; or statistics.
Calibration = Iterable[BatchLike] | ProvidedData | CalibrationStats


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
def compress(
    model: nn.Module,
    config: CompressionConfig | CompressionPlan,
    *,
    calibration: Calibration | None = None,
    prices: PriceList | None = None,
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
            possibly a loss function or saved statistics; or only statistics. If absent, an installed plugin
            may provide text; without any data, plans minimize the error of the weights. A
            `CalibrationWarning` reports both cases.
        prices: price list of this model, from `survey`; the model is then not surveyed again. A finished plan
            needs it for feedback along the outputs; otherwise it is rounded with feedback along the inputs.
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

    # Plan: survey the model block by block. Plans without number formats need the statistics of all layers.
    by_blocks = config.by_blocks or (isinstance(config, CompressionPlan) and prices is not None)
    tokens = WRITE_TOKENS[config.effort] if by_blocks else None
    data = gather(model, options, calibration, tokens=tokens, progress=progress)
    by_blocks = by_blocks and data.statistics is None and bool(data.batches)
    if prices is not None and not by_blocks:
        raise TargetError(
            "prices are only for plans of number formats, and need calibration=batches; leave them out."
        )
    cache: LayerCache = {}
    if isinstance(config, CompressionPlan):
        plan = config
        source = None if data.statistics is None else data.statistics.source
        if config.objective != "weight" and not by_blocks and source != config.calibration:
            raise BudgetError(
                f"The plan was made with {config.calibration}, and the cores depend on these data. Pass the "
                "same data with the same number of tokens, or the statistics that were collected on them."
            )
    elif by_blocks:
        prices = (
            prices.with_config(config)
            if prices
            else survey(
                model, data.batches, config, loss_fn=data.loss_fn, source=data.source, progress=progress
            )
        )
        plan = prices.plan()
    else:
        plan = plan_model(model, config, data.statistics, progress=progress)
    with unfused(model):
        weights = list_weights(model)

    # Apply the plan.
    before = record_losses(model, data.batches, loss_fn=data.loss_fn, source=data.source)
    if by_blocks:
        schemes = {layer.name: (layer.name, layer.topology, layer.storage) for layer in plan}
        for _, layers in compress_blocks(
            model, plan, data.batches, factors=factors_of(prices, plan), progress=progress
        ):
            cache |= {schemes[name]: new for name, new in layers.items()}
    row = _row_to_run(model, data.batches)
    errors = apply_plan(model, plan, data.statistics, progress=progress, cache=cache, batch=row)
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
        plan=plan.with_errors(errors),
        coverage=measure_coverage(weights, [*(layer.name for layer in plan), *rounded], unseen=plan.unseen),
        measured=measured,
        measured_layers=measured_layers,
        rounded=rounded,
    )


def gather(
    model: nn.Module,
    config: CompressionConfig,
    calibration: Calibration | None,
    *,
    tokens: int | None = None,
    progress: bool,
) -> ProvidedData:
    """Collect the statistics that a configuration needs, and a few of the batches.

    If the model will be visited block by block, only batches are collected, with at least `tokens` tokens.

    Warns if an extension provides the data. Also warns if there is no data, since plans then minimize the
    error of the weights.

    Returns:
        A few batches and the loss function, for measurements, and `statistics`. The statistics are None if
        they are not needed or if there is no data.
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
    if tokens is not None and data.statistics is None and needed:
        check_batches(data.batches, "compress")
        batches = read_batches(data.batches, model, tokens=tokens, rows=ENOUGH_LOSSES, most=MOST_TOKENS)
        return replace(data, batches=batches)
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
        for _ in sample:  # `sample` stores a few batches, since some loaders can be iterated over only once
            pass
    return _measurable(replace(data, batches=sample.kept, statistics=stats))


def calibration_config(plan: CompressionPlan) -> CompressionConfig:
    """Make a configuration that selects the layers of a plan for calibration; `max_bond` has no effect."""
    names: Any = [layer.name for layer in plan]
    return CompressionConfig(target_modules=names, objective=plan.objective, max_bond=1)  # type: ignore[arg-type]


def _named(data: Iterable[BatchLike] | ProvidedData, source: str) -> ProvidedData:
    """Convert batches to `ProvidedData` with the name `source`, unless they are `ProvidedData` already."""
    return data if isinstance(data, ProvidedData) else ProvidedData(data, source)


def _measurable(data: ProvidedData) -> ProvidedData:
    """Remove the loss function from the data if its values are random and so cannot be compared."""
    return replace(data, loss_fn=None) if data.loss_fn in (*PROJECTIONS, sampled_losses) else data


def _row_to_run(model: nn.Module, batches: Iterable[BatchLike]) -> Batch | None:
    """Return one row of the batches on which to run the model; None if the dense model does not run on it.

    This may happen if the batches are made for a loss function and not for the model itself.
    """
    try:
        if rows := some_rows(list(batches), model, 1):
            run_once(model, rows[0])
            return rows[0]
    except Exception:
        return None
    return None
