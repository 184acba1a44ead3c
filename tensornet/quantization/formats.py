"""Number formats: names, sizes, and conversion between values, integer codes and packed bytes.

An integer format stores a code of `bits` bits for every element, and a scale for every group of neighbouring
elements of a row: `value = scale * (code - zero)`. Without zero points, all groups have the same `zero`.

In formats with a table, codes are positions in a table of unequally spaced levels: `value = scale *
level[code]`. Since most weights are close to zero, 16 such levels have one sixth less squared error than 16
equally spaced levels.

Scales have 16 bits, or 8 bits on request. Groups of 32 with 8-bit scales take as many bytes as groups of 64
with 16-bit scales. They are more accurate, since codes are chosen after the scale is rounded. Scales may also
be integers of 6 or 8 bits times a step in float16 that 256 weights of a row share.

Formats such as `int5:g32:s6:min` have a minimum for every group: `value = scale * code - minimum`. Scales and
minima are integers of 4 or 6 bits without a sign, times steps in float16, as in the K types of GGUF.

The formats `mxfp4` and `nvfp4` have the 15 values of floating-point numbers of 4 bits (E2M1) as levels, and
scales of 8 bits without a sign. In `mxfp4`, 32 weights share a power of two (E8M0). In `nvfp4`, 16 weights
share a number of four significant bits (E4M3), or fewer below 1/64. No scale is shared by a whole matrix.

The formats `iq2_xxs` to `iq3_s` have tables and such scales too. A codebook restricts the codes of 4 or 8
neighbouring weights (see `codebooks`), so that a weight takes 2.06 to 3.44 bits in all.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tensornet._util import check_sizes, is_exporting
from tensornet.errors import FormatError
from tensornet.quantization.codebooks import CODEBOOKS, RUN, Codebook
from tensornet.quantization.packing import pack, packed_bytes, unpack

#: Numbers of bits of integer formats.
BITS = (8, 7, 6, 5, 4, 3, 2)
#: Sizes of groups; None is one group per row.
GROUPS = (16, 32, 64, 128, None)
DEFAULT_GROUP = 64
#: Sizes of groups that may have zero points: those of MLX, and of Q4_1 and Q5_1 in GGUF files.
ZERO_POINT_GROUPS = (32, 64, 128)
#: Dtype of scales for each suffix of the name of a format.
SCALE_DTYPES = {"": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e5m2}
#: Levels of the formats `nl<bits>`, by bits, as multiples of the scale. The 16 levels are those of the GGUF
#: types IQ4_NL and IQ4_XS. The others were fitted by Lloyd's algorithm to weights of a language model, in
#: groups of 32 with the scales of `search_scales`.
LEVELS = {
    4: (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    3: (-127, -76, -44, -17, 9, 35, 65, 105),
    2: (-127, -41, 21, 92),
}
#: Twice the values of E2M1, which are the levels of `mxfp4` and `nvfp4`. Therefore, scales count half.
FP4_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
#: Size of groups and dtype of scales of these formats.
FP4 = {"mxfp4": (32, torch.float8_e8m0fnu), "nvfp4": (16, torch.float8_e4m3fn)}
#: Number of weights in a block of `nvfp4` in files; rows consist of whole blocks.
_NVFP4_BLOCK = 64
#: Numbers of bits of integer scales, in formats that end in `:s6` or `:s8`, and the number of weights that
#: share a step.
SCALE_BITS, SUPER_BLOCK = (6, 8), 256
#: Number of bits of scales and minima, by the number of bits of a code and the size of groups.
MINIMA = {(2, 16): 4, (4, 32): 6, (5, 32): 6}
#: Number of bits of the exponent and of the mantissa of each dtype.
_PARTS = {
    torch.bfloat16: (8, 7),
    torch.float16: (5, 10),
    torch.float8_e5m2: (5, 2),
    torch.float8_e4m3fn: (4, 3),
    torch.float8_e8m0fnu: (8, 0),
}
_FLOATS = ("float", "bf16")
_PATTERN = re.compile(
    r"(?P<kind>int|nl)(?P<bits>\d)(:(g(?P<group>\d+)|(?P<row>row)))?(?P<zero>:zero)?"
    r"(:((?P<dtype>float16|float8)|s(?P<scale>\d)(?P<minimum>:min)?))?"
)


class Levels(NamedTuple):
    """Table of levels.

    Args:
        values: the levels, which are integers.
        nearest: the level that is nearest to each interval of length 1/2. The intervals begin at the lowest
            level. The midpoint of two levels is never inside an interval.
        codes: the code of each integer from the lowest level to the highest; 0 for other integers.
    """

    values: Tensor
    nearest: Tensor
    codes: Tensor


@dataclass(frozen=True)
class NumberFormat:
    """Storage format of the elements of a core or matrix.

    Args:
        bits: number of bits of an integer code, 2 to 8; None for floating-point formats.
        group: number of neighbouring elements of a row that share a scale; the last group of a row may be
            shorter. None is one group per row.
        zero_point: True if every group has its own zero point, an integer of `bits` bits. This needs groups
            of `ZERO_POINT_GROUPS` and any number of bits except 7. If False, the value 0 is in the middle of
            the codes. With three or more bits, it is the value of a code. With two bits, it is between two
            codes, since four symmetric values fit a normal distribution better.
        scale_dtype: dtype of scales or, with `scale_bits`, of their steps: `torch.bfloat16`; `torch.float16`,
            which underflows below 6e-8; or `torch.float8_e5m2`, which underflows below 1.5e-5.
        dtype: dtype of the elements of a floating-point format; None is the dtype of the model.
        table: True if codes are positions in the table `LEVELS[bits]`, without zero points.
        scale_bits: number of bits of integer scales; None if scales are floating-point numbers. A scale is
            the integer times a step in `torch.float16`, which `SUPER_BLOCK` weights share. These integers
            have a sign, unless there are minima. With a codebook, scales are odd integers from 1 to 31 times
            a step and times `Codebook.unit`.
        minimum: True if every group has a minimum, one of `MINIMA`. Minima take the place of zero points in
            all functions. They have as many bits as the scales, and steps of their own.
        fp4: name of the format with levels of E2M1, one of `FP4`; None in other formats. The name determines
            all other arguments.
        codebook: name of the codebook that restricts the codes of neighbouring weights, one of `CODEBOOKS`;
            None without one. The name determines all other arguments.

    Raises:
        FormatError: this combination of arguments does not exist.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> number_format = NumberFormat.parse("int4:g128")
        >>> number_format.bits, number_format.group, number_format.nbytes((2, 256))
        (4, 128, 264)
    """

    bits: int | None = None
    group: int | None = None
    zero_point: bool = False
    scale_dtype: torch.dtype = torch.bfloat16
    dtype: torch.dtype | None = None
    table: bool = False
    scale_bits: int | None = None
    codebook: str | None = None
    fp4: str | None = None
    minimum: bool = False

    def __post_init__(self) -> None:
        if self.fp4 is not None:
            others = (self.zero_point, self.dtype, self.scale_bits, self.codebook)
            kind = (self.bits, self.group, self.scale_dtype, self.table)
            if kind != (4, *FP4.get(self.fp4, ()), True) or any(others):
                raise FormatError(
                    f"A format with levels of E2M1 is one of {', '.join(FP4)}, read by NumberFormat.parse; "
                    f"got {self!r}."
                )
            return
        if self.codebook is not None:
            book = CODEBOOKS.get(self.codebook)
            given = (self.bits, self.group, self.zero_point, self.scale_dtype, self.dtype, self.table)
            if (
                book is None
                or given != (_code_bits(book), book.group, False, torch.float16, None, True)
                or self.scale_bits != 4
            ):
                raise FormatError(
                    f"A format with a codebook is one of {', '.join(CODEBOOKS)}, read by NumberFormat.parse; "
                    f"got {self!r}."
                )
            return
        if self.bits is None:
            other = self.group is not None or self.zero_point or self.table or self.scale_bits
            if other or self.dtype not in (None, torch.bfloat16):
                raise FormatError(
                    f"A floating-point format is one of {', '.join(_FLOATS)}, without groups and zero "
                    f"points; got {self!r}."
                )
            return
        if self.bits not in BITS or self.dtype is not None:
            raise FormatError(f"An integer format has 2 to 8 bits and no dtype, got {self.bits!r} bits.")
        if self.table and (self.bits not in LEVELS or self.zero_point):
            raise FormatError(f"Tables of levels have 2 to 4 bits and no zero points; got {self!r}.")
        if self.group not in GROUPS:
            raise FormatError(
                f"Groups have 16, 32, 64 or 128 inputs, or None for one group per row; got {self.group!r}."
            )
        if self.zero_point and (self.bits == 7 or self.group not in ZERO_POINT_GROUPS):
            raise FormatError(
                "Zero points need 2, 3, 4, 5, 6 or 8 bits and groups of 32, 64 or 128 inputs, as in the "
                f"files of other runtimes; got {self!r}. Leave out ':zero'."
            )
        if self.scale_dtype not in SCALE_DTYPES.values():
            names = ", ".join(map(str, SCALE_DTYPES.values()))
            raise FormatError(f"Scales are one of {names}; got {self.scale_dtype}.")
        if self.minimum:
            if self.table or self.scale_bits != MINIMA.get((self.bits, self.group or 0), 0):
                names = ", ".join(f"int{bits}:g{group}:s{n}:min" for (bits, group), n in MINIMA.items())
                raise FormatError(f"Formats with minima are {names}; got {self!r}.")
        elif self.scale_bits is not None and self.scale_bits not in SCALE_BITS:
            raise FormatError(f"Integer scales have 6 or 8 bits, or 4 with minima; got {self!r}.")
        if self.scale_bits is not None and (
            self.group is None or self.zero_point or self.scale_dtype != torch.float16
        ):
            raise FormatError(
                f"Integer scales have steps in torch.float16, and groups without zero points; got {self!r}."
            )

    @classmethod
    def parse(cls, name: "str | NumberFormat") -> "NumberFormat":
        """Read a format from its name, such as `"int4"`, `"int4:g128"`, `"int8:row"` or `"int3:g64:zero"`.

        Args:
            name: `"float"`, `"bf16"`, `"mxfp4"`, `"nvfp4"`, the name of a codebook, such as `"iq3_s"`, or the
                name of another integer format. It begins with `int2` ... `int8` or, with a table, `nl2` ...
                `nl4`. Optional suffixes, in this order: the group, `:g16`, `:g32`, `:g64` (the default),
                `:g128` or `:row`; `:zero` for zero points; `:float16` or `:float8` for the dtype of scales,
                or `:s6` or `:s8` for integer scales; `:min` after integer scales for minima.

        Raises:
            FormatError: the name is unknown; the message lists the known names.
        """
        if isinstance(name, NumberFormat):
            return name
        if name == "float":
            return cls()
        if name == "bf16":
            return cls(dtype=torch.bfloat16)
        if isinstance(name, str) and name in FP4:
            return cls(4, FP4[name][0], scale_dtype=FP4[name][1], table=True, fp4=name)
        if isinstance(name, str) and name in CODEBOOKS:
            return cls(
                _code_bits(CODEBOOKS[name]),
                CODEBOOKS[name].group,
                scale_dtype=torch.float16,
                table=True,
                scale_bits=4,
                codebook=name,
            )
        found = _PATTERN.fullmatch(name) if isinstance(name, str) else None
        if found is None or int(found["bits"]) not in (BITS if found["kind"] == "int" else LEVELS):
            raise FormatError(
                f"Unknown number format {name!r}; known are {', '.join(format_names())}. Integer formats may "
                "add a group size, zero points and a dtype of scales: 'int4:g128', 'int8:row', "
                "'int3:g64:zero', 'int4:g32:float8'."
            )
        group = None if found["row"] else int(found["group"] or DEFAULT_GROUP)
        scale_bits = int(found["scale"]) if found["scale"] else None
        return cls(
            int(found["bits"]),
            group,
            found["zero"] is not None,
            torch.float16 if scale_bits else SCALE_DTYPES[found["dtype"] or ""],
            table=found["kind"] == "nl",
            scale_bits=scale_bits,
            minimum=found["minimum"] is not None,
        )

    @property
    def name(self) -> str:
        """Shortest name that `parse` accepts for this format."""
        if self.bits is None:
            return "float" if self.dtype is None else "bf16"
        if self.codebook is not None or self.fp4 is not None:
            return self.codebook or self.fp4 or ""
        parts = [f"nl{self.bits}" if self.table else f"int{self.bits}"]
        if self.group != DEFAULT_GROUP:
            parts.append("row" if self.group is None else f"g{self.group}")
        if self.zero_point:
            parts.append("zero")
        if self.scale_bits is not None:
            return ":".join([*parts, f"s{self.scale_bits}", *(["min"] if self.minimum else [])])
        parts += [suffix for suffix, dtype in SCALE_DTYPES.items() if suffix and dtype == self.scale_dtype]
        return ":".join(parts)

    def __str__(self) -> str:
        return self.name

    @property
    def is_integer(self) -> bool:
        """True if elements are stored as integer codes with scales."""
        return self.bits is not None

    @property
    def for_networks(self) -> bool:
        """True if plans may use this format for cores of networks, and not only for dense matrices."""
        return not self.table and self.scale_bits is None

    @property
    def span(self) -> int | None:
        """Number of neighbouring elements of a row that share a scale or a step, or a block of `nvfp4`.

        None means the whole row.
        """
        if self.fp4 == "nvfp4":
            return _NVFP4_BLOCK
        return self.group if self.scale_bits is None else SUPER_BLOCK

    @property
    def book(self) -> Codebook | None:
        """The codebook that restricts the codes of neighbouring weights; None without one."""
        return None if self.codebook is None else CODEBOOKS[self.codebook]

    @property
    def level_values(self) -> tuple[int, ...]:
        """Levels of all codes as multiples of the scale, in formats with a table."""
        if self.fp4 is not None:
            return FP4_LEVELS
        return LEVELS[self._integer_bits()] if self.book is None else self.book.levels

    @property
    def top(self) -> int:
        """Largest code."""
        return (len(self.level_values) if self.table else 2 ** self._integer_bits()) - 1

    @property
    def center(self) -> float:
        """Code of the value 0 in formats without zero points (may be a half-integer); 0 with a table."""
        if self.table:
            return 0.0
        half = 2.0 ** (self._integer_bits() - 1)
        return half - 0.5 if self.bits == 2 else half

    @property
    def lowest(self) -> float:
        """Value of the code 0, divided by the scale, in formats without zero points."""
        return float(self.level_values[0]) if self.table else -self.center

    def levels(self, like: Tensor) -> Levels | None:
        """Return the table of levels in the dtype and on the device of `like`, or None without a table."""
        return _levels(self.level_values, like.dtype, like.device) if self.table else None

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

    @property
    def smallest_scale(self) -> float:
        """Smallest positive scale that can be stored."""
        limits = torch.finfo(self.scale_dtype)
        return limits.smallest_normal * limits.eps * self.scale_unit

    @property
    def largest_scale(self) -> float:
        """Largest scale that can be stored; larger scales are replaced by it."""
        reach = 1
        if self.scale_bits is not None:
            reach = (
                31
                if self.book is not None
                else 2**self.scale_bits - 1
                if self.minimum
                else 2 ** (self.scale_bits - 1)
            )
        return reach * torch.finfo(self.scale_dtype).max * self.scale_unit

    # --- groups ----------------------------------------------------------------------------------

    def divides(self, size: int) -> bool:
        """Return True if a row of `size` elements consists of complete groups and super-blocks."""
        return self.span is None or size % self.span == 0

    def fits(self, size: int) -> bool:
        """Return True if rows of `size` elements can be stored: super-blocks, if any, must be complete."""
        return self.scale_bits is None or self.divides(size)

    def groups(self, size: int) -> int:
        """Count the groups in a row of `size` elements.

        Raises:
            FormatError: scales are integers, and `size` is not a multiple of `SUPER_BLOCK`.
        """
        self._integer_bits()
        if not self.fits(size):
            other = f"int{self.bits}:g32"
            if self.codebook is None:
                other = replace(self, scale_bits=None, minimum=False).name
            raise FormatError(
                f"{self.name!r} stores one step for {SUPER_BLOCK} weights of a row, but {size} inputs are "
                f"not a multiple of {SUPER_BLOCK}; use {other!r}."
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
            Scales in `scale_dtype`, or in float32 if they are integers times steps or count half.
        """
        if self.scale_bits is not None:
            return self.scales_of(*self.factored(scales, importance))
        limit = torch.finfo(self.scale_dtype).max
        if self.fp4 is not None:  # these scales have no sign
            found = (scales.abs() / self.scale_unit).clamp(max=limit).to(self.scale_dtype)
            return found.float() * self.scale_unit
        return scales.clamp(-limit, limit).to(self.scale_dtype)

    def factored(self, scales: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Approximate scales by integers times a step that each super-block of `SUPER_BLOCK` weights shares.

        Candidates for the step are the largest scale of the super-block divided by large integers, and the
        three smallest steps. With a candidate of the first kind, the integer of the largest scale must also
        be large. Then results of `scales_of` are factored exactly, so that a layer stores the very scales for
        which its codes were chosen.

        Args:
            scales, importance: see `storable`.

        Returns:
            Integers as `torch.uint8`, shape `(..., groups)`, and steps in `torch.float16`, shape `(...,
            groups * group / SUPER_BLOCK)`. Integers have an offset of half their range, unless there are
            minima. With a codebook, the odd integer `2 k + 1` is returned as `k`.
        """
        assert self.scale_bits is not None
        assert self.group is not None
        zero, each, odd = self._zero_scale(), SUPER_BLOCK // self.group, self.book is not None
        lowest, highest = -zero, 2**self.scale_bits - 1 - zero
        blocks = scales.reshape(*scales.shape[:-1], scales.shape[-1] // each, each)
        blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32)) / self.scale_unit
        blocks = blocks if zero else blocks.abs()

        def rounded(x: Tensor) -> Tensor:
            """Round to integers of the range, or to odd integers."""
            if odd:
                x = (x - 1) / 2
            x = x.round().clamp_(lowest, highest)
            return 2 * x + 1 if odd else x

        weights = (
            torch.ones_like(blocks) if importance is None else importance.to(blocks).reshape(blocks.shape)
        )
        place = blocks.abs().argmax(-1, keepdim=True)
        largest = blocks.gather(-1, place)[..., 0]
        limit = torch.finfo(torch.float16).max
        step, integers = torch.zeros_like(largest, dtype=torch.float16), rounded(torch.zeros_like(blocks))
        least = (weights * blocks.square()).sum(-1)
        farthest, smallest, toward = (lowest, -(2.0**-24), 1) if zero else (highest, 2.0**-24, -1)
        if odd:
            farthest, toward = 2 * highest + 1, -2
        steps = [(k * smallest * largest.sign()).half() for k in (1, 2, 3)]
        numbers = range(farthest, farthest * 3 // 4 + toward, toward)
        for number in numbers:
            tried = (largest / number).clamp(-limit, limit).half()
            steps.append(tried)
        for k, tried in enumerate(steps):
            divisor = torch.where(tried == 0, 1, tried.to(blocks))[..., None]
            found = rounded(blocks / divisor)
            error = (weights * (blocks - found * tried.to(blocks)[..., None]).square_()).sum(-1)
            better = error < least
            if k >= 3:
                better &= found.gather(-1, place)[..., 0].abs() >= abs(numbers[-1])
            least, step = torch.where(better, error, least), torch.where(better, tried, step)
            integers = torch.where(better[..., None], found, integers)
        integers = (integers - 1) / 2 if odd else integers + zero
        return integers.to(torch.uint8).reshape(scales.shape), step

    def scales_of(self, integers: Tensor, steps: Tensor) -> Tensor:
        """Compute scales in float32, shape `(..., groups)`, from the two results of `factored`."""
        assert self.scale_bits is not None
        blocks = integers.reshape(*steps.shape, -1) if steps.numel() else integers.unsqueeze(-1)
        whole = blocks.float() - self._zero_scale() if self.book is None else 2 * blocks.float() + 1
        values = whole * steps.float().unsqueeze(-1) * self.scale_unit
        return values.reshape(integers.shape)

    @property
    def scale_unit(self) -> float:
        """Factor of all stored scales, a power of two."""
        if self.fp4 is not None:
            return 0.5
        return 1.0 if self.book is None else self.book.unit

    def _zero_scale(self) -> int:
        """Return the stored integer of a scale of zero."""
        assert self.scale_bits is not None
        return 0 if self.minimum or self.book is not None else 2 ** (self.scale_bits - 1)

    def pack_zeros(self, zeros: Tensor) -> Tensor:
        """Pack zero points, or the integers of minima followed by the bytes of their steps.

        Args:
            zeros: zero points in `torch.uint8`, or minima, shape `(..., groups)`.
        """
        if not self.minimum:
            return pack(zeros, self._integer_bits())
        assert self.scale_bits is not None
        integers, steps = self.factored(zeros)
        return torch.cat([pack(integers, self.scale_bits), steps.contiguous().view(torch.uint8)], -1)

    def unpack_zeros(self, packed: Tensor, groups: int) -> Tensor:
        """Unpack zero points, or minima in float32, shape `(..., groups)`: the inverse of `pack_zeros`."""
        if not self.minimum:
            return unpack(packed, self._integer_bits(), groups)
        assert self.scale_bits is not None
        length = packed_bytes(groups, self.scale_bits)
        integers = unpack(packed[..., :length], self.scale_bits, groups)
        steps = packed[..., length:]
        if is_exporting():  # the same bits in wider integers, since bytes cannot be viewed as others
            steps = steps.to(torch.int32)
            steps = steps[..., ::2] + 256 * steps[..., 1::2]
        else:
            steps = steps.contiguous().view(torch.int16)
        return self.scales_of(integers, floating(steps, torch.float16))

    def ratios(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """Return zero points as they are, and minima divided by the scales, which are codes of zero too."""
        if not self.minimum:
            return zeros
        return zeros / torch.where(scales == 0, torch.ones_like(scales), scales)

    def encode(self, values: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """Round values to the nearest codes for given scales.

        Args:
            values: values, shape `(..., out, in)`.
            scales: scales, shape `(..., out, groups)`; a scale of zero makes all values of its group zero.
            zeros: zero points in `torch.uint8`, or minima, shape `(..., out, groups)`; None without them.

        Returns:
            Codes in `torch.uint8`, shape `(..., out, in)`.

        Example:
            >>> from tensornet.quantization import NumberFormat
            >>> int4, scales = NumberFormat.parse("int4"), torch.tensor([[0.5]])
            >>> int4.encode(torch.tensor([[-9.0, 0.1, 0.6]]), scales)
            tensor([[0, 8, 9]], dtype=torch.uint8)
        """
        size = values.shape[-1]
        spread = self.spread(scales.to(values.dtype), size)
        if zeros is not None:
            zeros = self.ratios(scales.to(values.dtype), zeros.to(values.dtype))
        zero = self.center if zeros is None else self.spread(zeros, size)
        found = values / torch.where(spread == 0, torch.ones_like(spread), spread) + zero
        if self.book is not None:
            return self.to_codes(self.book.nearest(found.reshape(1, -1, RUN)).view(found.shape))
        return self.to_codes(nearest(found, self.top, self.levels(found)))

    def to_codes(self, found: Tensor) -> Tensor:
        """Convert the results of `nearest`, which are codes or levels, to codes in `torch.uint8`."""
        levels = self.levels(found)
        if levels is None:
            return found.to(torch.uint8)
        places = (found - levels.values[0]).int()
        return levels.codes.index_select(0, places.reshape(-1)).view(found.shape)

    def decode(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Compute the values of codes, differentiably.

        They are `scale * (code - zero)`, `scale * level[code]` or `scale * code - minimum`.

        Codes that are trained are floating-point numbers. They are rounded here, but their gradient is
        computed as if they were not (the straight-through estimator of Bengio, Leonard, Courville 2013). The
        derivative of a level with respect to its code is the mean distance to the neighbouring levels.

        Args:
            codes: codes in `torch.uint8`, or in floating point for training, shape `(..., out, in)`.
            scales: scales, shape `(..., out, groups)`.
            zeros: zero points in `torch.uint8`, or minima, shape `(..., out, groups)`; None without them.
            dtype: dtype of the values.

        Example:
            >>> from tensornet.quantization import NumberFormat
            >>> codes = torch.tensor([[0, 8, 9]], dtype=torch.uint8)
            >>> NumberFormat.parse("int4").decode(codes, torch.tensor([[0.5]]))
            tensor([[-4.0000,  0.0000,  0.5000]])
        """
        if codes.is_floating_point():
            whole, slope = codes.detach().round().clamp_(0, self.top), None
            if (levels := self.levels(codes)) is not None:
                places = whole.long()
                whole, slope = levels.values[places], torch.gradient(levels.values)[0][places]
            moved = codes - codes.detach()
            whole = whole + (moved if slope is None else moved * slope)
            if self.minimum:
                assert zeros is not None
                products = self.grouped(whole) * scales.to(codes).unsqueeze(-1)
                return (
                    (products - zeros.to(codes).unsqueeze(-1)).flatten(-2)[..., : codes.shape[-1]].to(dtype)
                )
            zero = self.center if zeros is None else zeros.to(codes).unsqueeze(-1)
            values = (self.grouped(whole) - zero) * scales.to(codes).unsqueeze(-1)
            return values.flatten(-2)[..., : codes.shape[-1]].to(dtype)
        if self.table:
            table = torch.tensor(self.level_values, dtype=torch.int8, device=codes.device)
            points = table.index_select(0, codes.reshape(-1).long()).view(codes.shape)
            return _scaled(self.grouped(points), scales, dtype)[..., : codes.shape[-1]]
        grouped, halves = self.grouped(codes), False
        if self.minimum:
            assert zeros is not None
            wide = torch.promote_types(dtype, torch.float32)
            products = grouped.to(wide) * scales.to(wide).unsqueeze(-1)
            values = (products - zeros.to(wide).unsqueeze(-1)).to(dtype)
            return values.flatten(-2)[..., : codes.shape[-1]]
        # Differences `code - zero` are exact and fast in 8-bit integers. For int2, whose center is 1.5, twice
        # the difference is computed.
        if zeros is not None:
            kind = torch.int16 if self.bits == 8 else torch.int8
            points = grouped.to(kind) - zeros.to(kind).unsqueeze(-1)
        elif self.center % 1:
            points, halves = 2 * _signed(grouped) - int(2 * self.center), True
        elif self.bits == 8:
            points = grouped.to(torch.int16) - 128 if is_compiling() else (grouped ^ 128).view(torch.int8)
        else:
            points = _signed(grouped) - int(self.center)
        return _scaled(points, scales, dtype, halves=halves)[..., : codes.shape[-1]]

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes `(..., in)` to bytes for storage, shape `(..., packed_bytes(in))`.

        8-bit codes are stored as signed integers `code - 128`, as torch's kernels need them.

        Example:
            >>> from tensornet.quantization import NumberFormat
            >>> int4, codes = NumberFormat.parse("int4"), torch.tensor([[0, 8, 9]], dtype=torch.uint8)
            >>> packed = int4.pack(codes)
            >>> packed.shape, int4.unpack(packed, 3).tolist()
            (torch.Size([1, 2]), [[0, 8, 9]])
        """
        if self.book is not None:
            return self.book.pack(codes)
        packed = pack(codes, self._integer_bits())
        return packed ^ 128 if self.bits == 8 else packed

    def packed_bytes(self, size: int) -> int:
        """Compute the number of bytes of a packed row of `size` codes."""
        return packed_bytes(size, self._integer_bits()) if self.book is None else self.book.packed_bytes(size)

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        """Unpack rows of `size` codes; this is the inverse of `pack`."""
        if self.book is not None:
            return self.book.unpack(packed, size)
        codes = unpack(packed, self._integer_bits(), size)
        return codes ^ 128 if self.bits == 8 else codes

    def decode_packed(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        size: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Compute the values of packed codes, shape `(..., out, size)`, as `decode` does.

        Args:
            packed: packed codes, as returned by `pack`.
            scales: scales, shape `(..., out, groups)`.
            zeros: result of `pack_zeros`; None without zero points and minima.
            size: number of columns.
            dtype: dtype of the values.
        """
        if self.bits == 8 and zeros is None and not is_exporting():  # signed bytes are `code - zero`
            return _scaled(self.grouped(packed).view(torch.int8), scales, dtype)[..., :size]
        if self.book is not None:
            levels = self.book.unpack_levels(packed, size)
            return _scaled(self.grouped(levels), scales, dtype)[..., :size]
        if zeros is not None:
            zeros = self.unpack_zeros(zeros, scales.shape[-1])
        return self.decode(self.unpack(packed, size), scales, zeros, dtype)

    # --- size ------------------------------------------------------------------------------------

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Compute the exact number of bytes of a tensor, including scales, zero points and padding.

        Args:
            shape: shape `(..., out, in)` of the tensor.
            dtype: dtype of the model, which is used only by the format `float`.
        """
        sizes = check_sizes("shape", shape, least=0)
        rows, size = math.prod(sizes[:-1]), sizes[-1]
        if self.bits is None:
            return rows * size * (self.dtype or dtype).itemsize
        groups = self.groups(size)
        each = self.packed_bytes(size)
        if self.scale_bits is None:
            each += groups * self.scale_dtype.itemsize
        else:
            each += packed_bytes(groups, self.scale_bits) + size // SUPER_BLOCK * self.scale_dtype.itemsize
        return rows * (each + self.zero_bytes(size))

    def zero_bytes(self, size: int) -> int:
        """Compute the number of bytes of the packed zero points or minima of a row; 0 without them."""
        if self.minimum:
            assert self.scale_bits is not None
            return packed_bytes(self.groups(size), self.scale_bits) + size // SUPER_BLOCK * 2
        return packed_bytes(self.groups(size), self._integer_bits()) if self.zero_point else 0

    def bits_per_weight(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        """Compute the mean number of bits per element, including scales, zero points and padding."""
        return 8 * self.nbytes(shape, dtype) / math.prod(shape)

    def _integer_bits(self) -> int:
        if self.bits is None:
            raise FormatError(
                f"The format {self.name!r} has no codes; use one of int2 ... int8, nl2 ... nl4, mxfp4, "
                "nvfp4, iq2_xxs ... iq3_s."
            )
        return self.bits


def format_names() -> tuple[str, ...]:
    """List all format names without suffixes: floats, integers, tables of levels, 4-bit floats, codebooks."""
    return (*_FLOATS, *(f"int{bits}" for bits in BITS), *(f"nl{bits}" for bits in LEVELS), *FP4, *CODEBOOKS)


def _code_bits(book: Codebook) -> int:
    """Return the number of bits of the code of one weight before packing."""
    return (len(book.levels) - 1).bit_length()


def nearest(x: Tensor, top: int, levels: Levels | None, out: Tensor | None = None) -> Tensor:
    """Round `x` to the nearest codes from 0 to `top`, or to the nearest levels; `x` may be overwritten."""
    if levels is None:
        return torch.clamp(x.round_(), 0, top, out=out)
    places = x.mul_(2).floor_().sub_(2 * levels.values[0]).clamp_(0, len(levels.nearest) - 1).int()
    found = levels.nearest.index_select(0, places.reshape(-1)).view(x.shape)
    return found if out is None else out.copy_(found)


@lru_cache(maxsize=64)
def _levels(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Levels:
    with torch.inference_mode(False):
        values = torch.tensor(levels, dtype=dtype, device=device)
        inside = torch.arange(2 * levels[0], 2 * levels[-1] + 1, device=device) / 2 + 0.25
        codes = torch.zeros(levels[-1] - levels[0] + 1, dtype=torch.uint8, device=device)
        codes[(values - values[0]).long()] = torch.arange(len(values), dtype=torch.uint8, device=device)
        return Levels(values, values[(inside[:, None] - values).abs().argmin(1)], codes)


def floating(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the floating-point numbers whose bits are stored as integers of the same size."""
    if not is_exporting():
        return bits.view(dtype)
    # ONNX cannot reinterpret bits, so numbers are computed from sign, exponent and mantissa.
    exponents, digits = _PARTS[dtype]
    whole = bits.to(torch.int32) & (2 ** (exponents + digits + 1) - 1)
    sign = 1 - 2 * (whole >> (exponents + digits)).float()
    exponent = ((whole >> digits) & (2**exponents - 1)).float()
    mantissa = (whole & (2**digits - 1)).float() / 2**digits
    # Subnormal numbers have no leading one.
    leading = (exponent > 0).float()
    power = torch.exp2(exponent + (1 - leading) - (2 ** (exponents - 1) - 1))
    found = sign * (leading + mantissa) * power
    return found if dtype == torch.float8_e8m0fnu else found.to(dtype)  # nor can ONNX convert to this dtype


def _signed(codes: Tensor) -> Tensor:
    """Convert codes below 128 to signed bytes.

    The result is a view, except in compiled code, since ONNX has no such views.
    """
    return codes.to(torch.int8) if is_compiling() else codes.view(torch.int8)


def _scaled(points: Tensor, scales: Tensor, dtype: torch.dtype, *, halves: bool = False) -> Tensor:
    """Multiply integers `(..., groups, group)` by scales `(..., groups)`, and round each product only once.

    If `halves` is True, the integers count halves.
    """
    # Use float32: small bfloat16 scales underflow in float16, and 16-bit types take twice the time on CPUs.
    wide = dtype == torch.float16 or (dtype == torch.bfloat16 and points.is_cpu)
    factor = scales.to(torch.float32 if wide else dtype).unsqueeze(-1)
    factor = factor / 2 if halves else factor
    return ((points if wide else points.to(dtype)) * factor).to(dtype).flatten(-2)
