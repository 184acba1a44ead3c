"""Sensitivity of the loss to errors in one weight: damped second moments from calibration statistics.

The predicted loss increase of an error `E` is `1/2 tr(R E C E^T)`, with the moment `R` of the output
gradients and the moment `C` of the inputs. `layer_weighting` returns both moments for a layer.
"""

from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.config import SHARED_BUDGETS, CompressionConfig
from tensornet.damping import FIT_DAMPING, FORECAST_ROW_DAMPING, MOMENT_DAMPING
from tensornet.errors import ShapeError, TargetError
from tensornet.linalg.svd import working_dtype
from tensornet.linalg.weighted_svd import (
    Weighting,
    check_weighting,
    damped,
    nearest_kronecker,
    restore_trace,
)
from tensornet.nn.targets import Target
from tensornet.quantization import Rounding

#: Fraction of the token frequencies that is spread evenly over all rows of an embedding, since other texts
#: contain other tokens. With a smaller fraction, the ratio of measured to predicted loss of SmolLM2's
#: embedding was four times as large for low rank as for integers (benchmarks/bytes.py).
FREQUENCY_SPREAD = 0.5


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of the loss to errors in one matrix, as two weightings with different damping.

    Args:
        weighting: weighting with little damping, for choosing and fitting candidates.
        forecast: weighting with more damping, for predicting the loss increase.
        rounding: how integers are rounded (see `CompressionConfig`).
    """

    weighting: Weighting
    forecast: Weighting
    rounding: Rounding = "two_sided"


def layer_sensitivity(
    target: Target,
    objective: str,
    stats: CalibrationStats | None,
    rounding: Rounding = "two_sided",
) -> Sensitivity | None:
    """Make the `Sensitivity` of the loss to errors in one matrix.

    Args:
        target: the weight.
        objective: `"weight"`, `"activation"` or `"curvature"`.
        stats: calibration statistics.
        rounding: how integers are rounded (see `CompressionConfig`).

    Returns:
        The weightings; None if all gradients are zero, so that errors do not change the loss.

    Raises:
        TargetError: see `layer_weighting`.
    """
    weighting = layer_weighting(target, objective, stats)
    if weighting is None:
        return None
    if objective != "curvature" or stats is None:
        return Sensitivity(weighting, weighting, rounding)
    forecast = forecast_weighting(target, stats)
    assert forecast is not None
    known, same = weighting.columns, forecast.columns
    if known is not None and same is not None and torch.equal(known, same):
        forecast = replace(forecast, columns=known)  # later code recognizes equal moments by identity
    return Sensitivity(weighting, forecast, rounding)


def forecast_weighting(target: Target, stats: CalibrationStats) -> Weighting | None:
    """Build the error weighting with which the loss increase of one weight matrix is predicted.

    The gradient moment is damped strongly (`FORECAST_ROW_DAMPING`), but its trace is preserved: half of the
    trace is spread evenly over the diagonal.

    Returns:
        The weighting; None if all gradients are zero, so that errors do not change the loss.

    Raises:
        TargetError: see `layer_weighting`.
    """
    found = curvature_weighting(target, stats, FORECAST_ROW_DAMPING)
    _check_shapes(target, found)
    if found is None:
        return None
    assert found.rows is not None  # `resolve_objective` has checked that gradients were calibrated
    return replace(found, rows=restore_trace(found.rows, FORECAST_ROW_DAMPING))


def layer_weighting(target: Target, objective: str, stats: CalibrationStats | None) -> Weighting | None:
    """Build the error weighting of one weight matrix for an objective of `CompressionConfig`.

    Returns:
        The weighting; None if all gradients are zero, so that errors do not change the loss.

    Raises:
        TargetError: the statistics do not contain the layer, or belong to another model.
    """
    if objective == "weight" or stats is None:
        return Weighting()
    if objective == "curvature":
        found = curvature_weighting(target, stats, MOMENT_DAMPING)
    else:
        found = input_weighting(target, stats)
        if found.columns is not None:
            found = replace(found, columns=damped(found.columns, FIT_DAMPING))
    _check_shapes(target, found)
    return found


def _check_shapes(target: Target, found: Weighting | None) -> None:
    """Raise TargetError if the weighting of a weight has another shape than the weight."""
    try:
        check_weighting(target.matrix, found or Weighting())
    except ShapeError as error:
        raise TargetError(
            f"The statistics do not belong to this model: layer {target.name!r} has another shape in them. "
            f"{error} Calibrate this model."
        ) from error


def input_weighting(target: Target, stats: CalibrationStats) -> Weighting:
    """Build the error weighting of one weight matrix from the second moment of its inputs alone, undamped.

    For an embedding, the frequencies of its tokens replace this moment. If several layers use the weight, the
    inputs are those of the first layer that ran. If all inputs were zero, all errors have equal weight.

    Raises:
        TargetError: no layer that uses this weight ran during calibration.
    """
    for name, kind in zip(target.names, target.kinds, strict=True):
        if kind.name == "embedding" and name in stats.rows:
            return Weighting(_spread(stats.rows[name]), None)
        if kind.name != "embedding" and name in stats.columns:
            columns = stats.columns[name]
            break
    else:
        raise never_ran(target)
    return Weighting(None, columns) if _counts(columns) else Weighting()


def curvature_weighting(target: Target, stats: CalibrationStats, damping: float) -> Weighting | None:
    """Build the error weighting of one weight matrix from the second moments of its inputs and gradients.

    The gradients are those of the loss with respect to the outputs. Both moments are damped. For an
    embedding, the frequencies of its tokens replace the input moment. If several layers use the weight, the
    weighting is the Kronecker product closest to the sum over these layers.

    Args:
        target: the weight; layers that did not run in calibration are skipped.
        stats: calibration statistics.
        damping: fraction of the mean diagonal that is added to gradient moments.

    Returns:
        The weighting; None if all gradients or all inputs were zero, so that errors do not change the loss.

    Raises:
        TargetError: no layer that uses this weight ran during calibration.
    """
    terms = []
    for name, kind in zip(target.names, target.kinds, strict=True):
        if name not in stats.rows and name not in stats.columns:
            continue
        rows, columns = stats.rows.get(name), stats.columns.get(name)
        if not (_counts(rows) and _counts(columns)):
            continue
        if kind.name == "embedding":
            terms.append(Weighting(_spread(rows), damped(columns, damping)))
        else:
            coherent = damped(rows, damping) * stats.coherence.get(name, 1.0)
            terms.append(Weighting(coherent, damped(columns, FIT_DAMPING)))
    if not is_known(target, stats):
        raise never_ran(target)
    return nearest_kronecker(terms) if terms else None


def _spread(frequencies: Tensor) -> Tensor:
    """Spread the fraction `FREQUENCY_SPREAD` of the frequencies evenly over all rows of an embedding."""
    kept = (1 - FREQUENCY_SPREAD) * frequencies.to(working_dtype(frequencies.dtype))
    return kept + FREQUENCY_SPREAD * frequencies.mean()


def _counts(moment: Tensor | None) -> TypeGuard[Tensor]:
    return moment is not None and bool(moment.any())


def is_known(target: Target, stats: CalibrationStats) -> bool:
    """Return True if the statistics contain the moments of at least one layer that uses the weight."""
    uses = zip(target.names, target.kinds, strict=True)
    return any(name in (stats.rows if kind.name == "embedding" else stats.columns) for name, kind in uses)


def never_ran(target: Target) -> TargetError:
    """Build the exception for a weight without calibration statistics."""
    return TargetError(
        f"Layer {target.name!r} never ran during calibration, so the effect of errors in it is unknown. "
        "Calibrate with data for which it runs, or exclude it."
    )


def resolve_objective(config: CompressionConfig, stats: CalibrationStats | None) -> str:
    """Return the objective of a configuration; `"auto"` becomes the best one that the statistics allow.

    Raises:
        TargetError: the objective needs statistics that are missing.
    """
    known = "weight" if stats is None else "curvature" if stats.has_gradients else "activation"
    order = ("weight", "activation", "curvature")
    if known == "weight" and config.method in ("auto", "nearest") and config.one_format_keeps:
        return known
    wanted = "curvature" if config.needs_curvature else config.objective
    # How integers are rounded depends on the method alone, so gradients only add predicted losses.
    if wanted == "auto" or (config.formats and order.index(wanted) < order.index(known)):
        return known
    if order.index(wanted) > order.index(known):
        missing = "gradients" if wanted == "curvature" else "inputs"
        whole = [x for x in (*SHARED_BUDGETS, "share_experts") if getattr(config, x)]
        needs = whole[0] if whole else f"method={config.method!r}"
        raise TargetError(
            f"{needs} needs calibrated {missing}: pass calibration=batches to compress, or statistics from "
            "tensornet.calibrate to plan. method='nearest' with formats, and method='svd' for networks, need "
            "none."
        )
    return wanted
