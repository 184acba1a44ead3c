"""Integer matrices in the layout of torch's int4 kernel on the CPU (see `tensornet.nn.prepare`).

The kernel multiplies blocks of 64 rows (32 without AVX-512), input by input. The low 4 bits of byte
`[block, input, k]` are the code of row `k` of the block, and the high 4 bits are the code of row `k + half`.
Here `half` is half the number of rows in a block. Each group of inputs has a scale and an offset:
`value = scale * (code - 8) + offset`.

Codes of 1 to 3 bits are converted to 4 bits. A code `u` of 5 to 8 bits is split into its 4 highest bits and
its `k` other bits: `scale * u = 2^k scale * high + scale * low`. So the product is the sum of two kernel
products with the same groups. The rows of low parts are stored after all rows of high parts. All conversions
are exact, since the kernel's scales and offsets are powers of two times the stored scales.

The layout depends on the processor and is not saved. Bits per weight for groups of 64, as stored and as
prepared:

| format | int2 | int3 | int4 | int5 | int6 | int8 |
|---|---|---|---|---|---|---|
| stored | 2.25 | 3.25 | 4.25 | 5.25 | 6.25 | 8.25 |
| prepared | 4.5 | 4.5 | 4.5 | 9 | 9 | 9 |
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from tensornet._util import is_exporting
from tensornet.quantization import NumberFormat

#: Group sizes that the kernel supports.
_GROUPS = (128, 64, 32)
#: Largest number of tokens for which a single kernel product is faster than unpacking the matrix; two kernel
#: products are faster up to half this number. AMX instructions make products with the unpacked matrix three
#: to four times as fast, but not the kernel, so the limit is lower.
KERNEL_TOKENS = 48 if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else 96
#: Default limit on the bytes of a matrix in the kernel's layout, relative to its stored bytes.
MAX_GROWTH = 1.75
#: Number of elements to convert, or to unpack and multiply, at a time; they take 8 MiB.
_BLOCK = 2**20
_BITS = 4


@dataclass(frozen=True)
class KernelMatrix:
    """Integer matrix `(out, in)` in the layout of the kernel.

    Args:
        number_format: format from which the matrix was converted.
        codes: shape `(products * out, in / 2)`, bytes in the order described at the top of this module.
        scales: scale and offset of each group, `torch.bfloat16`, shape `(groups, products * out, 2)`.
        block: number of rows in a block.
    """

    number_format: NumberFormat
    codes: Tensor
    scales: Tensor
    block: int

    @property
    def products(self) -> int:
        """Number of 4-bit matrices into which the matrix is split, 1 or 2; their products are added."""
        return 2 if _low_bits(self.number_format) else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out, in)`."""
        return len(self.codes) // self.products, 2 * self.codes.shape[1]

    @property
    def group(self) -> int:
        """Number of inputs that share a scale."""
        return self.shape[1] // len(self.scales)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the codes and scales in this layout."""
        return self.codes.nbytes + self.scales.nbytes

    def row_scales(self, dtype: torch.dtype) -> None:
        """Return None, since `blocks` already applies all scales."""

    @property
    def kernel_tokens(self) -> int:
        """Largest number of tokens for which the CPU kernel is faster than unpacking; 0 on other devices."""
        return KERNEL_TOKENS // self.products if self.codes.is_cpu else 0

    def has_kernel(self, x: Tensor) -> bool:
        """Return True if the kernel can multiply this input, and is faster than unpacking."""
        return x.dtype == torch.bfloat16 and 0 < len(x) <= self.kernel_tokens

    def by_kernel(self, x: Tensor) -> Tensor:
        """Compute `x W^T` with the kernel, from `x: (tokens, in)` to `(tokens, out)`."""
        multiply = multiply_int4 if self.products == 1 else multiply_int4_twice
        return multiply(x, self.codes, self.scales)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield each slice of rows with its unpacked values, as the transpose of a contiguous matrix."""
        rows, columns = self.shape
        # Scales in bfloat16 may exceed the range of float16, so they are not converted to float16.
        own = torch.float32 if dtype == torch.float16 else dtype
        factors = _in_order(self.scales, rows, self.block // 2).permute(2, 3, 0, 1, 4).to(own)
        factors = factors / _unit(self.number_format)
        for part in _parts(rows, columns, self.block):
            blocks = slice(part.start // self.block, part.stop // self.block)
            # Codes are reordered before they are converted to values, since this moves less memory.
            points = self._points(part).permute(2, 0, 1, 3)
            made = points.new_empty(points.shape, dtype=own).copy_(points)  # shape: (in, blocks, 2, half)
            del points  # free this block before the next one is allocated
            made.view(-1, self.group, *made.shape[1:]).mul_(factors[:, :, blocks])
            yield part, made.view(columns, -1).to(dtype).T

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Unpack the whole matrix, shape `(out, in)`, by operations that a compiler can fuse."""
        (rows, columns), half = self.shape, self.block // 2
        parts = self.codes.view(self.products, -1, columns, half).unbind()
        ordered = _in_order if is_exporting() else _copied_in_order
        sides = []
        for side, scales in enumerate(ordered(self.scales, rows, half).unbind(1)):
            points = self._joined([codes >> 4 if side else codes & 15 for codes in parts])
            values = points.view(len(points), -1, self.group, half) * scales.to(torch.float32)
            sides.append(values.view(-1, columns, half).transpose(0, 1).to(dtype))
        return torch.stack(sides, 2).view(columns, rows).T

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Unpack the rows with the given indices, shape `(n,)`, to their values, shape `(n, in)`."""
        (rows, columns), half = self.shape, self.block // 2
        row = index % self.block
        codes = self.codes.view(self.products, -1, columns, half)[:, index // self.block, :, row % half]
        nibbles = codes >> (4 * (row // half))[:, None, None] & 15  # shape: (n, products, in)
        scales = self.scales[:, -rows:, 0].index_select(1, index).T.to(torch.float32)
        values = self._joined(nibbles.unbind(1)).view(-1, len(self.scales), self.group) * scales[:, :, None]
        return values.view(-1, columns).to(dtype)

    def _joined(self, nibbles: Sequence[Tensor]) -> Tensor:
        """Compute `value / scale` in float32 from the 4-bit codes of one or two kernel products."""
        low = _low_bits(self.number_format)
        high, *rest = (codes.to(torch.float32) for codes in nibbles)
        if low:
            return high * 2**low + (rest[0] - (2 ** (low + 3) + 8 - 2 ** (low - 1)))
        return high - (7.5 if _between_points(self.number_format) else 8)

    def _points(self, part: slice) -> Tensor:
        """Unpack rows to the `torch.int8` integers `_unit * value / scale`, shape `(blocks, 2, in, half)`."""
        low, (_, columns) = _low_bits(self.number_format), self.shape
        high, *rest = (
            self.codes[part.start + offset : part.stop + offset].view(-1, columns, self.block // 2)
            for offset in range(0, len(self.codes), self.shape[0])
        )
        found = high.new_empty(len(high), 2, *high.shape[1:])
        if not low:
            # Flipping the highest bit of a code `u`, and moving the code to the high half of a byte, gives
            # the signed byte 16 (u - 8).
            flipped = high ^ 0x88
            torch.bitwise_left_shift(flipped, 4, out=found[:, 0])
            torch.bitwise_and(flipped, 0xF0, out=found[:, 1])
            found = found.add_(8) if _between_points(self.number_format) else found
            return found.view(torch.int8)
        torch.bitwise_and(high, 15, out=found[:, 0])
        torch.bitwise_right_shift(high, 4, out=found[:, 1])
        found.bitwise_left_shift_(low)
        found[:, 0] += rest[0] & 15
        found[:, 1] += rest[0] >> 4
        # `low` is the number of bits in the low part of a code, and `found` is now `2^low u + v` with the
        # 4-bit codes `u` and `v` of the two kernel products. The integers are `2^low (u - 8) + v - 8 +
        # 2^(low - 1)`. Bytes wrap around modulo 256, so they contain the signed result.
        return found.sub_(2 ** (low + 3) + 8 - 2 ** (low - 1)).view(torch.int8)


def _in_order(scales: Tensor, rows: int, half: int) -> Tensor:
    """Arrange the scales of a kernel matrix in the order of its codes, shape `(blocks, 2, groups, 1, half)`.

    Args:
        scales: the scales and offsets of a `KernelMatrix`.
        rows: number of rows of the matrix.
        half: number of rows in half a block.
    """
    # With two products, the scales of the first are multiplied by a power of two; the last rows have the
    # scales of the matrix itself.
    found = scales[:, -rows:, 0].view(len(scales), -1, 2, 1, half)
    return found.permute(1, 2, 0, 3, 4)


# Compilers do not fuse a custom operation, so the scales are copied only once. Ordinary indexing would be
# fused, and would gather a scale from the pairs of scale and offset for every single weight.
@torch.library.custom_op("tensornet::kernel_scales", mutates_args=())
def _copied_in_order(scales: Tensor, rows: int, half: int) -> Tensor:
    return _in_order(scales, rows, half).to(torch.float32).contiguous()


@_copied_in_order.register_fake
def _(scales: Tensor, rows: int, half: int) -> Tensor:
    groups, blocks = len(scales), rows // (2 * half)
    return scales.new_empty(blocks, 2, groups, 1, half, dtype=torch.float32)


def multiply_int4(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Compute `x W^T` for `x: (tokens, in)`, from a `KernelMatrix` whose `products` is 1."""
    group = x.shape[1] // scales.shape[0]
    # The operation is private, but torch has no public product of floats with 4-bit weights.
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, codes, group, scales)
    return y


def multiply_int4_twice(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Compute `x W^T` for `x: (tokens, in)`, from a `KernelMatrix` whose `products` is 2."""
    high, low = multiply_int4(x, codes, scales).chunk(2, dim=1)
    return high + low


@lru_cache(maxsize=1024)
def has_layout(number_format: NumberFormat, shape: tuple[int, int], max_growth: float = MAX_GROWTH) -> bool:
    """Return True if matrices of this format and shape can be converted for the kernel on this processor.

    Args:
        number_format: format of the matrix.
        shape: shape of the matrix, `(out, in)`.
        max_growth: largest size of the layout, relative to the stored bytes.
    """
    block, group = _block_rows(), _kernel_group(number_format, shape[1])
    if not number_format.is_integer or not number_format.points.equal_steps:
        return False
    if number_format.scales.dtype == torch.float16:
        return False  # the kernel needs bfloat16 scales, which would round these
    plain = number_format.scales.dtype == torch.bfloat16
    if plain and number_format.bits == 8 and number_format.groups(shape[1]) == 1:
        return False  # not necessary: torch's int8 kernel can read the stored codes
    if block is None or group is None or shape[0] == 0 or shape[0] % block:
        return False
    return layout_bytes(number_format, shape) <= max_growth * number_format.nbytes(shape)


def products_of(number_format: NumberFormat) -> int:
    """Return the number of 4-bit matrices into which a matrix of this format is split, 1 or 2."""
    return 2 if _low_bits(number_format) else 1


def layout_bytes(number_format: NumberFormat, shape: tuple[int, int]) -> int:
    """Count the bytes of a matrix in the layout of the kernel; `has_layout` must return True for it."""
    rows, columns = shape
    group = _kernel_group(number_format, columns)
    assert group is not None
    return products_of(number_format) * rows * (columns // 2 + 4 * (columns // group))


@torch.no_grad()
def to_kernel(number_format: NumberFormat, codes: Tensor, scales: Tensor, columns: int) -> KernelMatrix:
    """Convert a stored matrix to the layout of the kernel; `has_layout` must return True for it.

    Args:
        number_format: format of the matrix.
        codes: packed codes of each row, shape `(out, bytes)`.
        scales: floating-point scales, shape `(out, groups)`.
        columns: number of columns, `in`.
    """
    block, group, low = _block_rows(), _kernel_group(number_format, columns), _low_bits(number_format)
    assert block is not None
    assert group is not None
    rows, products = len(codes), products_of(number_format)
    made = codes.new_empty(products, rows, columns // 2)
    for part in _parts(rows, columns, block):
        points = number_format.unpack(codes[part], columns).to(torch.int16) - 2 ** (
            number_format.points.bits - 1
        )
        if low:
            whole = points + 2 ** (low + 3)
            nibbles = [whole >> low, (whole & (2**low - 1)) + (8 - 2 ** (low - 1))]
        else:
            nibbles = [points + 8]
        for product, codes_of_4 in enumerate(nibbles):
            made[product, part] = _by_input(codes_of_4.to(torch.uint8), block)
    scale = scales.to(torch.bfloat16).T
    if len(scale) * group < columns:
        scale = scale.expand(columns // group, -1)
    offset = scale / 2 if _between_points(number_format) else torch.zeros_like(scale)
    pairs = [torch.stack((scale, offset), -1)]
    if low:
        pairs.insert(0, torch.stack((scale * 2**low, scale * 2 ** (low - 1)), -1))
    held = torch.cat(pairs, 1).contiguous()
    return KernelMatrix(number_format, made.view(products * rows, -1), held, block)


def _low_bits(number_format: NumberFormat) -> int:
    """Return the number of bits in the low part of each code; 0 if the matrix is not split."""
    return max(number_format.points.bits - _BITS, 0)


def _between_points(number_format: NumberFormat) -> bool:
    """Return True if the value 0 lies midway between two codes."""
    return number_format.points.center % 1 != 0


def _unit(number_format: NumberFormat) -> int:
    """Return the factor by which `KernelMatrix._points` multiplies `value / scale`."""
    return 1 if _low_bits(number_format) else 16


def _by_input(codes: Tensor, block: int) -> Tensor:
    """Pack 4-bit codes `(rows, in)` in the order of the kernel, two per byte: shape `(rows, in / 2)`."""
    low, high = codes.view(-1, block, codes.shape[1]).transpose(1, 2).split(block // 2, dim=2)
    return (low | (high << 4)).reshape(len(codes), -1)


def _parts(rows: int, columns: int, block: int) -> Iterator[slice]:
    """Yield slices of rows that contain whole kernel blocks and about `_BLOCK` elements."""
    step = max(1, _BLOCK // (block * columns)) * block
    for start, stop in pairwise((*range(0, rows, step), rows)):
        yield slice(start, stop)


def _kernel_group(number_format: NumberFormat, columns: int) -> int | None:
    """Choose the group size for the kernel; None if the kernel does not support the groups of the format."""
    if number_format.group is not None:
        fits = number_format.group in _GROUPS and columns % number_format.group == 0
        return number_format.group if fits else None
    return next((group for group in _GROUPS if columns % group == 0), None)


@lru_cache(maxsize=1)
def _block_rows() -> int | None:
    """Find the number of rows in a kernel block by converting an example; None if the layout is unknown."""
    convert = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if convert is None or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    with torch.inference_mode(False):
        codes = torch.arange(128 * 32, device="cpu").mul_(7).floor_divide_(3).remainder_(16).view(128, 32)
        found = convert(codes.to(torch.int32), 1).flatten()
        for block in (64, 32):
            low, high = codes.to(torch.uint8).view(-1, block, 32).transpose(1, 2).split(block // 2, dim=2)
            if torch.equal(found, (low | (high << 4)).flatten()):
                return block
    return None
