"""Allocation of budgets over many layers, by one Lagrange multiplier for all cost curves.

Each layer has candidates, each with a size and a cost. With one Lagrange multiplier `m`, every layer takes
the candidate with the least `cost + m * size`. Of all allocations of the same total size this one has the
least cost (Everett's theorem). As `m` decreases, every layer moves along the lower convex hull of its
candidates. The steps are taken in the order of their saving per unit of size, until the budget is spent. The
remaining budget is spent so that a larger budget never costs more.

Reference:
    Everett 1963, "Generalized Lagrange multiplier method for solving problems of optimum allocation of
    resources"; Shoham, Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tensornet.compression.config import BYTE_BUDGETS, DEFAULT_FORMATS, CompressionConfig
from tensornet.compression.loss_increase import UNMEASURED, Forecast
from tensornet.errors import BudgetError
from tensornet.nn.storage import Storage
from tensornet.nn.targets import Target
from tensornet.topology import Topology

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight.

    Args:
        topology: the network; None is the dense matrix in the dtype of the model.
        storage: encoding of its cores.
        num_bytes: exact size, scales and padding included.
        params: stored numbers.
        predicted_loss: predicted loss increase, in nats per token with calibrated gradients.
        error: relative Frobenius error.
        cost: number by which candidates are compared: the predicted loss under gradient moments with little
            damping. Little damping ranks candidates best but underestimates the loss on other text;
            `predicted_loss` uses more damping.
        milliseconds: predicted time of a forward pass; 0 if no token count was given.
        number_format: for a dense matrix in a number format, the name of that format as the user gave it.

    Example:
        >>> from tensornet.compression.allocate import Candidate
        >>> from tensornet.nn.storage import Storage
        >>> Candidate(None, Storage(), num_bytes=64, params=16, predicted_loss=0.0, error=0.0).cost
        0.0
    """

    topology: Topology | None
    storage: Storage
    num_bytes: int
    params: int
    predicted_loss: float
    error: float
    cost: float = 0.0
    milliseconds: float = 0.0
    number_format: str = ""

    def scaled(self, factor: float) -> "Candidate":
        """Copy the candidate with its predicted losses multiplied."""
        return replace(self, cost=factor * self.cost, predicted_loss=factor * self.predicted_loss)


class CostCurve(NamedTuple):
    """Sizes (parameters, bytes or milliseconds) and costs of the candidates of one layer.

    Both have shape `(candidates,)`; costs have any unit that adds over layers.
    """

    sizes: Tensor
    costs: Tensor

    def best(self, multiplier: float) -> int:
        """Find the candidate of least `cost + multiplier * size`; ties go to the smallest."""
        return int((self.costs + multiplier * self.sizes).argmin())


def spend_size(curves: Sequence[CostCurve], budget: float) -> list[int]:
    """Choose the candidates of least total cost whose total size is at most `budget`.

    Raises:
        BudgetError: the smallest candidates together are larger than the budget.
    """
    least = sum(float(curve.sizes.min()) for curve in curves)
    if least > budget:
        raise BudgetError(
            f"The budget allows {budget:,.6g}, the smallest candidates of all layers need {least:,.6g}; "
            "raise the budget or choose fewer layers."
        )
    start, steps = hull_steps(curves)
    # Take steps in order while they fit; a layer whose step does not fit takes none of its later steps. So a
    # larger budget never costs more: at the first step where the walks of two budgets differ, the larger one
    # takes a step that the smaller one cannot, and all later steps save less per unit of size.
    walk, blocked = list(start), set()
    left = budget - total_size(curves, start)
    for layer, candidate, growth in steps:
        if layer in blocked:
            continue
        if growth <= left:
            walk[layer], left = candidate, left - growth
        else:
            blocked.add(layer)
    # Or stop at the first step that does not fit, and replace the one candidate that then saves most.
    other, left = list(start), budget - total_size(curves, start)
    for layer, candidate, growth in steps:
        if growth > left:
            break
        other[layer], left = candidate, left - growth
    best, place = 0.0, None
    for layer, (curve, index) in enumerate(zip(curves, other, strict=True)):
        saving = curve.costs[index] - curve.costs
        saving = torch.where(curve.sizes - curve.sizes[index] <= left, saving, 0.0)
        if float(saving.max()) > best:
            best, place = float(saving.max()), (layer, int(saving.argmax()))
    if place is not None:
        other[place[0]] = place[1]
    return min((walk, other), key=lambda chosen: total_cost(curves, chosen))


def spend_cost(
    curves: Sequence[CostCurve], allowed: float, counted: Sequence[Tensor] | None = None
) -> list[int]:
    """Choose the candidates of least total size whose total cost is at most `allowed`.

    Args:
        curves: the cost curve of each layer.
        allowed: the budget.
        counted: costs that count against the budget, if they differ from the costs in `curves`.

    Raises:
        BudgetError: the most accurate candidates together cost more than allowed.
    """
    charged = counted if counted is not None else [curve.costs for curve in curves]

    def charge(multiplier: float) -> float:
        return sum(float(x[c.best(multiplier)]) for x, c in zip(charged, curves, strict=True))

    least = charge(0.0)
    if least > allowed:
        raise BudgetError(
            f"A cost of {allowed:g} is allowed, the best candidates already cost {least:g}; allow more or "
            "choose fewer layers."
        )
    # The cost grows with the multiplier: find the largest multiplier whose cost is still allowed.
    low, high = 0.0, 1.0
    while charge(high) <= allowed and high < 1e12:
        high *= 4
    for _ in range(100):
        middle = (max(low, high * 1e-12) * high) ** 0.5  # geometric mean: multipliers span many orders
        low, high = (middle, high) if charge(middle) <= allowed else (low, middle)
    return [curve.best(low) for curve in curves]


def decide_alone(
    dense: Sequence[int],
    ratio: float,
    decide: Callable[[int, float], _Choice],
    stay: Callable[[int], tuple[_Choice, float]],
) -> list[_Choice]:
    """Choose the candidate of each layer separately, under the same keep ratio.

    The smallest candidate of a tiny matrix may have more parameters than the ratio allows. Such a layer stays
    dense, and the ratio of the other layers is lowered, so that all layers together keep the requested ratio.

    Args:
        dense: parameters of each layer.
        ratio: keep ratio of all of them.
        decide: returns the candidate for a layer index and a ratio; raises `BudgetError` if none fits.
        stay: returns the candidate of a layer that stays dense, and its parameters.

    Raises:
        BudgetError: the ratio cannot be kept; the error is that of the first layer that failed.

    Example:
        >>> from tensornet.compression.allocate import decide_alone
        >>> from tensornet.errors import BudgetError
        >>> def rank(index, ratio):  # of square matrices
        ...     width = (40, 2)[index]
        ...     if (found := int(ratio * width / 2)) == 0:
        ...         raise BudgetError("rank 1 is too large")
        ...     return found
        >>> decide_alone([1600, 4], 0.5, rank, lambda index: ("dense", 4))
        [9, 'dense']
    """
    refused: dict[int, BudgetError] = {}
    share = ratio
    while True:
        chosen: dict[int, _Choice] = {}
        before = len(refused)
        for index in range(len(dense)):
            if index not in refused:
                try:
                    chosen[index] = decide(index, share)
                except BudgetError as error:
                    refused[index] = error
        if len(refused) == before:
            return [chosen[k] if k in chosen else stay(k)[0] for k in range(len(dense))]
        left = ratio * sum(dense) - sum(stay(index)[1] for index in refused)
        rest = sum(dense[index] for index in chosen)
        if left <= 0 or rest == 0:
            raise min(refused.items())[1]
        share = left / rest


def frontier(curves: Sequence[CostCurve], points: int = 64) -> list[tuple[float, float]]:
    """Compute `(total size, total cost)` along the optimal allocations, by decreasing size."""
    steps = [c.costs.max() / (c.sizes.max() - c.sizes.min()).clamp_min(1) for c in curves]
    steepest = max(max(float(step) for step in steps), 1e-300)
    top = float(torch.tensor(steepest, dtype=torch.float64).log10())  # multipliers that change the allocation
    exponents = torch.logspace(top - 8, top + 3, points - 1, base=10, dtype=torch.float64)
    multipliers = [0.0, *exponents.tolist()]
    allocations = [[curve.best(multiplier) for curve in curves] for multiplier in multipliers]
    pairs = {(total_size(curves, chosen), total_cost(curves, chosen)) for chosen in allocations}
    return sorted(pairs, reverse=True)


def total_size(curves: Sequence[CostCurve], chosen: Sequence[int]) -> float:
    """Sum the sizes of the chosen candidates."""
    return sum(float(curve.sizes[index]) for curve, index in zip(curves, chosen, strict=True))


def total_cost(curves: Sequence[CostCurve], chosen: Sequence[int]) -> float:
    """Sum the costs of the chosen candidates."""
    return sum(float(curve.costs[index]) for curve, index in zip(curves, chosen, strict=True))


def hull_steps(curves: Sequence[CostCurve]) -> tuple[list[int], list[tuple[int, int, float]]]:
    """Find the smallest allocation, and the order of the steps that enlarge it.

    Returns:
        The cheapest of the smallest candidates of each curve, and `(curve, candidate, growth in size)` of all
        steps along the hulls, ordered by decreasing saving per unit of size.

    Example:
        >>> from tensornet.compression.allocate import CostCurve, hull_steps
        >>> sizes = torch.tensor([1.0, 2.0, 4.0])
        >>> curves = [CostCurve(sizes, torch.tensor(costs)) for costs in ([9.0, 3.0, 0.0], [8.0, 6.0, 0.0])]
        >>> hull_steps(curves)
        ([0, 0], [(0, 1, 1.0), (1, 2, 3.0), (0, 2, 2.0)])
    """
    start, steps = [], []
    for layer, curve in enumerate(curves):
        sizes, costs = curve.sizes.tolist(), curve.costs.tolist()
        hull = lower_hull(sizes, costs)
        start.append(hull[0])
        for a, b in pairwise(hull):
            growth = sizes[b] - sizes[a]
            steps.append(((costs[b] - costs[a]) / growth, layer, growth, b))
    return start, [(layer, candidate, growth) for _, layer, growth, candidate in sorted(steps)]


def lower_hull(sizes: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Find the lower convex hull of points; return indices by increasing size and decreasing cost.

    Example:
        >>> from tensornet.compression.allocate import lower_hull
        >>> lower_hull([4, 2, 3, 1], [0.0, 1.0, 0.9, 5.0])
        [3, 1, 0]
    """
    hull: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda index: (sizes[index], costs[index], index)):
        if hull and costs[k] >= costs[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (costs[b] - costs[a]) * (sizes[k] - sizes[a]) < (costs[k] - costs[a]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


# --- all caps of a configuration --------------------------------------------------------------------

#: Format of all layers without calibration data.
_BLIND = "int8"
#: Largest number of layers named in an error.
_NAMED = 4
#: Largest number of rounds that adjust the multipliers of several caps.
_ROUNDS = 80


def curve_of(candidates: Sequence[Candidate], unit: str) -> CostCurve:
    """Build the cost curve of a layer over `"params"`, `"num_bytes"` or `"milliseconds"`."""
    sizes = torch.tensor([float(getattr(x, unit)) for x in candidates], dtype=torch.float64)
    return CostCurve(sizes, torch.tensor([x.cost for x in candidates], dtype=torch.float64))


def choose_candidates(
    targets: Sequence[Target],
    candidates: Sequence[Sequence[Candidate]],
    config: CompressionConfig,
    objective: str,
    *,
    forecast: Forecast = UNMEASURED,
    rest: tuple[int, int] = (0, 0),
    names: Sequence[str] | None = None,
) -> tuple[list[int], str]:
    """Choose a candidate for each layer within all caps; return indices and the name of the tightest cap.

    Args:
        targets: the layers.
        candidates: the candidates of each target.
        config: has the budgets.
        objective: the objective that the candidates were made for.
        forecast: corrects predicted losses by measured ones.
        rest: elements and bytes of the parameters that are not targeted, for budgets of the whole model.
        names: names for errors, if one list of candidates belongs to several layers.

    Raises:
        BudgetError: the caps cannot be kept.
    """
    if objective != "curvature" or not (config.param_ratio is not None or config.needs_curvature):
        if config.formats:
            return one_format(targets, candidates, config, rest)
        capping = (x for x in ("param_ratio", "rel_error", "max_bond") if getattr(config, x) is not None)
        return _choose_alone(targets, candidates, config), next(capping, "exact")
    caps: list[Cap] = []
    names = names or [target.name for target in targets]

    def add(name: str, unit: str, allowed: float) -> None:
        caps.append(Cap(name, [curve_of(found, unit) for found in candidates], allowed))

    if config.param_ratio is not None:
        add("param_ratio", "params", config.param_ratio * sum(target.matrix.numel() for target in targets))
    for name, allowed in allowed_bytes(config, targets, rest).items():
        add(name, "num_bytes", allowed)
    if config.max_milliseconds is not None:
        add("max_milliseconds", "milliseconds", config.max_milliseconds)
    if not caps:
        assert config.loss_increase is not None
        curves = [curve_of(found, "num_bytes" if config.formats else "params") for found in candidates]
        losses = [torch.tensor([x.predicted_loss for x in found]).double() for found in candidates]
        return spend_cost(curves, forecast.uncorrected(config.loss_increase), losses), "loss_increase"
    chosen, bound_by = spend_all(caps, names)
    for name in _common_formats(candidates):  # or one format for all layers, if that costs less
        same = [uniform(found)[name] for found in candidates]
        cheaper = total_cost(caps[0].curves, same) < total_cost(caps[0].curves, chosen)
        if cheaper and all(cap.use(same) <= 1 for cap in caps):
            chosen, bound_by = same, max(caps, key=lambda cap: cap.use(same)).name
    if config.loss_increase is not None:
        loss = sum(found[k].predicted_loss for found, k in zip(candidates, chosen, strict=True))
        if (predicted := forecast.corrected(loss)) > config.loss_increase:
            raise BudgetError(
                f"{bound_by} and loss_increase={config.loss_increase} contradict each other: the best plan "
                f"of that size raises the loss by {predicted:.4g}. Drop one of them or raise it."
            )
    return chosen, bound_by


class Cap(NamedTuple):
    """Cap on the sum of one size over all layers.

    Args:
        name: name of the budget, for errors and reports.
        curves: the cost curve of each layer over this size; the costs are the same for all caps.
        allowed: largest sum that is allowed.
    """

    name: str
    curves: Sequence[CostCurve]
    allowed: float

    def use(self, chosen: Sequence[int]) -> float:
        """Compute the fraction of the cap that a choice uses, at most 1 if the cap is kept."""
        return total_size(self.curves, chosen) / self.allowed


def spend_all(caps: Sequence[Cap], names: Sequence[str] = ()) -> tuple[list[int], str]:
    """Choose the candidates of least total cost that keep all caps, and name the tightest one.

    The caps are combined into one cap by a weighted mean, which any choice within all caps keeps as well. The
    weights of exceeded caps are raised until all caps are kept. `names` are those of the layers, for errors.

    Raises:
        BudgetError: a cap cannot be kept, or they cannot be kept together.
    """
    alone = []
    for cap in caps:
        try:
            alone.append(spend_size(cap.curves, cap.allowed))
        except BudgetError as error:
            # Layers that cannot shrink at all come first, then those with the largest smallest candidate.
            least = [(len(curve.sizes) == 1, float(curve.sizes.min())) for curve in cap.curves]
            fixed = [size for only, size in least if only]
            text = (
                f" {len(fixed)} layers have one candidate and take {sum(fixed):,.6g}, as those do that no "
                "gradient reaches in calibration: exclude them, or choose objective='activation', which "
                "needs none."
            )
            order = sorted(range(len(names)), key=lambda k: least[k], reverse=True)
            shown = ", ".join(f"{names[k]} ({least[k][1]:,.6g})" for k in order[:_NAMED])
            more = f"{text if fixed else ''} The largest are {shown}." if shown else ""
            raise BudgetError(f"{cap.name}: {error}{more}") from error
    kept = [chosen for chosen in alone if all(cap.use(chosen) <= 1 for cap in caps)]
    weights, allowed = torch.full((len(caps),), 1 / len(caps), dtype=torch.float64), 1.0
    for round_ in range(0 if kept or len(caps) == 1 else _ROUNDS):
        mixed = []
        for layer, curve in enumerate(caps[0].curves):  # all sizes of a layer, each relative to its cap
            sizes = torch.stack([cap.curves[layer].sizes / cap.allowed for cap in caps])
            mixed.append(CostCurve(weights @ sizes, curve.costs))
        least_use = sum(float(curve.sizes.min()) for curve in mixed)
        chosen = spend_size(mixed, max(least_use * (1 + 1e-12), allowed))
        use = torch.tensor([cap.use(chosen) for cap in caps], dtype=torch.float64)
        if bool((use <= 1).all()):
            kept.append(chosen)
            allowed = 1.0
        else:  # with few candidates the combined cap needs some slack
            allowed *= 0.99
        weights = weights * use.clamp(0.5, 2.0) ** (0.95**round_)
        weights = weights / weights.sum()
    if not kept:
        raise BudgetError(
            f"{' and '.join(cap.name for cap in caps)} contradict each other: no choice of candidates was "
            "found that keeps them all. Drop one of them or raise it."
        )
    best = min(kept, key=lambda chosen: total_cost(caps[0].curves, chosen))
    return best, max(caps, key=lambda cap: cap.use(best)).name


def allowed_bytes(
    config: CompressionConfig, targets: Sequence[Target], rest: tuple[int, int]
) -> dict[str, float]:
    """Compute the bytes available to the targeted layers, by the name of the budget.

    Raises:
        BudgetError: the rest of the model alone takes more.
    """
    weights = sum(target.matrix.numel() for target in targets)
    now = sum(target.matrix.numel() * target.matrix.element_size() for target in targets)
    found = {}
    for name in BYTE_BUDGETS:
        if (value := getattr(config, name)) is None:
            continue
        whole = config.counts_model(name)
        params, size = (weights + rest[0], now + rest[1]) if whole else (weights, now)
        total = {"bits_per_weight": value / 8 * params, "byte_ratio": value * size, "max_bytes": value}[name]
        found[name] = total - (rest[1] if whole else 0)
        if found[name] <= 0:
            raise BudgetError(
                f"{name}={value} allows {total:,.0f} bytes for the whole model, {rest[1]:,} of which "
                "are tensors that are not compressed. Raise it, target more layers, or count the targeted "
                "layers alone by whole_model=False."
            )
    return found


def one_format(
    targets: Sequence[Target],
    candidates: Sequence[Sequence[Candidate]],
    config: CompressionConfig,
    rest: tuple[int, int],
) -> tuple[list[int], str]:
    """Choose the most accurate single format that keeps the caps, for plans without calibration data.

    Raises:
        BudgetError: no format keeps the caps.
    """
    caps = allowed_bytes(config, targets, rest)
    names = _common_formats(candidates)
    if config.formats == DEFAULT_FORMATS:  # without data fewer bits are used only on request
        names = [_BLIND]
    sizes = {x: sum(found[uniform(found)[x]].num_bytes for found in candidates) for x in names}
    for name in sorted(names, key=lambda x: -sizes[x]):
        if all(sizes[name] <= allowed for allowed in caps.values()):
            return [uniform(found)[name] for found in candidates], min(
                caps, key=caps.__getitem__, default="exact"
            )
    budget = " and ".join(f"{name}={getattr(config, name)}" for name in caps)
    raise BudgetError(
        f"{budget}: without calibration data all layers get one format, {' or '.join(names)}, which takes "
        f"{min(sizes.values()):,.0f} bytes where {min(caps.values()):,.0f} are allowed. Pass "
        "calibration=batches to plan smaller ones, or name the format to round to: formats=('int4',)."
    )


def _common_formats(candidates: Sequence[Sequence[Candidate]]) -> list[str]:
    """List the formats in which every layer has a dense candidate."""
    return [x for x in uniform(candidates[0]) if all(x in uniform(found) for found in candidates)]


def uniform(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Map number formats to the index of the dense matrix in that format."""
    return {x.number_format: k for k, x in enumerate(candidates) if x.number_format}


def _choose_alone(
    targets: Sequence[Target], candidates: Sequence[Sequence[Candidate]], config: CompressionConfig
) -> list[int]:
    """Choose the best candidate of each layer under the caps on single layers."""
    if config.param_ratio is not None:
        sizes = [target.matrix.numel() for target in targets]

        def decide(index: int, ratio: float) -> int:
            try:
                return spend_size([curve_of(candidates[index], "params")], ratio * sizes[index])[0]
            except BudgetError as error:
                raise BudgetError(f"Layer {targets[index].name!r}: {error}") from error

        def stay(index: int) -> tuple[int, float]:
            """Keep the dense matrix, or the smallest candidate if a cap on ranks excludes it."""
            found = candidates[index]
            dense = [k for k, x in enumerate(found) if x.topology is None]
            place = dense[0] if dense else min(range(len(found)), key=lambda k: found[k].params)
            return place, float(found[place].params)

        return decide_alone(sizes, config.param_ratio, decide, stay)
    if config.rel_error is not None:
        return [min(range(len(found)), key=lambda k: found[k].params) for found in candidates]
    return [min(range(len(found)), key=lambda k: found[k].cost) for found in candidates]
