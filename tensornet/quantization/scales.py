"""Scales and zero points of groups: search by weighted error, refit by least squares.

The search minimises `sum_j C_jj (w_j - q_j)^2` in every group over shrunken ranges, since a few clamped
elements often cost less than a coarse grid. The refit takes the codes as given and minimises
`(w - q) C (w - q)^T` over all scales of a row at once, correlations between groups included.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite
from tensornet.quantization.formats import NumberFormat

#: Ranges tried, as shares of the largest element: from the first for few bits up to the last.
_WIDEST = 1.1
_TRIED = 24
#: Alternations of rounding and weighted least squares that follow the search.
_POLISHED = 2
#: Elements searched at a time: on a CPU they stay in its cache, elsewhere memory is bounded.
_CACHED, _CHUNK = 1 << 16, 1 << 22


@dataclass(frozen=True)
class GroupScales:
    """Scale and zero point of every group.

    Args:
        scales: shape `(..., out, groups)`, in the dtype of the format's scales. Scales may be negative: their
            sign mirrors a grid that has one point more below zero than above.
        zeros: codes whose value is zero, `torch.uint8` of the same shape; None without zero points.

    Example:
        >>> from tensornet.quantization import NumberFormat, search_scales
        >>> found = search_scales(torch.randn(4, 64), NumberFormat.parse("int4"))
        >>> found.scales.shape, found.zeros
        (torch.Size([4, 1]), None)
    """

    scales: Tensor
    zeros: Tensor | None = None


@torch.no_grad()
def search_scales(
    weight: Tensor, number_format: NumberFormat, importance: Tensor | None = None
) -> GroupScales:
    """Find scales and zero points with little weighted rounding error, group by group.

    Args:
        weight: shape `(..., out, in)`.
        number_format: an integer format.
        importance: weight of the squared error of every element, broadcastable to the weight: usually the
            diagonal of the input moment, shape `(in,)`. Equal weights if absent.

    Raises:
        NonFiniteError: the weight or the importance holds NaN or infinity.
        ShapeError: the weight is neither a matrix nor a stack of matrices.

    Example:
        >>> from tensornet.quantization import NumberFormat, search_scales
        >>> search_scales(torch.randn(4, 128), NumberFormat.parse("int4")).scales.shape
        torch.Size([4, 2])
    """
    if weight.ndim < 2:
        raise ShapeError(f"Scales are searched for matrices (..., out, in), got shape {tuple(weight.shape)}.")
    check_finite(weight, "The weight")
    grouped = as_groups(weight if weight.dtype == torch.float64 else weight.float(), number_format)
    flat = grouped.reshape(-1, grouped.shape[-1])
    if importance is None:
        importance = grouped.new_ones(1)
    check_finite(importance, "The importance of the elements")
    # Padding has no importance: not every grid has a zero.
    prices = as_groups(importance.to(grouped).expand(weight.shape), number_format).reshape(flat.shape)
    step = max(1, (_CACHED if flat.is_cpu else _CHUNK) // flat.shape[1])
    scales, zeros = [], []
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        # One group a column: sums over groups of 32 and products with scales run along all groups.
        scale, zero = _search(flat[part].T.contiguous(), number_format, prices[part].T.contiguous())
        scales.append(scale)
        zeros.append(zero)
    shape = grouped.shape[:-1]
    found = torch.cat(scales).reshape(shape).to(number_format.scale_dtype)
    if not number_format.zero_point:
        return GroupScales(found)
    return GroupScales(found, torch.cat(zeros).reshape(shape).to(torch.uint8))


def as_groups(x: Tensor, number_format: NumberFormat) -> Tensor:
    """Reshape `(..., in)` to `(..., groups, group)` with zero padding; a view where nothing is padded."""
    size = x.shape[-1]
    groups = number_format.groups(size)
    width = number_format.group or max(size, 1)
    if groups * width != size:  # padding by nothing copies
        x = torch.nn.functional.pad(x, (0, groups * width - size))
    return x.reshape(*x.shape[:-1], groups, width)


def spread_groups(values: Tensor, number_format: NumberFormat, size: int) -> Tensor:
    """Repeat the value of each group `(..., groups)` for all its elements, `(..., size)`."""
    width = number_format.group or max(size, 1)
    # Many times faster than `repeat_interleave`.
    return values.unsqueeze(-1).expand(*values.shape, width).flatten(-2)[..., :size]


def _search(flat: Tensor, number_format: NumberFormat, prices: Tensor) -> tuple[Tensor, Tensor]:
    """Find the best scale and zero, shape `(groups,)` each, for groups `(width, groups)`."""
    best = _Best(flat, prices, number_format)
    for scale, zero in _candidates(flat, number_format):
        best.offer(scale, zero)
    for _ in range(_POLISHED):
        points = best.points(best.scale, best.zero)
        weighed = points * prices
        size = (weighed * points).sum(0)
        fitted = (weighed * flat).sum(0) / torch.where(size > 0, size, torch.ones_like(size))
        best.offer(torch.where(size > 0, fitted, best.scale), best.zero)
    return best.scale, best.zero


def _narrowest(number_format: NumberFormat) -> float:
    return 1 - 1.6 / number_format.top**0.7 if number_format.top > 3 else 0.3


class _Best:
    """Best scale and zero found so far for every group, a column of `flat: (width, groups)`."""

    def __init__(self, flat: Tensor, prices: Tensor, number_format: NumberFormat) -> None:
        self.flat, self.prices, self.format = flat, prices, number_format
        self.against = -flat
        self.scale = flat.new_zeros(flat.shape[1])
        self.zero = torch.full_like(self.scale, 0.0 if number_format.zero_point else number_format.center)
        self.cost = (flat * flat).mul_(prices).sum(0)

    def points(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Compute the nearest codes less their zeros."""
        found = self.flat / torch.where(scale == 0, torch.ones_like(scale), scale)
        center, top = self.format.center, self.format.top
        if self.format.zero_point:
            return found.add_(zero).round_().clamp_(0, top).sub_(zero)
        if center % 1:  # points lie between whole numbers
            found.sub_(0.5).round_().add_(0.5)
        else:
            found.round_()
        return found.clamp_(-center, top - center)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        scale = _stored(scale, self.format)
        error = torch.addcmul(self.against, self.points(scale, zero), scale)
        cost = error.mul_(error).mul_(self.prices).sum(0)
        better = cost < self.cost
        self.scale, self.zero, self.cost = (
            torch.where(better, new, old)
            for new, old in ((scale, self.scale), (zero, self.zero), (cost, self.cost))
        )


def _stored(scale: Tensor, number_format: NumberFormat) -> Tensor:
    """Round scales to the dtype they are stored in; zero where they leave its range."""
    kept = scale.to(number_format.scale_dtype).to(scale.dtype)
    return torch.where(kept.isfinite(), kept, torch.zeros_like(kept))


def _candidates(flat: Tensor, number_format: NumberFormat) -> Iterator[tuple[Tensor, Tensor]]:
    """List scales and zeros that fit shares of the range of every group into the grid."""
    low, high = flat.amin(0).clamp_max(0), flat.amax(0).clamp_min(0)
    top = number_format.top
    if number_format.zero_point:
        whole = (high - low) / top
        middle = (-low / torch.where(whole == 0, torch.ones_like(whole), whole)).round()
        others = [(1, (middle + shift).clamp(0, top)) for shift in (-1, 0, 1)]
    else:
        extreme = torch.where(high > -low, high, low)
        whole = -extreme / number_format.center  # code 0 reaches farthest from the center
        center = torch.full_like(low, number_format.center)
        others = [(sign, center) for sign in ((1,) if number_format.center % 1 else (1, -1))]
    shares = torch.linspace(_narrowest(number_format), _WIDEST, _TRIED, device=flat.device)
    for scale in _distinct(_stored(shares.to(flat)[:, None] * whole, number_format)):
        for sign, zero in others:
            yield sign * scale, zero


def _distinct(scales: Tensor) -> Tensor:
    """Drop scales that are the same once stored: of 24 those with 8 bits leave two or three, or eight.

    Args:
        scales: shape `(tried, groups)`, sorted in every group.

    Returns:
        Shape `(kept, groups)`; a group with fewer than others repeats its last one.
    """
    place = torch.zeros(scales.shape, dtype=torch.int64, device=scales.device)
    torch.cumsum(scales[1:] != scales[:-1], 0, out=place[1:])
    found = scales[-1:].repeat(int(place[-1].max()) + 1, 1)
    return found.scatter_(0, place, scales)


@torch.no_grad()
def refit_scales(
    weight: Tensor,
    points: Tensor,
    number_format: NumberFormat,
    columns: Tensor | None = None,
) -> Tensor:
    """Fit the scales to given codes by least squares under the input moment, jointly for each row.

    Args:
        weight: shape `(..., out, in)`.
        points: codes less their zeros, of the shape of the weight.
        number_format: an integer format.
        columns: input moment `(..., in, in)`, or `(in,)` if diagonal; identity if absent.

    Returns:
        Scales in the dtype of the weight, shape `(..., out, groups)`; zero where all points of a group are.

    Raises:
        NonFiniteError: the weight, the points or the moment hold NaN or infinity.

    Example:
        >>> from tensornet.quantization import NumberFormat, refit_scales
        >>> points = torch.randint(-7, 8, (4, 64)).double()
        >>> scales = refit_scales(0.5 * points, points, NumberFormat.parse("int4"))
        >>> bool(torch.allclose(scales.double(), torch.tensor(0.5).double()))
        True
    """
    for tensor, name in ((weight, "The weight"), (points, "The points"), (columns, "The input moment")):
        if tensor is not None:
            check_finite(tensor, name)
    size = weight.shape[-1]
    if columns is None or columns.ndim == 1:
        weighed = points if columns is None else points * columns
        normal = as_groups(weighed * points, number_format).sum(-1)
        right = as_groups(weighed * weight, number_format).sum(-1)
        return torch.where(normal > 0, right / torch.where(normal > 0, normal, 1.0), 0.0)
    width = number_format.group or size
    normals = []
    for start in range(0, size, width):
        part = slice(start, min(start + width, size))
        seen = (points[..., part] @ columns[..., part, :]).mul_(points)
        normals.append(as_groups(seen, number_format).sum(-1))
    normal = torch.stack(normals, -2)  # shape: (..., out, groups, groups)
    right = as_groups((weight @ columns).mul_(points), number_format).sum(-1)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    # Groups without a point and groups that others determine need a finite answer.
    shift = torch.where(diagonal > 0, 8 * torch.finfo(normal.dtype).eps * diagonal, 1.0)
    solved = torch.linalg.solve(normal + torch.diag_embed(shift), right)
    return torch.where(diagonal > 0, solved, 0.0)
