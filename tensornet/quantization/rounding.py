"""Rounding of a matrix to a number format at little loss increase: nearest, one-sided, two-sided.

To explain the choice: feedback lowers the loss increase from `s^2/24 tr R tr C` to `s^2/24 tr D_R tr D_C`,
but pushes some elements out of the range of their grid, where they are clamped. So each method that the given
moments allow is tried, and the cheapest is kept, matrix by matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.quantization.codes import dequantize
from tensornet.quantization.curvature import Side, loss_increase, prepare_side
from tensornet.quantization.descent import descend
from tensornet.quantization.feedback import Grid, one_sided, two_sided
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.prediction import ExpectedResiduals, expected_residuals, group_ranges
from tensornet.quantization.scales import (
    GroupScales,
    refit_scales,
    search_scales,
    spread_groups,
)

#: How much of the error of an element is fed back to those that are rounded after it.
Rounding = Literal["nearest", "one_sided", "two_sided"]

#: Shares of the mean diagonals of the output-gradient and the input moment that are added before rounding.
ROW_DAMPING, COLUMN_DAMPING = 0.1, 0.01
#: Rows from which on one-sided rounding is priced without the products of different rows, which average out.
_ESTIMATED_ROWS = 256
#: Rows of all matrices of a stack at which arithmetic takes as long as calls in descent.
_DESCENT_ROWS = 2048
#: Added to output-gradient moments that are damped already, only against singular ones.
LEAST_DAMPING = 1e-6


@dataclass(frozen=True)
class RoundedWeight:
    """Codes and scales of a rounded matrix or stack of matrices.

    Args:
        codes: `torch.uint8`, shape `(..., out, in)`.
        scales: 16-bit, shape `(..., out, groups)`.
        zeros: `torch.uint8` of the same shape; None without zero points.
        number_format: of all of them.
        methods: one for each matrix of the stack, in order: the cheapest of those that could be tried.
        predicted: loss increase expected before rounding, shape `(...)`; None unless asked for.
        loss_increase: exact loss increase `1/2 tr(R E C E^T)` under the damped moments, shape `(...)`.

    Example:
        >>> from tensornet.quantization import NumberFormat, round_weight
        >>> rounded = round_weight(torch.randn(16, 64), NumberFormat.parse("int4"))
        >>> rounded.codes.dtype, rounded.nbytes, rounded.dequantize().shape
        (torch.uint8, 544, torch.Size([16, 64]))
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    number_format: NumberFormat
    methods: tuple[Rounding, ...]
    predicted: Tensor | None
    loss_increase: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes when packed, including scales and zero points."""
        return self.number_format.nbytes(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convert the codes to values, shape `(..., out, in)`."""
        return dequantize(self.codes, self.scales, self.zeros, self.number_format, dtype)


def empty_weight(matrix: Tensor, number_format: NumberFormat) -> RoundedWeight:
    """Return the codes of a matrix without elements."""
    groups = (*matrix.shape[:-1], number_format.groups(matrix.shape[-1]))
    scales = matrix.new_zeros(groups).to(number_format.scale_dtype)
    codes = matrix.new_zeros(matrix.shape, dtype=torch.uint8)
    zeros = codes.new_zeros(groups) if number_format.zero_point else None
    nothing = matrix.new_zeros(matrix.shape[:-2], dtype=torch.float64)
    return RoundedWeight(codes, scales, zeros, number_format, (), None, nothing)


@torch.no_grad()
@outside_autocast
def round_weight(
    weight: Tensor,
    number_format: NumberFormat | str,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    rounding: Rounding = "two_sided",
    row_damping: float = ROW_DAMPING,
    column_damping: float = COLUMN_DAMPING,
    refits: int = 1,
    sweeps: int = 0,
    predict: bool = False,
) -> RoundedWeight:
    """Round a weight to an integer format with little loss increase `1/2 tr(R E C E^T)`.

    Args:
        weight: shape `(out, in)`, or `(..., out, in)` for a stack. Computed in float64 if it is that,
            else in float32.
        number_format: an integer format or its name.
        rows: moment `R` of the gradients by the outputs, `(out, out)` or `(out,)`, or one for each matrix of
            the stack, `(..., out, out)`. Missing or all zero means the identity, and no feedback between
            rows.
        columns: moment `C` of the inputs, likewise.
        rounding: the most feedback that is tried: `"nearest"` has none; `"one_sided"` (GPTQ, LDLQ) follows
            the inputs, or the outputs where only their moment is full; `"two_sided"` follows both. A side
            without a full moment has no feedback. Ways with less are tried as well, and the one of least
            loss is kept.
        row_damping: fraction of the mean diagonal of `R` that is added to it; 0 if it is damped already.
        column_damping: the same for `C`.
        refits: how often scales are refitted to the codes and codes rounded again. Where both sides are
            rounded with, the codes of the first refit are those of the cheapest other method: they fix the
            scales as well, and two-sided rounding takes most of the time.
        sweeps: rounds of descent on the exact loss increase afterwards.
        predict: also predict the loss increase.

    Raises:
        FormatError: not an integer format.
        NonFiniteError: the weight or a moment holds NaN or infinity.
        ShapeError: moments that do not fit, or another word for `rounding`.

    Example:
        >>> from tensornet.quantization import round_weight
        >>> inputs = torch.randn(100, 64)
        >>> rounded = round_weight(torch.randn(8, 64), "int4", columns=inputs.T @ inputs / 100)
        >>> rounded.methods, rounded.nbytes, rounded.dequantize().shape
        (('one_sided',), 272, torch.Size([8, 64]))
    """
    number_format = NumberFormat.parse(number_format)
    if weight.ndim < 2 or weight.numel() == 0:
        raise ShapeError(f"round_weight needs a matrix (..., out, in), got shape {tuple(weight.shape)}.")
    check_finite(weight, "The weight")
    lead = tuple(weight.shape[:-2])
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    work = weight.detach().to(dtype).reshape(-1, *weight.shape[-2:])
    problem = _Problem(
        work,
        number_format,
        prepare_side(rows, work.shape[1], lead, row_damping, work, "rows"),
        prepare_side(columns, work.shape[2], lead, column_damping, work, "columns"),
    )
    names = _roundings(rounding, problem)
    importance = None if problem.columns is None else problem.columns.diagonal[:, None, :]
    start = search_scales(work, number_format, importance)
    factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    loops = {name: problem.rounder(name, factors) for name in names}
    predicted = problem.predicted(start, loops[names[-1]]) if predict else None
    two_sided_later = refits > 0 and names[-1] == "two_sided"
    first = names[:-1] if two_sided_later else names
    estimate = two_sided_later and work.shape[1] >= _ESTIMATED_ROWS
    best = problem.cheapest([problem.solve(start, name, loops[name], estimate) for name in first])
    for k in range(refits):
        again = GroupScales(problem.refitted(best), best.scales.zeros)
        # The last of the names has most feedback; where another was cheaper, it usually stays so.
        tried = {names[-1]} if two_sided_later and k == 0 else {*best.methods, names[-1]}
        best = problem.cheapest([best, *(problem.solve(again, n, loops[n]) for n in names if n in tried)])
    if estimate and any(name in first for name in best.methods):
        best = problem.priced(best)
    if sweeps:
        best = problem.improved(best, sweeps)
    return problem.result(best, predicted, weight)


def _roundings(most: Rounding, problem: "_Problem") -> list[Rounding]:
    """List the ways to round that the moments allow, the one with most feedback last.

    Raises:
        ShapeError: another word than those of `Rounding`.
    """
    if most not in get_args(Rounding):
        raise ShapeError(f"rounding must be one of {', '.join(get_args(Rounding))}, got {most!r}.")
    full = sum(side is not None and side.couples for side in (problem.rows, problem.columns))
    return list(get_args(Rounding)[: 1 + min(get_args(Rounding).index(most), full)])


@dataclass(frozen=True)
class _Solution:
    """Rounded stack: codes, scales, loss increase `(stack,)` and method of each matrix."""

    codes: Tensor
    scales: GroupScales
    price: Tensor
    methods: tuple[Rounding, ...]


@dataclass(frozen=True)
class _Loop:
    """Rounding loop with its orders, and `D` of both sides, each `(stack or 1, n)`."""

    run: Callable[[Tensor, Grid], Tensor]
    rows: Tensor | None
    columns: Tensor | None
    row_order: Tensor | None
    column_order: Tensor | None


@dataclass(frozen=True)
class _Problem:
    """Rounding problem: weights `(stack, out, in)`, the target format, and both moments."""

    weight: Tensor
    format: NumberFormat
    rows: Side | None
    columns: Side | None

    def grid(self, found: GroupScales) -> Grid:
        """Expand scales and zero points to a grid of every element."""
        return Grid(*_spread(found, self.format, self.weight.shape[2], self.weight.dtype), self.format.top)

    def rounder(
        self, rounding: Rounding, factors: dict[str, tuple[Tensor, Tensor, Tensor]] | None = None
    ) -> _Loop:
        """Build the rounding loop of one way to round, with its moments factorised.

        Args:
            rounding: the way to round.
            factors: of both sides as far as other ways needed them; those that this one needs are added.
        """
        stack, factors = len(self.weight), {} if factors is None else factors

        # One side follows the inputs where their moment is full.
        along = "columns" if self.columns is not None and self.columns.couples else "rows"

        def factorised(name: str, side: Side | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            if rounding != "two_sided" and (rounding == "nearest" or name != along):
                return None, None, None
            assert side is not None
            if name not in factors:
                order = side.order()
                factors[name] = (order, *side.feedback(order))
            return factors[name]

        row_order, row_feedback, rows = factorised("rows", self.rows)
        column_order, column_feedback, columns = factorised("columns", self.columns)

        def run(weight: Tensor, grid: Grid) -> Tensor:
            wide = [None if x is None else x.expand(stack, -1, -1) for x in (row_feedback, column_feedback)]
            if wide[0] is not None and wide[1] is not None:
                return two_sided(weight, grid, wide[0], wide[1])
            if wide[1] is not None:
                return one_sided(weight, grid, wide[1])
            if wide[0] is not None:
                return one_sided(weight.mT, grid.transposed(), wide[0]).mT
            return grid.codes(weight)

        return _Loop(run, rows, columns, row_order, column_order)

    def solve(
        self, scales: GroupScales, rounding: Rounding, loop: _Loop, estimate: bool = False
    ) -> _Solution:
        """Round all matrices with given scales.

        Args:
            scales: of all groups.
            rounding: that the loop belongs to.
            loop: of `rounder`.
            estimate: price errors of rows as if these were independent, by the diagonal of their moment. So
                they are where no feedback couples them, and the product with the whole moment takes long.
        """
        grid = self.grid(scales)

        def ordered(x: Tensor, *, back: bool = False) -> Tensor:
            for order, axis in ((loop.row_order, 1), (loop.column_order, 2)):
                if order is not None:
                    index = (order.argsort(1) if back else order).unsqueeze(3 - axis)
                    x = x.gather(axis, index.expand(x.shape))
            return x

        zero = ordered(grid.zero) if isinstance(grid.zero, Tensor) else grid.zero
        turned = Grid(ordered(grid.scale), zero, grid.top)
        codes = ordered(loop.run(ordered(self.weight), turned), back=True)
        rows = Side(self.rows.diagonal) if estimate and self.rows is not None else self.rows
        price = loss_increase(self.weight - grid.points(codes), rows, self.columns)
        return _Solution(codes, scales, price, (rounding,) * len(codes))

    def priced(self, solution: _Solution) -> _Solution:
        """Replace estimates by the exact loss increase."""
        error = self.weight - self.grid(solution.scales).points(solution.codes)
        return replace(solution, price=loss_increase(error, self.rows, self.columns))

    def cheapest(self, solutions: list[_Solution]) -> _Solution:
        """Select the solution of least loss increase for each matrix; ties go to the first."""
        best = solutions[0]
        for other in solutions[1:]:
            better = other.price < best.price
            pick = better[:, None, None]
            zeros = best.scales.zeros
            if zeros is not None:
                assert other.scales.zeros is not None
                zeros = torch.where(pick, other.scales.zeros, zeros)
            methods = zip(better.tolist(), other.methods, best.methods, strict=True)
            best = _Solution(
                torch.where(pick, other.codes, best.codes),
                GroupScales(torch.where(pick, other.scales.scales, best.scales.scales), zeros),
                torch.where(better, other.price, best.price),
                tuple(new if take else old for take, new, old in methods),
            )
        return best

    def refitted(self, solution: _Solution) -> Tensor:
        """Refit the scales to the codes under the input moment."""
        moment = None if self.columns is None else self.columns.moment
        if moment is not None and moment.ndim == 2:
            moment = moment[0]
        points = solution.codes - self.grid(solution.scales).zero
        return _storable(refit_scales(self.weight, points, self.format, moment), self.format)

    def improved(self, solution: _Solution, sweeps: int) -> _Solution:
        """Descend on the exact loss increase, a stack of small matrices at once."""
        grid = self.grid(solution.scales)
        codes, scales = solution.codes.clone(), solution.scales.scales.clone()
        step = max(1, _DESCENT_ROWS // self.weight.shape[1])
        for start in range(0, len(codes), step):
            some = slice(start, start + step)
            weight, zero = self.weight[some], grid.zero
            codes[some], scales[some] = descend(
                weight,
                codes[some],
                scales[some],
                zero[some] if isinstance(zero, Tensor) else zero,
                self.format,
                _moments(self.rows, some, weight[:, :, 0]),
                _whole(_moments(self.columns, some, weight[:, 0])),
                sweeps,
                solution.price[some],
            )
        found = GroupScales(scales, solution.scales.zeros)
        made = self.priced(_Solution(codes, found, solution.price, solution.methods))
        return self.cheapest([solution, made])

    def result(self, solution: _Solution, predicted: Tensor | None, like: Tensor) -> RoundedWeight:
        """Reshape a solution to the shape of the original weight."""
        lead = like.shape[:-2]
        groups = (*like.shape[:-1], self.format.groups(like.shape[-1]))
        zeros = solution.scales.zeros
        return RoundedWeight(
            solution.codes.to(torch.uint8).reshape(like.shape),
            solution.scales.scales.reshape(groups),
            None if zeros is None else zeros.reshape(groups),
            self.format,
            solution.methods,
            None if predicted is None else predicted.reshape(lead),
            solution.price.reshape(lead),
        )

    def predicted(self, scales: GroupScales, loop: _Loop) -> Tensor:
        """Predict the loss increase `1/2 sum v_ij d_i e_j` from expected squares `v`, shape `(stack,)`."""
        found = self.expected(scales, loop)
        return found.loss(found.rows[0], found.columns[0])

    def expected(self, scales: GroupScales, loop: _Loop, sample: Tensor | None = None) -> ExpectedResiduals:
        """Predict the squared rounding residuals, with the weights that turn them into losses and errors.

        Args:
            scales: of all rows, or of those of the sample.
            loop: rounding loop of the method.
            sample: indices of the rows whose residuals are predicted; those of the others are scaled from
                them by the ranges of their groups. All rows if absent.
        """
        some = self if sample is None else replace(self, weight=self.weight[:, sample])
        grid = some.grid(scales)
        rows = _undone(loop.rows, loop.row_order, self.rows, self.weight, self.weight.shape[1])
        columns = _undone(loop.columns, loop.column_order, self.columns, self.weight, self.weight.shape[2])
        if loop.rows is None and loop.columns is None:
            square = (some.weight - grid.points(grid.codes(some.weight))).square_()
        else:
            growth = rows[1] if sample is None else rows[1][:, sample]
            spread = growth[:, :, None] * columns[1][:, None, :] - 1
            square = expected_residuals(some.weight, grid, spread.clamp_min_(0))
        ranges = None if sample is None else group_ranges(self.weight, self.format)
        return ExpectedResiduals(square, rows, columns, self.format, sample, ranges)


def _undone(
    kept: Tensor | None, order: Tensor | None, side: Side | None, like: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Undo the rounding order of one side; return its weights in the loss and its error growth.

    Both have shape `(stack or 1, size)`.
    """
    if kept is not None:
        assert order is not None
        assert side is not None
        back = order.argsort(1)
        return kept.gather(1, back), side.growth(order).gather(1, back)
    one = like.new_ones(1, size)
    return (one if side is None else side.diagonal), one


def _spread(
    found: GroupScales, number_format: NumberFormat, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | float]:
    """Expand scales and zero points to every element."""
    scale = spread_groups(found.scales.to(dtype), number_format, size)
    if found.zeros is None:
        return scale, number_format.center
    return scale, spread_groups(found.zeros.to(dtype), number_format, size)


def _storable(scales: Tensor, number_format: NumberFormat) -> Tensor:
    """Cast scales to their storage dtype, clamped to its range."""
    limit = torch.finfo(number_format.scale_dtype).max
    return scales.clamp(-limit, limit).to(number_format.scale_dtype)


def _moments(side: Side | None, some: slice, like: Tensor) -> Tensor:
    """Select the moments of a part of the stack, diagonals as vectors; None is the identity."""
    if side is None:
        return torch.ones_like(like)
    moment = side.moment
    return moment[some] if len(moment) > 1 else moment.expand(len(like), *moment.shape[1:])


def _whole(moments: Tensor) -> Tensor:
    return moments if moments.ndim == 3 else torch.diag_embed(moments)
