"""Multiply by an integer matrix, either with a torch kernel or by unpacking blocks of rows.

An unpacked block of rows fits into the processor's cache, while a whole unpacked matrix would be written to
memory and read again. Forward and backward passes allocate only one block and the output.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tensornet.nn.int4_cpu import KernelMatrix
from tensornet.nn.storage import PackedCore, aligned, unpacked
from tensornet.quantization import NumberFormat

#: Number of elements to unpack at a time if scales are applied to them, and if scales are not applied.
_BLOCK, _POINTS = 2**17, 2**20
#: Largest number of tokens for which torch's int8 kernel on the CPU is faster than unpacking.
INT8_TOKENS = 24
_KERNEL_STEP = 32
#: Largest number of tokens for which unpacking and multiplying in float32 is faster than in 16 bits.
WIDE_TOKENS = 8


@dataclass(frozen=True)
class PackedMatrix:
    """Integer matrix `(out, in)` in its stored form.

    Args:
        number_format: format of the codes.
        codes: packed codes of each row, shape `(out, bytes)`.
        scales: floating-point scales, shape `(out, groups)`.
        zeros: packed minimum of each group, shape `(out, bytes)`; None if the format has no minima.
        columns: number of columns, `in`.
        scale_bits: tensor in which a `PackedCore` stores the scales. If the core stores another tensor now,
            its scales have changed, and this matrix must not be used any more.
    """

    number_format: NumberFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: int
    scale_bits: Tensor | None = None

    @classmethod
    def of(cls, core: PackedCore) -> "PackedMatrix":
        """Make an integer matrix from a core."""
        zeros = core.tensors.get("zeros")
        return cls(core.number_format, core.codes, core.scale_values, zeros, core.columns, core.scales)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out, in)`."""
        return len(self.codes), self.columns

    def row_scales(self, dtype: torch.dtype) -> Tensor | None:
        """Return the scale of each row, shape `(out,)`, if the outputs can be scaled instead of the weights.

        Scaling the outputs is faster. It needs codes of 8 bits (exact in bfloat16) and one scale for each
        row; otherwise the result is None. The result is also None for `torch.float16`, in which products with
        unscaled integers may overflow.
        """
        trained = self.codes.is_floating_point()
        if trained or dtype == torch.float16 or not is_int8_per_row(self.number_format, self.columns):
            return None
        return self.scales[:, 0].to(dtype)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield each slice of rows with its unpacked values; scales from `row_scales` are not applied."""
        if self.row_scales(dtype) is not None:
            for part in self._parts(_POINTS):
                yield part, self.codes[part].view(torch.int8).to(dtype)
            return
        for part in self._parts(_BLOCK):
            zeros = None if self.zeros is None else self.zeros[part]
            found = unpacked(
                self.number_format, self.codes[part], self.scales[part], zeros, self.columns, dtype
            )
            yield part, found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Unpack the whole matrix, shape `(out, in)`."""
        return unpacked(self.number_format, self.codes, self.scales, self.zeros, self.columns, dtype)

    def _parts(self, elements: int) -> Iterator[slice]:
        """Yield slices of rows with about `elements` elements each."""
        step = max(1, elements // max(self.columns, 1))
        for start in range(0, len(self.codes), step):
            yield slice(start, min(start + step, len(self.codes)))

    @property
    def kernel_tokens(self) -> int:
        """Largest token count at which torch's int8 kernel beats unpacking; 0 without a usable kernel."""
        fits = self.codes.is_cpu and has_int8_kernel(self.number_format, self.shape)
        return INT8_TOKENS if fits and self.scales.dtype == torch.bfloat16 else 0

    def has_kernel(self, x: Tensor) -> bool:
        """Return True if torch's int8 kernel can multiply this input, and is faster than unpacking."""
        return x.dtype == torch.bfloat16 and x.is_cpu and 0 < len(x) <= self.kernel_tokens

    def by_kernel(self, x: Tensor) -> Tensor:
        """Compute `x W^T` with the kernel, from `x: (tokens, in)` to `(tokens, out)`."""
        codes, scales = self.codes.view(torch.int8), self.scales.reshape(-1)
        if not torch.compiler.is_compiling():
            x, codes = aligned(x), aligned(codes)
        # The operation is private, but torch has no public product of floats with int8 weights.
        y: Tensor = torch.ops.aten._weight_int8pack_mm.default(x, codes, scales)
        return y


#: Integer matrix as it is stored, or in the layout of torch's int4 kernel.
StoredMatrix = PackedMatrix | KernelMatrix


def is_int8_per_row(number_format: NumberFormat, columns: int) -> bool:
    """Return True if the format has equal steps, 8 bits, and one scale for each row."""
    points = number_format.points
    return points.bits == 8 and points.equal_steps and number_format.groups(columns) == 1


def has_int8_kernel(number_format: NumberFormat, shape: tuple[int, int]) -> bool:
    """Return True if torch's int8 kernel can read stored matrices of this format and shape."""
    plain = is_int8_per_row(number_format, shape[1]) and number_format.scales.dtype == torch.bfloat16
    # If a size is not a multiple of 32, the kernel reads out of bounds and crashes.
    return plain and all(n % _KERNEL_STEP == 0 for n in shape)


def multiply(x: Tensor, matrix: StoredMatrix, bias: Tensor | None) -> Tensor:
    """Compute `x W^T + bias` for an integer matrix `W`, differentiable with respect to input and bias.

    Args:
        x: input, shape `(..., in)`.
        matrix: the matrix `(out, in)`; it gets no gradients, so its scales must not be trained.
        bias: shape `(out,)`, or None.
    """
    out_features, in_features = matrix.shape
    flat = x.reshape(-1, in_features)
    recorded = torch.is_grad_enabled() and flat.requires_grad
    if torch.compiler.is_compiling():
        y = _traced(flat, matrix, recorded=recorded)
    elif recorded:
        y = _Multiplication.apply(flat, matrix)
    else:
        y = _product(flat, matrix)
    y = y.reshape(*x.shape[:-1], out_features)
    return y if bias is None else y + bias


def _traced(x: Tensor, matrix: StoredMatrix, *, recorded: bool) -> Tensor:
    """Compute `x W^T` for `x: (tokens, in)`, by operations that a compiler can differentiate."""
    if matrix.has_kernel(x) and not recorded:
        return matrix.by_kernel(x)
    if not isinstance(matrix, PackedMatrix):
        return linear(x, matrix.dense(x.dtype))
    if not recorded and (scales := matrix.row_scales(x.dtype)) is not None:
        return linear(x, matrix.codes.view(torch.int8).to(x.dtype)) * scales
    name = matrix.number_format.name
    y: Tensor = integer_product(x, matrix.codes, matrix.scales, matrix.zeros, name)
    return y


def _product(x: Tensor, matrix: StoredMatrix) -> Tensor:
    """Compute `x W^T` for `x: (tokens, in)`, without gradients."""
    if matrix.has_kernel(x):
        return matrix.by_kernel(x.contiguous())
    y = x.new_empty(len(x), matrix.shape[0])
    wide = x.float() if x.dtype == torch.bfloat16 and x.is_cpu and len(x) <= WIDE_TOKENS else x
    for part, rows in matrix.blocks(wide.dtype):
        y[:, part] = linear(wide, rows)
    scales = matrix.row_scales(wide.dtype)
    return y if scales is None else y.mul_(scales)


def _pulled_back(gradient: Tensor, matrix: StoredMatrix) -> Tensor:
    """Compute the gradient of the input `(tokens, in)` from the gradient of the output `(tokens, out)`."""
    made = gradient.new_zeros(len(gradient), matrix.shape[1])
    scales = matrix.row_scales(gradient.dtype)
    gradient = gradient if scales is None else gradient * scales
    for part, rows in matrix.blocks(gradient.dtype):
        made.addmm_(gradient[:, part], rows)
    return made


class _Multiplication(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: StoredMatrix) -> Tensor:
        ctx.matrix = matrix
        return _product(x, matrix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _pulled_back(gradients[0], ctx.matrix), None


# Compilers generate slow code for unpacking, so a custom operation hides the unpacking from them.
@torch.library.custom_op("tensornet::integer_product", mutates_args=())
def integer_product(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, number_format: str
) -> Tensor:
    """Compute `x W^T` for `x: (tokens, in)` and a stored integer matrix `W: (out, in)`."""
    parsed = NumberFormat.parse(number_format)
    return _product(x, PackedMatrix(parsed, codes, scales, zeros, x.shape[1]))


@torch.library.custom_op("tensornet::integer_product_gradient", mutates_args=())
def _gradient(
    gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, number_format: str, columns: int
) -> Tensor:
    parsed = NumberFormat.parse(number_format)
    return _pulled_back(gradient, PackedMatrix(parsed, codes, scales, zeros, columns))


@integer_product.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, number_format: str) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@_gradient.register_fake
def _(
    gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, number_format: str, columns: int
) -> Tensor:
    return gradient.new_empty(gradient.shape[0], columns)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, zeros, ctx.number_format = inputs
    ctx.columns = x.shape[1]
    ctx.save_for_backward(codes, scales, zeros)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales, zeros = ctx.saved_tensors
    made = _gradient(gradient, codes, scales, zeros, ctx.number_format, ctx.columns)
    return made, None, None, None, None


integer_product.register_autograd(_backward, setup_context=_keep)
