"""Recover codes and scales from weights whose values already lie on the grid of a number format.

Models are often stored as floating-point numbers although their values come from few integers and scales:
after quantization-aware training, or if a quantized file was converted back. Rounding such weights with error
feedback would move them off their grid. If the scales are found again, nothing is lost.

Which point of the grid the largest weight of a group belongs to is not known, so every point is tried. Each
one gives an approximate scale and thus the points of the other weights. A weight may have been rounded to 16
bits after it was multiplied by its scale, so it leaves an interval for the scale. The intervals of all
weights intersect in a scale that the format can store. Recovered matrices are decoded and compared with the
weights, so a matrix that is not equal in every element is never taken for one on a grid.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.rounding import ROUNDINGS, RoundedWeight

#: Number formats in which files store weights on a grid, with the names of their GGUF types; smaller
#: formats come first. Rows and groups of quantization-aware training have scales in bfloat16 or float16.
GRIDS: dict[str, str] = {
    f"int{bits}:{group}{scales}": f"Q{bits}_0" if (bits, group, scales) in kinds else ""
    for kinds in [{(4, "g32", ":float16"), (5, "g32", ":float16"), (8, "g32", ":float16")}]
    for bits in (2, 3, 4, 5, 6, 7, 8)
    for group in ("row", "g128", "g64", "g32", "g16")
    for scales in ("", ":float16")
} | {"mxfp4": "MXFP4", "nvfp4": "NVFP4", "nl4:g32:float16": "IQ4_NL"}
#: Number of groups that are tried first, since hardly any matrix lies on a grid, and of weights in each.
_PROBED, _PROBED_WEIGHTS = 8, 32
#: Number of elements, times number of points, that are tried at a time.
_CHUNK = 1 << 17
#: Every grid of `GRIDS` consists of integers of 8 bits times scales, for groups of at least 16 weights.
_FINEST = NumberFormat.parse("int8:g16")
#: Relative error of weights below which a scale that is computed from one of them is accurate enough.
_PRECISE = 1e-5
#: How many times the intervals of scales are narrowed otherwise.
_NARROWED = 3


@torch.no_grad()
@outside_autocast
def recover(weight: Tensor, number_format: NumberFormat) -> RoundedWeight | None:
    """Find codes and scales that decode to exactly the given weights.

    Args:
        weight: real matrix of shape `(out, in)`, or stack of shape `(..., out, in)`.
        number_format: number format.

    Returns:
        The codes and scales, whose values in the dtype of the weight equal all weights; None if there are
        none, or if they cannot be recovered because the format has minima or a codebook.

    Example:
        >>> from tensornet.quantization import NumberFormat, round_weight
        >>> from tensornet.quantization.grids import recover
        >>> int4 = NumberFormat.parse("int4:g32:float16")
        >>> weight = round_weight(torch.randn(8, 64), int4).dequantize(torch.bfloat16)
        >>> torch.equal(recover(weight, int4).dequantize(torch.bfloat16), weight)
        True
        >>> recover(torch.randn(8, 64), int4) is None
        True
    """
    known = number_format.is_integer and number_format.points.run == 1 and number_format.minima is None
    if not known or not weight.is_floating_point() or weight.numel() == 0 or weight.ndim < 2:
        return None
    if not number_format.fits(weight.shape[-1]) or not bool(weight.isfinite().all()):
        return None
    # Scales that share a step are rounded together at the end.
    free = number_format.scales.count > 1
    if not _probe(weight, number_format, free=free):
        return None
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    found = []
    for start in range(0, len(rows), step):
        scales = _scales(_groups(rows[start : start + step], number_format), number_format, free=free)
        if scales is None:
            return None
        found.append(scales)
    groups = (*weight.shape[:-1], number_format.groups(weight.shape[-1]))
    stored = number_format.storable(torch.cat(found).reshape(groups).float())
    codes = number_format.encode(weight.float(), stored)
    if not torch.equal(number_format.decode(codes, stored, None, weight.dtype), weight):
        return None
    nothing = torch.zeros(weight.shape[:-2], dtype=torch.float64, device=weight.device)
    return RoundedWeight(codes, stored, None, number_format, ROUNDINGS[:1] * nothing.numel(), nothing)


@torch.no_grad()
def grid_of(weight: Tensor, names: Iterable[str] = GRIDS) -> NumberFormat | None:
    """Find the smallest of some number formats on whose grid all weights of a matrix lie.

    Args:
        weight: matrix, shape `(out, in)`.
        names: names of number formats; formats with minima or a codebook are ignored.

    Returns:
        The number format in which the matrix takes the fewest bytes; None if it lies on none of the grids.

    Example:
        >>> from tensornet.quantization.grids import grid_of
        >>> scales = (0.01 * torch.rand(8, 1)).bfloat16().float()
        >>> print(grid_of(scales * torch.randint(-7, 8, (8, 256))))
        int4:row
        >>> print(grid_of(torch.randn(8, 256)))
        None
    """
    if not on_some_grid(weight):
        return None
    formats = [NumberFormat.parse(name) for name in names]
    formats = [x for x in formats if x.is_integer and x.divides(weight.shape[-1])]
    possible: dict[str, bool] = {}
    for each in sorted(formats, key=lambda x: x.nbytes(weight.shape)):
        points, _, others = each.name.partition(":")
        if points.startswith("int") and each.minima is None:
            # Integers of fewer bits are among those of 8 bits, which are tried once for all of them.
            if others not in possible:
                finer = NumberFormat.parse(f"int8:{others}" if others else "int8")
                possible[others] = _probe(weight, finer, free=finer.scales.count > 1)
            if not possible[others]:
                continue
        if recover(weight, each) is not None:
            return each
    return None


@torch.no_grad()
def on_some_grid(weight: Tensor) -> bool:
    """Return False if some groups of a matrix show that it lies on no grid of `GRIDS`; this is quick."""
    if not weight.is_floating_point() or weight.ndim != 2 or weight.numel() == 0:
        return False
    return _probe(weight, _FINEST, free=True)


def grid_name(name: str) -> str:
    """Return the name of a number format for reports, with that of the GGUF type that has this grid, if any.

    >>> from tensornet.quantization.grids import grid_name
    >>> grid_name("int4:g32:float16")
    'int4:g32:float16 (Q4_0)'
    """
    return f"{name} ({GRIDS[name]})" if GRIDS.get(name) else name


def _probe(weight: Tensor, number_format: NumberFormat, *, free: bool) -> bool:
    """Return False if some groups of a matrix show that it does not lie on a grid (see `_scales`).

    Of each group, only some weights are read, since a part of a group on a grid lies on it too.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    places = torch.linspace(0, len(rows) - 1, min(len(rows), _PROBED)).long().tolist()
    width = min(number_format.group or rows.shape[1], rows.shape[1])
    starts = range(0, rows.shape[1] - width + 1, width)
    groups = [(row, starts[k * len(starts) // len(places)]) for k, row in enumerate(places)]
    step = max(1, width // _PROBED_WEIGHTS)
    some = torch.stack([rows[row, start : start + width : step] for row, start in groups])
    return _scales(_groups(some, None), number_format, free=free) is not None


class Groups(NamedTuple):
    """Weights by group, in float64, shape `(groups, group)`.

    Args:
        values: the weights, padded with zeros.
        least, most: the smallest and the largest number that the dtype rounds to each weight; infinite for
            padding.
        dtype: dtype of the weights.
    """

    values: Tensor
    least: Tensor
    most: Tensor
    dtype: torch.dtype


def _groups(rows: Tensor, number_format: NumberFormat | None) -> Groups:
    """Divide rows of weights, shape `(rows, in)`, into groups; without a format, each row is a group."""
    values = rows.double()
    limits = torch.finfo(rows.dtype)
    mantissa, exponent = torch.frexp(values.abs())
    ulp = torch.ldexp(torch.full_like(values, limits.eps), exponent - 1)
    ulp = torch.where(values == 0, 0.0, ulp.clamp(min=limits.smallest_normal * limits.eps))
    # Below a power of two, numbers are twice as dense.
    inner = torch.where(mantissa == 0.5, ulp / 4, ulp / 2)
    least = values - torch.where(values > 0, inner, ulp / 2)
    most = values + torch.where(values < 0, inner, ulp / 2)
    if number_format is None:
        return Groups(values, least, most, rows.dtype)
    padding = number_format.grouped(torch.ones_like(values)) == 0
    least = number_format.grouped(least).masked_fill(padding, -torch.inf)
    most = number_format.grouped(most).masked_fill(padding, torch.inf)
    values, least, most = (x.flatten(0, -2) for x in (number_format.grouped(values), least, most))
    return Groups(values, least, most, rows.dtype)


def _scales(groups: Groups, number_format: NumberFormat, *, free: bool) -> Tensor | None:
    """Find a scale for each group with which all of its weights are on the grid.

    Args:
        groups: weights of each group.
        number_format: number format.
        free: whether any scale is allowed, not only those that the format can store; coarse weights are then
            not compared with the grid.

    Returns:
        The scales in float64, shape `(groups,)`; None if a group has none.
    """
    points, values = number_format.points, groups.values
    whole, divisor = points.values(torch.arange(points.top + 1, dtype=torch.uint8, device=values.device))
    levels = whole.double() / divisor
    levels = levels[levels != 0]
    levels = levels[levels.abs().argsort(descending=True, stable=True)]
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))[:, 0]
    scales = torch.zeros_like(largest)
    left = (largest != 0).nonzero()[:, 0]  # a group of zeros has a scale of zero
    start, count = 0, 1
    while len(left) and start < len(levels):
        tried = largest[left] / levels[start : start + count, None]
        some = Groups(values[left], groups.least[left], groups.most[left], groups.dtype)
        fits, found = _fitted(some, tried, number_format, free=free)
        done = fits.any(0)
        first = fits.to(torch.uint8).argmax(0, keepdim=True)
        scales[left[done]] = found.gather(0, first)[0, done]
        left, start = left[~done], start + count
        # The first points are the most likely ones. Of the others, several are tried at a time.
        count = max(1, min(2 * count, _CHUNK // max(1, len(left) * values.shape[1])))
    return scales if len(left) == 0 else None


def _fitted(
    groups: Groups, scales: Tensor, number_format: NumberFormat, *, free: bool
) -> tuple[Tensor, Tensor]:
    """Fit approximate scales to groups, and tell with which of them all weights of a group are on the grid.

    Args:
        groups, number_format, free: see `_scales`.
        scales: approximate scales to try, shape `(tried, groups)`.

    Returns:
        Whether the weights are on the grid, and the fitted scales, both of shape `(tried, groups)`.
    """
    values, least, most, dtype = groups
    center = number_format.points.center

    def nearest(scales: Tensor) -> Tensor:
        return number_format.points.nearest(values / scales[..., None] + center) - center

    # Each weight leaves an interval for the scale. Of the weights whose point is certain although neither the
    # weight nor the scale is accurate, the intervals are intersected. Then the points of more are certain.
    widths, least_gap = torch.maximum(most - values, values - least), 0.49 * _spacing(number_format)
    sizes = values.abs()
    accuracy = (widths.gather(1, sizes.argmax(1, keepdim=True)) / sizes.amax(1, keepdim=True))[:, 0]
    for _ in range(1 if float(accuracy.max()) < _PRECISE else _NARROWED):
        found, steps = nearest(scales), scales.abs()[..., None]
        sure = (found != 0) & (found.abs() * accuracy[..., None] + widths / steps < least_gap)
        divisors = torch.where(sure, found, 1.0)
        ends = torch.stack([least / divisors, most / divisors])
        low = torch.where(sure, ends.amin(0), -torch.inf).amax(-1)
        high = torch.where(sure, ends.amax(0), torch.inf).amin(-1)
        better = sure.any(-1) & (low <= high)
        scales = torch.where(better, (low + high) / 2, scales)
        accuracy = torch.where(better, (high - low) / (2 * scales.abs()), accuracy)
    if free:
        zeros = ((nearest(scales) != 0) | ((least <= 0) & (most >= 0))).all(-1)
        return zeros & (low <= high), scales
    # The middle is rounded to a scale inside the interval, if there is one. There may be others next to it.
    fits, kept = torch.zeros_like(scales, dtype=torch.bool), scales
    stored = number_format.storable(scales.float())
    neighbours = [stored]
    if stored.dtype.itemsize == 2:
        neighbours += [(stored.view(torch.int16) + shift).view(stored.dtype) for shift in (1, -1)]
    for near in (x.double() for x in neighbours):
        products = nearest(torch.where(near == 0, 1.0, near)) * near[..., None]
        now = ((products.to(dtype) == values) | (most == torch.inf)).all(-1) & ~fits
        fits, kept = fits | now, torch.where(now, near, kept)
        if not bool(((low <= high) & ~fits).any()):
            break
    return fits, kept


def _spacing(number_format: NumberFormat) -> float:
    """Return the smallest distance of two points of a grid."""
    points = number_format.points
    values, divisor = points.values(torch.arange(points.top + 1, dtype=torch.uint8))
    return float(values.double().sort().values.diff().min()) / divisor
