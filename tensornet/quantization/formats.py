"""Number formats: names, sizes, and conversion between values, integer codes and packed bytes.

An integer format stores a code of a few bits for every element, and a scale for every group of neighbouring
elements of a row: `value = scale * point[code]`. The points are `code - center` or, in formats with a table,
unequally spaced levels (see `parts.Points`). Some formats also have a minimum for every group: `value = scale
* code - minimum`.

Scales have 16 bits, or 8 bits on request (see `parts.Scales`). Groups of 32 with 8-bit scales take as many
bytes as groups of 64 with 16-bit scales. They are more accurate, since codes are chosen after the scale is
rounded. Scales may also be integers of 6 or 8 bits times a step in float16 that 256 weights of a row share.

Formats such as `int5:g32:s6:min` have minima. Scales and minima are integers of 4 or 6 bits without a sign,
times steps in float16, as in the K types of GGUF.

The formats `mxfp4` and `nvfp4` have the 15 values of floating-point numbers of 4 bits (E2M1) as levels, and
scales of 8 bits without a sign. In `mxfp4`, 32 weights share a power of two (E8M0). In `nvfp4`, 16 weights
share a number of four significant bits (E4M3), or fewer below 1/64. No scale is shared by a whole matrix.

The formats `iq2_xxs` to `iq3_s` have levels and integer scales too. A codebook restricts the codes of 4 or 8
neighbouring weights (see `codebooks`), so that a weight takes 2.06 to 3.44 bits in all.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet._util import check_sizes
from tensornet.errors import FormatError
from tensornet.quantization.codebooks import CODEBOOKS, Codebook
from tensornet.quantization.parts import (
    SUPER_BLOCK,
    FloatScales,
    Integers,
    Levels,
    Points,
    Scales,
    StepScales,
)

#: Numbers of bits of integers.
BITS = (8, 7, 6, 5, 4, 3, 2, 1)
#: Sizes of groups; None is one group per row.
GROUPS = (16, 32, 64, 128, None)
DEFAULT_GROUP = 64
#: Points by the first part of the name of a format, which may be followed by a group and by scales. The 16
#: levels of `nl4` are those of the GGUF types IQ4_NL and IQ4_XS. Those of `nl3` and `nl2` were fitted by
#: Lloyd's algorithm to weights of a language model, in groups of 32 with the scales of `search_scales`.
POINTS: dict[str, Points] = {
    **{f"int{bits}": Integers.symmetric_of(bits) for bits in BITS},
    "nl4": Levels((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    "nl3": Levels((-127, -76, -44, -17, 9, 35, 65, 105)),
    "nl2": Levels((-127, -41, 21, 92)),
}
#: Scales by the last part of the name of a format. Integer scales are `s6` and `s8`.
SCALES = {
    "": FloatScales(torch.bfloat16),
    "float16": FloatScales(torch.float16),
    "float8": FloatScales(torch.float8_e5m2),
}
_SCALE_BITS = (6, 8)
#: Number of bits of scales and minima of formats with minima, by points and group.
_MINIMA = {("int2", 16): 4, ("int4", 32): 6, ("int5", 32): 6}
#: Factor by which groups are larger if 16-bit scales replace others, so that bytes stay about the same.
_WIDER = {"": 1, "float16": 1, "float8": 2, "s4": 4, "s6": 2, "s8": 2}
#: Names of the formats of floating-point numbers of 4 bits, and their levels: twice the values of E2M1, which
#: are integers. Stored scales are therefore multiplied by 1/2.
FP4 = ("mxfp4", "nvfp4")
FP4_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
_PATTERN = re.compile(
    r"(?P<points>\w+)(:(g(?P<group>\d+)|(?P<row>row)))?"
    r"(:((?P<dtype>float16|float8)|s(?P<bits>\d)(?P<min>:min)?))?"
)


class NumberFormat:
    """Storage format of the elements of a core or matrix; `NumberFormat.parse` reads it from its name.

    Two formats are equal if their names are. Without arguments, this is the format `float`.

    Args:
        name: the shortest name that `parse` accepts.
        points: what the codes mean; None for floating-point formats.
        scales: how scales are stored; None for floating-point formats.
        group: number of neighbouring elements of a row that share a scale; the last group of a row may be
            shorter. None is one group per row.
        minima: how minima are stored; None without them.
        span: rows that consist of complete groups are multiples of this number of elements; by default, the
            number of elements that share a scale or a step.
        wide: name of a format with 16-bit scales that takes about as many bytes.
        dtype: dtype of the elements of a floating-point format; None is the dtype of the model.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> number_format = NumberFormat.parse("int4:g128")
        >>> number_format.bits, number_format.group, number_format.nbytes((2, 256))
        (4, 128, 264)
    """

    def __init__(
        self,
        name: str = "float",
        points: Points | None = None,
        scales: Scales | None = None,
        group: int | None = None,
        *,
        minima: StepScales | None = None,
        span: int | None = None,
        wide: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.group, self.minima, self.dtype = name, group, minima, dtype
        self._points, self._scales, self._wide = points, scales, wide
        shared = 1 if scales is None else scales.count
        self.span = group * shared if span is None and group is not None else span

    @classmethod
    def parse(cls, name: "str | NumberFormat") -> "NumberFormat":
        """Read a format from its name, such as `"int4"`, `"int4:g128"`, `"int8:row"` or `"nl4:g32:float16"`.

        Args:
            name: a key of `FORMATS`, such as `"float"`, `"mxfp4"` or `"iq3_s"`, or a key of `POINTS`, such as
                `"int4"` or `"nl4"`. Optional suffixes of the latter, in this order: the group, `:g16`,
                `:g32`, `:g64` (the default), `:g128` or `:row`; `:float16` or `:float8` for the dtype of
                scales, or `:s6` or `:s8` for integer scales; `:min` after integer scales for minima.

        Raises:
            FormatError: the name is unknown, or its parts cannot be combined; the message lists the known
                names.
        """
        if isinstance(name, NumberFormat):
            return name
        if isinstance(name, str) and name in FORMATS:
            return FORMATS[name]
        found = _PATTERN.fullmatch(name) if isinstance(name, str) else None
        if found is None or found["points"] not in POINTS:
            raise FormatError(
                f"Unknown number format {name!r}; known are {', '.join(format_names())}. Integer formats may "
                "add a group size and a kind of scales: 'int4:g128', 'int8:row', 'int4:g32:float8'."
            )
        group = None if found["row"] else int(found["group"] or DEFAULT_GROUP)
        if group not in GROUPS:
            raise FormatError(
                f"Groups have 16, 32, 64 or 128 inputs, or None for one group per row; got {name!r}."
            )
        kind = f"s{found['bits']}" if found["bits"] else found["dtype"] or ""
        return _composed(found["points"], group, kind, minima=found["min"] is not None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumberFormat) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"NumberFormat.parse({self.name!r})"

    def __str__(self) -> str:
        return self.name

    @property
    def points(self) -> Points:
        """The points that the codes of the format stand for.

        Raises:
            FormatError: this is a floating-point format.
        """
        if self._points is None:
            raise self._without_codes()
        return self._points

    @property
    def scales(self) -> Scales:
        """How scales are stored.

        Raises:
            FormatError: this is a floating-point format.
        """
        if self._scales is None:
            raise self._without_codes()
        return self._scales

    def _without_codes(self) -> FormatError:
        return FormatError(
            f"The format {self.name!r} has no codes; use one of int2 ... int8, nl2 ... nl4, mxfp4, nvfp4, "
            "iq2_xxs ... iq3_s."
        )

    @property
    def is_integer(self) -> bool:
        """True if elements are stored as integer codes with scales."""
        return self._points is not None

    @property
    def bits(self) -> int | None:
        """Number of bits of a code before packing; None for floating-point formats."""
        return None if self._points is None else self._points.bits

    @property
    def for_networks(self) -> bool:
        """True if plans may use this format for cores of networks, and not only for dense matrices."""
        return not self.is_integer or (self.points.equal_steps and self.scales.count == 1)

    @property
    def wide(self) -> "NumberFormat":
        """Format with 16-bit scales that takes about as many bytes; the same format if it has such scales."""
        return self if self._wide is None else NumberFormat.parse(self._wide)

    def check_real(self, weight: Tensor) -> None:
        """Check that a weight is real, unless this is the format `float`, which stores complex numbers too.

        Raises:
            FormatError: the weight is complex.
        """
        if weight.is_complex() and self != NumberFormat():
            raise FormatError(
                f"{self.name!r} stores real numbers, and the weight has dtype {weight.dtype}. Use the format "
                "'float', for example with a low rank."
            )

    # --- groups ----------------------------------------------------------------------------------

    def divides(self, size: int) -> bool:
        """Return True if a row of `size` elements consists of complete groups and super-blocks."""
        return self.span is None or size % self.span == 0

    def fits(self, size: int) -> bool:
        """Return True if rows of `size` elements can be stored: super-blocks, if any, must be complete."""
        return not self.is_integer or self.scales.count == 1 or self.divides(size)

    def groups(self, size: int) -> int:
        """Count the groups in a row of `size` elements.

        Raises:
            FormatError: the format has no groups, or a step is shared by groups that a row of `size` elements
                does not complete.
        """
        if not self.is_integer:
            raise self._without_codes()
        if not self.fits(size):
            raise FormatError(
                f"{self.name!r} stores one step for {self.span} weights of a row, but {size} inputs are not "
                f"a multiple of {self.span}; use {self.wide.name!r}."
            )
        return 1 if self.group is None else math.ceil(size / self.group)

    def grouped(self, x: Tensor) -> Tensor:
        """Reshape `(..., in)` to `(..., groups, group)`, padded with zeros; a view if nothing is padded."""
        size = x.shape[-1]
        groups, width = self.groups(size), self.group or max(size, 1)
        if groups * width != size:  # `pad` copies even if it adds nothing
            x = torch.nn.functional.pad(x, (0, groups * width - size))
        return x.reshape(*x.shape[:-1], groups, width)

    def spread(self, values: Tensor, size: int) -> Tensor:
        """Repeat the value of each group, `(..., groups)`, for all elements of the group, `(..., size)`."""
        width = self.group or max(size, 1)
        # This is many times faster than `repeat_interleave`.
        return values.unsqueeze(-1).expand(*values.shape, width).flatten(-2)[..., :size]

    # --- values, codes, bytes --------------------------------------------------------------------

    def storable(self, scales: Tensor, importance: Tensor | None = None) -> Tensor:
        """Round scales to values that the format can store.

        Args:
            scales: scales, shape `(..., groups)`.
            importance: weight of the squared error of each scale when scales are rounded to integers; if
                absent, all weights are equal.

        Returns:
            Scales in the dtype of `scales`, or in float32 if they are integers times steps or have a unit.
        """
        return self.scales.storable(scales, importance)

    def ratios(self, scales: Tensor, minima: Tensor) -> Tensor:
        """Return minima divided by the scales, which are the codes of zero."""
        return minima / torch.where(scales == 0, torch.ones_like(scales), scales)

    def encode(self, values: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
        """Round values to the nearest codes for given scales.

        Args:
            values: values, shape `(..., out, in)`.
            scales: scales, shape `(..., out, groups)`; a scale of zero makes all values of its group zero.
            minima: minima, shape `(..., out, groups)`; None without them.

        Returns:
            Codes in `torch.uint8`, shape `(..., out, in)`.

        Example:
            >>> from tensornet.quantization import NumberFormat
            >>> int4, scales = NumberFormat.parse("int4"), torch.tensor([[0.5]])
            >>> int4.encode(torch.tensor([[-9.0, 0.1, 0.6]]), scales)
            tensor([[0, 8, 9]], dtype=torch.uint8)
        """
        size, own = values.shape[-1], scales.to(values.dtype)
        spread, zero = self.spread(own, size), self.points.center
        found = values / torch.where(spread == 0, torch.ones_like(spread), spread)
        if minima is not None:
            found = found + self.spread(self.ratios(own, minima.to(values.dtype)), size)
        else:
            found = found + zero
        return self.points.to_codes(self.points.closest(found))

    def decode(
        self,
        codes: Tensor,
        scales: Tensor,
        minima: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Compute the values of codes, differentiably.

        They are `scale * (code - center)`, `scale * level[code]` or `scale * code - minimum`.

        Codes that are trained are floating-point numbers. They are rounded here, but their gradient is
        computed as if they were not (the straight-through estimator of Bengio, Leonard, Courville 2013).

        Args:
            codes: codes in `torch.uint8`, or in floating point for training, shape `(..., out, in)`.
            scales: scales, shape `(..., out, groups)`.
            minima: minima, shape `(..., out, groups)`; None without them.
            dtype: dtype of the values.

        Example:
            >>> from tensornet.quantization import NumberFormat
            >>> codes = torch.tensor([[0, 8, 9]], dtype=torch.uint8)
            >>> NumberFormat.parse("int4").decode(codes, torch.tensor([[0.5]]))
            tensor([[-4.0000,  0.0000,  0.5000]])
        """
        if not codes.is_floating_point():
            return self._scaled(*self.points.values(codes), scales, minima, dtype)
        values = self.grouped(self.points.trained_values(codes)) * scales.to(codes).unsqueeze(-1)
        if minima is not None:
            values = values - minima.to(codes).unsqueeze(-1)
        return values.flatten(-2)[..., : codes.shape[-1]].to(dtype)

    def _scaled(
        self, points: Tensor, divisor: float, scales: Tensor, minima: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Multiply integers `(..., in)` by scales `(..., groups)`, and round each value only once.

        For the other arguments, see `parts.Points.values` and `decode`.
        """
        size, points = points.shape[-1], self.grouped(points)
        if minima is not None:
            wide = torch.promote_types(dtype, torch.float32)
            products = points.to(wide) * scales.to(wide).unsqueeze(-1)
            values = (products - minima.to(wide).unsqueeze(-1)).to(dtype)
            return values.flatten(-2)[..., :size]
        # Small bfloat16 scales underflow in float16, and 16-bit types take twice the time on CPUs.
        wide_factors = dtype == torch.float16 or (dtype == torch.bfloat16 and points.is_cpu)
        factor = scales.to(torch.float32 if wide_factors else dtype).unsqueeze(-1)
        factor = factor if divisor == 1 else factor / divisor
        values = ((points if wide_factors else points.to(dtype)) * factor).to(dtype)
        return values.flatten(-2)[..., :size]

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes `(..., in)` to bytes for storage, shape `(..., packed_bytes(in))`.

        Example:
            >>> from tensornet.quantization import NumberFormat
            >>> int4, codes = NumberFormat.parse("int4"), torch.tensor([[0, 8, 9]], dtype=torch.uint8)
            >>> packed = int4.pack(codes)
            >>> packed.shape, int4.unpack(packed, 3).tolist()
            (torch.Size([1, 2]), [[0, 8, 9]])
        """
        return self.points.pack(codes)

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        """Unpack rows of `size` codes; this is the inverse of `pack`."""
        return self.points.unpack(packed, size)

    def decode_packed(
        self,
        packed: Tensor,
        scales: Tensor,
        minima: Tensor | None,
        size: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Compute the values of packed codes, shape `(..., out, size)`, as `decode` does.

        Args:
            packed: packed codes, as returned by `pack`.
            scales: scales, shape `(..., out, groups)`.
            minima: packed minima; None without them.
            size: number of columns.
            dtype: dtype of the values.
        """
        return self._scaled(
            *self.points.packed_values(packed, size), scales, self.unpacked_minima(minima, scales), dtype
        )

    def unpacked_minima(self, packed: Tensor | None, scales: Tensor) -> Tensor | None:
        """Unpack minima, which have the shape of the scales; None without them."""
        if packed is None or self.minima is None:
            return None
        return self.minima.unpack(packed, scales.shape[-1])

    # --- size ------------------------------------------------------------------------------------

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Compute the exact number of bytes of a tensor, including scales, minima and padding.

        Args:
            shape: shape `(..., out, in)` of the tensor.
            dtype: dtype of the model, which is used only by the format `float`.
        """
        sizes = check_sizes("shape", shape, least=0)
        rows, size = math.prod(sizes[:-1]), sizes[-1]
        if not self.is_integer:
            return rows * size * (self.dtype or dtype).itemsize
        groups = self.groups(size)
        parts = sum(length * kind.itemsize for _, length, kind, _ in self.scales.layout(groups))
        minima = 0 if self.minima is None else self.minima.packed_bytes(groups)
        return rows * (self.points.packed_bytes(size) + parts + minima)

    def bits_per_weight(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        """Compute the mean number of bits per element, including scales, minima and padding."""
        return 8 * self.nbytes(shape, dtype) / math.prod(shape)


def format_names() -> tuple[str, ...]:
    """List all format names without suffixes."""
    return (*FORMATS, *POINTS)


def _composed(name: str, group: int | None, kind: str, *, minima: bool) -> NumberFormat:
    """Combine an entry of `POINTS` with a group, and with an entry of `SCALES` or integer scales."""
    points, suffix = POINTS[name], f":{kind}" if kind else ""
    size = "" if group == DEFAULT_GROUP else ":row" if group is None else f":g{group}"
    full = f"{name}{size}{suffix}" + (":min" if minima else "")
    wider = "row" if group is None else f"g{min(128, group * _WIDER.get(kind, 1))}"
    wide = f"{name}:{wider}" if kind else None
    if kind in SCALES:
        return NumberFormat(full, points, SCALES[kind], group, wide=wide)
    bits = int(kind[1:])
    if minima:
        if _MINIMA.get((name, group or 0)) != bits:
            known = ", ".join(f"{x}:g{width}:s{n}:min" for (x, width), n in _MINIMA.items())
            raise FormatError(f"Formats with minima are {known}; got {full!r}.")
        steps = StepScales(bits, SUPER_BLOCK // (group or 1))
        return NumberFormat(full, Integers(points.bits, 0.0), steps, group, minima=steps, wide=wide)
    if bits not in _SCALE_BITS or group is None:
        raise FormatError(f"Integer scales have 6 or 8 bits, and need groups; got {full!r}.")
    steps = StepScales(bits, SUPER_BLOCK // group, start=-(2 ** (bits - 1)))
    return NumberFormat(full, points, steps, group, wide=wide)


def codebook_format(name: str, book: Codebook, group: int, unit: float) -> NumberFormat:
    """Make a format of the points of a codebook, with scales `unit * step * (2 k + 1)` for `k` of 4 bits.

    Args:
        name: name of the format.
        book: the codebook.
        group: number of neighbouring elements that share a scale.
        unit: factor of all scales, a power of two.
    """
    steps = StepScales(4, SUPER_BLOCK // group, start=1, stride=2, unit=unit)
    return NumberFormat(name, book, steps, group, wide=f"int{book.bits - 1}")


#: Formats by names that have no suffixes.
FORMATS: dict[str, NumberFormat] = {
    x.name: x
    for x in (
        NumberFormat(),
        NumberFormat("bf16", dtype=torch.bfloat16),
        NumberFormat(
            "mxfp4",
            Levels(FP4_LEVELS),
            FloatScales(torch.float8_e8m0fnu, unit=0.5, signed=False),
            32,
            wide="int4",
        ),
        NumberFormat(
            "nvfp4",
            Levels(FP4_LEVELS),
            FloatScales(torch.float8_e4m3fn, unit=0.5, signed=False),
            16,
            span=64,  # the number of weights in a block of GGUF files
            wide="int4",
        ),
        codebook_format("iq3_s", CODEBOOKS["iq3_s"], 32, 1.0),
        codebook_format("iq3_xxs", CODEBOOKS["iq3_xxs"], 32, 0.25),
        codebook_format("iq2_s", CODEBOOKS["iq2_s"], 16, 0.125),
        codebook_format("iq2_xs", CODEBOOKS["iq2_xs"], 16, 0.125),
        codebook_format("iq2_xxs", CODEBOOKS["iq2_xxs"], 32, 0.125),
    )
}
