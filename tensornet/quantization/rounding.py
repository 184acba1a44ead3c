"""Round a matrix to a number format: to nearest, or with one-sided or two-sided error feedback.

With scales `s`, error feedback lowers the loss increase from `s^2/24 tr R tr C` to `s^2/24 tr D_R tr D_C`
(`feedback` defines `D`). But it moves some elements out of the range of the grid, where they are clamped. So
methods with less feedback are tried too in small matrices, and the result with the smallest loss is kept for
each matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.damping import COLUMN_DAMPING, ROW_DAMPING
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.quantization.descent import descend
from tensornet.quantization.feedback import Grid, round_with_feedback
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.moments import (
    Moment,
    damped_moment,
    loss_increase,
    rounding_dtype,
)
from tensornet.quantization.scales import refit_scales, refits_final_scales, search_scales

#: Rounding methods, from no error feedback to feedback along inputs and outputs (see `round_weight`).
Rounding = Literal["nearest", "one_sided", "two_sided"]
#: The values of `Rounding`, in the order of increasing feedback.
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

#: Smallest number of rows for which losses of one-sided rounding are estimated from the diagonal of R.
_ESTIMATED_ROWS = 256
#: Largest number of rows for which methods with less feedback are tried too, if the full moment of the inputs
#: is known. Of 104 larger matrices of two trained models, in 2 to 8 bits, only one had a smaller loss without
#: feedback between rows, by 0.3 %, and none without any feedback.
_FEW_ROWS = 64
#: Number of rows that are rounded at a time if rows are independent.
_ROWS = 8192
#: Number of rows that coordinate descent processes at a time, in stacks of small matrices.
_DESCENT_ROWS = 2048


@dataclass(frozen=True)
class RoundedWeight:
    """Codes and scales of a rounded matrix or stack of matrices.

    Args:
        codes: codes in `torch.uint8`, shape `(..., out, in)`.
        scales: scales in the dtype of the format, or in float32 if they are integers times steps, shape
            `(..., out, groups)`.
        minima: minima in float32, shape `(..., out, groups)`; None without them.
        number_format: the number format.
        rounding: the best rounding method for each matrix of the stack. The rows of a large matrix are
            rounded in parts; then it is the method with the most feedback among the parts.
        loss_increase: exact loss increase `1/2 tr(R E C E^T)` under the damped moments, shape `(...)`.

    Example:
        >>> from tensornet.quantization import NumberFormat, round_weight
        >>> rounded = round_weight(torch.randn(16, 64), NumberFormat.parse("int4"))
        >>> rounded.codes.dtype, rounded.nbytes, rounded.dequantize().shape
        (torch.uint8, 544, torch.Size([16, 64]))
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None
    number_format: NumberFormat
    rounding: tuple[Rounding, ...]
    loss_increase: Tensor

    @property
    def nbytes(self) -> int:
        """Number of bytes in packed form, including scales and minima."""
        return self.number_format.nbytes(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convert the codes to values, shape `(..., out, in)`."""
        return self.number_format.decode(self.codes, self.scales, self.minima, dtype)


class _Solution(NamedTuple):
    """Rounded stack of matrices.

    Args:
        codes: codes (or levels) as floating-point numbers, shape `(stack, out, in)`.
        scales: scales, shape `(stack, out, groups)`.
        loss: loss increase, shape `(stack,)`.
        way: rounding method as an index of `ROUNDINGS`, shape `(stack,)`.
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
    """Round a weight to an integer format with a small loss increase `1/2 tr(R E C E^T)`.

    Args:
        weight: matrix of shape `(out, in)` or stack of shape `(..., out, in)`. For the dtype of computations
            see `rounding_dtype`.
        number_format: integer format or its name.
        rows: moment `R` of the gradients at the outputs: shape `(out, out)` or `(out,)` for all matrices, or
            `(..., out, out)` for each. If absent or zero, it is the identity.
        columns: moment `C` of the inputs, in shapes as for `rows`.
        rounding: the method with the most feedback; with at most 64 rows, methods with less feedback are
            tried too. `"nearest"` has no feedback. `"one_sided"` (GPTQ, LDLQ) has feedback along the inputs,
            or along the outputs if only `rows` is a full moment. `"two_sided"` has feedback along both.
            Feedback along inputs or outputs needs their full moment; without it, less feedback is used.
        row_damping: fraction of the mean diagonal of `R` that is added to its diagonal. Use 0 if `R` is
            damped already.
        column_damping: fraction of the mean diagonal of `C` that is added to its diagonal.
        refits: how many times scales are refitted and codes are rounded again; 0 with minima.
        sweeps: number of sweeps of coordinate descent afterwards.

    Raises:
        FormatError: the format is not an integer format or needs rows of another length, or the weight is
            complex.
        NonFiniteError: the weight or a moment contains NaN or infinity.
        ShapeError: a moment has the wrong shape, or `rounding` is unknown.

    Reference:
        Frantar et al. 2023, "GPTQ"; Tseng et al. 2025, "Model-preserving adaptive rounding" (two-sided).

    Example:
        >>> from tensornet.quantization import round_weight
        >>> inputs = torch.randn(100, 64)
        >>> rounded = round_weight(torch.randn(8, 64), "int4", columns=inputs.T @ inputs / 100)
        >>> rounded.rounding, rounded.nbytes, rounded.dequantize().shape
        (('one_sided',), 272, torch.Size([8, 64]))
    """
    # 1. Reshape the weight to a stack of matrices, and damp the moments.
    number_format = NumberFormat.parse(number_format)
    number_format.check_real(weight)
    if weight.ndim < 2:
        raise ShapeError(f"round_weight needs a matrix (..., out, in), got shape {tuple(weight.shape)}.")
    if weight.numel() == 0:
        return _nothing(weight, number_format)
    check_finite(weight, "The weight")
    lead, dtype = tuple(weight.shape[:-2]), rounding_dtype(weight, rows, columns)
    out, size = weight.shape[-2:]
    groups = (*weight.shape[:-1], number_format.groups(size))
    like = weight.new_empty(0, dtype=dtype)
    r = damped_moment(rows, out, lead, row_damping, like, "rows")
    c = damped_moment(columns, size, lead, column_damping, like, "columns")
    run = number_format.points.run
    c = None if c is None else c.in_runs(run)
    # In runs, there is feedback between rows only if there is feedback between columns.
    alone = run > 1 and (c is None or not c.full)
    ways = possible_roundings(rounding, None if alone else r, c, out)

    # 2. Round the rows in parts, which need less memory, unless there is feedback between rows.
    together = r is not None and r.full
    parts: list[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]] = []
    for work in weight.detach().reshape(-1, out, size).split(out if together else _ROWS, dim=1):
        start = sum(part[0].shape[1] for part in parts)
        seen = r if r is None or together else Moment(r.diagonal[:, start : start + work.shape[1]])
        parts.append(_rounded(work.to(dtype), number_format, seen, c, ways, refits, sweeps))
    codes, scales, minima, losses, found = map(list, zip(*parts, strict=True))
    return RoundedWeight(
        torch.cat(codes, 1).reshape(weight.shape),
        torch.cat(scales, 1).reshape(groups),
        None if minima[0] is None else torch.cat(minima, 1).reshape(groups),
        number_format,
        tuple(ROUNDINGS[k] for k in torch.stack(found).amax(0).tolist()),
        torch.stack(losses).sum(0).reshape(lead),
    )


def _rounded(
    work: Tensor,
    number_format: NumberFormat,
    r: Moment | None,
    c: Moment | None,
    ways: Sequence[Rounding],
    refits: int,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Round a stack of matrices (see `round_weight`).

    Args:
        work: matrices in the dtype of computations, shape `(stack, out, in)`.
        number_format, refits, sweeps: see `round_weight`.
        r, c: damped moments of the gradients and of the inputs.
        ways: rounding methods to try, in the order of increasing feedback.

    Returns:
        Codes, scales, minima or None, the loss increase of each matrix, and its rounding method as an
        index of `ROUNDINGS`.
    """
    stack, out, size = work.shape
    dtype = work.dtype

    # 1. Find the scale and the minimum of each group. They belong together, so scales are not refitted if
    # there are minima.
    start, minima = search_scales(work, number_format, importance(c, ways[-1]))
    ratios = None if minima is None else number_format.ratios(start.to(dtype), minima.to(dtype))
    zero = number_format.points.center if ratios is None else number_format.spread(ratios, size)
    refits = refits if minima is None else 0
    final = refits_final_scales(number_format)

    def grid(scales: Tensor) -> Grid:
        return Grid.of(number_format, number_format.spread(scales.to(dtype), size), zero)

    def rounded(scales: Tensor, way: Rounding, seen: Moment | None = r) -> _Solution:
        along = fed_back(way, r, c)
        codes, losses = round_with_feedback(work, scales, ratios, number_format, *along)
        across = seen if along[0] is None else c  # the moment without feedback
        if way == "two_sided" and losses is not None:
            loss = 0.5 * losses
        elif losses is None or (across is not None and across.full):
            loss = loss_increase(work - grid(scales).values(codes), seen, c)
        else:
            losses = losses if across is None else losses * across.diagonal
            loss = 0.5 * losses.sum(1, dtype=torch.float64)
        return _Solution(codes, scales, loss, torch.full((stack,), ROUNDINGS.index(way), device=work.device))

    # 2. Round with each method, and keep the solution with the smallest loss for each matrix. Two-sided
    # rounding, the slowest method, is tried only after the scales are refitted. Until then, errors of
    # different rows are independent, and the diagonal of R is sufficient to estimate losses.
    later = refits > 0 and ways[-1] == "two_sided"
    estimates = later and r is not None and out >= _ESTIMATED_ROWS
    seen = Moment(r.diagonal) if estimates and r is not None else r
    tried = (ways[:-1] or ["one_sided"]) if later else ways
    best = _best([rounded(start, way, seen) for way in tried])

    # 3. Refit the scales to the best codes by least squares under C, and round again with the new scales.
    def refitted(solution: _Solution) -> Tensor:
        moment = None if c is None else c.values[0] if c.values.ndim == 2 else c.values
        return number_format.storable(refit_scales(work, solution.codes - zero, number_format, moment))

    def keep_codes(scales: Tensor) -> list[_Solution]:
        if not final:
            return []
        loss = loss_increase(work - grid(scales).values(best.codes), seen, c)
        return [best._replace(scales=scales, loss=loss)]

    for k in range(refits):
        scales = refitted(best)
        # Methods with less feedback are tried again only if they were the best for some matrix.
        before = [] if later and k == 0 else [w for w in ways[:-1] if ROUNDINGS.index(w) in best.way.tolist()]
        best = _best([best, *keep_codes(scales), *(rounded(scales, way) for way in (*before, ways[-1]))])
    if final:
        best = _best([best, *keep_codes(refitted(best))])
    if estimates and bool((best.way < ROUNDINGS.index("two_sided")).any()):
        best = best._replace(loss=loss_increase(work - grid(best.scales).values(best.codes), r, c))

    # 4. Lower the exact loss increase by coordinate descent.
    if sweeps:
        # Scales stay if minima would not fit others, or if they have just been refitted to the codes.
        refit = minima is None and not final
        best = _best([best, _descended(best, work, number_format, zero, r, c, sweeps, refit=refit)])
    return number_format.points.to_codes(best.codes), best.scales, minima, best.loss, best.way


def possible_roundings(
    most: Rounding, rows: Moment | None, columns: Moment | None, out: int
) -> Sequence[Rounding]:
    """List the rounding methods to try for matrices of `out` rows, in the order of increasing feedback.

    They are those up to `most` that the moments allow; for more than `_FEW_ROWS` rows, only the last of them.

    Raises:
        ShapeError: `most` is not a value of `Rounding`.
    """
    if most not in ROUNDINGS:
        raise ShapeError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {most!r}.")
    full = sum(moment is not None and moment.full for moment in (rows, columns))
    ways = ROUNDINGS[: 1 + min(ROUNDINGS.index(most), full)]
    return ways[-1:] if out > _FEW_ROWS and columns is not None and columns.full else ways


def importance(columns: Moment | None, way: Rounding) -> Tensor | None:
    """Weight the squared errors of each column for the search of scales, shape `(stack or 1, 1, in)`.

    Without feedback, the weights are `C_jj`. With feedback, only the residual counts, with the weight `D_j`.
    But the search does not know the feedback, and sees the errors of the weights themselves. The geometric
    mean of `C_jj` and `D_j` was better than both for trained language models.
    """
    if columns is None:
        return None
    if way == "nearest" or not columns.full:
        return columns.diagonal[:, None, :]
    kept = columns.feedback[1].gather(1, columns.order.argsort(1))
    return (columns.diagonal * kept).sqrt()[:, None, :]


def fed_back(
    way: Rounding, rows: Moment | None, columns: Moment | None
) -> tuple[Moment | None, Moment | None]:
    """Select the moments for feedback. One-sided rounding uses `columns` if full, otherwise `rows`."""
    if way == "nearest":
        return None, None
    if way == "two_sided":
        return rows, columns
    return (None, columns) if columns is not None and columns.full else (rows, None)


def _best(solutions: Sequence[_Solution]) -> _Solution:
    """Select the solution with the smallest loss increase for each matrix; the first if several are equal."""
    best = solutions[0]
    for other in solutions[1:]:
        better = other.loss < best.loss
        if len(better) == 1:  # nothing needs to be copied
            best = other if bool(better) else best
            continue
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
    *,
    refit: bool,
) -> _Solution:
    stack, out, size = weight.shape

    def moments(moment: Moment | None, some: slice, n: int) -> Tensor:
        values = weight.new_ones(1, n) if moment is None else moment.values
        return values[some] if len(values) > 1 else values.expand(len(weight[some]), *values.shape[1:])

    codes, scales, loss = solution.codes.clone(), solution.scales.clone(), solution.loss.clone()
    step = max(1, _DESCENT_ROWS // out)
    for start in range(0, stack, step):
        some = slice(start, start + step)
        inner = moments(columns, some, size)
        codes[some], scales[some], loss[some] = descend(
            weight[some],
            codes[some],
            scales[some],
            zero[some] if isinstance(zero, Tensor) else zero,
            number_format,
            moments(rows, some, out),
            inner if inner.ndim == 3 else torch.diag_embed(inner),
            sweeps,
            solution.loss[some],
            refit=refit,
        )
    return _Solution(codes, scales, loss, solution.way)


def _nothing(weight: Tensor, number_format: NumberFormat) -> RoundedWeight:
    groups = (*weight.shape[:-1], number_format.groups(weight.shape[-1]))
    codes = weight.new_zeros(weight.shape, dtype=torch.uint8)
    scales = number_format.storable(weight.new_zeros(groups))
    minima = None if number_format.minima is None else scales.clone()
    nothing = weight.new_zeros(weight.shape[:-2], dtype=torch.float64)
    return RoundedWeight(codes, scales, minima, number_format, ROUNDINGS[:1] * nothing.numel(), nothing)
