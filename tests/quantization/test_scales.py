"""Scales: found by weighted error, refitted by least squares, negative, zero and underflowing ones."""

from __future__ import annotations

import pytest
import torch
from allocations import peak
from hypothesis import example, given
from hypothesis import strategies as st
from quantization.rounding_cases import moment, weight
from torch import Tensor

from tensornet.errors import NonFiniteError, ShapeError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization import NumberFormat, round_weight
from tensornet.quantization import scales as searching
from tensornet.quantization.formats import GROUPS
from tensornet.quantization.scales import (
    group_ranges,
    refit_scales,
    scale_fault,
    search_scales,
    storable_formats,
)


@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.integers(1, 6),
    st.integers(1, 150),
    st.integers(0, 1000),
)
@example(5, 6, 2, 5)
def test_search_is_no_dearer_than_the_full_range(bits: int, m: int, n: int, seed: int) -> None:
    number_format = NumberFormat.parse(f"int{bits}:g32")
    matrix = weight(m, n, seed)
    importance = torch.rand(n, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    rounded = round_weight(matrix, number_format, columns=importance, column_damping=0, refits=0)
    found = (matrix - rounded.dequantize(torch.float64)).square() * importance
    for start in range(0, n, 32):
        group = matrix[:, start : start + 32]
        low, high = group.amin(1, keepdim=True).clamp_max(0), group.amax(1, keepdim=True).clamp_min(0)
        center = 2 ** (bits - 1) - (0.5 if bits == 2 else 0)
        step = torch.maximum(high, -low) / center
        full = ((group / step + center).round().clamp(0, 2**bits - 1) - center) * step
        plain = ((group - full).square() * importance[start : start + 32]).sum(1)
        floor = 2.0**-16 * (group.square() * importance[start : start + 32]).sum(1)
        part = found[:, start : start + 32].sum(1)
        # A scale of bfloat16 is off by up to 2^-8, and so is every point: norms of both errors add.
        assert bool((part.sqrt() <= plain.sqrt() + floor.sqrt() + 1e-12).all())


def test_weighted_search_serves_its_weights() -> None:
    matrix, importance = weight(16, 64, 0), torch.rand(64).double() ** 4 + 1e-3
    number_format = NumberFormat.parse("int3")

    def cost(known: torch.Tensor | None) -> float:
        scales = search_scales(matrix, number_format, known)[0]
        error = matrix - scales.double() * (matrix / scales.double()).round().clamp(-4, 3)
        return float((error.square() * importance).sum())

    assert cost(importance) < cost(None)


@pytest.mark.parametrize("columns", ["full", "diagonal", "none"])
def test_refit_is_least_squares(columns: str) -> None:
    """Against the normal equations of a row, written out."""
    matrix, size = weight(5, 100, 0), 100
    number_format = NumberFormat.parse("int3:g32")
    moments = {"full": moment(size, 0), "diagonal": moment(size, 0).diagonal(), "none": None}
    found, _ = search_scales(matrix, number_format)
    spread = found.double().repeat_interleave(32, 1)[:, :size]
    points = (matrix / spread).round().clamp(-4, 3)
    scales = refit_scales(matrix, points, number_format, moments[columns])
    dense = moments[columns] if columns == "full" else torch.eye(size, dtype=torch.float64)
    if columns == "diagonal":
        dense = torch.diag(moments["diagonal"])  # type: ignore[arg-type]
    assert dense is not None
    root = torch.linalg.cholesky(dense)
    for row in range(5):
        basis = torch.stack([points[row] * (torch.arange(size) // 32 == g) for g in range(4)], 1)
        expected = torch.linalg.lstsq(root.T @ basis, (root.T @ matrix[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(scales[row], expected, rtol=1e-4, atol=1e-6)


def test_refit_leaves_empty_groups_at_zero() -> None:
    points = torch.zeros(2, 64).double()
    points[0, :32] = 1
    scales = refit_scales(torch.ones(2, 64).double(), points, NumberFormat.parse("int4:g32"), moment(64, 0))
    assert scales[0, 0] != 0
    assert scales[0, 1] == 0
    assert not scales[1].any()


@pytest.mark.parametrize("name", ["int4", "nl4"])
def test_an_exact_grid_is_found(name: str) -> None:
    codes = torch.randint(0, 16, (6, 128), dtype=torch.uint8)
    codes[:, ::64] = 0  # the widest point is there
    number_format = NumberFormat.parse(name)
    scales = (torch.rand(6, 2) + 0.5).bfloat16()
    matrix = number_format.decode(codes, scales)
    assert float(round_weight(matrix, number_format).loss_increase) < 1e-6 * float(matrix.square().sum())


def test_bad_input() -> None:
    number_format = NumberFormat.parse("int4")
    with pytest.raises(NonFiniteError, match="The weight"):
        search_scales(torch.full((2, 3), torch.nan), number_format)
    with pytest.raises(NonFiniteError, match="The importance"):
        search_scales(torch.ones(2, 3), number_format, torch.full((3,), torch.inf))
    with pytest.raises(NonFiniteError, match="The input moment"):
        refit_scales(torch.ones(2, 3), torch.ones(2, 3), number_format, torch.full((3, 3), torch.nan))
    with pytest.raises(ShapeError, match="matrices"):
        search_scales(torch.ones(3), number_format)


def cost(
    matrix: Tensor,
    number_format: NumberFormat,
    scales: Tensor,
    zeros: Tensor | None,
    importance: Tensor | float = 1,
) -> float:
    """Weighted squared error of the nearest values; equally good scales may differ."""
    codes = number_format.encode(matrix, scales, zeros)
    error = number_format.decode(codes, scales, zeros, matrix.dtype) - matrix
    return float((importance * error.square()).sum())


@pytest.mark.parametrize("name", ["int2:g32:float8", "int4:g32:float8", "int3", "nl4:g32:float8"])
def test_scales_that_are_stored_alike_are_tried_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 24 shares of the range, each tried: nothing is missed, and with eight bits few are left."""
    number_format, matrix = NumberFormat.parse(name), weight(40, 96, 0)
    tried: list[int] = []
    distinct = searching._distinct
    monkeypatch.setattr(searching, "_distinct", lambda x: (tried.append(len(distinct(x))), distinct(x))[1])
    few = search_scales(matrix, number_format)
    monkeypatch.setattr(searching, "_distinct", lambda x: x)
    every = search_scales(matrix, number_format)
    assert cost(matrix, number_format, *few) == pytest.approx(cost(matrix, number_format, *every), rel=1e-6)
    assert all(count <= 9 for count in tried) or number_format.scales.dtype == torch.bfloat16


def test_groups_are_searched_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    number_format, matrix = NumberFormat.parse("int3:g32"), weight(20, 100, 1)
    importance = torch.rand(20, 100, generator=torch.Generator().manual_seed(0))
    whole, _ = search_scales(matrix, number_format, importance)
    monkeypatch.setattr(searching, "_CACHED", 3 * 32)
    parts, _ = search_scales(matrix, number_format, importance)
    found, expected = (cost(matrix, number_format, scales, None, importance) for scales in (parts, whole))
    assert found == pytest.approx(expected, rel=1e-6)


# --- scales below the range of their dtype ---

NAMES = [
    "int8:g64:float8",
    "int6:g32:float8",
    "int4:g32:float8",
    "int2:g32:float8",
    "nl4:g32:float8",
    "int6:g16:s8",
    "nl4:g32:s6",
    "int2:g16:s4:min",
    "iq3_s",
    "iq2_xs",
]


def narrow(seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(24, 256, generator=torch.Generator().manual_seed(seed))


def rounding_error(matrix: torch.Tensor, number_format: NumberFormat) -> float:
    kept = round_weight(matrix, number_format).dequantize(torch.float64)
    return float(torch.linalg.norm((kept - matrix) / matrix.abs().max())) / float(
        torch.linalg.norm(matrix / matrix.abs().max())
    )


@pytest.mark.parametrize("name", [*NAMES, "int4:float16", "int4"])
def test_scales_that_are_not_found_cost_little(name: str) -> None:
    """Powers of two change no rounding but by their scales."""
    number_format, exact = NumberFormat.parse(name), rounding_error(narrow(), NumberFormat.parse(name))
    found = []
    for k in range(41):
        small = narrow() * 2.0**-k
        found.append(scale_fault(small, number_format) == "underflow")
        if not found[-1]:
            assert rounding_error(small, number_format) < 1.05 * exact
        elif rounding_error(small, number_format) < 1.05 * exact:  # not found long before it costs
            # The first group that is found may have a quarter of the range of the others.
            assert rounding_error(small / 16, number_format) > 1.05 * exact
    assert found == sorted(found)
    assert found[-1] == (name != "int4")


def test_groups_count_by_what_they_cost() -> None:
    number_format = NumberFormat.parse("int4:g32:float8")
    matrix = narrow()
    matrix[3] *= 1e-5
    assert not scale_fault(matrix, number_format)
    rows = torch.ones(24)
    rows[3] = 1e12  # all of the loss
    assert scale_fault(matrix, number_format, Weighting(rows))
    assert scale_fault(matrix, number_format, Weighting(torch.diag(rows)))
    columns = torch.ones(256)
    assert scale_fault(matrix, number_format, Weighting(rows, columns))
    assert not scale_fault(torch.zeros(4, 64), number_format)
    assert not scale_fault(1e-9 * matrix, NumberFormat())


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("int4", 3.39e38),
        ("int4:float16", 65504),
        ("int4:g32:float8", 57344),
        ("int8:g32:s8", 128 * 65504),
        ("int2:g16:s4:min", 15 * 2.0**15),
        ("iq2_s", 31 / 8 * 65504),
    ],
)
def test_scales_that_overflow(name: str, largest: float) -> None:
    """The largest weight has the farthest code, at which a scale is as large as it can be, or larger."""
    number_format = NumberFormat.parse(name)
    matrix = narrow().double()
    farthest = -number_format.points.lowest or number_format.points.top / 2
    matrix *= farthest * largest / matrix.abs().max()
    assert scale_fault(0.9 * matrix, number_format) is None
    assert scale_fault(30 * matrix, number_format) == "overflow"
    error = rounding_error(0.9 * matrix, number_format)
    assert error < 2 * rounding_error(matrix * 2.0**-30, number_format)
    # Nothing becomes zero only because no scale is large enough.
    assert round_weight(30 * matrix, number_format, refits=0).dequantize(torch.float64).abs().max() > largest


@pytest.mark.parametrize(
    "name", [*NAMES, "int3:row:float8", "int4:g128:float8", "int4:float16", "int4", "bf16"]
)
def test_formats_with_16_bit_scales_take_as_many_bytes(name: str) -> None:
    number_format = NumberFormat.parse(name)
    wide = number_format.wide
    if number_format.is_integer and number_format.points.run == 1 and number_format.minima is None:
        assert wide.points == number_format.points
    if not number_format.is_integer:
        assert wide == number_format
        return
    assert wide.scales.dtype == torch.bfloat16
    larger = (
        0 if number_format.group in (16, 32, 64) or not name.endswith("float8") else 24 * wide.groups(256)
    )
    assert wide.nbytes((24, 256)) <= number_format.nbytes((24, 256)) + larger
    assert not scale_fault(2.0**-40 * narrow(), wide)
    assert storable_formats(2.0**-40 * narrow(), [number_format]) == (wide,)
    assert storable_formats(narrow(), [number_format]) == (number_format,)


@given(
    size=st.integers(1, 300),
    group=st.sampled_from(GROUPS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    offset=st.sampled_from([-1, 0, 1]),
)
def test_ranges_of_groups_are_those_of_their_elements(
    size: int, group: int | None, dtype: torch.dtype, offset: int
) -> None:
    values = (weight(3, size, 0) + offset).to(dtype)
    groups = NumberFormat.parse("int8:row" if group is None else f"int8:g{group}").grouped(values).float()
    assert torch.equal(group_ranges(values, group, shifted=False), groups.abs().amax(-1))
    assert torch.equal(group_ranges(values, group, shifted=True), groups.amax(-1) - groups.amin(-1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_faults_of_a_large_weight_are_found_a_few_rows_at_a_time() -> None:
    large = torch.ones(1 << 17, 128)
    large[:, :16] = 1e-9  # too small for 16-bit scales, but not important
    number_format = NumberFormat.parse("int4:g16:float16")
    assert scale_fault(large, number_format) is None
    assert peak(lambda: scale_fault(large, number_format)) <= 2 * large.nbytes
