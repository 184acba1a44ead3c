"""Encode integer matrices exactly in the block types of GGUF.

A block is of one of these kinds:

- 32 weights with one 16-bit scale (`Q4_0`, `Q8_0`, ...)
- 32 weights with a power of two (`MXFP4`), or 64 weights with four 8-bit scales (`NVFP4`)
- 256 weights with a small integer scale for each 16 or 32 weights, and one 16-bit factor for all of these
  scales (K types, `IQ4_XS`)

Codes have one of five meanings. The code of the value zero is half the range; or the block stores a minimum
(`Q4_1`, `Q4_K`, ...); or codes are indices into a table of 16 levels (`IQ4_NL`, `IQ4_XS`); or
they are floating-point numbers (`MXFP4`, `NVFP4`); or they are replaced by indices of the points of a
codebook, and signs (`IQ2_XXS` to `IQ3_S`). Whether a type can store a matrix exactly depends on the matrix;
`write_blocks` raises an error if it cannot.

Reference: the layout of `ggml-common.h` of llama.cpp; the package `gguf` has a decoder of every type.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tensornet.errors import FormatError
from tensornet.quantization import NumberFormat, formats
from tensornet.quantization.codebooks import Codebook
from tensornet.quantization.parts import Levels, StepScales

Array = NDArray[Any]
#: Number of weights in a block, in the smallest group that has its own scale, and in a super-block.
BLOCK, SMALL_BLOCK, SUPER_BLOCK = 32, 16, 256
#: The 16 levels of `IQ4_NL` and `IQ4_XS`.
_NL4 = formats.POINTS["nl4"]
assert isinstance(_NL4, Levels)
LEVELS = np.array(_NL4.numbers)


class BlockType(NamedTuple):
    """GGUF type of integer weights.

    Args:
        bits: bits of a code.
        offset: code of the value zero if it is fixed; None if blocks have a minimum or codes are indices.
        write: function that arranges codes and scales as the parts of a block's bytes.
        sub: only for super-blocks: number of weights with the same integer scale, and the least and largest
            integer scale.
        table: True if codes are indices into `LEVELS`.
        codebook: name of the codebook that the type uses. Then `write` takes the indices of points, signs as
            for `Codebook.split`, integer scales `k` for `2 k + 1`, and their 16-bit steps.
        fp4: only for numbers of 4 bits (E2M1): number of weights in a block, number of weights with the same
            scale, and the function that encodes scales in 8 bits.
    """

    bits: int
    offset: int | None
    write: Callable[..., list[Array]]
    sub: tuple[int, int, int] | None = None
    table: bool = False
    codebook: str | None = None
    fp4: tuple[int, int, Callable[[str, Array], Array]] | None = None

    @property
    def block(self) -> int:
        """Number of weights in a block; the columns of a matrix must be a multiple of it."""
        if self.fp4 is not None:
            return self.fp4[0]
        return BLOCK if self.sub is None else SUPER_BLOCK


def write_blocks(kind: str, points: Array, scales: Array, minima: Array | None = None) -> Array:
    """Encode the matrix `scale * point`, or `scale * point - minimum`, as bytes of a GGUF type.

    Args:
        kind: name of the type (see `TYPES`).
        points: signed integers, or half-integers, shape `(rows, columns)`.
        scales: float32, one for each 32 or 16 weights of a row, shape `(rows, columns / 32)` or
            `(rows, columns / 16)`.
        minima: minima in the same shape; only for types with minima.

    Returns:
        Bytes of each row, uint8, shape `(rows, bytes)`.

    Raises:
        FormatError: the type cannot store this matrix exactly; the message says why.
    """
    found, rows = TYPES[kind], points.shape[0]
    if points.shape[1] % found.block:
        raise FormatError(f"{kind} needs rows of a multiple of {found.block} weights, got {points.shape[1]}.")
    # The type has a scale for each `width` weights. If the given scales are for more weights, repeat them; if
    # they are for fewer weights, they must be equal within each group of `width`.
    width, given = found.sub[0] if found.sub else BLOCK, points.shape[1] // scales.shape[1]
    width = found.fp4[1] if found.fp4 else width

    def for_width(values: Array) -> Array:
        each = values.astype(np.float32).repeat(max(given // width, 1), axis=1)
        each = each.reshape(-1, max(width // given, 1))
        if np.any(each != each[:, :1]):
            raise FormatError(
                f"{kind} has one scale for {width} weights, but the matrix has one for {given}."
            )
        return each[:, :1]

    points, steps = points.reshape(-1, width), for_width(scales)
    if minima is not None:
        if found.sub is None or found.sub[1] != 0:
            raise FormatError(f"{kind} has no minima in multiples of a step, but the matrix has.")
        minima = for_width(minima)
    if found.fp4 is not None:
        codes = _codes_of_levels(kind, np.array(formats.FP4_LEVELS), points)
        magnitudes = codes - len(formats.FP4_LEVELS) // 2
        codes = np.where(magnitudes < 0, 8 - magnitudes, magnitudes).astype(np.uint8)
        parts = [codes.reshape(-1, found.block), found.fp4[2](kind, steps).reshape(-1, found.block // width)]
        return np.concatenate(found.write(*parts), axis=-1).reshape(rows, -1)
    if found.codebook is not None:
        steps = steps.reshape(rows, -1)
        return _with_codebook(kind, points.reshape(rows, -1), steps).reshape(rows, -1)
    if found.table:
        codes = _codes_of_levels(kind, LEVELS, points)
    else:
        if found.offset is not None and np.any(points % 1):  # half-integers become odd integers
            points, steps = 2 * points, steps / 2
        zeros: Array | float
        if minima is not None:
            zeros = 0.0
        elif found.offset is not None:
            zeros = found.offset
        else:  # use the same zero for all blocks if possible, since scales and minima then have a common step
            lowest = points.min(axis=1, keepdims=True)
            zeros = -lowest.min() if points.max() - lowest.min() < 2**found.bits else -lowest
            minima = steps * zeros
        codes = points + zeros
        if codes.min() < 0 or codes.max() >= 2**found.bits:
            raise FormatError(f"{kind} has codes of {found.bits} bits, too few for these weights.")
    codes = codes.astype(np.uint8).reshape(-1, found.block)
    parts = [codes]
    if found.sub is None:
        parts.append(_half(kind, steps))
        if minima is not None:
            parts.append(_half(kind, -minima))
    else:
        _, least, most = found.sub
        for values in (steps,) if minima is None else (steps, minima):
            step, integers = _common_step(kind, values.reshape(-1, SUPER_BLOCK // width), least, most)
            parts += [integers, _half(kind, step)]
    return np.concatenate(found.write(*parts), axis=-1).reshape(rows, -1)


def _with_codebook(kind: str, points: Array, scales: Array) -> Array:
    """Encode a matrix in a type with a codebook; see `write_blocks`. Return shape `(super-blocks, bytes)`."""
    found = TYPES[kind]
    number_format = NumberFormat.parse(found.codebook or "")
    book, stored = number_format.points, number_format.scales
    assert isinstance(book, Codebook)
    assert isinstance(stored, StepScales)
    codes = _codes_of_levels(kind, np.array(book.levels), points)
    indices, signs = book.split(torch.from_numpy(codes.astype(np.uint8)))
    whole, steps = stored.factored(torch.from_numpy(scales))
    if not np.array_equal(stored.product(whole, steps).numpy(), scales):
        raise FormatError(
            f"{kind} needs scales that are odd integers from 1 to 31 times a common step in float16 within "
            f"{SUPER_BLOCK} weights, but some of these scales are not."
        )
    count = steps.numel()
    parts = [x.numpy().reshape(count, -1) for x in (indices, signs, whole)]
    return np.concatenate(found.write(*parts, steps.numpy().reshape(-1, 1).view(np.uint8)), axis=-1)


def _codes_of_levels(kind: str, levels: Array, points: Array) -> Array:
    """Return the position of each point in a table of levels; raise FormatError if one is not a level."""
    codes: Array = np.searchsorted(levels, points).clip(0, len(levels) - 1)
    if not np.array_equal(levels[codes], points):
        raise FormatError(f"{kind} has {len(levels)} levels, but these weights have other values.")
    return codes


def _half(kind: str, values: Array) -> Array:
    """Return numbers as bytes of float16, shape `(blocks, 2)`; raise FormatError if float16 is not exact."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        raise FormatError(f"{kind} has scales in float16, in which some of these scales are not exact.")
    return half.reshape(-1, 1).view(np.uint8)


def _e8m0(kind: str, scales: Array) -> Array:
    """Return twice the scales in the format E8M0; raise FormatError if they are not powers of two."""
    mantissa, exponent = np.frexp(scales)
    found = exponent + 127  # scales are 2^(exponent - 1)
    if np.any(mantissa != 0.5) or found.min() < 0 or found.max() > 254:
        raise FormatError(f"{kind} has scales that are powers of two, but some of these scales are not.")
    return found.astype(np.uint8)


def _e4m3(kind: str, scales: Array) -> Array:
    """Return twice the scales in the format E4M3; raise FormatError if they are not exact, or negative."""
    doubled = torch.from_numpy(2 * scales)
    found = doubled.clamp(max=torch.finfo(torch.float8_e4m3fn).max).to(torch.float8_e4m3fn)
    if not torch.equal(found.float(), doubled) or bool((doubled < 0).any()):
        raise FormatError(f"{kind} has scales in E4M3, in which some of these scales are not exact.")
    return found.view(torch.uint8).numpy()


def _common_step(kind: str, steps: Array, least: int, most: int) -> tuple[Array, Array]:
    """Write the scales of each super-block as integers times a common step.

    Args:
        kind: name of the type, for error messages.
        steps: scales, float32, shape `(super-blocks, scales)`.
        least, most: range of the integers.

    Returns:
        The steps, shape `(super-blocks, 1)`, and the integers, shape `(super-blocks, scales)`.

    Raises:
        FormatError: there is no common step.
    """
    mantissa, exponent = np.frexp(steps)
    whole, exponent = (mantissa * 2**24).astype(np.int64), exponent.astype(np.int64) - 24
    # Write all scales of a super-block with the same exponent, the smallest one. The greatest common divisor
    # of their mantissas is then the largest step of which all scales are multiples.
    used = whole != 0
    lowest = np.where(used, exponent, 1 << 40).min(axis=1, keepdims=True)
    lowest = np.where(used.any(axis=1, keepdims=True), lowest, 0)
    shift = np.where(used, exponent - lowest, 0)
    if shift.max(initial=0) > 30:
        raise FormatError(f"{kind}: the scales within {SUPER_BLOCK} weights differ too much.")
    whole <<= shift
    common = np.gcd.reduce(whole, axis=1, keepdims=True)
    common = np.where(common == 0, 1, common)
    # The range has one more negative integer than positive integers, so a negative step may fit.
    signs = np.where((whole.max(axis=1, keepdims=True) > most * common) & (least < 0), -1, 1)
    integers = signs * whole // common
    if integers.min(initial=0) < least or integers.max(initial=0) > most:
        raise FormatError(
            f"{kind} needs scales that are {least} to {most} times a common step within {SUPER_BLOCK} "
            "weights, but some of these scales are not."
        )
    step = np.ldexp((signs * common).astype(np.float64), lowest)
    # If float16 does not store the common step exactly, try fractions of the step, with larger integers.
    left = np.flatnonzero(step.astype(np.float16) != step)
    for part in range(2, most + 1) if len(left) else ():
        smaller, larger = step[left] / part, integers[left] * part
        exact = smaller.astype(np.float16) == smaller
        exact &= (larger.min(axis=1, keepdims=True) >= least) & (larger.max(axis=1, keepdims=True) <= most)
        done = exact[:, 0]
        step[left[done]], integers[left[done]] = smaller[done], larger[done]
        left = left[~done]
    return step.astype(np.float32), integers


# --- layouts: writers take codes, shape (blocks, block), and integer scales with their 16-bit steps ---------


def _nibbles(codes: Array, run: int) -> Array:
    """Pack pairs of runs of 4-bit codes into bytes, with the first run of a pair in the low four bits."""
    pairs = codes.reshape(len(codes), -1, 2, run)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(codes), -1)


def _planes(codes: Array, count: int, run: int, bits: int) -> Array:
    """Pack `count` runs of `run` codes into `run` bytes; byte i has code i of run k at bit `bits * k`."""
    planes = codes.reshape(len(codes), -1, count, run)
    found = np.zeros((len(codes), planes.shape[1], run), np.uint8)
    for number in range(count):
        found |= planes[:, :, number] << np.uint8(bits * number)
    return found.reshape(len(codes), -1)


def _q4(codes: Array, *halves: Array) -> list[Array]:
    return [*halves, _nibbles(codes, 16)]


def _q5(codes: Array, *halves: Array) -> list[Array]:
    return [*halves, np.packbits(codes >> 4, axis=-1, bitorder="little"), _nibbles(codes & 15, 16)]


def _q8(codes: Array, step: Array) -> list[Array]:
    return [step, codes ^ 128]


def _q2_k(codes: Array, scales: Array, step: Array, minima: Array, least: Array) -> list[Array]:
    return [(scales | (minima << 4)).astype(np.uint8), _planes(codes, 4, 32, 2), step, least]


def _q3_k(codes: Array, scales: Array, step: Array) -> list[Array]:
    shifted = (scales + 32).astype(np.uint8)
    low, high = shifted & 15, shifted >> 4
    packed = np.concatenate([low[:, :8] | (low[:, 8:] << 4), _planes(high, 4, 4, 2)], axis=-1)
    return [_planes(codes >> 2, 8, 32, 1), _planes(codes & 3, 4, 32, 2), packed, step]


def _k_scales(scales: Array, minima: Array) -> Array:
    """Pack eight 6-bit scales and eight 6-bit minima into twelve bytes."""
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return np.concatenate([first, second, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], axis=-1)


def _q4_k(codes: Array, scales: Array, step: Array, minima: Array, least: Array) -> list[Array]:
    return [step, least, _k_scales(scales, minima), _nibbles(codes, 32)]


def _q5_k(codes: Array, scales: Array, step: Array, minima: Array, least: Array) -> list[Array]:
    high = _planes(codes >> 4, 8, 32, 1)
    return [step, least, _k_scales(scales, minima), high, _nibbles(codes & 15, 32)]


def _q6_k(codes: Array, scales: Array, step: Array) -> list[Array]:
    high = _planes(codes >> 4, 4, 32, 2)
    return [_nibbles(codes & 15, 64), high, scales.astype(np.int8).view(np.uint8), step]


def _iq4_xs(codes: Array, scales: Array, step: Array) -> list[Array]:
    shifted = (scales + 32).astype(np.uint16)  # shape: (super-blocks, 8)
    high = ((shifted >> 4) << (2 * np.arange(8, dtype=np.uint16))).sum(axis=1, dtype=np.uint16)
    low = _planes((shifted & 15).astype(np.uint8).reshape(-1, 4, 2).swapaxes(1, 2).reshape(-1, 8), 2, 4, 4)
    return [step, high.reshape(-1, 1).view(np.uint8), low, _nibbles(codes, 16)]


def _pairs(integers: Array) -> Array:
    """Pack pairs of 4-bit integers into bytes, with the first of a pair in the low four bits."""
    return (integers[:, ::2] | (integers[:, 1::2] << 4)).astype(np.uint8)


def _signs_and_scales(signs: Array, scales: Array) -> Array:
    """Pack the 7 signs of four runs and a 4-bit scale into 32 bits, shape `(super-blocks, 8)`."""
    runs = (signs & 127).astype(np.uint32).reshape(len(signs), -1, 4)
    packed = (runs << (7 * np.arange(4, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
    return packed | (scales.astype(np.uint32) << 28)


def _high_bits(indices: Array, bits: int) -> Array:
    """Pack the bits above the lowest eight of neighbouring indices into bytes, the first in the low bits."""
    return _planes((indices >> 8).astype(np.uint8), 8 // bits, 1, bits)


def _low(indices: Array) -> Array:
    return indices.astype(np.uint8)


def _iq2_xxs(indices: Array, signs: Array, scales: Array, step: Array) -> list[Array]:
    points = np.ascontiguousarray(_low(indices)).view(np.uint32)
    return [
        step,
        np.stack([points, _signs_and_scales(signs, scales)], -1).view(np.uint8).reshape(len(step), -1),
    ]


def _iq2_xs(indices: Array, signs: Array, scales: Array, step: Array) -> list[Array]:
    return [step, (indices | ((signs & 127) << 9)).astype(np.uint16).view(np.uint8), _pairs(scales)]


def _iq2_s(indices: Array, signs: Array, scales: Array, step: Array) -> list[Array]:
    return [step, _low(indices), _low(signs), _high_bits(indices, 2), _pairs(scales)]


def _iq3_xxs(indices: Array, signs: Array, scales: Array, step: Array) -> list[Array]:
    return [step, _low(indices), _signs_and_scales(signs, scales).view(np.uint8)]


def _iq3_s(indices: Array, signs: Array, scales: Array, step: Array) -> list[Array]:
    return [step, _low(indices), _high_bits(indices, 1), _low(signs), _pairs(scales)]


def _mxfp4(codes: Array, scales: Array) -> list[Array]:
    return [scales, _nibbles(codes, 16)]


def _nvfp4(codes: Array, scales: Array) -> list[Array]:
    return [scales, _nibbles(codes, 8)]


#: All types, by increasing size.
TYPES: dict[str, BlockType] = {
    "IQ2_XXS": BlockType(3, None, _iq2_xxs, (32, 1, 31), codebook="iq2_xxs"),
    "IQ2_XS": BlockType(3, None, _iq2_xs, (16, 1, 31), codebook="iq2_xs"),
    "IQ2_S": BlockType(3, None, _iq2_s, (16, 1, 31), codebook="iq2_s"),
    "Q2_K": BlockType(2, None, _q2_k, (16, 0, 15)),
    "IQ3_XXS": BlockType(4, None, _iq3_xxs, (32, 1, 31), codebook="iq3_xxs"),
    "Q3_K": BlockType(3, 4, _q3_k, (16, -32, 31)),
    "IQ3_S": BlockType(4, None, _iq3_s, (32, 1, 31), codebook="iq3_s"),
    "IQ4_XS": BlockType(4, None, _iq4_xs, (32, -32, 31), table=True),
    "MXFP4": BlockType(4, None, _mxfp4, fp4=(32, 32, _e8m0)),
    "Q4_0": BlockType(4, 8, _q4),
    "IQ4_NL": BlockType(4, None, _q4, table=True),
    "Q4_K": BlockType(4, None, _q4_k, (32, 0, 63)),
    "NVFP4": BlockType(4, None, _nvfp4, fp4=(64, 16, _e4m3)),
    "Q4_1": BlockType(4, None, _q4),
    "Q5_0": BlockType(5, 16, _q5),
    "Q5_K": BlockType(5, None, _q5_k, (32, 0, 63)),
    "Q5_1": BlockType(5, None, _q5),
    "Q6_K": BlockType(6, 32, _q6_k, (16, -128, 127)),
    "Q8_0": BlockType(8, 128, _q8),
}
