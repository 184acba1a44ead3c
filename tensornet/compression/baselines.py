"""Baselines of a plan: round to nearest, GPTQ and the truncated SVD, at about the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tensornet._util import on_cpu_unless_said, progress_bar
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.sensitivity import forecast_weighting, input_weighting
from tensornet.errors import TargetError
from tensornet.linalg.weighted_svd import Weighting, tail_costs, weighted_svd
from tensornet.nn.encoding import Storage
from tensornet.nn.targets import Target, all_targets
from tensornet.nn.unfuse import unfused
from tensornet.quantization import NumberFormat, round_weight
from tensornet.quantization.formats import BITS
from tensornet.topologies import dense

NEAREST, GPTQ, SVD = "round to nearest", "GPTQ", "plain SVD"
#: Integer formats that the plain methods choose from, with 16-bit scales.
_FORMATS = tuple(NumberFormat(bits, group) for bits in BITS for group in (64, 32, 128))
#: Bytes of a number in the factors of the plain SVD where the plan has number formats.
_SHORT = 2
#: A format that takes so much more than the plan still counts as one of the same bytes.
_SLACK = 1.01
#: Sizes at which the curve of the plain SVD is drawn, as bits of a weight.
_CURVE_BITS = (1, 1.5, 2, 3, 4, 6, 8, 11, 16, 22, 30)


@dataclass(frozen=True)
class BaselineResult:
    """A plain method, the same for all layers, at about the bytes of a plan.

    Args:
        method: `"round to nearest"`, `"GPTQ"` or `"plain SVD"`.
        form: number format or ranks, in a few characters.
        num_bytes: of all layers, scales included.
        num_params: stored numbers, scales included.
        predicted_loss_increase: of all layers together, corrected as that of the plan; None without
            calibrated gradients.
    """

    method: str
    form: str
    num_bytes: int
    num_params: int
    predicted_loss_increase: float | None = None


@dataclass(frozen=True)
class BaselineLosses:
    """Predicted loss increase of the plain methods, by layer and over sizes.

    Args:
        nearest: by layer, of rounding to nearest at the bytes of its plan; between two number formats it is
            interpolated, beyond them it is that of the nearest one.
        svd: by layer, of the truncated SVD of at most those bytes.
        nearest_curve: `(bytes of all layers, loss increase)`, of one format for all layers.
        svd_curve: likewise, of one ratio for all layers.
    """

    nearest: Mapping[str, float] = field(default_factory=dict)
    svd: Mapping[str, float] = field(default_factory=dict)
    nearest_curve: tuple[tuple[int, float], ...] = ()
    svd_curve: tuple[tuple[int, float], ...] = ()


def baseline_methods(stats: CalibrationStats | None) -> tuple[str, ...]:
    """List the plain methods that the statistics allow: GPTQ needs moments of inputs.

    Example:
        >>> from tensornet.compression.baselines import baseline_methods
        >>> baseline_methods(None)
        ('round to nearest', 'plain SVD')
    """
    return (NEAREST, SVD) if stats is None else (NEAREST, GPTQ, SVD)


def predict_baseline(
    model: nn.Module, plan: CompressionPlan, method: str, stats: CalibrationStats | None = None
) -> BaselineResult:
    """Predict the loss increase of a plain method at the bytes of a plan; the model is not changed.

    Args:
        model: dense, the plan was made for it.
        plan: gives the layers and their bytes.
        method: one of `baseline_methods(stats)`.
        stats: the plan was made with them.

    Raises:
        TargetError: an unknown method, GPTQ without statistics, or a model without the planned layers.

    Example:
        >>> from tensornet.compression.baselines import predict_baseline
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> plan = tn.plan(model, tn.CompressionConfig(max_bond=8)).replace_layer("0", None, "int4")
        >>> predict_baseline(model, plan, "round to nearest").form
        'int4'
    """
    return _baseline(model, plan, method, stats, write=False)


def apply_baseline(
    model: nn.Module, plan: CompressionPlan, method: str, stats: CalibrationStats | None = None
) -> BaselineResult:
    """Round or truncate the planned weights in place by a plain method of the same bytes.

    The layers stay dense: this is for measuring the loss. Arguments and errors as `predict_baseline`.

    Example:
        >>> from tensornet.compression.baselines import apply_baseline
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> plan = tn.plan(model, tn.CompressionConfig(max_bond=8)).replace_layer("0", None, "int4")
        >>> apply_baseline(model, plan, "round to nearest").num_bytes == plan.bytes_after
        True
    """
    return _baseline(model, plan, method, stats, write=True)


@torch.no_grad()
@on_cpu_unless_said
def _baseline(
    model: nn.Module, plan: CompressionPlan, method: str, stats: CalibrationStats | None, *, write: bool
) -> BaselineResult:
    if method not in baseline_methods(stats):
        known = ", ".join(map(repr, baseline_methods(stats)))
        raise TargetError(
            f"Unknown baseline {method!r}; choose one of {known} ('GPTQ' needs calibration statistics)."
        )
    size, params, losses, ranks = 0, 0, [], []
    number_format = _format_of_size(plan)
    with unfused(model):
        for target, weighting in _weighed(model, plan, stats):
            matrix = target.matrix
            made = _PLAIN[method](target, number_format, plan, stats)
            if weighting is not None:
                losses.append(weighting.cost(matrix.double() - made.matrix.double()))
            if write:
                matrix.copy_(made.matrix)
            size, params = size + made.num_bytes, params + made.num_params
            ranks += [] if made.rank is None else [made.rank]
    form = _ranks(ranks) if ranks else number_format.name
    return BaselineResult(
        method, form, size, params, plan.forecast.rise(sum(losses)) if _predicts(plan, stats) else None
    )


@torch.no_grad()
@on_cpu_unless_said
def baseline_losses(
    model: nn.Module, plan: CompressionPlan, stats: CalibrationStats | None, *, progress: bool = False
) -> BaselineLosses:
    """Predict the loss increase of rounding to nearest and of the plain SVD, by layer and over sizes.

    Takes one SVD of each layer. Empty where the plan was made without calibrated gradients.

    Args:
        model: dense, the plan was made for it.
        plan: gives the layers and their bytes.
        stats: the plan was made with them.
        progress: show a progress bar.

    Raises:
        TargetError: the model has no layer of a planned name.

    Example:
        >>> from tensornet.compression.baselines import baseline_losses
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> config = tn.CompressionConfig(bits_per_weight=6.25)
        >>> stats = tn.calibrate(model, [torch.randn(32, 64)], config=config)
        >>> losses = baseline_losses(model, tn.plan(model, config, stats), stats)
        >>> losses.svd["0"] > losses.nearest["0"]
        True
    """
    if not _predicts(plan, stats):
        return BaselineLosses()
    formats = [NumberFormat.parse(f"int{bits}") for bits in BITS]
    bits = [x for x in _CURVE_BITS if x <= 8 * plan.bytes_before / plan.params_before]
    nearest, svd = {}, {}
    nearest_sums = {x: [0.0, 0.0] for x in formats}
    svd_sums = {x: [0.0, 0.0] for x in bits}
    with unfused(model):
        work = _weighed(model, plan, stats)
        for target, weighting in progress_bar(work, desc="baselines", unit="layer", disable=not progress):
            matrix, layer = target.matrix, plan[target.name]
            weighting = weighting or Weighting(*(matrix.new_zeros(size) for size in matrix.shape))
            points = []
            for number_format in formats:
                gap = matrix.double() - _nearest_matrix(matrix, number_format).double()
                points.append((number_format.nbytes(matrix.shape), weighting.cost(gap)))
                _add(nearest_sums[number_format], points[-1])
            nearest[target.name] = _between(points, layer.bytes_after)
            costs = tail_costs(weighted_svd(matrix, Weighting()), weighting).tolist()
            each = _rank_bytes(matrix, plan)
            svd[target.name] = costs[min(len(costs) - 1, max(1, layer.bytes_after // each))]
            for size in bits:
                rank = min(len(costs) - 1, max(1, int(size / 8 * matrix.numel()) // each))
                _add(svd_sums[size], (rank * each, costs[rank]))
    return BaselineLosses(
        nearest,
        svd,
        tuple((int(size), plan.forecast.rise(cost)) for size, cost in nearest_sums.values()),
        tuple((int(size), plan.forecast.rise(cost)) for size, cost in svd_sums.values()),
    )


@dataclass(frozen=True)
class _Plain:
    """Matrix compressed by a plain method, with its bytes and stored numbers, and its rank if it has one."""

    matrix: Tensor
    num_bytes: int
    num_params: int
    rank: int | None = None


def _nearest(
    target: Target, number_format: NumberFormat, plan: CompressionPlan, stats: CalibrationStats | None
) -> _Plain:
    matrix = target.matrix
    kept = _nearest_matrix(matrix, number_format)
    return _integers(kept, number_format)


def _integers(kept: Tensor, number_format: NumberFormat) -> _Plain:
    """Count the bytes and the stored numbers, scales included, of a rounded matrix."""
    topology = dense(out_features=kept.shape[0], in_features=kept.shape[1])
    numbers = Storage(number_format=number_format).num_params(topology)
    return _Plain(kept, number_format.nbytes(kept.shape), numbers)


def _nearest_matrix(matrix: Tensor, number_format: NumberFormat) -> Tensor:
    return round_weight(matrix, number_format, rounding="nearest", refits=0).dequantize()


def _gptq(
    target: Target, number_format: NumberFormat, plan: CompressionPlan, stats: CalibrationStats | None
) -> _Plain:
    assert stats is not None  # checked with the method
    matrix = target.matrix
    columns = input_weighting(target, stats).columns
    kept = round_weight(matrix, number_format, columns=columns, rounding="one_sided").dequantize()
    return _integers(kept, number_format)


def _svd(
    target: Target, number_format: NumberFormat, plan: CompressionPlan, stats: CalibrationStats | None
) -> _Plain:
    matrix = target.matrix
    made, each = weighted_svd(matrix, Weighting()), _rank_bytes(matrix, plan)
    allowed = int(plan.bytes_after / plan.params_before * matrix.numel())
    rank = min(len(made.values), max(1, allowed // each))
    dtype = torch.bfloat16 if _plans_formats(plan) else matrix.dtype
    left, right = (x.to(dtype).to(matrix.dtype) for x in (made.left[:, :rank], made.right[:rank]))
    return _Plain(left @ right, rank * each, rank * sum(matrix.shape), rank)


_PLAIN: dict[str, Callable[[Target, NumberFormat, CompressionPlan, CalibrationStats | None], _Plain]] = {
    NEAREST: _nearest,
    GPTQ: _gptq,
    SVD: _svd,
}


def _weighed(
    model: nn.Module, plan: CompressionPlan, stats: CalibrationStats | None
) -> list[tuple[Target, Weighting | None]]:
    """Return the planned weights, each with the weighting of forecasts; None where errors cost nothing.

    Raises:
        TargetError: the model has no layer of a planned name.
    """
    targets = {target.name: target for target in all_targets(model)}
    if missing := [layer.name for layer in plan if layer.name not in targets]:
        raise TargetError(f"The plan names a layer {missing[0]!r} that this model does not have as dense.")
    chosen = [targets[layer.name] for layer in plan]
    if not _predicts(plan, stats):
        return [(target, None) for target in chosen]
    return [(target, forecast_weighting(target, stats, plan.damping)) for target in chosen]


def _predicts(plan: CompressionPlan, stats: CalibrationStats | None) -> bool:
    """Return True if losses can be predicted."""
    return plan.objective == "curvature" and stats is not None


def _plans_formats(plan: CompressionPlan) -> bool:
    return any(layer.storage.own_dtypes for layer in plan)


def _rank_bytes(matrix: Tensor, plan: CompressionPlan) -> int:
    """Count the bytes that one more rank adds to the plain SVD of a matrix."""
    return sum(matrix.shape) * (_SHORT if _plans_formats(plan) else matrix.element_size())


def _format_of_size(plan: CompressionPlan) -> NumberFormat:
    """Choose the largest integer format of at most about the bytes of a plan, or the smallest of all."""
    sizes = {x: sum(x.nbytes(layer.shape) for layer in plan) for x in _FORMATS}
    fitting = [x for x in _FORMATS if sizes[x] <= _SLACK * plan.bytes_after]
    return max(fitting, key=lambda x: sizes[x]) if fitting else min(_FORMATS, key=lambda x: sizes[x])


def _between(points: Sequence[tuple[int, float]], size: int) -> float:
    """Interpolate the logarithm of a loss over bytes; constant beyond both ends."""
    ordered = sorted(points)
    below = [point for point in ordered if point[0] <= size]
    above = [point for point in ordered if point[0] > size]
    if not below or not above:
        return (below or above)[-1 if below else 0][1]
    (x0, y0), (x1, y1) = below[-1], above[0]
    if min(y0, y1) <= 0:
        return y0
    return y0 * (y1 / y0) ** ((size - x0) / (x1 - x0))


def _add(sums: list[float], point: tuple[int, float]) -> None:
    sums[0] += point[0]
    sums[1] += point[1]


def _ranks(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"rank {low} to {high}"
