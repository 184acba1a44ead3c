"""Spending one budget over many layers: pure functions on cost curves.

Each layer offers forms, each with a size and a cost. With one price for a unit of size, every layer takes the
form with the least `cost + price * size`, which is optimal for the size that comes out (Everett's theorem);
bisection finds the price for a given budget, and what is left over is spent greedily.

Reference:
    Everett 1963, "Generalized Lagrange multiplier method for solving problems of optimum allocation of
    resources"; Shoham, Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tensornet.errors import BudgetError

_Form = TypeVar("_Form")


@dataclass(frozen=True)
class CostCurve:
    """Forms a layer may take.

    Args:
        sizes: parameters or bytes of each form, shape `(forms,)`.
        costs: what each form costs, in any unit that adds over layers, shape `(forms,)`.
    """

    sizes: Tensor
    costs: Tensor

    def best(self, price: float) -> int:
        """Index of the form with the least `cost + price * size`; the smallest of equals."""
        return int((self.costs + price * self.sizes).argmin())


def spend_size(curves: Sequence[CostCurve], budget: float) -> list[int]:
    """Forms of least total cost whose total size is at most `budget`.

    Raises:
        BudgetError: the smallest forms together are larger than the budget.
    """
    least = sum(float(curve.sizes.min()) for curve in curves)
    if least > budget:
        raise BudgetError(
            f"The budget allows {budget:,.6g}, the smallest forms of all layers need {least:,.6g}; raise the "
            "budget or choose fewer layers."
        )
    price = _price(curves, lambda forms: total_size(curves, forms) <= budget)
    return _fill(curves, [curve.best(price) for curve in curves], budget)


def spend_cost(
    curves: Sequence[CostCurve], allowed: float, counted: Sequence[Tensor] | None = None
) -> list[int]:
    """Forms of least total size whose total cost is at most `allowed`.

    Args:
        curves: forms of each layer.
        allowed: the budget.
        counted: costs that count against the budget, where they are others than those that decide.

    Raises:
        BudgetError: the most accurate forms together cost more than allowed.
    """
    charged = counted if counted is not None else [curve.costs for curve in curves]

    def charge(price: float) -> float:
        return sum(float(x[c.best(price)]) for x, c in zip(charged, curves, strict=True))

    least = charge(0.0)
    if least > allowed:
        raise BudgetError(f"A cost of {allowed:g} is allowed, the best forms already cost {least:g}.")
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
    decide: Callable[[int, float], _Form],
    stay: Callable[[int], tuple[_Form, float]],
) -> list[_Form]:
    """Decide each layer by itself under one keep ratio.

    To explain how this works: the smallest form of a tiny matrix may have more parameters than the ratio
    allows. Such a layer stays as it is, and the others pay for it with a smaller ratio, so that all layers
    together keep to the one asked for.

    Args:
        dense: parameters of each layer.
        ratio: kept share of all of them.
        decide: form of a layer, by its index, under a ratio; raises `BudgetError` where none is small enough.
        stay: form of a layer that stays, and its parameters.

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
        chosen: dict[int, _Form] = {}
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
    chosen = [[curve.best(price) for curve in curves] for price in prices]
    pairs = {(total_size(curves, forms), total_cost(curves, forms)) for forms in chosen}
    return sorted(pairs, reverse=True)


def total_size(curves: Sequence[CostCurve], forms: Sequence[int]) -> float:
    """Sum of the sizes of the chosen forms."""
    return sum(float(curve.sizes[form]) for curve, form in zip(curves, forms, strict=True))


def total_cost(curves: Sequence[CostCurve], forms: Sequence[int]) -> float:
    """Sum of the costs of the chosen forms."""
    return sum(float(curve.costs[form]) for curve, form in zip(curves, forms, strict=True))


def _price(curves: Sequence[CostCurve], fits: object) -> float:
    """The smallest price whose forms fit."""
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


def _fill(curves: Sequence[CostCurve], forms: list[int], budget: float) -> list[int]:
    """Spend what the multiplier left over: the upgrade that saves most for its size, while one fits."""
    left = budget - total_size(curves, forms)
    while True:
        best: tuple[float, int, int, float] | None = None
        for index, (curve, form) in enumerate(zip(curves, forms, strict=True)):
            growth = curve.sizes - curve.sizes[form]
            saving = curve.costs[form] - curve.costs
            rate = torch.where(
                (growth > 0) & (growth <= left) & (saving > 0), saving / growth.clamp_min(1e-9), -1.0
            )
            top = int(rate.argmax())
            if float(rate[top]) > 0 and (best is None or float(rate[top]) > best[0]):
                best = (float(rate[top]), index, top, float(growth[top]))
        if best is None:
            return forms
        forms[best[1]], left = best[2], left - best[3]
