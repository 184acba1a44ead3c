"""Second moments of the inputs and output gradients of a layer: damping, factorization, loss increase.

The loss increase of an error `E: (out, in)` is predicted as `1/2 tr(R E C E^T)`. Here `R` is the moment of
the gradients with respect to the outputs, and `C` is the moment of the inputs. Rounding damps both moments:
it adds a fraction of the mean of the diagonal to the diagonal.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite, largest_element
from tensornet.linalg.weighted_svd import cholesky

#: Rounding computes in float32 only if the binary exponents of squared weights, of moments, and of their
#: products are at most this number. It is less than 127, the largest exponent of float32, since sums exceed
#: their terms. Errors need no check of their own, since they are smaller than the weights.
_FLOAT32_EXPONENT = 80

#: Largest size of a moment for which `Moment.growth` is exact, and number of random probes for larger ones.
#: An exact growth takes twice as many operations as the factorization.
_PROBED_SIZE, _PROBES = 512, 128


@dataclass(frozen=True)
class Moment:
    """Damped second moments of the rows or of the columns of a stack of matrices, with cached factors.

    Args:
        values: the moments, shape `(stack or 1, n, n)`, or their diagonal, shape `(1, n)`.
        run: number of neighbouring rows or columns that stay together in the order of rounding.
    """

    values: Tensor
    run: int = 1

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of the moments, shape `(stack or 1, n)`."""
        return self.values if self.values.ndim == 2 else self.values.diagonal(dim1=1, dim2=2)

    @property
    def full(self) -> bool:
        """True if off-diagonal elements are known; error feedback needs them."""
        return self.values.ndim == 3

    def times(self, matrix: Tensor) -> Tensor:
        """Multiply a stack of matrices by the moment from the left."""
        return self.values @ matrix if self.full else self.values[:, :, None] * matrix

    @cached_property
    def order(self) -> Tensor:
        """Order of rounding: indices by descending diagonal, shape `(stack or 1, n)`.

        The last element compensates for the errors of all others, so it should be the least sensitive. Runs
        are sorted by the sum of their diagonal.
        """
        sums = self.diagonal.unflatten(1, (-1, self.run)).sum(2)
        order = sums.argsort(dim=1, descending=True, stable=True)
        return (order[..., None] * self.run + torch.arange(self.run, device=order.device)).flatten(1)

    def in_runs(self, run: int) -> "Moment":
        """Return the same moment with an order that keeps runs of neighbouring rows or columns together."""
        return self if run == self.run else self._by_run.setdefault(run, Moment(self.values, run))

    @cached_property
    def _by_run(self) -> "dict[int, Moment]":
        return {}

    @cached_property
    def feedback(self) -> tuple[Tensor, Tensor]:
        """Factor `M = U D U^T`, with the rows and columns of `M` in the order of rounding.

        `U` is unit upper triangular.

        Returns:
            `U` without its diagonal, shape `(stack or 1, n, n)`, and `D`, shape `(stack or 1, n)`.

        Raises:
            ShapeError: the moment is not positive definite.
        """
        backward = self.order.flip(1)
        # Permute whole rows first; indexing single elements would take as long as the factorization.
        chosen = zip(self.values, backward, strict=True)
        sorted_values = [x.index_select(0, places).index_select(1, places) for x, places in chosen]
        lower, positive = cholesky(
            sorted_values[0][None] if len(sorted_values) == 1 else torch.stack(sorted_values)
        )
        del sorted_values  # moments may be as large as all other tensors together, so few copies are kept
        if not positive:
            raise ShapeError(
                "A second moment is not positive definite, even with damping. Check that it is a sum of "
                "x x^T, or raise the damping."
            )
        size, dtype = lower.diagonal(dim1=1, dim2=2).clone(), self.values.dtype
        # LAPACK returns columns that are contiguous; of these, `tril_` is much faster than `triu_`.
        unit = lower.div_(size[:, None, :]).to(dtype).flip(1, 2).mT.tril_(-1).mT
        return unit, size.square().flip(1).to(dtype)

    @cached_property
    def feedback_between_runs(self) -> tuple[Tensor, Tensor]:
        """Factors for feedback between runs: `feedback`, with identity blocks for the runs.

        Let `U_b` and `D_b` be the blocks of a run on the diagonals of `U` and `D`.

        Returns:
            `U`, in which the columns of each run are divided by `U_b`, shape `(stack or 1, n, n)`; its blocks
            on and below the diagonal are not used. `U_b D_b^1/2` of every run, shape `(stack or 1, n / run,
            run, run)`.
        """
        (unit, kept), run = self.feedback, self.run
        inner = unit.unflatten(1, (-1, run)).unflatten(3, (-1, run)).diagonal(0, 1, 3).permute(0, 3, 1, 2)
        inner = inner + torch.eye(run, dtype=unit.dtype, device=unit.device)
        by_run = unit.unflatten(2, (-1, run)).transpose(1, 2)  # shape: (stack or 1, runs, n, run)
        divided = torch.linalg.solve_triangular(inner, by_run, upper=True, left=False, unitriangular=True)
        return divided.transpose(1, 2).flatten(2), inner * kept.sqrt().unflatten(1, (-1, 1, run))

    @cached_property
    def growth(self) -> Tensor:
        """Variance of each error divided by the variance of its rounding residual, `D_i (M^-1)_ii`.

        Shape `(stack or 1, n)`, in the order of rounding. For large moments, this is an unbiased estimate.
        """
        # M^-1 = U^-T D^-1 U^-1, and the diagonal of U^-1 is 1. So the growth is 1 plus a sum of squares. For
        # a large moment, the sum is estimated from random probes.
        unit, kept = self.feedback
        size = unit.shape[1]
        if size <= _PROBED_SIZE:
            probes = torch.eye(size, dtype=unit.dtype, device=unit.device)
        else:
            generator = torch.Generator().manual_seed(0)
            probes = torch.randn(size, _PROBES, generator=generator).to(unit) / _PROBES**0.5
        probes = kept.rsqrt()[:, :, None] * probes
        solved = torch.linalg.solve_triangular(unit.mT, probes, upper=False, unitriangular=True)
        return 1 + kept * (solved - probes).square().sum(2)


def rounding_dtype(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> torch.dtype:
    """Choose the dtype in which the rounding of a weight is computed.

    It is float64 for float64 weights, and if squared weights, moments or their products could leave the range
    of float32; otherwise float32.

    Args:
        weight: matrix or stack of matrices.
        rows, columns: moments of the gradients and of the inputs, or None.
    """
    if weight.dtype == torch.float64:
        return torch.float64
    sizes = [0.0 if x is None or x.numel() == 0 else largest_element(x) for x in (weight, rows, columns)]
    square, row, column = (math.frexp(size)[1] if math.isfinite(size) else 0 for size in sizes)
    square *= 2
    exponents = (square, row, column, square + row, square + column, square + row + column)
    return torch.float64 if max(map(abs, exponents)) > _FLOAT32_EXPONENT else torch.float32


def damped_moment(
    moment: Tensor | None, size: int, lead: tuple[int, ...], damping: float, like: Tensor, name: str
) -> Moment | None:
    """Check and damp the moments of a stack of matrices; return None if they are missing or zero.

    Args:
        moment: one moment for all matrices, shape `(n, n)` or `(n,)`, or one for each matrix, shape
            `(*lead, n, n)`.
        size: number `n` of rows or columns.
        lead: leading dimensions of the weight.
        damping: fraction of the mean diagonal that is added to the diagonal.
        like: tensor whose dtype and device are used.
        name: `"rows"` or `"columns"`, for error messages.

    Raises:
        ShapeError: the moment has another shape.
        NonFiniteError: the moment contains NaN or infinity.
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
) -> Moment | None:
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
        return Moment((moment + damping * moment.mean())[None])
    moment = moment.reshape(-1, size, size)
    moment = (moment + moment.mT).mul_(0.5)  # a moment is symmetric only up to rounding
    mean = moment.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # moments of experts without tokens are zero
    moment.diagonal(dim1=1, dim2=2).add_(damping * mean)
    return Moment(moment)


def loss_increase(error: Tensor, rows: Moment | None, columns: Moment | None) -> Tensor:
    """Predict the loss increase `1/2 tr(R E C E^T)` of each matrix of `error: (stack, out, in)`.

    A moment of None is the identity.
    """
    left = error if rows is None else rows.times(error)
    right = error if columns is None else columns.times(error.mT).mT
    return 0.5 * (left * right).sum((1, 2), dtype=torch.float64)
