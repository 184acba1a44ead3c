"""From a configuration to a plan: which family and which bonds for every layer."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet.budget import Budget
from tensornet.compression.config import CompressionConfig, family_options
from tensornet.compression.global_plan import choose_forms, layer_forms, storage_of
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.stats import CalibrationStats
from tensornet.compression.targets import Target, find_targets
from tensornet.errors import BudgetError, TargetError
from tensornet.svd import check_finite, working_dtype
from tensornet.topologies import Decomposition, topology_family


@torch.no_grad()
def plan(
    model: nn.Module,
    config: CompressionConfig,
    stats: CalibrationStats | None = None,
    *,
    progress: bool = False,
) -> CompressionPlan:
    """Decide the form of every targeted layer; the model is not changed.

    Args:
        model: any module; targets are found by `find_targets`.
        config: what to compress and how far.
        stats: from `calibrate`; what the objective may use.
        progress: show a progress bar.

    Raises:
        TargetError: nothing matches, or the objective needs statistics that are not there.
        NonFiniteError: naming the layer that holds NaN or infinity.
        BudgetError: naming the layer that cannot meet the budget.
    """
    objective = resolve_objective(config, stats)
    targets = find_targets(model, config)
    for target in targets:
        check_finite(target.matrix, f"Layer {target.name!r}")
    bar = tqdm(targets, desc="planning", disable=not progress, unit="layer")
    if objective == "weight" and storage_of(config, objective).plain:
        return CompressionPlan(tuple(plan_layer(target, config) for target in bar))
    forms = [layer_forms(target, config, objective, stats) for target in bar]
    chosen, bound_by = choose_forms(targets, forms, config, objective)
    layers = []
    for target, form, index in zip(targets, forms, chosen, strict=True):
        topology, storage = form.make(index)
        made = LayerPlan(
            name=target.name,
            shape=(target.matrix.shape[0], target.matrix.shape[1]),
            topology=topology,
            bound_by="dense" if topology is None else bound_by,
            error=float(form.errors[index]),
            baseline_error=0.0,
            singular_values=tuple(singular_values(target.matrix).tolist()),
            storage=storage,
            loss_increase=float(form.forecasts[index]) if objective == "curvature" else None,
            curve=form.hull() if objective == "curvature" else (),
        )
        layers.append(_with_baseline(made))
    return CompressionPlan(
        tuple(layers),
        objective=objective,
        damping=config.damping,
        dense_loss=stats.loss if stats is not None else None,
        calibration=stats.source if stats is not None else None,
    )


def resolve_objective(config: CompressionConfig, stats: CalibrationStats | None) -> str:
    """The objective that `"auto"` stands for.

    Raises:
        TargetError: the objective needs statistics that are not there.
    """
    known = "weight" if stats is None else "curvature" if stats.has_gradients else "activation"
    order = ("weight", "activation", "curvature")
    wanted = "curvature" if config.needs_curvature else config.objective
    if wanted == "auto":
        return known
    if order.index(wanted) > order.index(known):
        missing = "gradients" if wanted == "curvature" else "inputs"
        raise TargetError(
            f"objective={wanted!r} needs calibrated {missing}: pass calibration=batches to compress, or the "
            "statistics that tensornet.calibrate collects to plan; objective='weight' needs none."
        )
    return wanted


def plan_layer(target: Target, config: CompressionConfig) -> LayerPlan:
    """Plan one layer by the Frobenius error of its weight: the best family under the budget."""
    matrix = target.matrix
    dense_params = matrix.numel()
    spectrum = singular_values(matrix)
    best: Decomposition | None = None
    refusals = []
    for family in config.families:
        try:
            options = family_options(family, config)
            found = topology_family(family).decompose(matrix, config.budget, **options)
        except BudgetError as error:
            refusals.append(f"{family}: {error}")
            continue
        if best is None or _better(found, best, config.budget):
            best = found
    if best is None:
        raise BudgetError(f"Layer {target.name!r} cannot meet the budget. " + " ".join(refusals))
    dense = LayerPlan(
        target.name, (matrix.shape[0], matrix.shape[1]), None, "dense", 0.0, 0.0, tuple(spectrum.tolist())
    )
    if not config.budget.unlimited and best.network.num_params >= dense_params:
        return dense
    return _with_baseline(
        replace(dense, topology=best.network.topology, bound_by=best.bound_by, error=best.error)
    )


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in descending order, in double precision, by the smaller Gram matrix."""
    work = matrix.to(working_dtype(matrix.dtype))
    if work.shape[0] > work.shape[1]:
        work = work.mH
    return torch.linalg.eigvalsh(work @ work.mH).flip(0).clamp_min(0).sqrt()


def low_rank_error(spectrum: Tensor, shape: tuple[int, int], params: int) -> float:
    """Relative error of the truncated SVD that has at most this many parameters (rank at least 1)."""
    rank = max(1, params // (shape[0] + shape[1]))
    energies = spectrum.square()
    total = float(energies.sum())
    return math.sqrt(float(energies[rank:].sum()) / total) if total > 0 else 0.0


def _with_baseline(layer: LayerPlan) -> LayerPlan:
    if layer.topology is None:
        return layer
    spectrum = torch.tensor(layer.singular_values, dtype=torch.float64)
    return replace(layer, baseline_error=low_rank_error(spectrum, layer.shape, layer.params_after))


def _better(new: Decomposition, old: Decomposition, budget: Budget) -> bool:
    """With an error promise the smaller network wins, with a size cap the more accurate one."""
    if budget.rel_error is not None:
        kept_new, kept_old = new.error <= budget.rel_error, old.error <= budget.rel_error
        if kept_new and kept_old:
            return new.network.num_params < old.network.num_params
        if kept_new != kept_old:
            return kept_new
    return new.error < old.error
