"""Compression in one call: calibrate, plan, execute, report."""

import time
from collections.abc import Collection, Iterable

import torch
from torch import nn

from tensornet._util import warn
from tensornet.calibration.batch_sample import BatchSample
from tensornet.calibration.batches import BatchLike
from tensornet.calibration.calibrate import calibrate
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan
from tensornet.compression.config import CompressionConfig, check_config
from tensornet.compression.measured_loss import DenseLosses, warn_of_loss
from tensornet.compression.planner import prepare
from tensornet.compression.reach import measure_reach
from tensornet.compression.report import CompressionReport, layer_reports, model_size
from tensornet.errors import CalibrationWarning, TargetError
from tensornet.nn.extension import provided_data
from tensornet.nn.targets import check_model

Calibration = CalibrationStats | Iterable[BatchLike]


@torch.inference_mode(False)  # what is made there could not be trained
def compress(
    model: nn.Module,
    config: CompressionConfig,
    *,
    calibration: Calibration | None = None,
    validation: Collection[BatchLike] | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compress a model in place: replace the targeted layers by tensor-network layers.

    Args:
        model: any module.
        config: what to compress and how far.
        calibration: batches of the model's arguments (see `calibrate`), or statistics already collected.
            Without, a plugin may offer text of its own; else the error of the weights decides. Either is
            said in a `CalibrationWarning`. With batches, predicted losses of number formats are verified by
            measuring (`CompressionConfig.verify`), and the loss is measured before and after on at most
            2,048 tokens of them, or of `validation`: one forward pass each (`CompressionReport.measured`). A
            `CalibrationWarning` says so where it rises far above the prediction or what was allowed.
        validation: batches like those of `calibrate`, best of another source. The loss is measured on them
            at a few sizes before anything is replaced, which corrects the forecast and with it what a budget
            of `loss_increase` buys (`PreparedPlan.measured`). Needs calibrated gradients.
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
    check_config(config)
    if iter(validation or ()) is validation:
        raise TargetError("validation is walked through several times: pass a list, not an iterator.")
    params_before, bytes_before = model_size(model)
    stats, batches = gather(model, config, calibration, progress=progress)
    prepared = prepare(model, config, stats, progress=progress)
    if config.verify and stats is not None:
        prepared = prepared.verified(model, stats, batches or [*(validation or ())], progress=progress)
    if validation is not None:
        if stats is None:
            raise TargetError(
                "validation corrects what calibration predicts: pass calibration=batches as well, and not "
                "objective='weight'."
            )
        prepared = prepared.measured(model, stats, validation, progress=progress)
    made, decomposed = prepared.plan_decomposed(progress=progress)
    readers = () if stats is None else stats.readers
    reach = measure_reach(model, [layer.name for layer in made], readers=readers, unseen=made.unseen)
    data, source = (batches, "calibration data") if validation is None else (validation, "validation data")
    before = DenseLosses.measure(model, data, source)
    errors = apply_plan(
        model, made, stats, progress=progress, decomposed=decomposed, rounded=prepared.rounded
    )
    params_after, bytes_after = model_size(model)
    measured = None if before is None else before.rise(model)
    if measured is not None:
        warn_of_loss(measured, made.predicted_loss_increase, config.loss_increase)
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


def gather_statistics(
    model: nn.Module, config: CompressionConfig, calibration: Calibration | None, *, progress: bool
) -> CalibrationStats | None:
    """Collect the statistics that a configuration needs, unless they are given; None if it needs none.

    Warns where it takes data of its own, and where the error of the weights must do.
    """
    return gather(model, config, calibration, progress=progress)[0]


def gather(
    model: nn.Module, config: CompressionConfig, calibration: Calibration | None, *, progress: bool
) -> tuple[CalibrationStats | None, list[BatchLike]]:
    """Collect statistics as `gather_statistics`, and a few of the batches they were collected on."""
    if isinstance(calibration, CalibrationStats):
        return calibration, []
    unlimited = config.budget.unlimited and not config.needs_curvature and not config.plans_formats
    unlimited = unlimited and not config.fixed
    if config.objective == "weight" or unlimited:
        return None, []
    source = "calibration data"
    if calibration is None:
        found = provided_data(model)
        if found is None:
            if config.objective == "auto" and config.one_format_keeps:
                warn(
                    f"No calibration data: all layers of {type(model).__name__} get one number format, int8 "
                    "unless formats= names others, rounded to nearest. Pass calibration=batches (about 30 of "
                    "1,000 tokens) for fewer bits at less loss, or objective='weight' if this is meant.",
                    CalibrationWarning,
                )
                return None, []
            if config.objective == "auto" and not config.needs_curvature:
                warn(
                    f"No calibration data: {type(model).__name__} is compressed by the error of its weights "
                    "alone, which keeps far less of what it can do. Pass calibration=batches (about 30 of "
                    "1,000 tokens), or objective='weight' if this is meant.",
                    CalibrationWarning,
                )
            return None, []
        calibration, source = found.batches, found.source
        warn(
            f"No calibration data: using {source}. Text like that of the intended use gives a better model; "
            "pass calibration=batches.",
            CalibrationWarning,
        )
    gradients = 0 if config.objective == "activation" else None
    sample = BatchSample(calibration)
    stats = calibrate(
        model, sample, config=config, gradient_batches=gradients, source=source, progress=progress
    )
    return stats, sample.kept
