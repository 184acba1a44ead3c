"""Make plans: find the targets of a model and their candidates once, then plan for any number of budgets.

With calibrated gradients all layers share one budget. Without gradients every layer is planned separately, by
the error of its outputs or of its weight.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet._util import on_cpu_unless_said
from tensornet.calibration.stats import CalibrationStats, weight_samples
from tensornet.compression.allocate import ENTRY, Candidate, choose_candidates, decide_alone, uniform
from tensornet.compression.apply import LayerCache, check_stats
from tensornet.compression.candidates import find_candidates, format_fits, hull_of
from tensornet.compression.config import WHOLE_MODEL_BUDGETS, CompressionConfig, check_config
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.report import model_size
from tensornet.compression.sensitivity import forecast_weighting, is_known, never_ran, resolve_objective
from tensornet.errors import BudgetError, CalibrationWarning, FormatError
from tensornet.linalg.svd import check_finite, singular_values
from tensornet.nn.storage import Storage
from tensornet.nn.targets import Target, check_holder, check_loaded, find_targets, summary
from tensornet.nn.unfuse import unfused
from tensornet.quantization import NumberFormat
from tensornet.quantization.menus import MENUS
from tensornet.topologies import topology_family
from tensornet.topologies.base import Decomposition
from tensornet.topologies.registry import topology_of_shape

#: Budgets that `Prepared.plan` can change, since the candidates do not depend on them.
BUDGETS = ("param_ratio", *WHOLE_MODEL_BUDGETS)


@dataclass(frozen=True)
class Prepared:
    """Targets of a model and their candidates; finding them is slow, but they are the same for all budgets.

    `prepare` makes this object. It refers to the weights of the model and does not copy them.

    Args:
        config: the configuration.
        weights: every weight of the model, including skipped weights (see `find_targets`).
        targets: the weights to compress, in model order.
        candidates: candidates of each target; empty if each layer is planned separately by the error of its
            weight.
        spectra: singular values of each target.
        template: a plan without layers, which contains all that is known from calibration and measurements.
        stats: calibration statistics.
        untargeted: number of elements and number of bytes of all parameters that are not targeted, and all
            other bytes of the model's file; they count in budgets of the whole model.
        measured: `(layer, scheme)` of the layers that `check_loss` has measured; None if it did not run.
        cache: layers that were already rounded for measurements, to be reused by `apply_plan`.

    Example:
        >>> from tensornet.compression import prepare
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
        >>> prepared = prepare(model, tn.CompressionConfig(max_bond=8, topology="low_rank"))
        >>> prepared.template.objective, len(prepared.targets)
        ('weight', 1)
    """

    config: CompressionConfig
    weights: tuple[Target, ...]
    targets: tuple[Target, ...]
    candidates: tuple[Sequence[Candidate], ...]
    spectra: tuple[tuple[float, ...], ...]
    template: CompressionPlan
    stats: CalibrationStats | None = None
    untargeted: tuple[int, int, int] = (0, 0, 0)
    measured: frozenset[tuple[str, str]] | None = None
    cache: LayerCache = field(default_factory=dict, compare=False, repr=False)

    @torch.no_grad()
    @on_cpu_unless_said
    def plan(self, *, progress: bool = False, **budget: Any) -> CompressionPlan:
        """Compute the plan of least predicted loss for one budget.

        Args:
            progress: whether to show a progress bar if layers are decomposed one by one.
            budget: any of `param_ratio`, `bits_per_weight`, `byte_ratio`, `max_bytes` and `loss_increase`;
                they replace the budgets of the configuration.

        Raises:
            BudgetError: the budget cannot be met; or it contains another limit, such as `max_bond`, which
                cannot be changed because the candidates depend on it.
        """
        if unknown := sorted(budget.keys() - set(BUDGETS)):
            raise BudgetError(
                f"The budget of a plan can be {', '.join(BUDGETS)}; got {', '.join(unknown)}. Call prepare "
                "again with other options."
            )
        config = replace(self.config, **{**dict.fromkeys(BUDGETS), **budget}) if budget else self.config
        if not self.candidates:
            layers = _plan_by_weight(self.targets, config, self.stats, progress=progress)
            return replace(self.template, layers=tuple(layers))
        objective = self.template.objective
        alone = self.config.formats is not None and config.one_format_keeps
        if config.needs_curvature and objective != "curvature" and not alone:
            raise BudgetError(f"{', '.join(budget)} needs objective='curvature', not {objective!r}.")
        # Layers that a kernel of the export target fuses get one number format, so they are planned as one.
        names = [target.name for target in self.targets]
        groups = group_fused_layers(names, () if config.menu is None else MENUS[config.menu].fused)
        joined = [_joined([self.candidates[k] for k in group]) for group in groups]
        found, bound_by = choose_candidates(
            self.targets,
            [candidates for candidates, _ in joined],
            config,
            objective,
            forecast=self.template.forecast,
            untargeted=self.untargeted,
            names=[", ".join(names[k] for k in group) for group in groups],
        )
        chosen = [0] * len(names)
        for group, (_, places), index in zip(groups, joined, found, strict=True):
            for k, place in zip(group, places[index], strict=True):
                chosen[k] = place
        return self.planned(chosen, bound_by)

    def planned(self, chosen: Sequence[int], bound_by: str) -> CompressionPlan:
        """Make the plan that consists of the chosen candidate of each layer.

        Args:
            chosen: index of the chosen candidate of each layer.
            bound_by: name of the tightest budget.
        """
        predicts = self.template.objective == "curvature"
        samples = weight_samples(self.targets)
        layers = []
        for target, found, index, spectrum in zip(
            self.targets, self.candidates, chosen, self.spectra, strict=True
        ):
            candidate = found[index]
            layer = LayerPlan(
                name=target.name,
                shape=(target.matrix.shape[0], target.matrix.shape[1]),
                topology=candidate.topology,
                bound_by="dense" if candidate.topology is None else bound_by,
                error=candidate.error,
                storage=candidate.storage,
                loss_increase=candidate.predicted_loss if predicts else None,
                curve=hull_of(found) if predicts else (),
                dtype=target.matrix.dtype,
                sample=samples[target.name],
                target=self.config.menu,
            )
            layers.append(layer.with_baseline(spectrum))
        check = self.template.loss_check
        if check is not None and self.measured is not None:
            check = replace(check, layers=sum((x.name, x.scheme) in self.measured for x in layers))
        return replace(self.template, layers=tuple(layers), loss_check=check)


def group_fused_layers(names: Sequence[str], sets: Sequence[Sequence[str]]) -> list[list[int]]:
    """Group the layers that an export target fuses: siblings with names in the same set of `Menu.fused`."""
    groups: dict[tuple[str, Any], list[int]] = {}
    for k, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        fused = next((x for x in sets if child in x), child)
        groups.setdefault((parent, fused), []).append(k)
    return list(groups.values())


def _joined(group: Sequence[Sequence[Candidate]]) -> tuple[list[Candidate], list[tuple[int, ...]]]:
    """Make one joint candidate for fused layers for each format; its size and loss are sums over the layers.

    Args:
        group: the candidates of each layer; a single layer keeps its candidates.

    Returns:
        The joint candidates, and for each of them the index of the candidate of each layer.
    """
    if len(group) == 1:
        return list(group[0]), [(k,) for k in range(len(group[0]))]
    by_format = [uniform(found) for found in group]
    places = [tuple(x[name] for x in by_format) for name in by_format[0] if all(name in x for x in by_format)]
    sums = []
    for place in places:
        same = [found[k] for found, k in zip(group, place, strict=True)]
        parts = ("num_bytes", "params", "predicted_loss", "cost", "tensors")
        sums.append(replace(same[0], **{name: sum(getattr(x, name) for x in same) for name in parts}))
    return sums, places


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
    return prepare(model, config, stats, progress=progress).plan(progress=progress)


@torch.no_grad()
@on_cpu_unless_said
def prepare(
    model: nn.Module,
    config: CompressionConfig,
    stats: CalibrationStats | None = None,
    *,
    progress: bool = False,
) -> Prepared:
    """Find the candidates of every targeted layer; making plans from them for any budget is then quick.

    For the arguments and errors see `plan`.

    Example:
        >>> from tensornet.compression import prepare
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> stats = tn.calibrate(model, [(torch.randn(64, 32), torch.randint(10, (64,)))])
        >>> prepared = prepare(model, tn.CompressionConfig(param_ratio=0.5), stats)
        >>> plans = [prepared.plan(param_ratio=ratio) for ratio in (0.7, 0.4)]
        >>> plans[0].predicted_loss_increase < plans[1].predicted_loss_increase
        True
    """
    check_holder(model)
    check_config(config)
    config.check_says_how_far()
    check_stats(stats)
    objective = resolve_objective(config, stats)
    with unfused(model):
        weights = tuple(find_targets(model, config))
    targets = tuple(x for x in weights if not x.skip)
    check_loaded(targets)
    if stats is not None:
        stats.check_weights(targets)
    targets, unseen = _seen(targets, config, objective, stats)
    for target in targets:
        check_finite(target.matrix, f"Layer {target.name!r}")
    counts = {} if stats is None or objective == "weight" else stats.counts
    unrouted = tuple(x.name for x in targets if all(counts.get(name) == 0 for name in x.names))
    unfit = _unfit(targets, config)
    template = CompressionPlan(
        (),
        objective=objective,
        damping=config.damping if objective != "weight" else 0.0,
        rounding=config.rounding,
        dense_loss=stats.loss if stats is not None and stats.loss == stats.loss else None,  # None for NaN
        calibration=stats.source if stats is not None else None,
        topology_options=config.topology_options,
        of_tokens=stats is not None and stats.of_tokens,
        unseen=unseen,
        unrouted=unrouted,
        unfit=unfit,
    )
    params, size = model_size(model)
    untargeted = (
        params - sum(x.matrix.numel() for x in targets),
        size - sum(x.matrix.numel() * x.matrix.element_size() for x in targets),
        _other_bytes(model, targets, size),
    )
    alone = objective == "weight" and not config.formats and not config.pivoted
    if alone or config.fixed:
        return Prepared(config, weights, targets, (), (), template, stats, untargeted)
    found = find_candidates(targets, config, objective, stats)
    candidates, spectra = [], []
    work = tqdm(targets, desc="planning", disable=not progress, unit="layer")
    for target, each in zip(work, found, strict=True):
        candidates.append(each)
        spectra.append(tuple(singular_values(target.matrix).tolist()))
    return Prepared(config, weights, targets, tuple(candidates), tuple(spectra), template, stats, untargeted)


def _other_bytes(model: nn.Module, targets: Sequence[Target], size: int) -> int:
    """Bound the bytes of a safetensors file of a model that belong to no parameter: buffers and the header.

    Args:
        model: the dense model.
        targets: the weights to compress, whose entries in the header are counted with their candidates.
        size: bytes of the parameters.
    """
    state = {
        id(x): (name, x) for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)
    }
    buffers = sum(x.nbytes for _, x in state.values()) - size
    planned = {id(module.weight) for target in targets for module in target.modules}
    header = sum(ENTRY + len(name) for key, (name, _) in state.items() if key not in planned)
    return max(buffers, 0) + header


def _unfit(targets: Sequence[Target], config: CompressionConfig) -> dict[str, tuple[str, ...]]:
    """Map each number format in which some layers cannot be stored to the names of these layers.

    These layers are planned without the format.

    Raises:
        FormatError: no format fits any layer.
    """
    formats = [x for x in config.number_formats if x != NumberFormat()]
    found = {x: [y.name for y in targets if not format_fits(x, y.matrix, config)] for x in formats}
    if formats and all(len(names) == len(targets) for names in found.values()):
        first = targets[0]
        raise FormatError(
            f"No layer can be stored in {', '.join(x.name for x in formats)}: the number of inputs must be a "
            f"multiple of {' or '.join(str(s) for s in dict.fromkeys(x.span for x in formats))}, but "
            f"{first.name!r} is {first.matrix.shape[0]} x {first.matrix.shape[1]} in {first.matrix.dtype}. "
            "Name other formats, such as int4:g32, or target other layers."
        )
    return {x.name: tuple(names) for x, names in found.items() if names}


def _seen(
    targets: tuple[Target, ...], config: CompressionConfig, objective: str, stats: CalibrationStats | None
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Remove the targets whose layers never ran in calibration, with a warning that names them.

    Returns:
        The remaining targets, and the names of the removed targets.

    Raises:
        TargetError: no layer ran, or `require_calibrated` is set and a layer did not run.
    """
    if objective == "weight" or stats is None:
        return targets, ()
    unseen = [target for target in targets if not is_known(target, stats)]
    if unseen and (config.require_calibrated or len(unseen) == len(targets)):
        raise never_ran(unseen[0])
    names = tuple(target.name for target in unseen)
    if names:
        warnings.warn(
            f"Left dense, because they never ran during calibration: {summary(unseen)}. Calibrate with data "
            "for which they run, compress them by the error of their weights alone (objective='weight' with "
            "target_modules that name them), or set require_calibrated=True to get an error instead.",
            CalibrationWarning,
            stacklevel=2,
        )
    return tuple(target for target in targets if target.name not in names), names


# --- layers planned one by one, by the Frobenius error of their weights ------------------------------


def _plan_by_weight(
    targets: Sequence[Target], config: CompressionConfig, stats: CalibrationStats | None, *, progress: bool
) -> list[LayerPlan]:
    """Plan every layer by the Frobenius error of its weight, with the given topology or the best family.

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
        if config.fixed:
            topology = topology_of_shape(config.fixed, stays.shape, f"Layer {target.name!r}")
            storage = Storage(pivoted=bool(config.pivoted)).for_topology(topology)
            made = replace(stays, topology=topology, bound_by="topology", error=None, storage=storage)
            return replace(made, loss_increase=None).with_baseline(singular_values(target.matrix).tolist())
        budget = replace(config.budget, param_ratio=ratio)
        attempts: list[Decomposition] = []
        refusals = []
        for family in config.families:
            try:
                found = topology_family(family).decompose(
                    target.matrix, budget, **config.family_options(family)
                )
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
            forecast = forecast_weighting(target, stats, config.damping)
            gap = target.matrix - best.network.to_matrix()
            loss = 0.0 if forecast is None else forecast.cost(gap)
        made = replace(stays, topology=topology, bound_by=best.bound_by, error=best.error, loss_increase=loss)
        return made.with_baseline(singular_values(target.matrix).tolist())

    with bar:
        if config.param_ratio is None:
            return [decide(index, None) for index in range(len(targets))]
        sizes = [target.matrix.numel() for target in targets]
        return decide_alone(sizes, config.param_ratio, decide, lambda index: (dense(index), sizes[index]))
