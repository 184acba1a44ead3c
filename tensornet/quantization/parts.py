"""Parts of number formats: what the codes mean, and how scales are stored.

A number format of integers combines an object with the methods of `Points` and one with the methods of
`Scales`. All other code calls only these methods, and never checks the class. `codebooks.Codebook` has the
methods of `Points` too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tensornet._util import is_exporting
from tensornet.quantization.packing import pack, packed_bytes, unpack

#: Number of weights that share the step of integer scales.
SUPER_BLOCK = 256
#: Largest range that is tried in the search for scales, as a multiple of the largest element.
WIDEST = 1.1
#: Number of ranges that are tried in the search for scales, by number of bits. With few bits, further ranges
#: hardly lower the error. With many bits, each of them is a new chance that large elements are close to the
#: grid.
_TRIED = {1: 8, 2: 8, 3: 8, 4: 10, 5: 12, 6: 16, 7: 20, 8: 24}
#: How many of the smallest multiples of the smallest step are inaccurate, by number of bits of the multiples.
_INACCURATE = {4: 8, 6: 4, 8: 16}
#: Integer dtype in which the bits of each floating-point dtype are stored, since `module.to(dtype)` does not
#: convert integers.
BIT_DTYPES = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}
#: Number of bits of the exponent and of the mantissa of each dtype.
_EXPONENT_MANTISSA = {
    torch.bfloat16: (8, 7),
    torch.float16: (5, 10),
    torch.float8_e5m2: (5, 2),
    torch.float8_e4m3fn: (4, 3),
    torch.float8_e8m0fnu: (8, 0),
}


# --- what codes mean -----------------------------------------------------------------------------------


class Points(Protocol):
    """The values that codes stand for, as multiples of the scale of their group, and how codes are packed.

    In all rounding functions, codes are floating-point numbers. With unequally spaced values, these functions
    use the values themselves, called levels, instead of codes; then `center` is 0.
    """

    @property
    def bits(self) -> int:
        """Number of bits of a code before packing."""

    @property
    def top(self) -> int:
        """Largest code."""

    @property
    def center(self) -> float:
        """Code (or level) of the value 0; may be a half-integer."""

    @property
    def lowest(self) -> float:
        """Smallest value."""

    @property
    def run(self) -> int:
        """Number of neighbouring codes of a row that are chosen together; 1 if each code is free."""

    @property
    def equal_steps(self) -> bool:
        """True if neighbouring codes are always one scale apart."""

    @property
    def symmetric(self) -> bool:
        """True if the negative of every value is a value too."""

    def ranges(self, least: float, like: Tensor) -> Tensor:
        """Return the ranges that the search for scales tries, as ascending shares of the range of a group.

        Args:
            least: largest value that the smallest share may have.
            like: tensor whose dtype and device the result has.
        """

    def scales_of_even(self, group: Tensor) -> Iterator[Tensor]:
        """Yield further scales for the search if the weights of a group are nearly equal.

        Args:
            group: weights, each column a group.
        """

    def nearest(self, x: Tensor, out: Tensor | None = None, offset: float = 0.0) -> Tensor:
        """Round each `x = value / scale + center - offset` to the nearest code minus `offset`, or to a level.

        `x` may be overwritten. If codes are not free, their restriction is ignored.
        """

    def closest(self, x: Tensor) -> Tensor:
        """Round whole rows `x = value / scale + center`, shape `(..., in)`, to codes that can be stored."""

    def searched(self, x: Tensor) -> Tensor:
        """Round `x = value / scale` to values for the search of scales, where a fast approximation suffices.

        `x` may be overwritten. Each group is a column of `x`.
        """

    def to_codes(self, found: Tensor) -> Tensor:
        """Convert the results of rounding to codes in `torch.uint8`."""

    def values(self, codes: Tensor) -> tuple[Tensor, float]:
        """Return small integers, and the number by which they are divided, for codes in `torch.uint8`."""

    def trained_values(self, codes: Tensor) -> Tensor:
        """Compute values of codes in floating point, with straight-through gradients."""

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes `(..., in)` to bytes `(..., packed_bytes(in))`."""

    def packed_bytes(self, size: int) -> int:
        """Compute the number of bytes of a packed row of `size` codes."""

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        """Unpack rows of `size` codes: the inverse of `pack`."""

    def packed_values(self, packed: Tensor, size: int) -> tuple[Tensor, float]:
        """Return `values` of packed codes."""


@dataclass(frozen=True)
class Integers:
    """Equally spaced values: `code - center`.

    Args:
        bits: number of bits of a code, 1 to 8.
        center: code of the value 0.
    """

    bits: int
    center: float
    run = 1
    equal_steps = True

    @classmethod
    def symmetric_of(cls, bits: int) -> "Integers":
        """Return integers with 0 in the middle.

        With three or more bits, 0 is a value. With two bits or one, it is between two values, since symmetric
        values fit a normal distribution better.
        """
        return cls(bits, (2**bits - 1) / 2 if bits <= 2 else 2.0 ** (bits - 1))

    @property
    def top(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    @property
    def lowest(self) -> float:
        """Smallest value."""
        return -self.center

    @property
    def symmetric(self) -> bool:
        """True if the negative of every value is a value too."""
        return 2 * self.center == self.top

    def ranges(self, least: float, like: Tensor) -> Tensor:
        """Return the shares of the range that the search for scales tries."""
        return _ranges(self.top, self.bits, least, like)

    def scales_of_even(self, group: Tensor) -> Iterator[Tensor]:
        """Yield nothing: the largest code already represents a group of equal weights exactly."""
        yield from ()

    def nearest(self, x: Tensor, out: Tensor | None = None, offset: float = 0.0) -> Tensor:
        """Round to the nearest codes minus `offset`; see `Points.nearest`."""
        return torch.clamp(x.round_(), -offset, self.top - offset, out=out)

    def closest(self, x: Tensor) -> Tensor:
        """Round to the nearest codes."""
        return self.nearest(x)

    def searched(self, x: Tensor) -> Tensor:
        """Round to the nearest values; see `Points.searched`."""
        if self.center % 1:
            x.sub_(0.5).round_().add_(0.5)
        else:
            x.round_()
        return x.clamp_(-self.center, self.top - self.center)

    def to_codes(self, found: Tensor) -> Tensor:
        """Convert codes to `torch.uint8`."""
        return found.to(torch.uint8)

    def values(self, codes: Tensor) -> tuple[Tensor, float]:
        """Return `code - center`, or twice that if it is a half-integer; exact and fast in 8 bits."""
        if self.center % 1:
            return 2 * _signed(codes) - int(2 * self.center), 2.0
        if self.bits == 8 and self.center == 128:
            return (codes.to(torch.int16) - 128 if is_compiling() else (codes ^ 128).view(torch.int8)), 1.0
        return (codes if self.center == 0 else _signed(codes) - int(self.center)), 1.0

    def trained_values(self, codes: Tensor) -> Tensor:
        """Compute `code - center` of rounded codes, with the gradient of codes that are not rounded."""
        whole = codes.detach().round().clamp_(0, self.top)
        return whole + (codes - codes.detach()) - self.center

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes; 8-bit codes become signed integers `code - 128`, as torch's kernels need them."""
        packed = pack(codes, self.bits)
        return packed ^ 128 if self.bits == 8 else packed

    def packed_bytes(self, size: int) -> int:
        """Compute the number of bytes of a packed row of `size` codes."""
        return packed_bytes(size, self.bits)

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        """Unpack rows of `size` codes: the inverse of `pack`."""
        codes = unpack(packed, self.bits, size)
        return codes ^ 128 if self.bits == 8 else codes

    def packed_values(self, packed: Tensor, size: int) -> tuple[Tensor, float]:
        """Return `values` of packed codes; those of 8 bits are stored as they are."""
        if self.bits == 8 and self.center == 128 and not is_exporting():
            return packed.view(torch.int8), 1.0
        return self.values(self.unpack(packed, size))


class _Table(NamedTuple):
    """Levels as tensors.

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
class Levels:
    """Unequally spaced values; a code is the position of a value in a table.

    Since most weights are close to zero, 16 such values have one sixth less squared error than 16 equally
    spaced values.

    Args:
        numbers: the values, ascending integers from -128 to 127; the first one is farthest from zero.
    """

    numbers: tuple[int, ...]
    center = 0.0
    run = 1
    equal_steps = False

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return self.top.bit_length()

    @property
    def top(self) -> int:
        """Largest code."""
        return len(self.numbers) - 1

    @property
    def lowest(self) -> float:
        """Smallest value."""
        return float(self.numbers[0])

    @property
    def symmetric(self) -> bool:
        """True if the negative of every value is a value too."""
        return self.numbers == tuple(-x for x in reversed(self.numbers))

    def ranges(self, least: float, like: Tensor) -> Tensor:
        """Return the shares of the range that the search for scales tries."""
        return _ranges(self.top, self.bits, least, like)

    def scales_of_even(self, group: Tensor) -> Iterator[Tensor]:
        """Yield nothing: the largest code already represents a group of equal weights exactly."""
        yield from ()

    def nearest(self, x: Tensor, out: Tensor | None = None, offset: float = 0.0) -> Tensor:
        """Round to the nearest levels."""
        table = _table(self.numbers, x.dtype, x.device)
        places = x.mul_(2).floor_().sub_(2 * table.values[0]).clamp_(0, len(table.nearest) - 1).int()
        found = table.nearest.index_select(0, places.reshape(-1)).view(x.shape)
        return found if out is None else out.copy_(found)

    def closest(self, x: Tensor) -> Tensor:
        """Round to the nearest levels."""
        return self.nearest(x)

    def searched(self, x: Tensor) -> Tensor:
        """Round to the nearest levels."""
        return self.nearest(x)

    def to_codes(self, found: Tensor) -> Tensor:
        """Convert levels to codes in `torch.uint8`."""
        table = _table(self.numbers, found.dtype, found.device)
        places = (found - table.values[0]).int()
        return table.codes.index_select(0, places.reshape(-1)).view(found.shape)

    def values(self, codes: Tensor) -> tuple[Tensor, float]:
        """Look up the levels of codes."""
        table = torch.tensor(self.numbers, dtype=torch.int8, device=codes.device)
        return table.index_select(0, codes.reshape(-1).long()).view(codes.shape), 1.0

    def trained_values(self, codes: Tensor) -> Tensor:
        """Look up the levels of rounded codes, with gradients.

        The derivative of a level with respect to its code is the mean distance to the neighbouring levels.
        """
        levels = _table(self.numbers, codes.dtype, codes.device).values
        places = codes.detach().round().clamp_(0, self.top).long()
        return levels[places] + (codes - codes.detach()) * torch.gradient(levels)[0][places]

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes `(..., in)` to bytes."""
        return pack(codes, self.bits)

    def packed_bytes(self, size: int) -> int:
        """Compute the number of bytes of a packed row of `size` codes."""
        return packed_bytes(size, self.bits)

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        """Unpack rows of `size` codes: the inverse of `pack`."""
        return unpack(packed, self.bits, size)

    def packed_values(self, packed: Tensor, size: int) -> tuple[Tensor, float]:
        """Look up the levels of packed codes."""
        return self.values(self.unpack(packed, size))


@lru_cache(maxsize=64)
def _table(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Table:
    with torch.inference_mode(False):
        values = torch.tensor(numbers, dtype=dtype, device=device)
        inside = torch.arange(2 * numbers[0], 2 * numbers[-1] + 1, device=device) / 2 + 0.25
        codes = torch.zeros(numbers[-1] - numbers[0] + 1, dtype=torch.uint8, device=device)
        codes[(values - values[0]).long()] = torch.arange(len(values), dtype=torch.uint8, device=device)
        return _Table(values, values[(inside[:, None] - values).abs().argmin(1)], codes)


def _ranges(top: int, bits: int, least: float, like: Tensor) -> Tensor:
    """Return shares of the range; no result of a search is worse than that of the whole range."""
    narrowest = min(least, 1 - 1.6 / top**0.7 if top > 3 else 0.3)
    shares = torch.linspace(narrowest, WIDEST, _TRIED[bits], device=like.device).to(like)
    return torch.cat((shares, shares.new_ones(1))).sort().values


def _signed(codes: Tensor) -> Tensor:
    """Convert codes below 128 to signed bytes.

    The result is a view, except in compiled code, since ONNX has no such views.
    """
    return codes.to(torch.int8) if is_compiling() else codes.view(torch.int8)


# --- how scales are stored -----------------------------------------------------------------------------


class Scales(Protocol):
    """How the scales of the groups of a row are stored."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of scales or, if they are integers, of their steps."""

    @property
    def count(self) -> int:
        """Number of neighbouring scales that share a step; a row has a multiple of it."""

    @property
    def least_range(self) -> float:
        """Largest value of the smallest range in the search, so that two neighbouring scales are tried."""

    @property
    def trained(self) -> str:
        """Name of the stored tensor that can be trained, if its dtype has 16 bits."""

    @property
    def smallest(self) -> float:
        """Smallest positive scale."""

    @property
    def accurate(self) -> float:
        """Smallest scale that has at least two bits of precision."""

    @property
    def largest(self) -> float:
        """Largest scale; larger scales are replaced by it."""

    def early(self, scales: Tensor) -> Tensor:
        """Round scales as far as they do not depend on other scales, in their own dtype."""

    def storable(self, scales: Tensor, importance: Tensor | None = None) -> Tensor:
        """Round scales `(..., groups)` to values that can be stored (see `NumberFormat.storable`)."""

    def layout(self, groups: int) -> Iterator[tuple[str, int, torch.dtype, int]]:
        """Yield the name, the length and the dtype of each stored tensor of a row, and its number of values.

        An integer of few bits counts as one value.
        """

    def tensors(self, scales: Tensor) -> dict[str, Tensor]:
        """Convert the results of `storable` to the stored tensors."""

    def values(self, tensors: Mapping[str, Tensor], groups: int) -> Tensor:
        """Compute scales from stored tensors, or from a `trained` tensor in floating point."""


@dataclass(frozen=True)
class FloatScales:
    """Scales that are floating-point numbers.

    Args:
        dtype: dtype of the scales. `torch.float16` underflows below 6e-8, `torch.float8_e5m2` below 1.5e-5.
        unit: factor of all scales, a power of two.
        signed: True if a scale may be negative, which mirrors the points.
    """

    dtype: torch.dtype
    unit: float = 1.0
    signed: bool = True
    count = 1
    trained = "scales"

    @property
    def least_range(self) -> float:
        """One half for powers of two."""
        return 0.5 if torch.finfo(self.dtype).eps >= 1 else 1.0

    @property
    def smallest(self) -> float:
        """Smallest positive scale."""
        limits = torch.finfo(self.dtype)
        return limits.smallest_normal * limits.eps * self.unit

    @property
    def accurate(self) -> float:
        """Smallest scale that has at least two bits of precision."""
        return 4 * self.smallest

    @property
    def largest(self) -> float:
        """Largest scale."""
        return torch.finfo(self.dtype).max * self.unit

    def early(self, scales: Tensor) -> Tensor:
        """Round scales to those that can be stored."""
        return self.storable(scales).to(scales.dtype)

    def storable(self, scales: Tensor, importance: Tensor | None = None) -> Tensor:
        """Round scales to values that can be stored; see `values` for the dtype of the result."""
        limit = torch.finfo(self.dtype).max
        if self.signed:
            return scales.clamp(-limit, limit).to(self.dtype)
        return (scales.abs() / self.unit).clamp(max=limit).to(self.dtype).float() * self.unit

    def layout(self, groups: int) -> Iterator[tuple[str, int, torch.dtype, int]]:
        """Yield the tensor of scales, whose bits are stored as integers."""
        yield "scales", groups, BIT_DTYPES[self.dtype], groups

    def tensors(self, scales: Tensor) -> dict[str, Tensor]:
        """Return the bits of scales."""
        return {"scales": as_bits(scales if self.signed else scales / self.unit, self.dtype)}

    def values(self, tensors: Mapping[str, Tensor], groups: int) -> Tensor:
        """Return signed scales in `dtype`, and unsigned scales, multiplied by `unit`, in float32."""
        scales = _floats(tensors["scales"], self.dtype)
        return scales if self.signed else scales.float() * self.unit


@dataclass(frozen=True)
class StepScales:
    """Scales that are integers times a step in `torch.float16`, which `SUPER_BLOCK` weights share.

    A scale is `unit * step * (start + stride * k)` for an integer `k` of `bits` bits.

    Args:
        bits: number of bits of the integers.
        count: number of neighbouring scales that share a step.
        start, stride: the integers are `start`, `start + stride`, ... A negative `start` gives scales a sign.
        unit: factor of all scales, a power of two.
    """

    bits: int
    count: int
    start: int = 0
    stride: int = 1
    unit: float = 1.0
    dtype = torch.float16
    least_range = 1.0
    trained = "steps"

    @property
    def smallest(self) -> float:
        """Smallest positive scale."""
        limits = torch.finfo(self.dtype)
        return limits.smallest_normal * limits.eps * self.unit

    @property
    def accurate(self) -> float:
        """Smallest scale that has at least two bits of precision; small multiples of a step have fewer."""
        return 4 * self.smallest * _INACCURATE[self.bits] / self.stride

    @property
    def largest(self) -> float:
        """Largest scale."""
        return abs(self._farthest) * torch.finfo(self.dtype).max * self.unit

    @property
    def _farthest(self) -> int:
        """The integer of largest absolute value."""
        return self.start if self.start < 0 else self.start + self.stride * (2**self.bits - 1)

    def early(self, scales: Tensor) -> Tensor:
        """Return the scales, since they are rounded together with the others of their super-block."""
        return scales

    def storable(self, scales: Tensor, importance: Tensor | None = None) -> Tensor:
        """Round scales to integers times steps, in float32."""
        return self.product(*self.factored(scales, importance))

    def factored(self, scales: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Approximate scales by integers times a step for each `count` of them.

        Candidates for the step are the largest scale of the super-block divided by large integers, and the
        three smallest steps. With a candidate of the first kind, the integer of the largest scale must also
        be large. Then results of `product` are factored exactly, so that a layer stores the very scales for
        which its codes were chosen.

        Args:
            scales, importance: see `NumberFormat.storable`.

        Returns:
            The integers `k` as `torch.uint8`, shape `(..., groups)`, and steps, shape `(..., groups /
            count)`.
        """
        base, last, signed = self.start % self.stride, 2**self.bits - 1, self.start < 0
        lowest = (self.start - base) // self.stride
        blocks = scales.reshape(*scales.shape[:-1], scales.shape[-1] // self.count, self.count)
        blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32)) / self.unit
        blocks = blocks if signed else blocks.abs()

        def rounded(x: Tensor) -> Tensor:
            """Round to integers of the range, in floating point."""
            return ((x - base) / self.stride).round().clamp_(lowest, lowest + last) * self.stride + base

        weights = (
            torch.ones_like(blocks) if importance is None else importance.to(blocks).reshape(blocks.shape)
        )
        place = blocks.abs().argmax(-1, keepdim=True)
        largest = blocks.gather(-1, place)[..., 0]
        limit = torch.finfo(self.dtype).max
        step, integers = torch.zeros_like(largest, dtype=self.dtype), rounded(torch.zeros_like(blocks))
        least = (weights * blocks.square()).sum(-1)
        # If the range has one more negative integer than positive ones, steps are negative.
        far, sign = self._farthest, -1 if signed else 1
        steps = [(k * sign * 2.0**-24 * largest.sign()).to(self.dtype) for k in (1, 2, 3)]
        numbers = range(far, far * 3 // 4 - sign * self.stride, -sign * self.stride)
        steps += [(largest / number).clamp(-limit, limit).to(self.dtype) for number in numbers]
        for k, tried in enumerate(steps):
            divisor = torch.where(tried == 0, 1, tried.to(blocks))[..., None]
            found = rounded(blocks / divisor)
            error = (weights * (blocks - found * tried.to(blocks)[..., None]).square_()).sum(-1)
            better = error < least
            if k >= 3:
                better &= found.gather(-1, place)[..., 0].abs() >= abs(numbers[-1])
            least, step = torch.where(better, error, least), torch.where(better, tried, step)
            integers = torch.where(better[..., None], found, integers)
        return ((integers - self.start) / self.stride).to(torch.uint8).reshape(scales.shape), step

    def product(self, integers: Tensor, steps: Tensor) -> Tensor:
        """Compute scales in float32, shape `(..., groups)`, from the two results of `factored`."""
        blocks = integers.reshape(*steps.shape, -1) if steps.numel() else integers.unsqueeze(-1)
        whole = self.stride * blocks.float() + self.start
        return (whole * steps.float().unsqueeze(-1) * self.unit).reshape(integers.shape)

    def layout(self, groups: int) -> Iterator[tuple[str, int, torch.dtype, int]]:
        """Yield the tensors of packed integers and of steps, whose bits are stored as integers."""
        yield "scales", packed_bytes(groups, self.bits), torch.uint8, groups
        steps = groups // self.count
        yield "steps", steps, BIT_DTYPES[self.dtype], steps

    def tensors(self, scales: Tensor) -> dict[str, Tensor]:
        """Return packed integers and the bits of steps."""
        integers, steps = self.factored(scales)
        return {"scales": pack(integers, self.bits), "steps": as_bits(steps, self.dtype)}

    def values(self, tensors: Mapping[str, Tensor], groups: int) -> Tensor:
        """Return scales in float32."""
        steps = _floats(tensors["steps"], self.dtype)
        return self.product(unpack(tensors["scales"], self.bits, groups), steps)

    def packed_bytes(self, groups: int) -> int:
        """Compute the number of bytes of the result of `pack` for one row."""
        return packed_bytes(groups, self.bits) + groups // self.count * self.dtype.itemsize

    def pack(self, scales: Tensor) -> Tensor:
        """Pack integers and the bytes of their steps to one tensor, shape `(..., packed_bytes)`."""
        integers, steps = self.factored(scales)
        return torch.cat([pack(integers, self.bits), steps.contiguous().view(torch.uint8)], -1)

    def unpack(self, packed: Tensor, groups: int) -> Tensor:
        """Unpack scales in float32, shape `(..., groups)`: the inverse of `pack`."""
        length = packed_bytes(groups, self.bits)
        integers, steps = unpack(packed[..., :length], self.bits, groups), packed[..., length:]
        if is_exporting():  # the same bits in wider integers, since bytes cannot be viewed as others
            steps = steps.to(torch.int32)
            steps = steps[..., ::2] + 256 * steps[..., 1::2]
        else:
            steps = steps.contiguous().view(torch.int16)
        return self.product(integers, floating(steps, self.dtype))


# --- bits of floating-point numbers --------------------------------------------------------------------


def as_bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to a floating-point dtype, and view its bits as integers of the same size."""
    return tensor.to(dtype).contiguous().view(BIT_DTYPES[dtype])


def _floats(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in training as they are, and stored bits as floating-point numbers."""
    return bits if bits.is_floating_point() else floating(bits, dtype)


def floating(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the floating-point numbers whose bits are stored as integers of the same size."""
    if not is_exporting():
        return bits.view(dtype)
    # ONNX cannot reinterpret bits, so numbers are computed from sign, exponent and mantissa.
    exponents, digits = _EXPONENT_MANTISSA[dtype]
    whole = bits.to(torch.int32) & (2 ** (exponents + digits + 1) - 1)
    sign = 1 - 2 * (whole >> (exponents + digits)).float()
    exponent = ((whole >> digits) & (2**exponents - 1)).float()
    mantissa = (whole & (2**digits - 1)).float() / 2**digits
    # Subnormal numbers have no leading one.
    leading = (exponent > 0).float()
    power = torch.exp2(exponent + (1 - leading) - (2 ** (exponents - 1) - 1))
    found = sign * (leading + mantissa) * power
    return found if dtype == torch.float8_e8m0fnu else found.to(dtype)  # nor can ONNX convert to this dtype
