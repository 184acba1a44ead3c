"""Verification of predicted loss increases by measuring: where one is far too low, it is raised.

The price `1/2 tr(R E C E^T)` is of second order. With a large error it may be far too low: in
all-MiniLM-L6-v2 an output channel in front of a layer norm has thousands of times the power of others, and an
error of one percent of it drowns them, which no gradient at the dense weights knows. So layers with large
errors are rounded, and the loss is measured with all such layers of a block at once. A block that costs far
more than the sum of its prices is halved until the layers are found that do.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tensornet._util import progress_bar, warn
from tensornet.calibration.batches import BatchLike
from tensornet.calibration.losses import TokenLosses
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.candidates import LayerCandidates
from tensornet.compression.forecast import light_copy
from tensornet.compression.layer_blocks import layer_names
from tensornet.compression.layer_plan import LayerPlan
from tensornet.compression.loss_trial import LossTrial
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.verification import Checks, RaisedPrice, form_of, has_large_error
from tensornet.errors import CalibrationWarning
from tensornet.nn.targets import Target

if TYPE_CHECKING:
    from torch import nn

    from tensornet.compression.planner import PreparedPlan

#: Times a plan is made again with raised prices.
ROUNDS = 4
#: Groups of layers that are measured in one round, at most; more blocks are joined.
GROUPS = 12
#: Measurements that find the layers of groups that cost too much, at most, in one round.
_SPLITS = 48
#: Measured over predicted from which on a price is raised, and the least share of the loss increase of the
#: whole plan by which it must be wrong.
_TOO_LOW, _SHARE = 2.0, 0.02
#: Groups from which on their median ratio of measured to predicted counts as common to all layers.
_COMMON = 4
#: No price is raised by more.
_MOST = 1e4
#: Power of the strongest output over the median one, times the squared relative error of the weight, from
#: which on the error of a single output may drown the others.
_OUTLIER = 10.0

Group = tuple[LayerPlan, ...]


@torch.no_grad()
def verify_prices(
    prepared: "PreparedPlan",
    model: "nn.Module",
    stats: CalibrationStats,
    batches: Sequence[BatchLike],
    *,
    loss_fn: TokenLosses | None = None,
    progress: bool = False,
    **budget: Any,
) -> "PreparedPlan":
    """Measure the risky layers of the plan for a budget, and raise prices that are far too low.

    The plan is made again with raised prices, and what is new in it measured, in a few rounds.
    """
    trial = None
    powers = _outlier_powers(prepared.targets, stats)
    for _ in range(ROUNDS):
        plan = prepared.plan(**budget)
        known = _checks(prepared)
        suspects = {raised.layer for raised in known.raised}  # whose other forms may cost more as well
        groups = _groups(plan, powers, suspects)
        groups = [group for group in groups if not known.measured.issuperset(map(form_of, group))]
        if not groups:
            break
        if trial is None and not _can_copy(model):
            return replace(prepared, checks=None)
        trial = trial or LossTrial(model, stats, batches, loss_fn, prepared.rounded)
        factors = _Round(trial, plan, prepared.targets).factors(groups, progress=progress)
        prepared = _raised(prepared, groups, factors)
        if not factors:
            break
    return prepared


def _can_copy(model: "nn.Module") -> bool:
    """Return True if a model can be copied; warn that nothing is verified otherwise."""
    try:
        light_copy(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        warn(
            f"Predicted losses were not verified by measuring: {type(model).__name__} cannot be copied "
            f"({error}). verify=False leaves it out without this warning.",
            CalibrationWarning,
        )
        return False
    return True


class _Round:
    """Measurements of the groups of one plan."""

    def __init__(self, trial: LossTrial, plan: CompressionPlan, targets: Sequence[Target]) -> None:
        self.trial, self.plan = trial, plan
        self.modules = {target.name: target.names for target in targets}
        self.total = sum(layer.loss_increase or 0.0 for layer in plan)
        self.left = _SPLITS
        #: Ratio of measured to predicted that is common to all layers, which does not change a plan.
        self.common = 1.0

    def factors(self, groups: Sequence[Group], *, progress: bool) -> dict[str, float]:
        """Find the layers whose price is too low, and by which factor."""
        work = progress_bar(groups, desc="verifying prices", disable=not progress, unit="group")
        rises = [self._rise(group) for group in work]
        if len(groups) >= _COMMON:
            ratios = sorted(rise[0] / _price(group) for rise, group in zip(rises, groups, strict=True))
            middle = ratios[(len(ratios) - 1) // 2]
            self.common = max(1.0, middle) if math.isfinite(middle) else 1.0
        found: dict[str, float] = {}
        for group, rise in zip(groups, rises, strict=True):
            if self._too_high(group, rise):
                found |= self._split(group, rise)
        return found

    def _split(self, group: Group, rise: tuple[float, float]) -> dict[str, float]:
        """Find the layers of a group that cost too much; all of them where only all together do."""
        found: dict[str, float] = {}
        if len(group) > 1 and self.left > 1:
            self.left -= 2
            middle = len(group) // 2
            halves = group[:middle], group[middle:]
            rises = [self._rise(half) for half in halves]
            for half, measured in zip(halves, rises, strict=True):
                if self._too_high(half, measured):
                    found |= self._split(half, measured)
        factor = min(_MOST, rise[0] / (_price(group) * self.common))
        return found or dict.fromkeys((layer.name for layer in group), factor)

    def _rise(self, group: Group) -> tuple[float, float]:
        """Measure the loss increase of a group and its standard error; infinite if the model breaks down."""
        modules = [name for layer in group for name in self.modules[layer.name]]
        rise = self.trial.rise(self.plan, group, modules, self._allowed(group))
        known = math.isfinite(rise.value) and math.isfinite(rise.standard_error)
        return (rise.value, rise.standard_error) if known else (math.inf, 0.0)

    def _allowed(self, group: Group) -> float:
        """Compute the largest loss increase of a group that agrees with its price."""
        price = self.common * _price(group)
        return max(_TOO_LOW * price, price + self.common * _SHARE * self.total)

    def _too_high(self, group: Group, rise: tuple[float, float]) -> bool:
        return rise[0] - 2 * rise[1] > self._allowed(group)


def _price(group: Iterable[LayerPlan]) -> float:
    return sum(layer.loss_increase or 0.0 for layer in group)


def _groups(plan: CompressionPlan, powers: Mapping[str, float], suspects: Set[str]) -> list[Group]:
    """Group the layers of a plan whose prices may be wrong by block, and blocks to at most `GROUPS`."""
    names = layer_names([layer.name for layer in plan])
    blocks: dict[str, list[LayerPlan]] = {}
    for layer, name in zip(plan, names, strict=True):
        risky = layer.name in suspects or _is_risky(layer, powers[layer.name])
        if layer.loss_increase and risky:
            blocks.setdefault(name.place, []).append(layer)
    each = -(-len(blocks) // GROUPS)
    runs = list(blocks.values())
    return [
        tuple(layer for block in runs[k : k + each] for layer in block)
        for k in range(0, len(runs), max(1, each))
    ]


def _is_risky(layer: LayerPlan, power: float) -> bool:
    """Return True if the error of a layer is large, or may drown other outputs where one is an outlier."""
    error = layer.error or 0.0
    return has_large_error(layer) or (layer.topology is not None and error * error * power > _OUTLIER)


def _outlier_powers(targets: Sequence[Target], stats: CalibrationStats) -> dict[str, float]:
    """Compute the power of the strongest output over the median one, of each weight.

    The power of an output is the sum of squared weights times those of the inputs, as if inputs were
    independent. It is 1 for tables, and where most outputs are zero.
    """
    found = {}
    for target in targets:
        found[target.name] = 1.0
        moment = next((stats.columns[name] for name in target.names if name in stats.columns), None)
        if moment is None or target.kinds[0].name == "embedding":
            continue
        squares = (moment if moment.ndim == 1 else moment.diagonal()).to(target.matrix.device).double()
        power = target.matrix.double().square() @ squares
        if (median := float(power.median())) > 0:
            found[target.name] = float(power.max()) / median
    return found


def _raised(
    prepared: "PreparedPlan", groups: Sequence[Group], factors: Mapping[str, float]
) -> "PreparedPlan":
    """Raise prices, and note what was measured."""
    layers = {layer.name: layer for group in groups for layer in group}
    candidates = [
        _raise(found, layers[target.name], factors[target.name]) if target.name in factors else found
        for target, found in zip(prepared.targets, prepared.candidates, strict=True)
    ]
    raised = [RaisedPrice(*form_of(layers[name]), round(factor, 3)) for name, factor in factors.items()]
    known = _checks(prepared)
    checks = Checks(known.measured.union(map(form_of, layers.values())), (*known.raised, *raised))
    return replace(prepared, candidates=tuple(candidates), checks=checks)


def _checks(prepared: "PreparedPlan") -> Checks:
    return prepared.checks or Checks()


def _raise(found: LayerCandidates, layer: LayerPlan, factor: float) -> LayerCandidates:
    """Multiply the losses of the planned candidate and of smaller ones of its family."""
    assert layer.topology is not None
    forms = [found.make(index) for index in range(len(found.params))]
    same = torch.tensor([form[0] is not None and form[0].family == layer.topology.family for form in forms])
    largest = found.num_bytes[forms.index((layer.topology, layer.storage))]
    chosen = same & (found.num_bytes <= largest)
    return replace(
        found,
        costs=torch.where(chosen, factor * found.costs, found.costs),
        forecasts=torch.where(chosen, factor * found.forecasts, found.forecasts),
    )
