"""Scales too small for the dtype they are stored in, and formats of as many bytes that hold them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.scales import as_groups

#: Largest share of the weighted energy in groups with such scales that is left out of account. If all of it
#: is lost, the relative error is that of rounding to 8 bits.
_NEGLIGIBLE = 1e-4
#: Sizes of groups with 16-bit scales for those with 8-bit scales: twice as large ones take as many bytes.
_WIDER = {32: 64, 64: 128}


@torch.no_grad()
def scales_underflow(weight: Tensor, number_format: NumberFormat, weighting: Weighting | None = None) -> bool:
    """Return True if scales that matter for the loss are too small to be stored with two bits of precision.

    Smaller ones become coarse, and in the end zero, with all weights of their groups.

    Args:
        weight: shape `(out, in)`.
        number_format: any format; only integer ones have scales.
        weighting: sensitivity of the loss to errors of the weight, by whose diagonals groups are weighed;
            equal weights if absent.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> from tensornet.quantization.underflow import scales_underflow
        >>> number_format, weight = NumberFormat.parse("int4:g32:float8"), torch.randn(8, 64)
        >>> scales_underflow(weight, number_format), scales_underflow(1e-5 * weight, number_format)
        (False, True)
    """
    if not number_format.is_integer or number_format.scale_dtype == torch.bfloat16:  # the range of float32
        return False
    limits = torch.finfo(number_format.scale_dtype)
    smallest = 4 * limits.smallest_normal * limits.eps
    ranges = _ranges(weight, number_format.group, number_format.zero_point)
    steps = ranges / (number_format.top if number_format.zero_point else number_format.center)
    small = steps < smallest
    if not bool(small.any()):
        return False
    energy, seen = weight.double().square(), weighting or Weighting()
    for moment, axis in ((seen.rows, 1), (seen.columns, 0)):
        if moment is not None:
            energy *= (moment if moment.ndim == 1 else moment.diagonal()).to(energy).unsqueeze(axis)
    of_groups = as_groups(energy, number_format).sum(-1)
    return float(of_groups[small].sum()) > _NEGLIGIBLE * float(of_groups.sum())


@remembered
def _ranges(weight: Tensor, group: int | None, zero_point: bool) -> Tensor:
    """Compute the range of every group, `(out, groups)`, which formats of all bits share."""
    groups = as_groups(weight, NumberFormat(8, group))
    return groups.amax(-1) - groups.amin(-1) if zero_point else groups.abs().amax(-1)


def with_wide_scales(number_format: NumberFormat) -> NumberFormat:
    """Return the format with 16-bit scales that takes as many bytes, for scales of 8 bits.

    Groups are twice as large where larger ones exist.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> from tensornet.quantization.underflow import with_wide_scales
        >>> with_wide_scales(NumberFormat.parse("int4:g32:float8")).name
        'int4'
    """
    if not number_format.is_integer or number_format.scale_dtype == torch.bfloat16:
        return number_format
    group = number_format.group
    if number_format.scale_dtype.itemsize == 1 and group is not None:
        group = _WIDER.get(group, group)
    return replace(number_format, group=group, scale_dtype=torch.bfloat16)


def storable_formats(
    weight: Tensor, number_formats: Sequence[NumberFormat], weighting: Weighting | None = None
) -> tuple[NumberFormat, ...]:
    """Replace the formats whose scales underflow in a matrix by those with 16-bit scales."""
    return tuple(with_wide_scales(x) if scales_underflow(weight, x, weighting) else x for x in number_formats)
