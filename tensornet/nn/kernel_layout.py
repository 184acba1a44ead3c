"""Integer matrices in the layout of torch's int4 kernel on the CPU.

To explain the layout: the kernel multiplies blocks of 64 rows (32 without AVX-512), input by input. Byte
`[block, input, k]` holds the code of row `k` of the block in its low half and that of row `k + half` in its
high half, so the codes of a matrix take as many bytes as in their stored packing, four bits each. Beside the
scale of each group lies an offset, `value = scale * (code - 8) + offset`: 16 bits a group more.

The layout belongs to the processor and not to a file. It is made at the first pass that uses it, and undone
without loss wherever the stored tensors are asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from tensornet.quantization import NumberFormat, pack, unpack
from tensornet.quantization.codes import scaled

#: Inputs that share a scale, as the kernel can have them.
_GROUPS = (128, 64, 32)
#: Most tokens for which the kernel is faster than unpacking the matrix and multiplying by it.
KERNEL_TOKENS = 20
#: Elements that are converted or unpacked at a time.
_BLOCK = 2**17


@dataclass(frozen=True)
class KernelMatrix:
    """Symmetric four-bit matrix `(out, in)` in the layout of the kernel.

    Args:
        codes: shape `(out, in / 2)`, whose bytes lie as the module says.
        scales: scale and offset of each group, `torch.bfloat16`, shape `(groups, out, 2)`.
        block: rows of a block.
    """

    codes: Tensor
    scales: Tensor
    block: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return len(self.codes), 2 * self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // len(self.scales)

    def has_kernel(self, x: Tensor) -> bool:
        """Return True if the kernel is the faster way for this input."""
        return 0 < len(x) <= KERNEL_TOKENS and x.dtype == torch.bfloat16

    def by_kernel(self, x: Tensor) -> Tensor:
        """Multiply by the kernel: `(tokens, in)` to `(tokens, out)`."""
        return multiply_int4(x, self.codes, self.scales)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Unpack the rows, block by block."""
        rows, columns = self.shape
        for part in _parts(rows, columns, self.block):
            codes = _codes_by_row(self.codes[part], self.block)
            points = codes.view(torch.int8).reshape(len(codes), -1, self.group) - 8
            scales = self.scales[:, part, 0].T.to(dtype).unsqueeze(-1)
            yield part, scaled(points, scales, dtype).view(len(codes), columns)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Unpack all values, in operations that a compiler fuses."""
        block, (rows, columns) = self.block, self.shape
        codes = self.codes.view(rows // block, len(self.scales), self.group, block // 2)
        points = torch.stack((codes & 15, codes >> 4), 3).to(torch.int8) - 8
        scales = self.scales[..., 0].view(len(self.scales), rows // block, 1, 2, block // 2).transpose(0, 1)
        values = points.to(dtype) * scales.to(dtype)  # shape: (blocks, groups, group, 2, half)
        return values.view(rows // block, columns, block).transpose(1, 2).reshape(rows, columns)


def multiply_int4(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply `x: (tokens, in)` by codes and scales as `KernelMatrix` holds them."""
    group = x.shape[1] // scales.shape[0]
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, codes, group, scales)
    return y


@lru_cache(maxsize=1024)
def has_layout(number_format: NumberFormat, shape: tuple[int, int]) -> bool:
    """Return True if the kernel on this processor can have a matrix of this format and shape."""
    block, group = _block_rows(), _kernel_group(number_format, shape[1])
    if number_format.bits != 4 or number_format.zero_point or number_format.scale_dtype == torch.float16:
        return False  # offsets, and scales that are no bfloat16, would be rounded
    return block is not None and group is not None and shape[0] > 0 and shape[0] % block == 0


@torch.no_grad()
def to_kernel(number_format: NumberFormat, codes: Tensor, scales: Tensor, columns: int) -> KernelMatrix:
    """Convert from the stored packing; only where `has_layout`.

    Args:
        number_format: of the matrix.
        codes: packed rows.
        scales: shape `(out, groups)`.
        columns: `in`.
    """
    block, group = _block_rows(), _kernel_group(number_format, columns)
    assert block is not None
    assert group is not None
    made = torch.empty_like(codes)
    for part in _parts(len(codes), columns, block):
        rows = unpack(codes[part], 4, columns).view(-1, block, columns)
        low, high = rows.transpose(1, 2).split(block // 2, dim=2)
        made[part] = (low | (high << 4)).reshape(-1, columns // 2)
    whole = scales.to(torch.bfloat16).T
    if len(whole) * group < columns:
        whole = whole.expand(columns // group, -1)
    return KernelMatrix(made, torch.stack((whole, torch.zeros_like(whole)), -1).contiguous(), block)


@torch.no_grad()
def from_kernel(number_format: NumberFormat, matrix: KernelMatrix) -> tuple[Tensor, Tensor]:
    """Convert back to the stored packing: codes and scales, the inverse of `to_kernel`."""
    rows, columns = matrix.shape
    codes = torch.empty_like(matrix.codes)
    for part in _parts(rows, columns, matrix.block):
        codes[part] = pack(_codes_by_row(matrix.codes[part], matrix.block), 4)
    scales = matrix.scales[: number_format.groups(columns), :, 0].T
    return codes, scales.to(number_format.scale_dtype).contiguous()


def _codes_by_row(codes: Tensor, block: int) -> Tensor:
    """Order the codes by rows, one a byte, shape `(rows, in)`."""
    # Transposed while two codes share a byte.
    by_row = codes.view(len(codes) // block, -1, block // 2).transpose(1, 2).contiguous()
    found = codes.new_empty(len(by_row), 2, *by_row.shape[1:])
    torch.bitwise_and(by_row, 15, out=found[:, 0])
    torch.bitwise_right_shift(by_row, 4, out=found[:, 1])
    return found.view(len(codes), -1)


def _parts(rows: int, columns: int, block: int) -> Iterator[slice]:
    """Slices of whole blocks of the kernel, few enough rows at a time."""
    step = max(1, _BLOCK // (block * columns)) * block
    for start, stop in pairwise((*range(0, rows, step), rows)):
        yield slice(start, stop)


def _kernel_group(number_format: NumberFormat, columns: int) -> int | None:
    """Return how many inputs share a scale in the kernel, None if it cannot have groups like these."""
    if number_format.group is not None:
        return number_format.group if columns % number_format.group == 0 else None
    return next((group for group in _GROUPS if columns % group == 0), None)


@lru_cache(maxsize=1)
def _block_rows() -> int | None:
    """Return how many rows the kernel takes at once, None without the kernel or if its layout is another."""
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
