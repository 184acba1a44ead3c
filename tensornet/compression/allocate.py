"""Spend one budget over many layers: one multiplier for all cost curves.

Each layer has candidates, each with a size and a cost. With one price for a unit of size, every layer takes
the candidate with the least `cost + price * size`, which is optimal for the size that comes out (Everett's
theorem); bisection finds the price for a given budget, and what is left over is spent greedily.

Reference:
    Everett 1963, "Generalized Lagrange multiplier method for solving problems of optimum allocation of
    resources"; Shoham, Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from tensornet.compression.config import CompressionConfig
from tensornet.compression.forecast import UNMEASURED, Forecast
from tensornet.errors import BudgetError
from tensornet.nn.targets import Target

if TYPE_CHECKING:
    from tensornet.compression.candidates import LayerCandidates

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class CostCurve:
    """Candidates of one layer.

    Args:
        sizes: parameters or bytes of each candidate, shape `(candidates,)`.
        costs: what each candidate costs, in any unit that adds over layers, shape `(candidates,)`.
    """

    sizes: Tensor
    costs: Tensor

    def best(self, price: float) -> int:
        """Index of the candidate with the least `cost + price * size`; the smallest of equals."""
        return int((self.costs + price * self.sizes).argmin())


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
    price = _price(curves, lambda chosen: total_size(curves, chosen) <= budget)
    return _fill(curves, [curve.best(price) for curve in curves], budget)


def spend_cost(
    curves: Sequence[CostCurve], allowed: float, counted: Sequence[Tensor] | None = None
) -> list[int]:
    """Choose the candidates of least total size whose total cost is at most `allowed`.

    Args:
        curves: of each layer.
        allowed: the budget.
        counted: costs that count against the budget, where they are others than those that decide.

    Raises:
        BudgetError: the most accurate candidates together cost more than allowed.
    """
    charged = counted if counted is not None else [curve.costs for curve in curves]

    def charge(price: float) -> float:
        return sum(float(x[c.best(price)]) for x, c in zip(charged, curves, strict=True))

    least = charge(0.0)
    if least > allowed:
        raise BudgetError(f"A cost of {allowed:g} is allowed, the best candidates already cost {least:g}.")
    # The cost rises with the price: the last price at which it is still allowed.
    low, high = 0.0, 1.0
    while charge(high) <= allowed and high < 1e12:
        high *= 4
    for _ in range(100):
        middle = _middle(low, high)
        low, high = (middle, high) if charge(middle) <= allowed else (low, middle)
    return [curve.best(low) for curve in curves]


def decide_alone(
    dense: Sequence[int],
    ratio: float,
    decide: Callable[[int, float], _Choice],
    stay: Callable[[int], tuple[_Choice, float]],
) -> list[_Choice]:
    """Decide each layer by itself under one keep ratio.

    To explain how this works: the smallest candidate of a tiny matrix may have more parameters than the ratio
    allows. Such a layer stays as it is, and the others pay for it with a smaller ratio, so that all layers
    together keep to the one asked for.

    Args:
        dense: parameters of each layer.
        ratio: keep ratio of all of them.
        decide: candidate of a layer, by its index, under a ratio; raises `BudgetError` if none fits.
        stay: candidate of a layer that stays, and its parameters.

    Raises:
        BudgetError: the ratio cannot be kept; the error of the first layer that could not.

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
    """`(total size, total cost)` along the optimal allocations, by falling size."""
    low, high = _price_range(curves)
    prices = [0.0, *torch.logspace(low, high, points - 1, base=10, dtype=torch.float64).tolist()]
    allocations = [[curve.best(price) for curve in curves] for price in prices]
    pairs = {(total_size(curves, chosen), total_cost(curves, chosen)) for chosen in allocations}
    return sorted(pairs, reverse=True)


def total_size(curves: Sequence[CostCurve], chosen: Sequence[int]) -> float:
    """Sum of the sizes of the chosen candidates."""
    return sum(float(curve.sizes[index]) for curve, index in zip(curves, chosen, strict=True))


def total_cost(curves: Sequence[CostCurve], chosen: Sequence[int]) -> float:
    """Sum of the costs of the chosen candidates."""
    return sum(float(curve.costs[index]) for curve, index in zip(curves, chosen, strict=True))


def _price(curves: Sequence[CostCurve], fits: object) -> float:
    """The smallest price whose candidates fit."""
    assert callable(fits)
    low, high = 0.0, 1.0
    if fits([curve.best(0.0) for curve in curves]):
        return 0.0
    while not fits([curve.best(high) for curve in curves]):
        high *= 4
    for _ in range(100):
        middle = _middle(low, high)
        ok = fits([curve.best(middle) for curve in curves])
        low, high = (low, middle) if ok else (middle, high)
    return high


def _middle(low: float, high: float) -> float:
    """Geometric mean: prices span many orders of magnitude."""
    return (max(low, high * 1e-12) * high) ** 0.5


def _price_range(curves: Sequence[CostCurve]) -> tuple[float, float]:
    """Exponents of ten between which allocations change."""
    steps = [c.costs.max() / (c.sizes.max() - c.sizes.min()).clamp_min(1) for c in curves]
    top = max(max(float(step) for step in steps), 1e-300)
    exponent = float(torch.tensor(top, dtype=torch.float64).log10())
    return exponent - 8, exponent + 3


def _fill(curves: Sequence[CostCurve], chosen: list[int], budget: float) -> list[int]:
    """Spend what the multiplier left over: the upgrade that saves most for its size, while one fits."""
    left = budget - total_size(curves, chosen)
    while True:
        best: tuple[float, int, int, float] | None = None
        for layer, (curve, index) in enumerate(zip(curves, chosen, strict=True)):
            growth = curve.sizes - curve.sizes[index]
            saving = curve.costs[index] - curve.costs
            rate = torch.where(
                (growth > 0) & (growth <= left) & (saving > 0), saving / growth.clamp_min(1e-9), -1.0
            )
            top = int(rate.argmax())
            if float(rate[top]) > 0 and (best is None or float(rate[top]) > best[0]):
                best = (float(rate[top]), layer, top, float(growth[top]))
        if best is None:
            return chosen
        chosen[best[1]], left = best[2], left - best[3]


def choose_candidates(
    targets: Sequence[Target],
    candidates: Sequence["LayerCandidates"],
    config: CompressionConfig,
    objective: str,
    forecast: Forecast = UNMEASURED,
) -> tuple[list[int], str]:
    """Choose a candidate for each layer, by its index; also say which cap decided.

    With several caps on the whole, the one that leaves least wins. `forecast` corrects predicted
    losses by measured ones.

    Raises:
        BudgetError: the caps cannot be kept.
    """
    if objective != "curvature" or (config.param_ratio is None and not config.needs_curvature):
        return _alone(targets, candidates, config), _cap(config)
    curves = [found.curve("params") for found in candidates]
    choices = []
    if config.param_ratio is not None:
        allowed = config.param_ratio * sum(target.matrix.numel() for target in targets)
        choices.append((_spend(curves, allowed, "param_ratio", config), "param_ratio"))
    for unit, name in (("num_bytes", "max_bytes"), ("milliseconds", "max_milliseconds")):
        if (allowed := getattr(config, name)) is not None:
            choices.append((_spend([found.curve(unit) for found in candidates], allowed, name, config), name))
    if config.loss_increase is not None:
        allowed = forecast.price(config.loss_increase)
        chosen = spend_cost(curves, allowed, [found.forecasts for found in candidates])
        if not choices:
            return chosen, "loss_increase"
        cheapest = max(choices, key=lambda choice: total_cost(curves, choice[0]))
        price = sum(float(f.forecasts[k]) for f, k in zip(candidates, cheapest[0], strict=True))
        predicted = forecast.rise(price)
        if predicted > config.loss_increase:
            raise BudgetError(
                f"{cheapest[1]} and loss_increase={config.loss_increase} contradict each other: the best "
                f"plan of that size raises the loss by {predicted:.4g}. Drop one of them or raise it."
            )
        return cheapest
    return max(choices, key=lambda choice: total_cost(curves, choice[0]))


def _spend(curves: Sequence[CostCurve], allowed: float, name: str, config: CompressionConfig) -> list[int]:
    """`spend_size`, whose errors name the budget."""
    try:
        return spend_size(curves, allowed)
    except BudgetError as error:
        raise BudgetError(f"{name}={getattr(config, name)}: {error}") from error


def _alone(
    targets: Sequence[Target], candidates: Sequence["LayerCandidates"], config: CompressionConfig
) -> list[int]:
    """The best candidate of each layer under the caps on single layers."""
    if config.param_ratio is not None:
        sizes = [target.matrix.numel() for target in targets]

        def decide(index: int, ratio: float) -> int:
            try:
                return spend_size([candidates[index].curve("params")], ratio * sizes[index])[0]
            except BudgetError as error:
                raise BudgetError(f"Layer {targets[index].name!r}: {error}") from error

        def stay(index: int) -> tuple[int, float]:
            """The dense candidate, which is the last one; the smallest where a cap on ranks excludes it."""
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
