"""Make plans: find the targets of a model and their candidates once, then plan for any number of budgets.

With calibrated gradients all layers share one budget. Without gradients every layer is planned separately, by
the error of its outputs or of its weight.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm

from tensornet._util import on_cpu_unless_said
from tensornet.calibration.stats import CalibrationStats, weight_samples
from tensornet.compression.allocate import SurveyedLayer, decide_alone
from tensornet.compression.apply import check_stats
from tensornet.compression.candidates import find_candidates, format_fits
from tensornet.compression.config import CompressionConfig, check_config
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.sensitivity import forecast_weighting, is_known, never_ran, resolve_objective
from tensornet.compression.shared_cores import SharedCandidate, candidates_of
from tensornet.compression.survey import Survey, untargeted_sizes
from tensornet.errors import BudgetError, CalibrationWarning, FormatError
from tensornet.linalg.svd import OF_LAYER, check_finite, singular_values
from tensornet.nn.extension import shared_candidates
from tensornet.nn.targets import Target, check_holder, check_loaded, find_targets, list_weights, summary
from tensornet.nn.unfuse import unfused
from tensornet.quantization import NumberFormat
from tensornet.topologies import topology_family
from tensornet.topologies.base import Decomposition


@torch.no_grad()
@on_cpu_unless_said
def plan(
    model: nn.Module,
    config: CompressionConfig,
    stats: CalibrationStats | None = None,
    *,
    progress: bool = False,
) -> CompressionPlan:
    """Plan the compression of a model: choose a network or number format for every targeted layer.

    Candidates are compared by a loss increase that is predicted with little damping of the gradient moments.
    `predicted_loss_increase` of the plan uses more damping, so a slightly larger budget can give a plan with
    a slightly larger `predicted_loss_increase`.

    Args:
        model: any module; it is not changed.
        config: the options.
        stats: statistics from `calibrate`, if the objective needs them.
        progress: whether to show a progress bar.

    Raises:
        TargetError: no layer is selected, or the objective needs statistics that are missing.
        NonFiniteError: a weight contains NaN or infinity; the message names the layer.
        BudgetError: no budget is given, or it cannot be met.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> stats = tn.calibrate(model, [(torch.randn(64, 32), torch.randint(10, (64,)))])
        >>> plan = tn.plan(model, tn.CompressionConfig(param_ratio=0.5), stats)
        >>> plan.params_after <= 0.5 * plan.params_before
        True
    """
    targets, template = _select(model, config, stats)
    if planned_alone(config, template.objective):
        layers = _plan_by_weight(targets, config, stats, progress=progress)
        return replace(template, layers=tuple(layers))
    return _survey(model, targets, template, config, stats, progress=progress).plan()


@torch.no_grad()
@on_cpu_unless_said
def survey_from_stats(
    model: nn.Module,
    config: CompressionConfig,
    stats: CalibrationStats | None = None,
    *,
    progress: bool = False,
) -> Survey:
    """Find the candidates of every targeted layer; making plans from them for any budget is then quick.

    For the arguments and errors see `plan`.

    Raises:
        BudgetError: every layer is planned separately by the error of its weight, so `plan` is needed.

    Example:
        >>> from tensornet.compression import survey_from_stats
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> stats = tn.calibrate(model, [(torch.randn(64, 32), torch.randint(10, (64,)))])
        >>> survey = survey_from_stats(model, tn.CompressionConfig(param_ratio=0.5), stats)
        >>> plans = [survey.plan(param_ratio=ratio) for ratio in (0.7, 0.4)]
        >>> plans[0].predicted_loss_increase < plans[1].predicted_loss_increase
        True
    """
    targets, template = _select(model, config, stats)
    if planned_alone(config, template.objective):
        raise BudgetError(
            "Without number formats and calibration data, each layer is planned alone by the error of its "
            "weight, so there is no survey: call tensornet.plan."
        )
    return _survey(model, targets, template, config, stats, progress=progress)


def _survey(
    model: nn.Module,
    targets: Sequence[Target],
    template: CompressionPlan,
    config: CompressionConfig,
    stats: CalibrationStats | None,
    *,
    progress: bool,
) -> Survey:
    found = find_candidates(targets, config, template.objective, stats)
    layers = []
    for target, candidates in zip(
        tqdm(targets, desc="planning", disable=not progress, unit="layer"), found, strict=True
    ):
        layers.append(SurveyedLayer.of(target, candidates, singular_values(target.matrix).tolist()))
    shared: tuple[SharedCandidate, ...] = ()
    if config.share_experts:
        with unfused(model):
            names = {target.name for target in targets}
            stacks = shared_candidates([x for x in list_weights(model) if x.name in names], stats, config)
        shared = candidates_of(stacks, targets)
    return Survey(config, tuple(layers), template, untargeted_sizes(model, targets), shared=shared)


def _select(
    model: nn.Module, config: CompressionConfig, stats: CalibrationStats | None
) -> tuple[tuple[Target, ...], CompressionPlan]:
    """Select the weights to compress, and make a plan without layers from what calibration has found."""
    check_holder(model)
    check_config(config)
    config.check_says_how_far()
    check_stats(stats)
    objective = resolve_objective(config, stats)
    with unfused(model):
        targets = tuple(x for x in find_targets(model, config) if not x.skip)
    check_loaded(targets)
    if stats is not None:
        stats.check_weights(targets)
    never = [] if objective == "weight" or stats is None else [x for x in targets if not is_known(x, stats)]
    targets, unseen = without_unseen(targets, never)
    for target in targets:
        check_finite(target.matrix, f"Layer {target.name!r}", OF_LAYER)
    counts = {} if stats is None or objective == "weight" else stats.counts
    unrouted = tuple(x.name for x in targets if all(counts.get(name) == 0 for name in x.names))
    template = CompressionPlan(
        (),
        objective=objective,
        rounding=config.rounding,
        effort=config.effort,
        dense_loss=stats.loss if stats is not None and stats.loss == stats.loss else None,  # None for NaN
        calibration=stats.source if stats is not None else None,
        of_tokens=stats is not None and stats.of_tokens,
        unseen=unseen,
        unrouted=unrouted,
        unfit=unfit_formats(targets, config),
    )
    return targets, template


def planned_alone(config: CompressionConfig, objective: str) -> bool:
    """Return True if networks are chosen for each layer separately, by the errors of the weights."""
    return objective == "weight" and not (config.formats or config.fixed)


def unfit_formats(targets: Sequence[Target], config: CompressionConfig) -> dict[str, tuple[str, ...]]:
    """Map each number format in which some layers cannot be stored to the names of these layers.

    These layers are planned without the format.

    Raises:
        FormatError: no format fits any layer.
    """
    formats = [x for x in config.number_formats if x != NumberFormat()]
    found = {x: [y.name for y in targets if not format_fits(x, y.matrix, config)] for x in formats}
    if formats and all(len(names) == len(targets) for names in found.values()):
        first = targets[0]
        if first.matrix.is_complex():
            raise FormatError(
                f"No layer can be stored in {', '.join(x.name for x in formats)}: {first.name!r} is in "
                f"{first.matrix.dtype}, and complex weights have no number formats. Plan networks "
                "instead, with param_ratio and without formats."
            )
        raise FormatError(
            f"No layer can be stored in {', '.join(x.name for x in formats)}: the number of inputs must be a "
            f"multiple of {' or '.join(str(s) for s in dict.fromkeys(x.span for x in formats))}, but "
            f"{first.name!r} is {first.matrix.shape[0]} x {first.matrix.shape[1]} in {first.matrix.dtype}. "
            "Name other formats, such as int4:g32, or target other layers."
        )
    return {x.name: tuple(names) for x, names in found.items() if names}


def without_unseen(
    targets: Sequence[Target], unseen: Sequence[Target]
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Remove the targets whose layers never ran in calibration, with a warning that names them.

    Returns:
        The remaining targets, and the names of the removed targets.

    Raises:
        TargetError: no layer ran.
    """
    if unseen and len(unseen) == len(targets):
        raise never_ran(unseen[0])
    names = tuple(target.name for target in unseen)
    if names:
        warnings.warn(
            f"Left dense, because they never ran during calibration: {summary(unseen)}. Calibrate with data "
            "for which they run, or compress them by the error of their weights alone (target_modules "
            "that name them, with method='nearest' or 'svd').",
            CalibrationWarning,
            stacklevel=2,
        )
    return tuple(target for target in targets if target.name not in names), names


# --- layers planned one by one, by the Frobenius error of their weights ------------------------------


def _plan_by_weight(
    targets: Sequence[Target], config: CompressionConfig, stats: CalibrationStats | None, *, progress: bool
) -> list[LayerPlan]:
    """Plan every layer by the Frobenius error of its weight, with the best family.

    Raises:
        BudgetError: a layer cannot meet the budget; the message names the layer.
    """
    bar = tqdm(total=len(targets), desc="planning", disable=not progress, unit="layer")
    samples = weight_samples(targets)

    def dense(index: int) -> LayerPlan:
        target = targets[index]
        return LayerPlan(
            target.name,
            (target.matrix.shape[0], target.matrix.shape[1]),
            topology=None,
            bound_by="dense",
            error=0.0,
            baseline_error=0.0,
            loss_increase=None if stats is None or not stats.has_gradients else 0.0,
            dtype=target.matrix.dtype,
            sample=samples[target.name],
        )

    def decide(index: int, ratio: float | None) -> LayerPlan:
        target, stays = targets[index], dense(index)
        bar.update()
        budget = replace(config.budget, param_ratio=ratio)
        attempts: list[Decomposition] = []
        refusals = []
        for family in config.families:
            try:
                found = topology_family(family).decompose(target.matrix, budget, **config.family_options)
            except BudgetError as error:
                refusals.append(f"{family}: {error}")
                continue
            attempts.append(found)
        if not attempts:
            raise BudgetError(f"Layer {target.name!r} cannot keep the budget. " + " ".join(refusals))
        if config.rel_error is None:
            best = min(attempts, key=lambda x: x.error)
        else:
            best = min(attempts, key=lambda x: x.network.num_params)
        topology = best.network.topology
        if not budget.unlimited and topology.num_params >= target.matrix.numel():
            return stays
        loss = None
        if stats is not None and stats.has_gradients and is_known(target, stats):
            forecast = forecast_weighting(target, stats)
            gap = target.matrix - best.network.to_matrix()
            loss = 0.0 if forecast is None else forecast.cost(gap)
        made = replace(stays, topology=topology, bound_by=best.bound_by, error=best.error, loss_increase=loss)
        return made.with_baseline(singular_values(target.matrix).tolist())

    with bar:
        if config.param_ratio is None:
            return [decide(index, None) for index in range(len(targets))]
        sizes = [target.matrix.numel() for target in targets]
        return decide_alone(sizes, config.param_ratio, decide, lambda index: (dense(index), sizes[index]))
