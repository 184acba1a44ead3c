"""Integer matrix plus low-rank product, fitted alternately.

Given the product `A B` the codes round `W - A B`; given the codes `Q` the best product of rank `r` is the
truncated SVD of the whitened rest `W - Q`, in closed form. Low rank takes what few bits leave where the
curvature is large, so that below four bits the pair often costs less than one more bit does.

Reference:
    Zhang et al. 2024, "LQER"; Guo et al. 2024, "LQ-LoRA" (one side, alternated).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tensornet.linalg.weighted_svd import Weighting

Base = TypeVar("Base")
Product = TypeVar("Product")


@dataclass(frozen=True)
class Alternation(Generic[Base, Product]):
    """Best turn of `alternate`.

    Args:
        base: rounded matrix, as `round_base` returned it.
        product: fitted product, as `fit_product` returned it.
        loss_increase: exact, of the sum.
        history: loss increase of the first rounded matrix alone, and of the sum after each turn.
    """

    base: Base
    product: Product
    loss_increase: float
    history: tuple[float, ...]


def alternate(
    target: Tensor,
    weighting: Weighting,
    round_base: Callable[[Tensor], tuple[Base, Tensor]],
    fit_product: Callable[[Tensor], tuple[Product, Tensor]],
    turns: int,
) -> Alternation[Base, Product]:
    """Alternate rounding the residual of a product and fitting the product to the rounding error.

    Args:
        target: shape `(out, in)`.
        weighting: sensitivity of the loss to errors.
        round_base: rounds a matrix; returns its result and its values `(out, in)`.
        fit_product: fits a product to a matrix; returns its result and its values.
        turns: how often both are done; at least once.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> from tensornet.quantization.residual import alternate
        >>> exact = lambda matrix: (None, matrix)
        >>> alternate(torch.randn(4, 4), Weighting(), exact, exact, 1).history
        (0.0, 0.0)
    """
    values = torch.zeros_like(target)
    history: list[float] = []
    best: tuple[float, Base, Product] | None = None
    for _ in range(turns):
        base, rounded = round_base(target - values)
        rest = target - rounded
        if not history:
            history.append(weighting.cost(rest))
        product, values = fit_product(rest)
        history.append(weighting.cost(rest - values))
        if best is None or history[-1] < best[0]:
            best = history[-1], base, product
    assert best is not None
    return Alternation(best[1], best[2], best[0], tuple(history))
