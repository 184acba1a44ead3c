"""Rounding of a matrix to a number format with small loss increase: nearest, one-sided, two-sided.

Error feedback lowers the loss increase from `s^2/24 tr R tr C` to `s^2/24 tr D_R tr D_C`, but moves some
elements out of the range of their grid, where they are clamped. So rounding with less feedback is tried as
well, and for each matrix the result with the smallest loss is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.errors import FormatError, ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.quantization.descent import descend
from tensornet.quantization.entropy import round_to_rate
from tensornet.quantization.feedback import Grid, round_with_feedback
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.moments import (
    COLUMN_DAMPING,
    ROW_DAMPING,
    Moment,
    damped_moment,
    loss_increase,
)
from tensornet.quantization.scales import refit_scales, search_scales

#: How much of the error of an element is fed back to those that are rounded after it.
Rounding = Literal["nearest", "one_sided", "two_sided"]
#: The values of `Rounding`, from the least feedback to the most.
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

#: Number of rows above which one-sided rounding is compared by the diagonal of R alone.
_ESTIMATED_ROWS = 256
#: Total number of rows of a stack for which arithmetic takes as long as calls in descent.
_DESCENT_ROWS = 2048


@dataclass(frozen=True)
class RoundedWeight:
    """Codes and scales of a rounded matrix or stack of matrices.

    Args:
        codes: `torch.uint8`, shape `(..., out, in)`.
        scales: scales in the dtype of the format, shape `(..., out, groups)`; in float32 if they are integers
            times steps.
        zeros: `torch.uint8` of the same shape; None without zero points.
        number_format: format of all of them.
        rounding: the best rounding method for each matrix of the stack.
        loss_increase: exact loss increase `1/2 tr(R E C E^T)` under the damped moments, shape `(...)`.
        column_scales: scales of the columns of an entropy-coded matrix, shape `(in,)`; else None.

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
    rounding: tuple[Rounding, ...]
    loss_increase: Tensor
    column_scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes when packed, including scales and zero points."""
        return self.number_format.nbytes(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convert the codes to values, shape `(..., out, in)`."""
        if self.column_scales is None:
            return self.number_format.decode(self.codes, self.scales, self.zeros, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        values = self.number_format.decode(self.codes, self.scales, None, wide)
        return values.mul_(self.column_scales.to(wide)).to(dtype)


class _Solution(NamedTuple):
    """Rounded stack of matrices.

    Args:
        codes: codes (or levels) as floating-point numbers, shape `(stack, out, in)`.
        scales: shape `(stack, out, groups)`.
        loss: loss increase, shape `(stack,)`.
        way: index in `ROUNDINGS`, shape `(stack,)`.
    """

    codes: Tensor
    scales: Tensor
    loss: Tensor
    way: Tensor


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
) -> RoundedWeight:
    """Round a weight to an integer format with little loss increase `1/2 tr(R E C E^T)`.

    Args:
        weight: shape `(out, in)`, or `(..., out, in)` for a stack. Computations are in float64 for float64
            weights, else in float32.
        number_format: an integer format or its name.
        rows: moment `R` of the gradients by the outputs, `(out, out)` or `(out,)`, or one for each matrix of
            the stack, `(..., out, out)`. If absent or all zero, it is the identity, without feedback between
            rows.
        columns: moment `C` of the inputs, in the same forms.
        rounding: the most feedback that is tried: `"nearest"` has none; `"one_sided"` (GPTQ, LDLQ) has
            feedback along the inputs, or along the outputs if only their moment is full; `"two_sided"` along
            both. There is no feedback along a side without a full moment.
        row_damping: fraction of the mean diagonal of `R` that is added to it; 0 if it is already damped.
        column_damping: the same for `C`.
        refits: how often scales are refitted to the codes, and codes are rounded again.
        sweeps: rounds of descent on the exact loss increase afterwards.

    Raises:
        FormatError: not an integer format, or an entropy-coded one for a stack.
        NonFiniteError: the weight or a moment contains NaN or infinity.
        ShapeError: the moments do not fit, or `rounding` has another value.

    Reference:
        Frantar et al. 2023, "GPTQ"; Tseng et al. 2025, "Model-preserving adaptive rounding" (both sides).

    Example:
        >>> from tensornet.quantization import round_weight
        >>> inputs = torch.randn(100, 64)
        >>> rounded = round_weight(torch.randn(8, 64), "int4", columns=inputs.T @ inputs / 100)
        >>> rounded.rounding, rounded.nbytes, rounded.dequantize().shape
        (('one_sided',), 272, torch.Size([8, 64]))
    """
    # 1. Make one stack of matrices, in single or double precision, and damp the moments of both sides.
    number_format = NumberFormat.parse(number_format)
    if weight.ndim < 2:
        raise ShapeError(f"round_weight needs a matrix (..., out, in), got shape {tuple(weight.shape)}.")
    if weight.numel() == 0:
        return _nothing(weight, number_format)
    check_finite(weight, "The weight")
    lead, dtype = tuple(weight.shape[:-2]), torch.float64 if weight.dtype == torch.float64 else torch.float32
    work = weight.detach().to(dtype).reshape(-1, *weight.shape[-2:])
    stack, out, size = work.shape
    r = damped_moment(rows, out, lead, row_damping, work, "rows")
    c = damped_moment(columns, size, lead, column_damping, work, "columns")
    ways = possible_roundings(rounding, r, c)
    if number_format.rate is not None:  # no code is clamped, so that the most feedback is the best
        if lead:
            raise FormatError(f"{number_format.name!r} stores one matrix, got shape {tuple(weight.shape)}.")
        coded = round_to_rate(work[0], number_format, r, c, fed_back(ways[-1], r, c))
        codes = coded.codes.to(torch.uint8)
        return RoundedWeight(
            codes, coded.scales, None, number_format, (ways[-1],), coded.loss, coded.column_scales
        )

    # 2. Find scales and zero points for each group, with elements weighted by the diagonal of C.
    start, zeros = search_scales(work, number_format, None if c is None else c.diagonal[:, None, :])
    zero = number_format.center if zeros is None else number_format.spread(zeros.to(dtype), size)

    def grid(scales: Tensor) -> Grid:
        spread = number_format.spread(scales.to(dtype), size)
        return Grid(spread, zero, number_format.top, number_format.levels(work))

    def rounded(scales: Tensor, way: Rounding, seen: Moment | None = r) -> _Solution:
        points = grid(scales)
        codes = round_with_feedback(work, points, *fed_back(way, r, c))
        loss = loss_increase(work - points.points(codes), seen, c)
        return _Solution(codes, scales, loss, torch.full((stack,), ROUNDINGS.index(way), device=work.device))

    # 3. Round with each amount of feedback, except two-sided, and keep the solution with the smallest loss
    # for each matrix. Two-sided rounding is the slowest; it is tried after the scales are refitted to
    # one-sided codes. Until then no product with the full R is needed, since rows without feedback have
    # independent errors.
    later = refits > 0 and ways[-1] == "two_sided"
    estimates = later and r is not None and out >= _ESTIMATED_ROWS
    seen = Moment(r.diagonal) if estimates and r is not None else r
    best = _best([rounded(start, way, seen) for way in (ways[:-1] if later else ways)])

    # 4. Refit the scales to these codes by least squares under C, and round again with these scales.
    for k in range(refits):
        moment = None if c is None else c.values[0] if c.values.ndim == 2 else c.values
        fitted = refit_scales(work, best.codes - zero, number_format, moment)
        scales = number_format.storable(fitted)
        # If less feedback was better for a matrix, it usually stays better.
        before = [] if later and k == 0 else [w for w in ways[:-1] if ROUNDINGS.index(w) in best.way.tolist()]
        best = _best([best, *(rounded(scales, way) for way in (*before, ways[-1]))])
    if estimates and bool((best.way < ROUNDINGS.index("two_sided")).any()):
        best = best._replace(loss=loss_increase(work - grid(best.scales).points(best.codes), r, c))

    # 5. Descend on the exact loss, a few matrices of the stack at a time.
    if sweeps:
        best = _best([best, _descended(best, work, number_format, zero, r, c, sweeps)])
    groups = (*weight.shape[:-1], number_format.groups(size))
    return RoundedWeight(
        number_format.to_codes(best.codes).reshape(weight.shape),
        best.scales.reshape(groups),
        None if zeros is None else zeros.reshape(groups),
        number_format,
        tuple(ROUNDINGS[k] for k in best.way.tolist()),
        best.loss.reshape(lead),
    )


def possible_roundings(most: Rounding, rows: Moment | None, columns: Moment | None) -> list[Rounding]:
    """List the rounding methods that the moments allow, the one with the most feedback last.

    Raises:
        ShapeError: not a value of `Rounding`.
    """
    if most not in ROUNDINGS:
        raise ShapeError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {most!r}.")
    full = sum(moment is not None and moment.full for moment in (rows, columns))
    return list(ROUNDINGS[: 1 + min(ROUNDINGS.index(most), full)])


def fed_back(
    way: Rounding, rows: Moment | None, columns: Moment | None
) -> tuple[Moment | None, Moment | None]:
    """Select the moments used for feedback; one-sided rounding prefers the inputs."""
    if way == "nearest":
        return None, None
    if way == "two_sided":
        return rows, columns
    return (None, columns) if columns is not None and columns.full else (rows, None)


def _best(solutions: Sequence[_Solution]) -> _Solution:
    """Select the solution of least loss increase for each matrix; ties go to the first."""
    best = solutions[0]
    for other in solutions[1:]:
        better = other.loss < best.loss
        pick = better[:, None, None]
        best = _Solution(
            torch.where(pick, other.codes, best.codes),
            torch.where(pick, other.scales, best.scales),
            torch.where(better, other.loss, best.loss),
            torch.where(better, other.way, best.way),
        )
    return best


def _descended(
    solution: _Solution,
    weight: Tensor,
    number_format: NumberFormat,
    zero: Tensor | float,
    rows: Moment | None,
    columns: Moment | None,
    sweeps: int,
) -> _Solution:
    """Descend on the exact loss increase, for stacks of small matrices at once."""
    stack, out, size = weight.shape

    def moments(moment: Moment | None, some: slice, n: int) -> Tensor:
        """Select the moments of a part of the stack; diagonals are vectors."""
        values = weight.new_ones(1, n) if moment is None else moment.values
        return values[some] if len(values) > 1 else values.expand(len(weight[some]), *values.shape[1:])

    codes, scales = solution.codes.clone(), solution.scales.clone()
    step = max(1, _DESCENT_ROWS // out)
    for start in range(0, stack, step):
        some = slice(start, start + step)
        inner = moments(columns, some, size)
        codes[some], scales[some] = descend(
            weight[some],
            codes[some],
            scales[some],
            zero[some] if isinstance(zero, Tensor) else zero,
            number_format,
            moments(rows, some, out),
            inner if inner.ndim == 3 else torch.diag_embed(inner),
            sweeps,
            solution.loss[some],
        )
    error = weight - (codes - zero) * number_format.spread(scales.to(weight.dtype), size)
    return _Solution(codes, scales, loss_increase(error, rows, columns), solution.way)


def _nothing(weight: Tensor, number_format: NumberFormat) -> RoundedWeight:
    """Return the codes of a matrix without elements."""
    groups = (*weight.shape[:-1], number_format.groups(weight.shape[-1]))
    codes = weight.new_zeros(weight.shape, dtype=torch.uint8)
    zeros = codes.new_zeros(groups) if number_format.zero_point else None
    scales = number_format.storable(weight.new_zeros(groups))
    nothing = weight.new_zeros(weight.shape[:-2], dtype=torch.float64)
    return RoundedWeight(codes, scales, zeros, number_format, ROUNDINGS[:1] * nothing.numel(), nothing)
