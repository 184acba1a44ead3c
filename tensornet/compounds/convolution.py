"""Convolutions as linear layers, with one matrix for each group of channels."""

import math
from collections.abc import Callable, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensornet.nn.layer_kinds import is_plain
from tensornet.nn.module import NetworkModule
from tensornet.nn.unfuse import (
    Compound,
    Shared,
    StackedMatrices,
    dense_matrix,
    is_observed,
    register_compound,
)


@register_compound
class MatrixConvolution(Compound):
    """Replacement for `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` whose kernel is stored as matrices.

    Each group has a matrix `(out_channels / groups, in_channels / groups * kernel)`, where `kernel` is the
    number of points in the kernel. If there is only one group, a low-rank matrix `U V` is applied as two
    convolutions: `V` with the kernel size of the layer, then `U` with a kernel of size 1. Otherwise the
    kernel is rebuilt. During calibration, the linear layers are called with unfolded inputs of shape
    `(batch, points, in_channels / groups * kernel)`.
    """

    replaces = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def __init__(self, stock: nn.Conv1d | nn.Conv2d | nn.Conv3d, shared: Shared) -> None:
        columns = stock.in_channels // stock.groups * math.prod(stock.kernel_size)
        names = ("matrix",) if stock.groups == 1 else tuple(f"matrix_{k}" for k in range(stock.groups))
        super().__init__(stock, (StackedMatrices("weight", names, columns),), shared)
        self.out_channels, self.groups = stock.out_channels, stock.groups
        self.kernel_size, self.stride, self.dilation = stock.kernel_size, stock.stride, stock.dilation
        self.padding_mode = "constant" if stock.padding_mode == "zeros" else stock.padding_mode
        # As in F.pad, the last dimension comes first. The padding at the two ends of a dimension may differ
        # (`padding="same"`); then only this private attribute has the widths.
        self.pads = tuple(stock._reversed_padding_repeated_twice)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if the groups of channels are large enough for low rank; depthwise ones rarely are."""
        return is_plain(module) and _can_shrink(module)

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Return a reason if `matches` is False because the groups of channels are too small, else None."""
        return "groups too small for low rank" if is_plain(module) and not _can_shrink(module) else None

    def forward(self, input: Tensor) -> Tensor:
        """Convolve an input `(batch, in_channels, *points)` or `(in_channels, *points)`."""
        layers = [self.get_submodule(name) for name in self.layer_names]
        x = input if input.ndim == len(self.kernel_size) + 2 else input[None]
        x = F.pad(x, self.pads, mode=self.padding_mode) if any(self.pads) else x
        y = self._unfolded(x, layers) if is_observed(*layers) else self._convolved(x, layers)
        return y if input.ndim == len(self.kernel_size) + 2 else y[0]

    def _convolved(self, x: Tensor, layers: list[nn.Module]) -> Tensor:
        if len(layers) == 1 and (factors := _two_factors(layers[0])) is not None:
            left, right = factors
            inner = self._convolve(x, right, None)
            pointwise = left.reshape(*left.shape, *[1] * len(self.kernel_size))
            return _convolution(self.kernel_size)(inner, pointwise, self.bias)
        return self._convolve(x, torch.cat([dense_matrix(layer) for layer in layers]), self.bias)

    def _convolve(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        kernel = matrix.reshape(len(matrix), -1, *self.kernel_size)
        convolve = _convolution(self.kernel_size)
        return convolve(x, kernel, bias, self.stride, 0, self.dilation, self.groups)

    def _unfolded(self, x: Tensor, layers: list[nn.Module]) -> Tensor:
        sizes = zip(self.kernel_size, self.dilation, self.stride, strict=True)
        for axis, (kernel, dilation, stride) in enumerate(sizes, start=2):
            x = x.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
        # shape: (batch, channels, *points, *kernel)
        last = 2 + len(self.kernel_size)
        points = x.shape[2:last]
        order = (0, *range(2, last), 1, *range(last, x.ndim))
        columns = x.permute(order).flatten(last - 1).flatten(1, last - 2)
        parts = zip(layers, columns.chunk(self.groups, dim=2), strict=True)
        y = torch.cat([layer(part) for layer, part in parts], dim=2)
        y = y if self.bias is None else y + self.bias
        return y.transpose(1, 2).reshape(len(x), self.out_channels, *points)


def _convolution(kernel_size: Sized) -> Callable[..., Tensor]:
    return getattr(F, f"conv{len(kernel_size)}d")


def _two_factors(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the factors `U: (out, rank)` and `V: (rank, in)` of a low-rank layer.

    The result is None for other layers, and if the factors are not smaller than the matrix.
    """
    if not isinstance(layer, NetworkModule) or len(layer.topology.cores) != 2:
        return None
    rows, columns = layer.topology.shape
    first, second = layer.topology.core_shapes.values()
    fits = len(first) == 4 and first == (1, rows, 1, first[-1]) and second == (first[-1], 1, columns, 1)
    if not fits or first[-1] * (rows + columns) >= rows * columns:
        return None
    left, right = layer.cores
    return left.reshape(rows, -1), right.reshape(-1, columns)


def _can_shrink(module: Any) -> bool:
    """Return True if there is only one group, or if a group's matrix is larger than factors of rank 1."""
    rows = module.out_channels // module.groups
    columns = module.in_channels // module.groups * math.prod(module.kernel_size)
    return module.groups == 1 or rows + columns < rows * columns
