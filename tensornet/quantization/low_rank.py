"""Round the factors of a low-rank product `A B`, each with its own moments.

An error `F` of `B` is an error `A F` of the product, so the moments for `F` are `A^T R A` and `C`. The
moments for an error of `A` are `R` and `B C B^T`. After `B` is rounded, `A` is refitted, which reduces the
rounding error. `A` may be pivoted: then some of its rows form an identity matrix, and only the other
rows, called free, are fitted and rounded.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.damping import LEAST_DAMPING
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.linalg.weighted_svd import Weighting, times
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.rounding import RoundedWeight, Rounding, round_weight


@dataclass(frozen=True)
class RoundedProduct:
    """Product `A B` with one or both factors rounded to integers.

    Args:
        left: rounded or floating-point factor `A`, shape `(out, rank)`. If `A` is pivoted, the rows of the
            identity are omitted.
        right: rounded or floating-point factor `B`, shape `(rank, in)`.
        loss_increase: loss increase `1/2 tr(R E C E^T)` for the error `E` of the product.

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
    """Round one or both factors of a product `A B` to integers.

    A factor is refitted to compensate for part of the rounding error of the other factor.

    Args:
        left: factor `A`, shape `(out, rank)`.
        right: factor `B`, shape `(rank, in)`.
        left_format: integer format of `A`; None keeps it in floating point.
        right_format: integer format of `B`; None keeps it in floating point.
        weighting: damped moments of the product.
        target: matrix `(out, in)` that the product approximates; by default, the product itself.
        order: None if `A` is not pivoted. Otherwise the position of each row of `A` in a matrix that has the
            identity at the top and the other rows below it.
        rounding: rounding method (see `round_weight`).

    Raises:
        FormatError, NonFiniteError, ShapeError: see `round_weight`.
        ShapeError: the shapes of the factors and of the target do not match.

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
    product = _FactorRounding(wanted, Weighting(rows, columns), order, rounding)
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
    """Round one factor of a product, and leave the other unchanged.

    The given factor and a refitted one are both rounded; the result with the smaller loss is returned.

    Args:
        target: matrix `(out, in)` that the product approximates.
        left: factor `A`, shape `(out, rank)`.
        right: factor `B`, shape `(rank, in)`.
        side: the factor to round.
        number_format: integer format of this factor; None refits it without rounding.
        weighting: damped moments of the product.
        rounding: rounding method (see `round_weight`).
    """
    a, b, wanted = left.double(), right.double(), target.double()
    rows, columns = (None if x is None else x.to(wanted) for x in (weighting.rows, weighting.columns))
    product = _FactorRounding(wanted, Weighting(rows, columns), None, rounding)
    return (product.best_left if side == "left" else product.best_right)(a, b, number_format)[0]


@dataclass(frozen=True)
class _FactorRounding:
    """The problem of rounding two factors so that their product approximates the matrix `wanted`.

    If the left factor is pivoted, `order` is the position of each of its rows, as in `round_product`.
    """

    wanted: Tensor
    weighting: Weighting
    order: Tensor | None
    rounding: Rounding

    def _split(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the left factor's rows that form an identity, and those of all other rows."""
        if self.order is None:
            every = torch.arange(len(self.wanted), device=self.wanted.device)
            return every[:0], every
        rows = self.order.long().argsort()
        return rows[:rank], rows[rank:]

    def fit_left(self, b: Tensor) -> Tensor:
        """Compute the best left factor for a given right factor."""
        pivots, free = self._split(len(b))
        wanted = self.wanted[free]
        moment = self.weighting.rows
        if moment is not None and moment.ndim == 2 and len(pivots) and len(free):
            coupled = moment[free][:, pivots] @ (self.wanted[pivots] - b)
            wanted = wanted + torch.linalg.lstsq(moment[free][:, free], coupled).solution
        seen = times(self.weighting.columns, b.mT)  # shape: (in, rank), C B^T
        return self._whole(wanted @ seen @ torch.linalg.pinv(b @ seen, hermitian=True))

    def fit_right(self, a: Tensor) -> Tensor:
        """Compute the best right factor for a given left factor."""
        seen = times(self.weighting.rows, a)  # shape: (out, rank), R A
        return torch.linalg.pinv(a.mT @ seen, hermitian=True) @ (seen.mT @ self.wanted)

    def rounded_left(
        self, a: Tensor, b: Tensor, number_format: NumberFormat | None
    ) -> RoundedWeight | Tensor:
        """Round all rows of a left factor that do not belong to its identity."""
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
        """Round a left factor with and without refitting it first; return the better result and its loss."""
        made = [self.rounded_left(factor, b, number_format) for factor in (self.fit_left(b), a)]
        return min(((x, self.cost(x, b)) for x in made), key=lambda found: found[1])

    def best_right(
        self, a: Tensor, b: Tensor, number_format: NumberFormat | None
    ) -> tuple[RoundedWeight | Tensor, float]:
        """Round a right factor with and without refitting it first; return the better result and its loss."""
        made: list[RoundedWeight | Tensor] = [self.fit_right(a), b]
        if number_format is not None:
            seen = a.mT @ times(self.weighting.rows, a)
            made = [
                self.rounded(x, number_format, seen, self.weighting.columns) for x in (self.fit_right(a), b)
            ]
        costs = [self.cost(a, x if isinstance(x, Tensor) else x.dequantize(torch.float64)) for x in made]
        return min(zip(made, costs, strict=True), key=lambda found: found[1])

    def values(self, made: RoundedWeight | Tensor) -> Tensor:
        """Return the whole left factor, including the rows of the identity if it is pivoted."""
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
        """Round a factor, with errors weighted by moments that are already damped."""
        return round_weight(
            factor,
            number_format,
            rows=rows,
            columns=columns,
            rounding=self.rounding,
            row_damping=LEAST_DAMPING,
            column_damping=LEAST_DAMPING,
        )
