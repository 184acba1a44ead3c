"""Allocation of one budget over many layers, by one Lagrange multiplier for all cost curves.

Each layer has candidates, each with a size and a cost. With one price for a unit of size, every layer takes
the candidate with the least `cost + price * size`, which is optimal for the size that comes out (Everett's
theorem). Lowering the price walks every layer along the lower convex hull of its candidates, one step after
the other in the order of what a step saves for its size; a budget ends the walk, and what is left over is
spent so that a larger budget never costs more.

Reference:
    Everett 1963, "Generalized Lagrange multiplier method for solving problems of optimum allocation of
    resources"; Shoham, Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from tensornet.errors import BudgetError

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class CostCurve:
    """Sizes and costs of the candidates of one layer.

    Args:
        sizes: parameters or bytes of each candidate, shape `(candidates,)`.
        costs: what each candidate costs, in any unit that adds over layers, shape `(candidates,)`.
    """

    sizes: Tensor
    costs: Tensor

    def best(self, price: float) -> int:
        """Find the candidate of least `cost + price * size`; ties go to the smallest."""
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
    steps = _steps(curves)
    start = [_cheapest_of_smallest(curve) for curve in curves]
    ways = [_walk(curves, start, steps, budget), _one_more(curves, start, steps, budget)]
    return min(ways, key=lambda chosen: total_cost(curves, chosen))


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
        raise BudgetError(
            f"A cost of {allowed:g} is allowed, the best candidates already cost {least:g}; allow more or "
            "choose fewer layers."
        )
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
    """Choose the candidate of each layer separately, under the same keep ratio.

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
    """Compute `(total size, total cost)` along the optimal allocations, by decreasing size."""
    low, high = _price_range(curves)
    prices = [0.0, *torch.logspace(low, high, points - 1, base=10, dtype=torch.float64).tolist()]
    allocations = [[curve.best(price) for curve in curves] for price in prices]
    pairs = {(total_size(curves, chosen), total_cost(curves, chosen)) for chosen in allocations}
    return sorted(pairs, reverse=True)


def total_size(curves: Sequence[CostCurve], chosen: Sequence[int]) -> float:
    """Sum the sizes of the chosen candidates."""
    return sum(float(curve.sizes[index]) for curve, index in zip(curves, chosen, strict=True))


def total_cost(curves: Sequence[CostCurve], chosen: Sequence[int]) -> float:
    """Sum the costs of the chosen candidates."""
    return sum(float(curve.costs[index]) for curve, index in zip(curves, chosen, strict=True))


def hull_steps(curves: Sequence[CostCurve]) -> tuple[list[int], list[tuple[int, int]]]:
    """Find the best choice of every total size: where it starts, and which step pays next.

    Returns:
        The cheapest of the smallest candidates of each curve, and `(curve, candidate)` of all steps along
        the hulls, by falling saving for each unit of size.

    Example:
        >>> from tensornet.compression.allocate import CostCurve, hull_steps
        >>> sizes = torch.tensor([1.0, 2.0, 4.0])
        >>> curves = [CostCurve(sizes, torch.tensor(costs)) for costs in ([9.0, 3.0, 0.0], [8.0, 6.0, 0.0])]
        >>> hull_steps(curves)
        ([0, 0], [(0, 1), (1, 2), (0, 2)])
    """
    return [_cheapest_of_smallest(curve) for curve in curves], [
        (step.layer, step.candidate) for step in _steps(curves)
    ]


@dataclass(frozen=True, order=True)
class _Step:
    """Step along a hull, ordered by cost saved for each unit of size (negated: the best comes first)."""

    slope: float
    layer: int
    growth: float
    candidate: int


def _cheapest_of_smallest(curve: CostCurve) -> int:
    smallest = curve.sizes == curve.sizes.min()
    return int(torch.where(smallest, curve.costs, torch.inf).argmin())


def lower_hull(sizes: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Find the lower convex hull of points; indices by rising size and falling cost.

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


def _steps(curves: Sequence[CostCurve]) -> list[_Step]:
    """Sort the steps along the hulls of all layers by the loss they save for each unit of size."""
    found = []
    for layer, curve in enumerate(curves):
        sizes, costs = curve.sizes.tolist(), curve.costs.tolist()
        for a, b in pairwise(lower_hull(sizes, costs)):
            growth = sizes[b] - sizes[a]
            found.append(_Step((costs[b] - costs[a]) / growth, layer, growth, b))
    return sorted(found)


def _walk(
    curves: Sequence[CostCurve], start: Sequence[int], steps: Sequence[_Step], budget: float
) -> list[int]:
    """Take steps in order while they fit; a layer whose step does not fit takes none of its later steps.

    A larger budget never costs more: where two walks part, that with the larger budget takes a step, and all
    that the other one can still take is smaller and saves less for its size.
    """
    chosen, blocked = list(start), set()
    left = budget - total_size(curves, start)
    for step in steps:
        if step.layer in blocked:
            continue
        if step.growth <= left:
            chosen[step.layer], left = step.candidate, left - step.growth
        else:
            blocked.add(step.layer)
    return chosen


def _one_more(
    curves: Sequence[CostCurve], start: Sequence[int], steps: Sequence[_Step], budget: float
) -> list[int]:
    """Take steps while they fit, then the single candidate of any layer that saves most."""
    chosen, left = list(start), budget - total_size(curves, start)
    for step in steps:
        if step.growth > left:
            break
        chosen[step.layer], left = step.candidate, left - step.growth
    best, place = 0.0, None
    for layer, (curve, index) in enumerate(zip(curves, chosen, strict=True)):
        saving = curve.costs[index] - curve.costs
        saving = torch.where(curve.sizes - curve.sizes[index] <= left, saving, 0.0)
        if float(saving.max()) > best:
            best, place = float(saving.max()), (layer, int(saving.argmax()))
    if place is not None:
        chosen[place[0]] = place[1]
    return chosen


def _middle(low: float, high: float) -> float:
    """Compute the geometric mean, since multipliers span many orders of magnitude."""
    return (max(low, high * 1e-12) * high) ** 0.5


def _price_range(curves: Sequence[CostCurve]) -> tuple[float, float]:
    """Compute the exponents of ten between which the multiplier changes allocations."""
    steps = [c.costs.max() / (c.sizes.max() - c.sizes.min()).clamp_min(1) for c in curves]
    top = max(max(float(step) for step in steps), 1e-300)
    exponent = float(torch.tensor(top, dtype=torch.float64).log10())
    return exponent - 8, exponent + 3
