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

from tensornet.checks import check_dense, check_size
from tensornet.context import outside_autocast
from tensornet.errors import ShapeError
from tensornet.linalg.weighted_svd import Weighting, damped, weighted_svd
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.rounding import (
    COLUMN_DAMPING,
    ROW_DAMPING,
    Method,
    RoundedWeight,
    round_weight,
)

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


@dataclass(frozen=True)
class ResidualFit:
    """Integer matrix plus low-rank product, `W ~ Q + A B`.

    Args:
        rounded: `Q`, rounded from `W - A B` with the product of the turn before; so its own loss increase is
            not that of the sum.
        left: `A`, shape `(out, rank)`.
        right: `B`, shape `(rank, in)`.
        loss_increase: exact loss increase of the sum under the damped moments.
        history: loss increase of the integers alone, and after each alternation.

    Example:
        >>> from tensornet.quantization import NumberFormat, fit_residual
        >>> fit = fit_residual(torch.randn(32, 64), NumberFormat.parse("int4"), rank=2)
        >>> fit.left.shape, fit.right.shape, fit.to_matrix().shape
        (torch.Size([32, 2]), torch.Size([2, 64]), torch.Size([32, 64]))
    """

    rounded: RoundedWeight
    left: Tensor
    right: Tensor
    loss_increase: float
    history: tuple[float, ...]

    def to_matrix(self) -> Tensor:
        """Add the dequantized matrix and the product, shape `(out, in)`."""
        return self.rounded.dequantize(self.left.dtype) + self.left @ self.right


@torch.no_grad()
@outside_autocast
def fit_residual(
    weight: Tensor,
    number_format: NumberFormat | str,
    rank: int,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    alternations: int = 2,
    method: Method | None = None,
    row_damping: float = ROW_DAMPING,
    column_damping: float = COLUMN_DAMPING,
    sweeps: int = 0,
) -> ResidualFit:
    """Fit an integer matrix plus a rank-`rank` product to a weight; return the iterate with the least loss.

    Args:
        weight: shape `(out, in)`.
        number_format: of the integer matrix.
        rank: of the product, at most `min(out, in)`.
        rows: moment of the gradients by the outputs, `(out, out)` or `(out,)`; identity if absent.
        columns: moment of the inputs, `(in, in)` or `(in,)`; identity if absent.
        alternations: how often the product is fitted, and the codes before it rounded.
        method: as for `round_weight`.
        row_damping: as for `round_weight`.
        column_damping: as for `round_weight`.
        sweeps: as for `round_weight`.

    Raises:
        FormatError, NonFiniteError, ShapeError: as `round_weight`; also for a rank that does not fit.

    Example:
        >>> from tensornet.quantization import fit_residual
        >>> fit = fit_residual(torch.randn(16, 64), "int2", 4)
        >>> fit.loss_increase < fit.history[0], fit.left.shape
        (True, torch.Size([16, 4]))
    """
    check_dense(weight, "fit_residual", "a matrix of shape (out, in)", 2)
    check_size("rank", rank, error=ShapeError)
    check_size("alternations", alternations, error=ShapeError)
    if rank > min(weight.shape):
        raise ShapeError(
            f"rank={rank} is too large for a weight of shape {tuple(weight.shape)}; it is at most "
            f"{min(weight.shape)}."
        )
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    work = weight.detach().to(dtype)
    rows = None if rows is None or not rows.any() else rows
    columns = None if columns is None or not columns.any() else columns
    weighting = Weighting(
        None if rows is None else damped(rows, row_damping),
        None if columns is None else damped(columns, column_damping),
    )

    def round_base(rest: Tensor) -> tuple[RoundedWeight, Tensor]:
        rounded = round_weight(
            rest,
            number_format,
            rows=rows,
            columns=columns,
            method=method,
            row_damping=row_damping,
            column_damping=column_damping,
            sweeps=sweeps,
        )
        return rounded, rounded.dequantize(dtype)

    def fit_product(rest: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        left, right = (x.to(dtype) for x in weighted_svd(rest, weighting).factors(rank))
        return (left, right), left @ right

    best = alternate(work, weighting, round_base, fit_product, alternations)
    return ResidualFit(best.base, *best.product, best.loss_increase, best.history)
