"""Choose a candidate for every layer of a model under all the caps of a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.compression.allocate import (
    CostCurve,
    decide_alone,
    spend_cost,
    spend_size,
    total_cost,
    total_size,
)
from tensornet.compression.candidates import LayerCandidates
from tensornet.compression.config import BYTE_BUDGETS, DEFAULT_FORMATS, CompressionConfig
from tensornet.compression.forecast import UNMEASURED, Forecast
from tensornet.errors import BudgetError
from tensornet.nn.targets import Target


@dataclass(frozen=True)
class ModelRest:
    """Elements and bytes of the parameters that are not targeted."""

    params: int = 0
    num_bytes: int = 0


NO_REST = ModelRest()


@dataclass(frozen=True)
class Cap:
    """Cap on the sum of one size over all layers.

    Args:
        name: of the budget, for errors and reports.
        curves: cost over this size, of each layer; the costs are those of all other caps.
        allowed: the cap.
        layers: names, for errors.
    """

    name: str
    curves: Sequence[CostCurve]
    allowed: float
    layers: Sequence[str] = ()

    def use(self, chosen: Sequence[int]) -> float:
        """Compute the fraction of the cap that a choice uses; at most 1 keeps the cap."""
        return total_size(self.curves, chosen) / self.allowed


#: Format of all layers where nothing is known of their errors.
_BLIND = "int8"
#: Layers that an error names.
_NAMED = 4
#: Rounds in which the weights of several caps are adjusted.
_ROUNDS = 80


def spend_all(caps: Sequence[Cap]) -> tuple[list[int], str]:
    """Choose the candidates of least total cost that keep all caps, and name the tightest one.

    To explain how this works: a choice that keeps all caps also keeps any weighted mean of them, which is one
    cap. Weights of caps that are exceeded are raised until all are kept.

    Raises:
        BudgetError: a cap cannot be kept, or they cannot be kept together.
    """
    alone = [_spend(cap) for cap in caps]
    kept = [chosen for chosen in alone if all(cap.use(chosen) <= 1 for cap in caps)]
    weights, allowed = torch.full((len(caps),), 1 / len(caps), dtype=torch.float64), 1.0
    for round_ in range(0 if kept or len(caps) == 1 else _ROUNDS):
        mixed = [_mixed(caps, layer, weights) for layer in range(len(caps[0].curves))]
        least = sum(float(curve.sizes.min()) for curve in mixed)
        chosen = spend_size(mixed, max(least * (1 + 1e-12), allowed))
        use = torch.tensor([cap.use(chosen) for cap in caps], dtype=torch.float64)
        if bool((use <= 1).all()):
            kept.append(chosen)
            allowed = 1.0
        else:  # candidates are few: what is allowed together must leave some slack
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


def _mixed(caps: Sequence[Cap], layer: int, weights: Tensor) -> CostCurve:
    """Combine all sizes of one layer, each relative to its cap, by a weighted mean; the costs stay."""
    parts = torch.stack([cap.curves[layer].sizes / cap.allowed for cap in caps])
    return CostCurve(weights @ parts, caps[0].curves[layer].costs)


@dataclass(frozen=True)
class Allocation:
    """Layers with their candidates, and the budget to spend on them.

    Args:
        targets: the layers.
        candidates: of each.
        config: names the budget.
        objective: by which candidates were made.
        forecast: corrects predicted losses by measured ones.
        rest: part of the model that is not targeted, for budgets that count all of it.
    """

    targets: Sequence[Target]
    candidates: Sequence[LayerCandidates]
    config: CompressionConfig
    objective: str = "curvature"
    forecast: Forecast = UNMEASURED
    rest: ModelRest = NO_REST

    @property
    def unit(self) -> str:
        """Size that candidates are compared by: `"num_bytes"` or `"params"`."""
        return "num_bytes" if self.config.plans_formats else "params"


def choose_candidates(given: Allocation, names: Sequence[str] | None = None) -> tuple[list[int], str]:
    """Choose a candidate index for each layer, and name the cap that was decisive.

    Several caps on the whole are all kept.

    Args:
        given: layers, candidates and budget.
        names: of the candidates in errors, where several layers have candidates together.

    Raises:
        BudgetError: the caps cannot be kept.
    """
    targets, candidates, config, rest = given.targets, given.candidates, given.config, given.rest
    if not spends_jointly(config, given.objective):
        if config.plans_formats:
            return one_format(targets, candidates, config, rest)
        return _alone(targets, candidates, config), _cap(config)
    caps, names = [], names or [target.name for target in targets]
    if config.param_ratio is not None:
        allowed = config.param_ratio * sum(target.matrix.numel() for target in targets)
        caps.append(Cap("param_ratio", [found.curve("params") for found in candidates], allowed, names))
    curves = [found.curve("num_bytes") for found in candidates]
    caps += [Cap(name, curves, size, names) for name, size in allowed_bytes(config, targets, rest).items()]
    if config.max_milliseconds is not None:
        curves = [found.curve("milliseconds") for found in candidates]
        caps.append(Cap("max_milliseconds", curves, config.max_milliseconds, names))
    cheapest = None if not caps else _or_one_format(spend_all(caps), candidates, caps)
    if config.loss_increase is None:
        assert cheapest is not None
        return cheapest
    allowed = given.forecast.price(config.loss_increase)
    if cheapest is None:
        curves = [found.curve(given.unit) for found in candidates]
        return spend_cost(curves, allowed, [found.forecasts for found in candidates]), "loss_increase"
    price = sum(float(f.forecasts[k]) for f, k in zip(candidates, cheapest[0], strict=True))
    predicted = given.forecast.rise(price)
    if predicted > config.loss_increase:
        raise BudgetError(
            f"{cheapest[1]} and loss_increase={config.loss_increase} contradict each other: the best "
            f"plan of that size raises the loss by {predicted:.4g}. Drop one of them or raise it."
        )
    return cheapest


def spends_jointly(config: CompressionConfig, objective: str) -> bool:
    """Return True if budgets are spent over all layers together, False if each layer is planned alone."""
    return objective == "curvature" and (config.param_ratio is not None or config.needs_curvature)


def allowed_bytes(config: CompressionConfig, targets: Sequence[Target], rest: ModelRest) -> dict[str, float]:
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
        params, size = (weights + rest.params, now + rest.num_bytes) if whole else (weights, now)
        total = {"bits_per_weight": value / 8 * params, "byte_ratio": value * size, "max_bytes": value}[name]
        found[name] = total - (rest.num_bytes if whole else 0)
        if found[name] <= 0:
            raise BudgetError(
                f"{name}={value} allows {total:,.0f} bytes for the whole model, {rest.num_bytes:,} of which "
                "are tensors that are not compressed. Raise it, target more layers, or count the targeted "
                "layers alone by whole_model=False."
            )
    return found


def _or_one_format(
    planned: tuple[list[int], str], candidates: Sequence[LayerCandidates], caps: Sequence[Cap]
) -> tuple[list[int], str]:
    """Replace the planned choice by one format for all layers if that has the smaller predicted loss."""
    best = planned
    for name in _common_formats(candidates):
        chosen = [found.uniform[name] for found in candidates]
        fits = all(cap.use(chosen) <= 1 for cap in caps)
        if fits and total_cost(caps[0].curves, chosen) < total_cost(caps[0].curves, best[0]):
            best = chosen, max(caps, key=lambda cap: cap.use(chosen)).name
    return best


def one_format(
    targets: Sequence[Target],
    candidates: Sequence[LayerCandidates],
    config: CompressionConfig,
    rest: ModelRest,
) -> tuple[list[int], str]:
    """Choose the most accurate single format that keeps the caps, for plans without calibration data.

    Raises:
        BudgetError: no format keeps the caps.
    """
    caps = allowed_bytes(config, targets, rest)
    names = _common_formats(candidates)
    if config.formats == DEFAULT_FORMATS:  # fewer bits are only rounded blindly where they were asked for
        names = [_BLIND]
    sizes = {x: sum(float(f.num_bytes[f.uniform[x]]) for f in candidates) for x in names}
    for name in sorted(names, key=lambda x: -sizes[x]):
        if all(sizes[name] <= allowed for allowed in caps.values()):
            return [found.uniform[name] for found in candidates], min(
                caps, key=caps.__getitem__, default="exact"
            )
    budget = " and ".join(f"{name}={getattr(config, name)}" for name in caps)
    raise BudgetError(
        f"{budget}: without calibration data all layers get one format, {' or '.join(names)}, which takes "
        f"{min(sizes.values()):,.0f} bytes where {min(caps.values()):,.0f} are allowed. Pass "
        "calibration=batches to plan smaller ones, or name the format to round to: formats=('int4',)."
    )


def _common_formats(candidates: Sequence[LayerCandidates]) -> list[str]:
    """List the formats in which every layer has a dense candidate."""
    return [x for x in candidates[0].uniform if all(x in found.uniform for found in candidates)]


def _spend(cap: Cap) -> list[int]:
    """Call `spend_size`, with errors that name the budget."""
    try:
        return spend_size(cap.curves, cap.allowed)
    except BudgetError as error:
        raise BudgetError(f"{cap.name}: {error}{_largest(cap)}") from error


def _largest(cap: Cap) -> str:
    """Name the layers whose smallest candidates take most room, those that cannot shrink at all first."""
    least = [(len(curve.sizes) == 1, float(curve.sizes.min())) for curve in cap.curves]
    order = sorted(range(len(cap.layers)), key=lambda k: least[k], reverse=True)
    shown = ", ".join(f"{cap.layers[k]} ({least[k][1]:,.6g})" for k in order[:_NAMED])
    fixed = [size for alone, size in least if alone]
    text = (
        f" {len(fixed)} layers have one candidate and take {sum(fixed):,.6g}, as those do that no gradient "
        "reaches in calibration: exclude them, or choose objective='activation', which needs none."
    )
    return f"{text if fixed else ''} Most room is taken by {shown}." if shown else ""


def _alone(
    targets: Sequence[Target], candidates: Sequence[LayerCandidates], config: CompressionConfig
) -> list[int]:
    """Choose the best candidate of each layer under the caps on single layers."""
    if config.param_ratio is not None:
        sizes = [target.matrix.numel() for target in targets]

        def decide(index: int, ratio: float) -> int:
            try:
                return spend_size([candidates[index].curve("params")], ratio * sizes[index])[0]
            except BudgetError as error:
                raise BudgetError(f"Layer {targets[index].name!r}: {error}") from error

        def stay(index: int) -> tuple[int, float]:
            """Keep the dense candidate, the last one; the smallest one if a cap on ranks excludes it."""
            params = candidates[index].params
            last = len(params) - 1
            place = last if candidates[index].make(last)[0] is None else int(params.argmin())
            return place, float(params[place])

        return decide_alone(sizes, config.param_ratio, decide, stay)
    if config.rel_error is not None:
        return [int(found.params.argmin()) for found in candidates]
    return [int(found.costs.argmin()) for found in candidates]


def _cap(config: CompressionConfig) -> str:
    names = ("param_ratio", "rel_error", "max_bond")
    return next((name for name in names if getattr(config, name) is not None), "exact")
