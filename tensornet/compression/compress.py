"""Compression in one call: calibrate, plan, check the loss, apply, report."""

import time
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import nn

from tensornet._util import warn
from tensornet.calibration.batches import BatchLike, BatchSample
from tensornet.calibration.calibrate import calibrate
from tensornet.calibration.losses import PROJECTIONS, TokenLosses, sampled_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan
from tensornet.compression.config import CompressionConfig, check_config
from tensornet.compression.measured_loss import DenseLosses, warn_of_loss
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planner import prepare
from tensornet.compression.reach import measure_reach
from tensornet.compression.report import CompressionReport, layer_reports, model_size
from tensornet.compression.rounded_layers import RoundedLayers
from tensornet.errors import BudgetError, CalibrationWarning, TargetError
from tensornet.nn.extension import ProvidedData, provided_data
from tensornet.nn.targets import check_model, list_weights
from tensornet.nn.unfuse import unfused

#: What `compress` calibrates with: batches, batches with their name and loss, or statistics.
Calibration = Iterable[BatchLike] | ProvidedData | CalibrationStats


@torch.inference_mode(False)  # what is made there could not be trained
def compress(
    model: nn.Module,
    config: CompressionConfig | CompressionPlan,
    *,
    calibration: Calibration | None = None,
    validation: Collection[BatchLike] | ProvidedData | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compress a model in place: replace the targeted layers by tensor-network layers.

    Args:
        model: any module.
        config: what to compress and how far; or a plan, which may have been edited or loaded and is applied
            as it is.
        calibration: batches of the model's arguments (see `calibrate`); `ProvidedData`, which gives them a
            name for reports, a loss, or statistics that were saved; or statistics alone. Without, a plugin
            may offer text of its own; else the error of the weights decides. Either is said in a
            `CalibrationWarning`. With batches, predicted losses of number formats are verified by measuring
            (`CompressionConfig.verify`), and the loss is measured before and after on at most 2,048 tokens
            of them, or of `validation` (`CompressionReport.measured`). A `CalibrationWarning` says so where
            it rises far above the prediction or what was allowed.
        validation: batches like those of `calibrate`, best of another source, or `ProvidedData`. The loss is
            measured on them at a few sizes before anything is replaced, which corrects predicted losses and
            with them what a budget of `loss_increase` buys. Needs calibrated gradients.
        progress: show progress bars.

    Returns:
        What was done to each layer, with certified errors, the plain-SVD baseline and the predicted loss.

    Raises:
        TargetError, BudgetError, NonFiniteError, TopologyError: before anything is replaced.

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
    given = config if isinstance(config, CompressionPlan) else None
    if given is not None:  # the layers to observe; this budget is never read
        names = [layer.name for layer in given]
        config = CompressionConfig(target_modules=names, objective=given.objective, max_bond=1)  # type: ignore[arg-type]
    assert not isinstance(config, CompressionPlan)
    check_config(config)
    config.check_says_how_far()
    held_out = _named(validation, "validation data")
    if held_out is not None and iter(held_out.batches) is held_out.batches:
        raise TargetError("validation is walked through several times: pass a list, not an iterator.")
    params_before, bytes_before = model_size(model)
    stats, data = gather(model, config, calibration, progress=progress)
    rounded = RoundedLayers()
    if given is not None:
        _check_calibration(given, stats)
        if held_out is not None:
            raise TargetError(
                "validation corrects predictions while planning, and the plan is made: drop it."
            )
        made, decomposed = given, {}
        with unfused(model):
            weights = list_weights(model, () if stats is None else stats.readers)
    else:
        prepared = prepare(model, config, stats, progress=progress)
        batches = list(data.batches) or ([] if held_out is None else list(held_out.batches))
        if config.verify and stats is not None:
            prepared = prepared.verified(
                model, stats, batches, loss_fn=_deterministic(data), progress=progress
            )
        if held_out is not None:
            if stats is None:
                raise TargetError(
                    "validation corrects what calibration predicts: pass calibration=batches as well, and "
                    "not objective='weight'."
                )
            prepared = prepared.measured(
                model,
                stats,
                list(held_out.batches),
                loss_fn=_deterministic(held_out),
                source=held_out.source,
                progress=progress,
            )
        made, decomposed = prepared.plan_decomposed(progress=progress)
        rounded, weights = prepared.rounded, list(prepared.weights)
    reach = measure_reach(weights, [layer.name for layer in made], unseen=made.unseen)
    seen = held_out or data
    before = DenseLosses.measure(model, seen.batches, seen.source)
    errors = apply_plan(model, made, stats, progress=progress, decomposed=decomposed, rounded=rounded)
    params_after, bytes_after = model_size(model)
    measured = None if before is None else before.rise(model)
    if measured is not None:
        allowed = None if given is not None else config.loss_increase
        warn_of_loss(measured, made.predicted_loss_increase, allowed)
    return CompressionReport(
        layers=layer_reports(made, errors),
        model_params_before=params_before,
        model_params_after=params_after,
        model_bytes_before=bytes_before,
        model_bytes_after=bytes_after,
        seconds=time.perf_counter() - start,
        plan=made,
        reach=reach,
        measured=measured,
    )


def _named(data: Iterable[BatchLike] | ProvidedData | None, source: str) -> ProvidedData | None:
    """Give batches a name for reports unless they have one."""
    return data if data is None or isinstance(data, ProvidedData) else ProvidedData(data, source)


def _deterministic(data: ProvidedData) -> TokenLosses | None:
    """Return the loss of the data unless it draws random numbers, so that its value measures nothing."""
    return None if data.loss_fn in (*PROJECTIONS, sampled_losses) else data.loss_fn


def _check_calibration(plan: CompressionPlan, stats: CalibrationStats | None) -> None:
    """Raise BudgetError if a plan was made with other statistics, on which its cores depend."""
    if plan.objective != "weight" and (stats is None or stats.source != plan.calibration):
        raise BudgetError(
            f"The plan was made with {plan.calibration}, on which the cores depend; pass the same data, "
            "as many tokens of them, or the statistics that were collected then."
        )


def gather(
    model: nn.Module, config: CompressionConfig, calibration: Calibration | None, *, progress: bool
) -> tuple[CalibrationStats | None, ProvidedData]:
    """Collect the statistics that a configuration needs, and a few of the batches they were collected on.

    Warns where it takes data of its own, and where the error of the weights must do.

    Returns:
        None in place of statistics if nothing needs them or there are no data.
    """
    if isinstance(calibration, CalibrationStats):
        return calibration, ProvidedData([], calibration.source)
    unlimited = config.budget.unlimited and not config.needs_curvature and not config.plans_formats
    unlimited = unlimited and not config.fixed
    if config.objective == "weight" or unlimited:
        return None, ProvidedData([], "")
    data = _named(calibration, "calibration data")
    if data is None:
        data = provided_data(model)
        if data is None:
            _warn_without_data(model, config)
            return None, ProvidedData([], "")
        warn(
            f"No calibration data: using {data.source}. Text like that of the intended use gives a better "
            "model; pass calibration=batches.",
            CalibrationWarning,
        )
    sample = BatchSample(data.batches)
    if data.statistics is not None:
        for _ in sample:  # a few of the batches are kept
            pass
        return data.statistics, replace(data, batches=sample.kept)
    stats = calibrate(
        model,
        sample,
        config=config,
        loss_fn=data.loss_fn,
        gradient_batches=0 if config.objective == "activation" else None,
        source=data.source,
        progress=progress,
    )
    return stats, replace(data, batches=sample.kept)


def _warn_without_data(model: nn.Module, config: CompressionConfig) -> None:
    """Say what the error of the weights alone decides, unless it was asked for."""
    if config.objective != "auto":
        return
    name = type(model).__name__
    if config.one_format_keeps:
        warn(
            f"No calibration data: all layers of {name} get one number format, int8 unless formats= names "
            "others, rounded to nearest. Pass calibration=batches (about 30 of 1,000 tokens) for fewer bits "
            "at less loss, or objective='weight' if this is meant.",
            CalibrationWarning,
        )
    elif not config.needs_curvature:
        warn(
            f"No calibration data: {name} is compressed by the error of its weights alone, which keeps far "
            "less of what it can do. Pass calibration=batches (about 30 of 1,000 tokens), or "
            "objective='weight' if this is meant.",
            CalibrationWarning,
        )
