"""Products with an integer matrix, unpacked in blocks of rows.

To explain the blocks: a whole unpacked matrix would be written to memory and read again. A block of rows
stays in the cache, and beside the output a pass holds nothing larger than it, backwards as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tensornet.nn.encoding import unpacked
from tensornet.quantization import NumberFormat

#: Elements that are unpacked at a time.
_BLOCK = 2**17
#: Most tokens for which torch's int8 kernel on the CPU is faster than unpacking.
KERNEL_TOKENS = 48
_KERNEL_STEP = 32


@dataclass(frozen=True)
class IntegerMatrix:
    """Stored integer matrix `(out, in)`.

    Args:
        number_format: of its codes.
        codes: packed rows.
        scales: of its groups.
        zeros: packed zero points, None without.
        columns: `in`.
    """

    number_format: NumberFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: int

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the values of the rows, block by block."""
        step = max(1, _BLOCK // max(self.columns, 1))
        for start in range(0, len(self.codes), step):
            part = slice(start, min(start + step, len(self.codes)))
            kept = {"core_": self.codes[part], "scale_": self.scales[part]}
            if self.zeros is not None:
                kept["zero_"] = self.zeros[part]
            yield part, unpacked(self.number_format, kept, "", self.columns, dtype)

    def has_kernel(self, x: Tensor) -> bool:
        """Return True if torch has a kernel for this input that reads the stored codes."""
        if self.number_format.bits != 8 or self.zeros is not None or self.scales.shape[1] > 1:
            return False
        # With other sizes the kernel reads beyond its operands and crashes.
        fits = len(self.codes) % _KERNEL_STEP == 0 and self.columns % _KERNEL_STEP == 0
        few = 0 < len(x) <= KERNEL_TOKENS
        return fits and few and x.is_cpu and x.dtype == self.scales.dtype == torch.bfloat16


def multiply(x: Tensor, matrix: IntegerMatrix, bias: Tensor | None) -> Tensor:
    """Map `x: (..., in)` to `(..., out)`, differentiable by the input and the bias.

    Args:
        x: input.
        matrix: integers, whose scales are not trained.
        bias: shape `(out,)`, or None.
    """
    flat = x.reshape(-1, matrix.columns)
    y: Any = _Product.apply(flat, matrix)
    y = y.reshape(*x.shape[:-1], len(matrix.codes))
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: IntegerMatrix) -> Tensor:
        ctx.matrix = matrix
        if matrix.has_kernel(x):
            scales = matrix.scales[:, 0].contiguous()
            codes = matrix.codes.view(torch.int8)
            made: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, scales)
            return made
        y = x.new_empty(len(x), len(matrix.codes))
        for part, rows in matrix.blocks(x.dtype):
            y[:, part] = linear(x, rows)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        matrix: IntegerMatrix = ctx.matrix
        made = gradient.new_zeros(len(gradient), matrix.columns)
        for part, rows in matrix.blocks(gradient.dtype):
            made.addmm_(gradient[:, part], rows)
        return made, None
