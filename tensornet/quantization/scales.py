"""Search and refit the scales and minima of groups.

The search minimizes `sum_j c_j (w_j - q_j)^2` for every group, with weights `c` such as the diagonal of `C`.
It tries several ranges, since clamping a few elements is often better than a coarse grid. The refit minimizes
`(w - q) C (w - q)^T` for given codes, over all scales of a row together.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite, safe_scale
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization.formats import NumberFormat

#: With minima, smallest and largest fraction of both ends of the range, and number of fractions to try.
_MINIMUM_ENDS, _MINIMUM_TRIED = {2: (0.4, 1.0), 4: (0.7, 1.0), 5: (0.8, 1.0)}, 5
#: Number of alternations of rounding and weighted least squares after the search.
_POLISHED = 2
#: Largest number of bits of a code for `refits_final_scales`.
_REFITTED_BITS = 3
#: Number of rows that `refit_scales` processes at a time. They fit into the cache, and a row of 14,336 inputs
#: in groups of 16 has a system of 896 equations.
_REFITTED_ROWS = 64
#: Number of elements that are processed at a time in the search. On a CPU, it is small, so that they fit into
#: the cache; on other devices, it only limits memory.
_CACHED, _CHUNK = 1 << 16, 1 << 22
#: Scales may be out of range in groups that together have at most this fraction of the matrix's weighted sum
#: of squares. Losing this fraction would cause the same relative error as rounding to 8 bits.
_NEGLIGIBLE = 1e-4
#: Number of inputs in the smallest groups; all larger groups consist of these.
_SMALL_GROUP = 16


@torch.no_grad()
def search_scales(
    weight: Tensor, number_format: NumberFormat, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Find a scale, and a minimum if the format has minima, for each group so that its error is small.

    Args:
        weight: matrices, shape `(..., out, in)`.
        number_format: integer format.
        importance: factor of the squared error of each element, broadcastable to the weight; usually the
            diagonal of the input moment, shape `(in,)`; see `rounding.importance`. If absent, all factors are
            equal.

    Returns:
        Scales in the dtype of the format, and minima in float32 or None, shape `(..., out, groups)`. A
        negative scale mirrors the grid, which may have one more value below zero than above.

    Raises:
        NonFiniteError: the weight or the importance contains NaN or infinity.
        ShapeError: the weight has fewer than two dimensions.
    """
    if weight.ndim < 2:
        raise ShapeError(f"Scales are searched for matrices (..., out, in), got shape {tuple(weight.shape)}.")
    check_finite(weight, "The weight")
    size, work = weight.shape[-1], weight if weight.dtype == torch.float64 else weight.float()
    if importance is None:
        importance = work.new_ones(1)
    check_finite(importance, "The importance of the elements")
    importance = importance.to(work)
    flat = work.reshape(-1, size)
    step = max(1, (_CACHED if flat.is_cpu else _CHUNK) // size)
    # Usually all rows share the importance of their elements.
    by_row = importance.shape[:-1].numel() > 1
    shared = (
        importance.expand(weight.shape).reshape(flat.shape)
        if by_row
        else importance.reshape(-1).expand(step, size)
    )

    def by_group(x: Tensor) -> Tensor:
        """Make each group a column, so that sums and products are vectorized over groups."""
        # Padding gets an importance of zero, since not every grid can represent zero.
        return number_format.grouped(x).flatten(0, 1).T.contiguous()

    weights = None if by_row else by_group(shared)
    scales, ratios, totals = [], [], []
    for start in range(0, len(flat), step):
        part = by_group(flat[start : start + step])
        seen = by_group(shared[start : start + step]) if weights is None else weights[:, : part.shape[1]]
        scale, ratio = _search(part, number_format, seen)
        scales.append(scale)
        ratios.append(ratio)
        totals.append(seen.sum(0))
    shape = (*weight.shape[:-1], number_format.groups(size))
    found, weight_of = torch.cat(scales).reshape(shape), torch.cat(totals).reshape(shape)
    stored = number_format.storable(found, weight_of)
    if number_format.minima is None:
        return stored, None
    minima = torch.where(stored == 0, 0.0, found * torch.cat(ratios).reshape(shape))
    return stored, number_format.minima.storable(minima, weight_of)


def _search(flat: Tensor, number_format: NumberFormat, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Find the best scale, and the ratio of minimum and scale, of each group, shape `(groups,)`.

    A group is a column of `flat`. Without minima, ratios are zero.
    """
    against, shifted = -flat, number_format.minima is not None
    best_scale = flat.new_zeros(flat.shape[1])
    best_ratio = torch.zeros_like(best_scale)
    best_cost = (flat * flat).mul_(importance).sum(0)
    buffer, better = torch.empty_like(flat), torch.empty_like(best_scale)

    def points(scale: Tensor, ratio: Tensor) -> Tensor:
        """Round each element to the grid, in units of the scale."""
        found = torch.div(flat, torch.where(scale == 0, 1.0, scale), out=buffer)
        if shifted:
            return number_format.points.searched(found.add_(ratio)).sub_(ratio)
        return number_format.points.searched(found)

    def offer(scale: Tensor, ratio: Tensor) -> None:
        """Adopt the given scale and ratio in the groups where their error is the smallest so far."""
        error = torch.addcmul(against, points(scale, ratio), scale, out=buffer)
        cost = error.mul_(error).mul_(importance).sum(0)
        # Interpolation with the weights 0 and 1 is exact, and several times as fast as `torch.where`.
        torch.lt(cost, best_cost, out=better)
        best_scale.lerp_(scale, better)
        torch.minimum(best_cost, cost, out=best_cost)
        if shifted:
            best_ratio.lerp_(ratio, better)

    for scale, ratio in (_with_minima if shifted else _candidates)(flat, number_format):
        offer(scale, ratio)
    for _ in range(_POLISHED):  # fit the scale to the codes by least squares
        found = points(best_scale, best_ratio)
        weighed = found * importance
        if shifted:  # fit the minimum too
            found = found + best_ratio
            weighed = found * importance
            total, mean = importance.sum(0).clamp_min(1e-30), weighed.sum(0)
            value = (importance * flat).sum(0)
            size = total * (weighed * found).sum(0) - mean * mean
            fitted = (total * (weighed * flat).sum(0) - mean * value) / torch.where(size > 0, size, 1.0)
            fitted = torch.where(size > 0, fitted.clamp_min_(0), best_scale)
            least = (fitted * mean - value) / total
            offer(fitted, (least / torch.where(fitted > 0, fitted, 1.0)).clamp_min_(0))
            continue
        size = (weighed * found).sum(0)
        fitted = (weighed * flat).sum(0) / torch.where(size > 0, size, 1.0)
        offer(number_format.scales.early(torch.where(size > 0, fitted, best_scale)), best_ratio)
    return best_scale, best_ratio


def _with_minima(flat: Tensor, number_format: NumberFormat) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scales, and ratios of minima and scales, that cover various fractions of each group's range."""
    low, high = flat.amin(0).clamp_max(0), flat.amax(0).clamp_min(0)
    ends = torch.linspace(*_MINIMUM_ENDS[number_format.points.bits], _MINIMUM_TRIED).tolist()
    for lower in ends:
        for upper in ends:
            scale = (upper * high - lower * low) / number_format.points.top
            yield scale, -lower * low / torch.where(scale > 0, scale, 1.0)


def _candidates(flat: Tensor, number_format: NumberFormat) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scales with which the grid covers various fractions of each group's range, and ratios of zero."""
    low, high = flat.amin(0).clamp_max(0), flat.amax(0).clamp_min(0)
    points, scales, nothing = number_format.points, number_format.scales, torch.zeros_like(low)
    whole = torch.where(high > -low, high, low) / points.lowest
    tried = scales.early(points.ranges(scales.least_range, flat)[:, None] * whole)
    for scale in _distinct(tried) if scales.dtype.itemsize == 1 else tried:
        for sign in (1,) if points.symmetric else (1, -1):  # a negative scale mirrors the grid
            yield sign * scale, nothing
    for scale in points.scales_of_even(flat):
        yield scale, nothing


def _distinct(scales: Tensor) -> Tensor:
    """Remove duplicate scales: of 24 scales rounded to 8 bits, only a few are distinct.

    Args:
        scales: scales, shape `(tried, groups)`, sorted in every group.

    Returns:
        Shape `(kept, groups)`. A group with fewer distinct scales repeats its last scale.
    """
    place = torch.zeros(scales.shape, dtype=torch.int64, device=scales.device)
    torch.cumsum(scales[1:] != scales[:-1], 0, out=place[1:])
    found = scales[-1:].repeat(int(place[-1].max()) + 1, 1)
    return found.scatter_(0, place, scales)


def refits_final_scales(number_format: NumberFormat) -> bool:
    """Return True if scales are refitted to the final codes, without rounding the codes again.

    This lowers the loss increase by 2 to 6 % for codebooks of few levels, and hardly for others.
    """
    return number_format.points.run > 1 and number_format.points.bits <= _REFITTED_BITS


@torch.no_grad()
def refit_scales(
    weight: Tensor,
    points: Tensor,
    number_format: NumberFormat,
    columns: Tensor | None = None,
) -> Tensor:
    """Fit the scales to given codes by least squares under the input moment, all scales of a row together.

    Args:
        weight: matrices, shape `(..., out, in)`.
        points: codes minus `Points.center`, or levels, shape `(..., out, in)`.
        number_format: integer format.
        columns: moment of the inputs, shape `(..., in, in)`, or `(in,)` if diagonal; the identity if absent.

    Returns:
        Scales in the dtype of the weight, shape `(..., out, groups)`; zero if all points of a group are zero.

    Raises:
        NonFiniteError: the weight, the points or the moment contains NaN or infinity.
    """
    for tensor, name in ((weight, "The weight"), (points, "The points"), (columns, "The input moment")):
        if tensor is not None:
            check_finite(tensor, name)
    size = weight.shape[-1]
    if columns is None or columns.ndim == 1:
        weighed = points if columns is None else points * columns
        normal = number_format.grouped(weighed * points).sum(-1)
        right = number_format.grouped(weighed * weight).sum(-1)
        return torch.where(normal > 0, right / torch.where(normal > 0, normal, 1.0), 0.0)
    width, groups, span = number_format.group or size, number_format.groups(size), number_format.span or size
    solved = []
    for some, targets in zip(points.split(_REFITTED_ROWS, -2), weight.split(_REFITTED_ROWS, -2), strict=True):
        normal = some.new_zeros(*some.shape[:-1], groups, groups)
        for group in range(groups):  # the matrices are symmetric
            first = group * width // span * span
            part, later = slice(group * width, (group + 1) * width), slice(first, None)
            seen = (some[..., part] @ columns[..., part, later]).mul_(some[..., later])
            normal[..., group, first // width :] = number_format.grouped(seen).sum(-1)
        normal = normal.triu() + normal.triu(1).mT
        right = number_format.grouped((targets @ columns).mul_(some)).sum(-1)
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        # Regularize the system, so that groups of zeros and linearly dependent groups get finite scales.
        shift = torch.where(diagonal > 0, 8 * torch.finfo(normal.dtype).eps * diagonal, 1.0)
        found = torch.linalg.solve(normal + torch.diag_embed(shift), right)
        solved.append(torch.where(diagonal > 0, found, 0.0))
    return torch.cat(solved, -2)


@torch.no_grad()
def scale_fault(
    weight: Tensor, number_format: NumberFormat, weighting: Weighting | None = None
) -> Literal["underflow", "overflow"] | None:
    """Tell whether scales of important groups are too small or too large for their dtype.

    A scale that is too small has fewer than two bits of precision, or is rounded to zero.

    Args:
        weight: matrix, shape `(out, in)`.
        number_format: number format; the result is None for floating-point formats.
        weighting: sensitivity of the loss to errors of the weight; the diagonals of its moments give the
            importance of each element. If absent, all elements are equally important.
    """
    if not number_format.is_integer:
        return None
    points, scales, shifted = number_format.points, number_format.scales, number_format.minima is not None
    ranges = group_ranges(weight, number_format.group, shifted).double()
    steps = ranges / (points.top if shifted else -points.lowest)
    small, large = steps < scales.accurate, steps > scales.largest
    if not bool((small | large).any()):
        return None
    divisor, seen, found = safe_scale(weight), weighting or Weighting(), []
    step = max(1, _CHUNK // weight.shape[1])  # all rows in double precision may need too much memory
    for some in (slice(start, start + step) for start in range(0, len(weight), step)):
        energy = (weight[some].double() / divisor).square_()
        for moment, part, axis in ((seen.rows, some, 1), (seen.columns, slice(None), 0)):
            if moment is not None:
                diagonal = moment if moment.ndim == 1 else moment.diagonal()
                energy *= diagonal[part].to(energy).unsqueeze(axis)
        found.append(number_format.grouped(energy).sum(-1))
    of_groups = torch.cat(found)
    limit = _NEGLIGIBLE * float(of_groups.sum())
    if float(of_groups[large].sum()) > limit:
        return "overflow"
    return "underflow" if float(of_groups[small].sum()) > limit else None


def group_ranges(weight: Tensor, group: int | None, shifted: bool) -> Tensor:
    """Compute the largest absolute value of each group or, with shifted grids, the spread of its values."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    high, low = (x.to(dtype) for x in _extremes(weight, group))
    return high - low if shifted else torch.maximum(high, -low)


@remembered
def _extremes(weight: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Compute the largest and the smallest value of each group, shape `(..., out, groups)`."""
    if group is None or group == _SMALL_GROUP:
        groups = NumberFormat.parse("int8:row" if group is None else f"int8:g{group}").grouped(weight)
        return groups.amax(-1), groups.amin(-1)
    # The values of the smallest groups are computed once for formats with all group sizes.
    count = group // _SMALL_GROUP
    high, low = (
        torch.nn.functional.pad(x, (0, -x.shape[-1] % count)).unflatten(-1, (-1, count))
        for x in _extremes(weight, _SMALL_GROUP)
    )
    return high.amax(-1), low.amin(-1)


def storable_formats(
    weight: Tensor, number_formats: Sequence[NumberFormat], weighting: Weighting | None = None
) -> tuple[NumberFormat, ...]:
    """Replace each format whose scales would be out of range in this matrix by one with bfloat16 scales."""
    return tuple(x.wide if scale_fault(weight, x, weighting) else x for x in number_formats)
