"""Number formats: names, values, codes, packing, exact bytes, and clear errors."""

from __future__ import annotations

import math

import pytest
import torch
from allocations import peak
from devices import DEVICES
from hypothesis import example, given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.errors import FormatError, ShapeError, TopologyError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization import NumberFormat, predict_losses, round_weight
from tensornet.quantization.formats import format_names
from tensornet.quantization.packing import pack, packed_bytes, unpack
from tensornet.quantization.parts import StepScales

INTEGERS = st.builds(
    lambda points, group, scales: NumberFormat.parse(f"{points}:{group}{scales}"),
    st.sampled_from([*(f"int{bits}" for bits in range(2, 9)), "nl2", "nl3", "nl4"]),
    st.sampled_from(["g32", "g64", "g128", "row"]),
    st.sampled_from(["", ":float16", ":float8"]),
)
#: Formats with integer scales, for rows of a multiple of 256.
SUPER_BLOCKS = st.sampled_from(
    [
        NumberFormat.parse(x)
        for x in ("nl4:g32:s6", "int3:g16:s6", "int6:g16:s8", "int2:g16:s4:min", "int5:g32:s6:min", "int8:s6")
    ]
)
FORMATS = INTEGERS | SUPER_BLOCKS
CODEBOOKS = st.sampled_from([NumberFormat.parse(f"iq{x}") for x in ("3_s", "3_xxs", "2_s", "2_xs", "2_xxs")])

FLOATS = st.sampled_from([NumberFormat.parse("mxfp4"), NumberFormat.parse("nvfp4")])

#: 16 levels as in IQ4_NL of llama.cpp, eight, and four.
LEVELS = {
    4: [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    3: [-127, -76, -44, -17, 9, 35, 65, 105],
    2: [-127, -41, 21, 92],
}


def fitting(number_format: NumberFormat, size: int) -> int:
    """Size of a row that a format can store."""
    return size if number_format.scales.count == 1 else 256 * (1 + size % 2)


@given(st.one_of(FORMATS, CODEBOOKS, FLOATS, st.sampled_from([NumberFormat(), NumberFormat.parse("bf16")])))
def test_names_are_read_back(number_format: NumberFormat) -> None:
    assert NumberFormat.parse(number_format.name) == number_format
    assert NumberFormat.parse(number_format) is number_format
    assert str(number_format) == number_format.name


@given(FLOATS, st.integers(1, 3), st.integers(0, 1000), st.integers(-20, 4))
def test_four_bit_floats_are_those_of_their_standards(
    number_format: NumberFormat, groups: int, seed: int, power: int
) -> None:
    """Sign, exponent and mantissa of E2M1, times a scale of E8M0 or of E4M3 without a sign."""
    size, width = 64 * groups, 32 if number_format.name == "mxfp4" else 16
    matrix = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    rounded = round_weight(matrix, number_format)
    assert rounded.nbytes == 2 * (size // 2 + size // width)
    exponents, mantissas = torch.meshgrid(torch.arange(4), torch.arange(2), indexing="ij")
    normal = 2.0 ** (exponents - 1) * (1 + mantissas / 2)
    magnitudes = torch.where(exponents == 0, mantissas / 2, normal).flatten()
    if width == 32:
        scales = 2.0 ** torch.arange(-100, 100)
    else:
        steps = torch.arange(8)
        scales = torch.cat([steps / 512, *((1 + steps / 8) * 2.0**k for k in range(-6, 9))])
    values = rounded.dequantize().unflatten(1, (-1, width))
    found = 2 * rounded.scales
    assert bool((found[..., None] == scales).any(-1).all())
    assert bool((values.abs()[..., None] == found[..., None, None] * magnitudes).any(-1).all())
    # No value that can be stored with this scale is closer.
    nearest = (matrix.unflatten(1, (-1, width)).abs()[..., None] - found[..., None, None] * magnitudes).abs()
    error = (values - matrix.unflatten(1, (-1, width))).abs()
    torch.testing.assert_close(error, nearest.amin(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "bits", "group", "equal"),
    [
        ("int4", 4, 64, True),
        ("int4:g64", 4, 64, True),
        ("int4:g128", 4, 128, True),
        ("int8:row", 8, None, True),
        ("nl4:g32", 4, 32, False),
        ("int4:g16", 4, 16, True),
        ("int1:row", 1, None, True),
    ],
)
def test_names_of_integers(name: str, bits: int, group: int | None, equal: bool) -> None:
    found = NumberFormat.parse(name)
    assert (found.bits, found.group, found.points.equal_steps) == (bits, group, equal)
    assert found.name == name.removesuffix(":g64")


@pytest.mark.parametrize("name", ["int9", "int0", "int4:g48", "fp8", "", "int4:g64:", "INT4", "nl5", 4, None])
def test_unknown_names_list_the_known(name: object) -> None:
    with pytest.raises(FormatError, match=r"float, bf16.*int8.*int1, nl4|Groups have 16, 32, 64 or 128"):
        NumberFormat.parse(name)  # type: ignore[arg-type]


def test_combinations_that_do_not_exist() -> None:
    for name in ("mxfp4:g16", "float:row", "nl5", "int4:zero", "iq3_s:s6"):
        with pytest.raises(FormatError, match="Unknown number format"):
            NumberFormat.parse(name)
    for name in ("nl2:g16:s4:min", "int3:g16:s6:min"):
        with pytest.raises(FormatError, match="minima are int2:g16:s4:min"):
            NumberFormat.parse(name)
    for name in ("int4:s6", "int4:g32:s6"):
        with pytest.raises(FormatError, match="multiple"):
            round_weight(torch.randn(2, 320), name)
    for name in ("int4:row:s6", "int4:g32:s5", "int4:g16:s4", "nl2:g16:s4"):
        with pytest.raises(FormatError, match="Integer scales"):
            NumberFormat.parse(name)
    for read in (lambda x: x.points, lambda x: x.scales, lambda x: x.groups(64)):
        with pytest.raises(FormatError, match="no codes"):
            read(NumberFormat.parse("bf16"))


@pytest.mark.parametrize(
    "name",
    ["iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "int4:g32:s6:min", "int2:g16:s4:min", "nl4:g32:s6"],
)
def test_rows_of_no_whole_super_blocks_are_refused_with_moments_too(name: str) -> None:
    weight = torch.randn(3, 300)
    for moments in ({}, {"columns": torch.eye(300)}, {"rows": torch.eye(3), "columns": torch.ones(300)}):
        with pytest.raises(FormatError, match="not a multiple of 256"):
            round_weight(weight, name, **moments)
        with pytest.raises(FormatError, match="not a multiple of 256"):
            predict_losses(weight, [name], [Weighting(**moments)])
    model = torch.nn.Sequential(torch.nn.Linear(300, 40))
    config = tn.CompressionConfig(target_modules="all", formats=("int8",), method="nearest")
    with pytest.raises(FormatError, match="not a multiple of 256"):
        tn.plan(model, config).replace_layer("0", None, name)


@given(FORMATS | CODEBOOKS, st.integers(1, 5), st.integers(1, 200))
def test_bytes_are_those_of_the_stored_tensors(number_format: NumberFormat, rows: int, size: int) -> None:
    size = fitting(number_format, size)
    rounded = round_weight(torch.randn(rows, size), number_format, refits=0)
    assert number_format.bits is not None
    stored = [number_format.pack(rounded.codes), rounded.scales]
    tensors = number_format.scales.tensors(rounded.scales)
    stored[1:] = tensors.values()
    again = number_format.scales.values(tensors, rounded.scales.shape[-1])
    assert torch.equal(again.float(), rounded.scales.float())
    if rounded.minima is not None:
        assert number_format.minima is not None
        packed = number_format.minima.pack(rounded.minima)
        assert torch.equal(number_format.minima.unpack(packed, rounded.minima.shape[-1]), rounded.minima)
        stored.append(packed)
    assert rounded.nbytes == number_format.nbytes((rows, size)) == sum(x.nbytes for x in stored)


def test_bytes_of_the_usual_cases() -> None:
    for bits in range(2, 9):
        assert NumberFormat.parse(f"int{bits}").bits_per_weight((128, 512)) == bits + 0.25
        assert NumberFormat.parse(f"int{bits}:g32:float8").bits_per_weight((128, 512)) == bits + 0.25
    assert NumberFormat.parse("int8:row").nbytes((4, 100)) == 4 * 102
    assert NumberFormat.parse("float").nbytes((3, 5)) == 60
    assert NumberFormat.parse("float").nbytes((3, 5), torch.bfloat16) == 30
    assert NumberFormat.parse("bf16").nbytes((3, 5)) == 30
    assert NumberFormat.parse("int4").nbytes((2, 3, 65)) == 6 * (33 + 4)
    sizes = {"nl4:g32:float16": 4.5, "nl4:g32:s6": 4.25, "int3:g16:s6": 3.4375, "int6:g16:s8": 6.5625}
    sizes |= {"mxfp4": 4.25, "nvfp4": 4.5}
    sizes |= {"int2:g16:s4:min": 2.625, "int4:g32:s6:min": 4.5, "int5:g32:s6:min": 5.5}
    for name, bits_per_weight in sizes.items():  # of types of GGUF
        assert NumberFormat.parse(name).bits_per_weight((128, 512)) == bits_per_weight
    assert {"float", "int4", "mxfp4", "iq2_s"} <= set(format_names())
    with pytest.raises(TopologyError, match="sequence"):
        NumberFormat.parse("int4").nbytes(7)  # type: ignore[arg-type]


def test_two_bits_have_four_points_around_zero() -> None:
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    scales = torch.ones(1, 1, dtype=torch.bfloat16)
    values = NumberFormat.parse("int2").decode(codes, scales)
    assert values.tolist() == [[-1.5, -0.5, 0.5, 1.5]]
    assert NumberFormat.parse("int2").points.center == 1.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6])
@pytest.mark.parametrize("name", ["int8:row", "int5:g32", "int4", "int2:float8", "int1", "nl4:g32"])
def test_values_in_float16_are_the_exact_ones_rounded_once(name: str, size: float, device: str) -> None:
    """Whatever the scales are, which float16 may hold with fewer digits or not at all."""
    made = round_weight(torch.randn(5, 70) * size, name)
    exact = made.dequantize(torch.float64)
    parts = [x if x is None else x.to(device) for x in (made.codes, made.scales, made.minima)]
    assert parts[0] is not None
    assert parts[1] is not None
    values = made.number_format.decode(parts[0], parts[1], parts[2], torch.float16)
    assert torch.equal(values.cpu(), exact.to(torch.float16))
    assert bool(exact.any()) or "float8" in name


def test_trained_codes_of_a_table_have_the_slope_of_their_neighbours() -> None:
    number_format, scales = NumberFormat.parse("nl4"), torch.tensor([[0.5]])
    codes = torch.tensor([[0.0, 7.4, 8.0, 15.3]], requires_grad=True)
    values = number_format.decode(codes, scales)
    assert values.tolist() == [[-63.5, -5.0, 0.5, 56.5]]
    values.sum().backward()
    assert codes.grad is not None
    assert codes.grad.tolist() == [[11.5, 5.75, 5.75, 12.0]]


@given(SUPER_BLOCKS, st.integers(0, 1000), st.integers(-30, 15))
@example(NumberFormat.parse("int2:g16:s4:min"), 0, -21)
def test_integer_scales_are_close_and_stay_as_they_are(
    number_format: NumberFormat, seed: int, power: int
) -> None:
    """Also with subnormal steps; the largest scale keeps its digits, and the others half a step."""
    assert number_format.group is not None
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(3, 512 // number_format.group, generator=generator) * 2.0**power
    scales[1] = 0
    scales[2, :2] = torch.tensor([4.0, -4.0]) * 2.0**power  # only one of both is the lowest integer
    stored = number_format.storable(scales)
    steps = number_format.scales
    assert isinstance(steps, StepScales)
    assert int(steps.factored(scales)[0].max()) < 2**steps.bits
    assert torch.equal(number_format.storable(stored), stored)
    largest = scales.reshape(3, 2, -1).abs().amax(-1, keepdim=True)
    scales = scales.abs() if steps.start >= 0 else scales  # without a sign
    room = (2.0**-11 + 0.5 / (11 if steps.bits == 4 else 24)) * largest + 40 * 2.0**-24
    assert bool(((stored - scales).reshape(3, 2, -1).abs() <= room).all())
    assert not stored[1].any()


@given(FORMATS, st.integers(1, 4), st.integers(1, 150), st.integers(0, 1000))
def test_values_codes_and_bytes_convert(number_format: NumberFormat, rows: int, size: int, seed: int) -> None:
    """Codes come back from values and from bytes; any value becomes the nearest point of its grid."""
    torch.manual_seed(seed)
    assert number_format.bits is not None
    size = fitting(number_format, size)
    top, groups = number_format.points.top, (rows, number_format.groups(size))
    codes = torch.randint(0, top + 1, (rows, size), dtype=torch.uint8)
    scales = number_format.storable(torch.rand(groups) + 0.5)
    minima = packed_minima = None
    if number_format.minima is not None:
        minima = number_format.minima.storable(2 * torch.rand(groups))
        packed_minima = number_format.minima.pack(minima)
    values = number_format.decode(codes, scales, minima)
    assert torch.equal(number_format.encode(values, scales, minima), codes)
    packed = number_format.pack(codes)
    assert torch.equal(number_format.unpack(packed, size), codes)
    assert torch.equal(number_format.decode_packed(packed, scales, packed_minima, size), values)
    # Against all points of the grid, written out.
    wanted = 3 * torch.randn(rows, size)
    width = number_format.group or size
    spread = scales.float().repeat_interleave(width, 1)[:, :size, None]
    units = torch.arange(top + 1) - number_format.points.center
    if not number_format.points.equal_steps:
        units = torch.tensor(LEVELS[number_format.bits])
    points = units * spread
    if minima is not None:
        points = points - minima.repeat_interleave(width, 1)[:, :size, None]
    best = (points - wanted[..., None]).abs().amin(-1)
    made = number_format.decode(number_format.encode(wanted, scales, minima), scales, minima)
    torch.testing.assert_close((made - wanted).abs(), best, rtol=1e-5, atol=1e-5)


# --- packing ---


@given(st.integers(2, 8), st.lists(st.integers(0, 9), max_size=3), st.integers(0, 70), st.integers(0, 1000))
def test_round_trip(bits: int, lead: list[int], size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, size), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, packed_bytes(size, bits))
    assert torch.equal(unpack(packed, bits, size), codes)


@given(st.integers(2, 8), st.integers(0, 300))
def test_tight_up_to_one_set_of_segments(bits: int, size: int) -> None:
    assert 0 <= 8 * packed_bytes(size, bits) - bits * size < bits * 8
    if size % 8 == 0:
        assert 8 * packed_bytes(size, bits) == bits * size


@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_is_that_of_the_docstring(bits: int) -> None:
    """Bit by bit: code `k` of all segments lies in byte `k` of the planes, little end first."""
    segments, planes = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    length = 5
    codes = torch.randint(0, 2**bits, (segments * length,), dtype=torch.uint8)
    packed = pack(codes, bits).tolist()
    for k in range(length):
        word = sum(int(codes[s * length + k]) << (s * bits) for s in range(segments))
        assert [packed[p * length + k] for p in range(planes)] == list(word.to_bytes(planes, "little"))


def test_rows_can_be_sliced_while_packed() -> None:
    codes = torch.randint(0, 8, (4, 6, 33), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 3)[1:3, 2], 3, 33), codes[1:3, 2])


def test_bad_packing() -> None:
    with pytest.raises(ShapeError, match="code of 9"):
        pack(torch.tensor([9], dtype=torch.uint8), 3)
    with pytest.raises(ShapeError, match=r"got torch\.int64"):
        pack(torch.tensor([1]), 3)
    for bits in (0, 9, 4.0, True):
        with pytest.raises(ShapeError, match="to 8 bits"):
            pack(torch.zeros(8, dtype=torch.uint8), bits)  # type: ignore[arg-type]
    packed = pack(torch.zeros(2, 16, dtype=torch.uint8), 3)
    for size in (8, 17, 160):
        with pytest.raises(ShapeError, match=r"\(2, 6\).*damaged"):
            unpack(packed, 3, size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_codes_of_large_codebook_weights_are_packed_in_parts() -> None:
    number_format = NumberFormat.parse("iq3_s")
    codes = round_weight(torch.randn(300, 256), number_format).codes.repeat(512, 1)
    packed = number_format.pack(codes)
    assert torch.equal(packed[:300], number_format.pack(codes[:300]))
    assert torch.equal(number_format.unpack(packed, 256), codes)
    assert peak(lambda: number_format.pack(codes)) < 5 * codes.nbytes
