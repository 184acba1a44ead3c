"""Second moments of a weight (inputs and output gradients), damped and factorised for rounding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.linalg.weighted_svd import cholesky


@dataclass(frozen=True)
class Side:
    """Second moments of one side, rows or columns, of a stack of matrices.

    Args:
        moment: damped, shape `(stack, n, n)`, or `(stack, n)` if only its diagonal is known.
    """

    moment: Tensor

    @property
    def diagonal(self) -> Tensor:
        """Diagonal, shape `(stack, n)`."""
        return self.moment if self.moment.ndim == 2 else self.moment.diagonal(dim1=1, dim2=2)

    @property
    def couples(self) -> bool:
        """True if the moment has off-diagonal elements, so that rounding one element feeds back to others."""
        return self.moment.ndim == 3

    @remembered
    def order(self) -> Tensor:
        """Sort the indices by descending diagonal, the order of rounding, shape `(stack, n)`.

        The element rounded last absorbs the errors of all before it, and should have the least sensitivity.
        """
        return self.diagonal.argsort(dim=1, descending=True, stable=True)

    @remembered
    def feedback(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Factorise `M = U D U^T` in the given order.

        Returns:
            `U` less its diagonal, shape `(stack, n, n)`, and `D`, shape `(stack, n)`.

        Raises:
            ShapeError: the moment is not positive definite.
        """
        backward = order.flip(1)
        # Whole rows are copied first: an index of single elements takes as long as the factorisation.
        chosen = zip(self.moment, backward, strict=True)
        turned = torch.stack([x.index_select(0, places).index_select(1, places) for x, places in chosen])
        lower, positive = cholesky(turned)
        if not positive:
            raise ShapeError(
                "A second moment is not positive definite, even with damping; moments are sums of x x^T. "
                "Raise the damping or check where it comes from."
            )
        size, dtype = lower.diagonal(dim1=1, dim2=2), self.moment.dtype
        unit = (lower / size[:, None, :]).to(dtype).flip(1, 2).triu(1)
        return unit, size.square().flip(1).to(dtype)

    @remembered
    def growth(self, order: Tensor) -> Tensor:
        """Compute `D_i (M^-1)_ii`, by which the variance of an error exceeds that of its residual.

        Shape `(stack, n)`, in the given order.
        """
        unit, kept = self.feedback(order)
        triangle = unit + torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
        lower = (triangle * kept.sqrt()[:, None, :]).flip(1, 2)
        return kept * torch.cholesky_inverse(lower).diagonal(dim1=1, dim2=2).flip(1)

    def times(self, matrix: Tensor) -> Tensor:
        """Multiply a stack of matrices by the moment from the left."""
        return self.moment @ matrix if self.couples else self.moment[:, :, None] * matrix


def prepare_side(
    moment: Tensor | None, size: int, lead: tuple[int, ...], damping: float, like: Tensor, name: str
) -> Side | None:
    """Validate and damp the moment of a stack of matrices; return None if it is missing or all zero.

    Args:
        moment: `(n, n)` or `(n,)` for all matrices, or `(*lead, n, n)`, one for each.
        size: `n`.
        lead: leading dimensions of the weight.
        damping: fraction of the mean diagonal that is added.
        like: tensor of the dtype and device to compute in.
        name: `"rows"` or `"columns"`, for errors.

    Raises:
        ShapeError: another shape.
        NonFiniteError: NaN or infinity.
    """
    return None if moment is None else _damped(moment, size, lead, damping, like.dtype, like.device, name)


@remembered
def _damped(
    moment: Tensor,
    size: int,
    lead: tuple[int, ...],
    damping: float,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> Side | None:
    shapes = {(size,), (size, size), (*lead, size, size)}
    if tuple(moment.shape) not in shapes:
        raise ShapeError(
            f"The moment {name}= has shape {tuple(moment.shape)}; this weight needs one of "
            f"{', '.join(map(str, sorted(shapes, key=len)))}."
        )
    check_finite(moment, f"The moment {name}=")
    if not bool(moment.any()):
        return None
    moment = moment.to(device, dtype)
    if moment.ndim == 1:
        return Side((moment + damping * moment.mean())[None])
    moment = moment.reshape(-1, size, size)
    moment = (moment + moment.mT).mul_(0.5)  # accumulated in single precision: symmetric up to rounding
    mean = moment.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # a stack may hold experts that saw nothing
    moment.diagonal(dim1=1, dim2=2).add_(damping * mean)
    return Side(moment)


def loss_increase(error: Tensor, rows: Side | None, columns: Side | None) -> Tensor:
    """Compute `1/2 tr(R E C E^T)` of `error: (stack, out, in)`, shape `(stack,)`; None is the identity."""
    left = error if rows is None else rows.times(error)
    right = error if columns is None else columns.times(error.mT).mT
    return 0.5 * (left * right).sum((1, 2), dtype=torch.float64)
