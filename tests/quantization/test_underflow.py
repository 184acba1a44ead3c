"""Scales below the range of their dtype: found where they cost accuracy, and the formats in their place."""

from __future__ import annotations

import pytest
import torch

from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization import NumberFormat, round_weight
from tensornet.quantization.scales import scales_underflow, storable_formats, with_wide_scales

NAMES = ["int8:g64:float8", "int6:g32:float8", "int4:g32:float8", "int4:g32:zero:float8", "int2:g32:float8"]


def weight(seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(24, 128, generator=torch.Generator().manual_seed(seed))


def rounding_error(matrix: torch.Tensor, number_format: NumberFormat) -> float:
    kept = round_weight(matrix, number_format).dequantize()
    return float(torch.linalg.norm(kept - matrix) / torch.linalg.norm(matrix))


@pytest.mark.parametrize("name", [*NAMES, "int4:float16", "int4"])
def test_scales_that_are_not_found_cost_little(name: str) -> None:
    """Powers of two change no rounding but by their scales."""
    number_format, exact = NumberFormat.parse(name), rounding_error(weight(), NumberFormat.parse(name))
    found = []
    for k in range(41):
        small = weight() * 2.0**-k
        found.append(scales_underflow(small, number_format))
        if not found[-1]:
            assert rounding_error(small, number_format) < 1.05 * exact
        elif rounding_error(small, number_format) < 1.05 * exact:  # not found long before it costs
            assert rounding_error(small / 4, number_format) > 1.05 * exact
    assert found == sorted(found)
    assert found[-1] == (name != "int4")


def test_groups_count_by_what_they_cost() -> None:
    number_format = NumberFormat.parse("int4:g32:float8")
    matrix = weight()
    matrix[3] *= 1e-5
    assert not scales_underflow(matrix, number_format)
    rows = torch.ones(24)
    rows[3] = 1e12  # all of the loss
    assert scales_underflow(matrix, number_format, Weighting(rows))
    assert scales_underflow(matrix, number_format, Weighting(torch.diag(rows)))
    columns = torch.ones(128)
    assert scales_underflow(matrix, number_format, Weighting(rows, columns))
    assert not scales_underflow(torch.zeros(4, 64), number_format)
    assert not scales_underflow(1e-9 * matrix, NumberFormat())


@pytest.mark.parametrize(
    "name", [*NAMES, "int3:row:float8", "int4:g128:float8", "int4:float16", "int4", "bf16"]
)
def test_formats_with_16_bit_scales_take_as_many_bytes(name: str) -> None:
    number_format = NumberFormat.parse(name)
    wide = with_wide_scales(number_format)
    assert (wide.bits, wide.zero_point) == (number_format.bits, number_format.zero_point)
    assert wide.scale_dtype == torch.bfloat16
    larger = 0 if number_format.group in (32, 64) or not name.endswith("float8") else 24 * wide.groups(256)
    assert wide.nbytes((24, 256)) <= number_format.nbytes((24, 256)) + larger
    assert not scales_underflow(2.0**-40 * weight(), wide)
    assert storable_formats(2.0**-40 * weight(), [number_format]) == (wide,)
    assert storable_formats(weight(), [number_format]) == (number_format,)
