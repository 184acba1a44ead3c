"""Plain methods at the bytes of a plan: round to nearest, GPTQ and the truncated SVD.

Each is a configuration of the same pipeline; here are the configurations, and their predicted losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from tensornet._util import on_cpu_unless_said
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.allocate import Candidate
from tensornet.compression.apply import apply_plan
from tensornet.compression.candidates import dense_candidates, network_candidates
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planning import prepare
from tensornet.compression.sensitivity import Sensitivity, forecast_weighting
from tensornet.compression.viz import BaselineLosses
from tensornet.errors import TargetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.storage import PLAIN
from tensornet.nn.targets import all_targets
from tensornet.nn.unfuse import unfused
from tensornet.quantization import NumberFormat
from tensornet.quantization.formats import BITS
from tensornet.topologies import topology_family

NEAREST, GPTQ, SVD = "round to nearest", "GPTQ", "plain SVD"
#: Integer formats that the plain methods choose from, with 16-bit scales.
_FORMATS = tuple(NumberFormat(bits, group) for bits in BITS for group in (64, 32, 128))
#: A format that takes so much more than the plan still counts as one of the same bytes.
_SLACK = 1.01
#: Sizes at which the curve of the plain SVD is drawn, as bits of a weight.
_CURVE_BITS = (1, 1.5, 2, 3, 4, 6, 8, 11, 16, 22, 30)


@dataclass(frozen=True)
class BaselineResult:
    """A plain method, the same for all layers, at about the bytes of a plan.

    Args:
        method: `"round to nearest"`, `"GPTQ"` or `"plain SVD"`.
        scheme: number format or ranks, in a few characters.
        num_bytes: of all layers, scales included.
        num_params: stored numbers, scales included.
        predicted_loss_increase: of all layers together, corrected as that of the plan; None without
            calibrated gradients.
    """

    method: str
    scheme: str
    num_bytes: int
    num_params: int
    predicted_loss_increase: float | None = None


def baseline_configs(plan: CompressionPlan, stats: CalibrationStats | None) -> dict[str, CompressionConfig]:
    """Configure the plain methods at about the bytes of a plan, by name; GPTQ needs moments of inputs.

    Example:
        >>> from tensornet.compression.baselines import baseline_configs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> plan = tn.plan(model, tn.CompressionConfig(max_bond=8)).replace_layer("0", None, "int4")
        >>> baseline_configs(plan, None)["round to nearest"].formats
        ('int4',)
    """
    names = [layer.name for layer in plan]
    sizes = {x: sum(x.nbytes(layer.shape) for layer in plan) for x in _FORMATS}
    fitting = [x for x in _FORMATS if sizes[x] <= _SLACK * plan.bytes_after]
    largest = max(fitting, key=lambda x: sizes[x]) if fitting else min(_FORMATS, key=lambda x: sizes[x])
    integers = CompressionConfig(target_modules=names, formats=(largest.name,), verify=False)
    low_rank = CompressionConfig(
        target_modules=names,
        topology="low_rank",
        objective="weight",
        param_ratio=min(1.0, plan.bytes_after / (_number_bytes(plan) * plan.params_before)),
    )
    found = {NEAREST: replace(integers, rounding="nearest")}
    if stats is not None:
        found[GPTQ] = replace(integers, rounding="one_sided")
    return {**found, SVD: low_rank}


def run_baseline(
    model: nn.Module,
    plan: CompressionPlan,
    method: str,
    stats: CalibrationStats | None = None,
    *,
    apply: bool = False,
) -> BaselineResult:
    """Predict the loss increase of a plain method at the bytes of a plan.

    Args:
        model: dense, the plan was made for it.
        plan: gives the layers and their bytes.
        method: one of `baseline_configs(plan, stats)`.
        stats: the plan was made with them.
        apply: compress the model in place as well, to measure the loss.

    Raises:
        TargetError: an unknown method, GPTQ without statistics, or a model without the planned layers.

    Example:
        >>> from tensornet.compression.baselines import run_baseline
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> plan = tn.plan(model, tn.CompressionConfig(max_bond=8)).replace_layer("0", None, "int4")
        >>> result = run_baseline(model, plan, "round to nearest", apply=True)
        >>> result.scheme, result.num_bytes == plan.bytes_after, type(model[0]).__name__
        ('int4', True, 'TensorNetworkLinear')
    """
    configs = baseline_configs(plan, stats)
    if method not in configs:
        raise TargetError(
            f"Unknown baseline {method!r}; choose one of {', '.join(map(repr, configs))} ('GPTQ' needs "
            "calibration statistics)."
        )
    made = prepare(model, configs[method], None if method == SVD else stats).plan()
    ranks = [x.topology.bond_dims["b1"] for x in made if x.topology is not None and x.topology.bond_dims]
    scheme = next((x.storage.number_format.name for x in made if x.topology is not None), "dense")
    if ranks:
        scheme = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"rank {min(ranks)} to {max(ranks)}"
    size, loss = made.bytes_after, made.predicted_loss_increase
    if method == SVD:
        size = made.params_after * _number_bytes(plan)
        known = baseline_losses(model, plan, stats, sizes={x.name: x.params_after for x in made})
        loss = sum(known.svd.values()) if known.svd else None
    loss = None if loss is None else plan.forecast.corrected(loss)
    if apply:
        apply_plan(model, made, stats)
    return BaselineResult(method, scheme, size, made.params_after, loss)


@torch.no_grad()
@on_cpu_unless_said
def baseline_losses(
    model: nn.Module,
    plan: CompressionPlan,
    stats: CalibrationStats | None,
    *,
    sizes: Mapping[str, int] | None = None,
    progress: bool = False,
) -> BaselineLosses:
    """Predict the loss increase of rounding to nearest and of the plain SVD, by layer and over sizes.

    Takes one SVD of each layer. Empty where the plan was made without calibrated gradients.

    Args:
        model: dense, the plan was made for it.
        plan: gives the layers and their bytes.
        stats: the plan was made with them.
        sizes: stored numbers of the SVD of each layer; those of the bytes of its plan if absent.
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
    if plan.objective != "curvature" or stats is None:
        return BaselineLosses()
    formats = [NumberFormat.parse(f"int{bits}") for bits in BITS]
    each = _number_bytes(plan)
    bits = [x for x in _CURVE_BITS if x <= 8 * plan.bytes_before / plan.params_before]
    nearest, svd = {}, {}
    nearest_sums = {x.name: [0, 0.0] for x in formats}
    svd_sums: dict[float, list[float]] = {x: [0, 0.0] for x in bits}
    config = CompressionConfig(topology="low_rank", max_bond=max(max(layer.shape) for layer in plan))
    with unfused(model):
        targets = {target.name: target for target in all_targets(model)}
        if missing := [layer.name for layer in plan if layer.name not in targets]:
            raise TargetError(
                f"The plan names a layer {missing[0]!r} that this model does not have as dense."
            )
        for layer in tqdm(list(plan), desc="plain methods", unit="layer", disable=not progress):
            matrix = targets[layer.name].matrix
            forecast = forecast_weighting(targets[layer.name], stats, plan.damping)
            if forecast is None:  # no gradient arrives: errors cost nothing
                nearest[layer.name] = svd[layer.name] = 0.0
                continue
            plain = Sensitivity(Weighting(), forecast, "nearest")
            rounded = dense_candidates(matrix, plain, formats)
            ranks = network_candidates(matrix, plain, PLAIN, topology_family("low_rank"), config)
            fits = [x for x in rounded if x.num_bytes <= _SLACK * layer.bytes_after]
            nearest[layer.name] = _largest(fits or rounded[:1]).predicted_loss
            allowed = layer.bytes_after // each if sizes is None else sizes[layer.name]
            svd[layer.name] = _largest([x for x in ranks if x.params <= allowed] or ranks[:1]).predicted_loss
            for candidate in rounded:
                sums = nearest_sums[candidate.number_format]
                sums[0], sums[1] = sums[0] + candidate.num_bytes, sums[1] + candidate.predicted_loss
            for size, total in svd_sums.items():
                most = size / 8 * matrix.numel() / each
                found = _largest([x for x in ranks if x.params <= most] or ranks[:1])
                total[0], total[1] = total[0] + found.params * each, total[1] + found.predicted_loss

    def curve(sums: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
        return tuple((int(size), plan.forecast.corrected(loss)) for size, loss in sums)

    return BaselineLosses(nearest, svd, curve([*nearest_sums.values()]), curve([*svd_sums.values()]))


def _largest(candidates: Sequence[Candidate]) -> Candidate:
    return max(candidates, key=lambda x: x.num_bytes)


def _number_bytes(plan: CompressionPlan) -> int:
    """Bytes of a number in the factors of the plain SVD: 2 where the plan has number formats."""
    if any(layer.storage.own_dtypes for layer in plan):
        return 2
    return plan.layers[0].dtype.itemsize
