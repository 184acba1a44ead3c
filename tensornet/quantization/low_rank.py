"""Rounding of both factors of a low-rank product, each under its own moments.

An error `F` of the right factor of `A B` is the error `A F` of the product, so it must be weighted by the
moments `(A^T R A, C)`. An error of the left factor is weighted by `(R, B C B^T)`. After rounding the right
factor the left one is fitted again, which compensates a part of the rounding error. In a pivoted left factor
the pivot rows are an identity and only the other rows are free; the errors of pivot rows couple to them
through `R`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.linalg.weighted_svd import Weighting, times
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.moments import LEAST_DAMPING
from tensornet.quantization.rounding import RoundedWeight, Rounding, round_weight


@dataclass(frozen=True)
class RoundedProduct:
    """Product `A B` with integers in one or both factors.

    Args:
        left: codes or values of `A`, `(out, rank)`; only of its free rows if it is pivoted.
        right: codes or values of `B`, `(rank, in)`.
        loss_increase: exact loss increase of the product with respect to the target.

    Example:
        >>> from tensornet.quantization import RoundedProduct
        >>> RoundedProduct(torch.randn(16, 4), torch.randn(4, 64), loss_increase=0.0).loss_increase
        0.0
    """

    left: RoundedWeight | Tensor
    right: RoundedWeight | Tensor
    loss_increase: float


@torch.no_grad()
@outside_autocast
def round_product(
    left: Tensor,
    right: Tensor,
    left_format: NumberFormat | None,
    right_format: NumberFormat | None,
    weighting: Weighting,
    *,
    target: Tensor | None = None,
    order: Tensor | None = None,
    rounding: Rounding = "two_sided",
) -> RoundedProduct:
    """Round one factor of a product, or both, and refit the other one.

    Args:
        left: `A`, shape `(out, rank)`.
        right: `B`, shape `(rank, in)`.
        left_format: integer format of `A`; None leaves it in floating point.
        right_format: integer format of `B`; None leaves it in floating point.
        weighting: moments, already damped.
        target: matrix `(out, in)` that the product approximates; the product itself if absent.
        order: position of every row of `A` in an identity followed by its free rows; None if all are free.
        rounding: as for `round_weight`.

    Raises:
        FormatError, NonFiniteError, ShapeError: as for `round_weight`, and if the factors do not fit each
            other.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> from tensornet.quantization import NumberFormat, round_product
        >>> int4 = NumberFormat.parse("int4")
        >>> made = round_product(torch.randn(16, 4), torch.randn(4, 64), None, int4, Weighting())
        >>> made.left.shape, made.right.codes.shape
        (torch.Size([16, 4]), torch.Size([4, 64]))
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ShapeError(
            f"A product needs factors (out, rank) and (rank, in), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}."
        )
    a, b = left.double(), right.double()
    for factor, name in ((a, "The left factor"), (b, "The right factor")):
        check_finite(factor, name)
    wanted = a @ b if target is None else target.double()
    if wanted.shape != (a.shape[0], b.shape[1]):
        raise ShapeError(
            f"target= has shape {tuple(wanted.shape)}; the product has shape {(a.shape[0], b.shape[1])}."
        )
    rows, columns = (None if x is None else x.to(wanted) for x in (weighting.rows, weighting.columns))
    product = _Product(wanted, Weighting(rows, columns), order, rounding)
    if right_format is None:
        made = product.rounded_left(a, b, left_format)
        fitted = product.fit_right(product.values(made))
        return RoundedProduct(made, fitted, product.cost(made, fitted))
    codes = product.rounded(b, right_format, a.mT @ times(rows, a), columns)
    b = codes.dequantize(torch.float64)
    made, cost = product.best_left(a, b, left_format)
    return RoundedProduct(made, codes, cost)


@torch.no_grad()
@outside_autocast
def round_factor(
    target: Tensor,
    left: Tensor,
    right: Tensor,
    side: Literal["left", "right"],
    number_format: NumberFormat | None,
    weighting: Weighting,
    rounding: Rounding = "two_sided",
) -> RoundedWeight | Tensor:
    """Round one factor of a product; the other one does not change.

    The factor is rounded as given, and after a refit; the result of smaller loss is returned.

    Args:
        target: matrix `(out, in)` that the product approximates.
        left: `A`, shape `(out, rank)`.
        right: `B`, shape `(rank, in)`.
        side: the factor to round.
        number_format: its format; None refits it without rounding.
        weighting: moments, already damped.
        rounding: as for `round_weight`.
    """
    a, b, wanted = left.double(), right.double(), target.double()
    rows, columns = (None if x is None else x.to(wanted) for x in (weighting.rows, weighting.columns))
    product = _Product(wanted, Weighting(rows, columns), None, rounding)
    return (product.best_left if side == "left" else product.best_right)(a, b, number_format)[0]


@dataclass(frozen=True)
class _Product:
    """Target of a product, its weighting, and the order of the rows of a pivoted left factor."""

    wanted: Tensor
    weighting: Weighting
    order: Tensor | None
    rounding: Rounding

    def _split(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the pivot rows, and of the free ones."""
        if self.order is None:
            every = torch.arange(len(self.wanted), device=self.wanted.device)
            return every[:0], every
        rows = self.order.long().argsort()
        return rows[:rank], rows[rank:]

    def fit_left(self, b: Tensor) -> Tensor:
        """Compute the best left factor for a given right one."""
        pivots, free = self._split(len(b))
        wanted = self.wanted[free]
        moment = self.weighting.rows
        if moment is not None and moment.ndim == 2 and len(pivots) and len(free):
            coupled = moment[free][:, pivots] @ (self.wanted[pivots] - b)
            wanted = wanted + torch.linalg.lstsq(moment[free][:, free], coupled).solution
        seen = times(self.weighting.columns, b.mT)  # shape: (in, rank), C B^T
        return self._whole(wanted @ seen @ torch.linalg.pinv(b @ seen, hermitian=True))

    def fit_right(self, a: Tensor) -> Tensor:
        """Compute the best right factor for a given left one."""
        seen = times(self.weighting.rows, a)  # shape: (out, rank), R A
        return torch.linalg.pinv(a.mT @ seen, hermitian=True) @ (seen.mT @ self.wanted)

    def rounded_left(
        self, a: Tensor, b: Tensor, number_format: NumberFormat | None
    ) -> RoundedWeight | Tensor:
        """Round the free rows of a left factor under their moments."""
        _, free = self._split(len(b))
        moment = self.weighting.rows
        if moment is not None:
            moment = moment[free] if moment.ndim == 1 else moment[free][:, free]
        if number_format is None:
            return a[free]
        return self.rounded(a[free], number_format, moment, b @ times(self.weighting.columns, b.mT))

    def best_left(
        self, a: Tensor, b: Tensor, number_format: NumberFormat | None
    ) -> tuple[RoundedWeight | Tensor, float]:
        """Round a left factor as given, and after a refit; return the better one and its loss."""
        made = [self.rounded_left(factor, b, number_format) for factor in (self.fit_left(b), a)]
        return min(((x, self.cost(x, b)) for x in made), key=lambda found: found[1])

    def best_right(
        self, a: Tensor, b: Tensor, number_format: NumberFormat | None
    ) -> tuple[RoundedWeight | Tensor, float]:
        """Round a right factor as given, and after a refit; return the better one and its loss."""
        made: list[RoundedWeight | Tensor] = [self.fit_right(a), b]
        if number_format is not None:
            seen = a.mT @ times(self.weighting.rows, a)
            made = [
                self.rounded(x, number_format, seen, self.weighting.columns) for x in (self.fit_right(a), b)
            ]
        costs = [self.cost(a, x if isinstance(x, Tensor) else x.dequantize(torch.float64)) for x in made]
        return min(zip(made, costs, strict=True), key=lambda found: found[1])

    def values(self, made: RoundedWeight | Tensor) -> Tensor:
        """Assemble the whole left factor from its free rows."""
        return self._whole(made if isinstance(made, Tensor) else made.dequantize(torch.float64))

    def cost(self, made: RoundedWeight | Tensor, b: Tensor) -> float:
        return self.weighting.cost(self.wanted - self.values(made) @ b)

    def _whole(self, free: Tensor) -> Tensor:
        if self.order is None:
            return free
        eye = torch.eye(free.shape[1], dtype=free.dtype, device=free.device)
        return torch.cat((eye, free))[self.order.long()]

    def rounded(
        self, factor: Tensor, number_format: NumberFormat, rows: Tensor | None, columns: Tensor | None
    ) -> RoundedWeight:
        """Round a factor under its moments."""
        return round_weight(
            factor,
            number_format,
            rows=rows,
            columns=columns,
            rounding=self.rounding,
            row_damping=LEAST_DAMPING,  # both sides are damped already
            column_damping=LEAST_DAMPING,
        )
