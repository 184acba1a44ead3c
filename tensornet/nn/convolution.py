"""Convolutions as matrices: `(out_channels, in_channels * kernel)`, one for each group."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensornet.nn.compound import Compound, Shared, Stack, dense_matrix, is_observed, own_parameters
from tensornet.nn.module import NetworkModule
from tensornet.nn.stock_layers import CompoundKind, register_compound_kind


class MatrixConvolution(Compound):
    """Replacement for `nn.Conv1d` or `nn.Conv2d` that multiplies by matrices.

    A matrix of low rank `U V` is applied as two convolutions: `V` with the kernel, then `U` at every point.
    From any other network the kernel is rebuilt. While a layer is observed it is called with the unfolded
    input `(batch, points, in_channels * kernel)`.

    >>> stock = nn.Conv2d(8, 4, 3, stride=2)
    >>> x = torch.randn(2, 8, 9, 9)
    >>> torch.allclose(MatrixConvolution(stock, {})(x), stock(x), atol=1e-5)
    True
    """

    def __init__(self, stock: nn.Conv1d | nn.Conv2d, shared: Shared) -> None:
        names = ("matrix",) if stock.groups == 1 else tuple(f"matrix_{k}" for k in range(stock.groups))
        columns = stock.in_channels // stock.groups * math.prod(stock.kernel_size)
        super().__init__(stock, (Stack("weight", names, columns),), shared)
        self.in_channels, self.out_channels, self.groups = stock.in_channels, stock.out_channels, stock.groups
        self.kernel_size, self.stride, self.dilation = stock.kernel_size, stock.stride, stock.dilation
        self.padding_mode = "constant" if stock.padding_mode == "zeros" else stock.padding_mode
        # Of the last dimension first, as F.pad wants it; `padding="same"` may differ at the two ends.
        self.pads = tuple(stock._reversed_padding_repeated_twice)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(batch, in_channels, *points)` to `(batch, out_channels, *points)`; batch may be absent."""
        layers = [self.get_submodule(name) for name in self.layer_names]
        x = input if input.ndim == len(self.kernel_size) + 2 else input[None]
        x = F.pad(x, self.pads, mode=self.padding_mode) if any(self.pads) else x
        y = self._unfolded(x, layers) if is_observed(*layers) else self._convolved(x, layers)
        return y if input.ndim == len(self.kernel_size) + 2 else y[0]

    def _convolved(self, x: Tensor, layers: list[nn.Module]) -> Tensor:
        if len(layers) == 1 and (factors := _two_factors(layers[0])) is not None:
            left, right = factors
            inner = self._convolve(x, right, None)
            return self._pointwise(inner, left)
        return self._convolve(x, torch.cat([dense_matrix(layer) for layer in layers]), self.bias)

    def _convolve(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        kernel = matrix.reshape(len(matrix), -1, *self.kernel_size)
        convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        return convolve(x, kernel, bias, self.stride, 0, self.dilation, self.groups)

    def _pointwise(self, x: Tensor, matrix: Tensor) -> Tensor:
        convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        return convolve(x, matrix.reshape(*matrix.shape, *[1] * len(self.kernel_size)), self.bias)

    def _unfolded(self, x: Tensor, layers: list[nn.Module]) -> Tensor:
        sizes = [self.kernel_size, self.dilation, self.stride]
        if len(self.kernel_size) == 1:  # F.unfold knows two dimensions
            x, sizes = x[:, :, None], [(1, *size) for size in sizes]
        kernel, dilation, stride = sizes
        points = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, d, s in zip(x.shape[2:], kernel, dilation, stride, strict=True)
        ]
        columns = F.unfold(x, kernel, dilation=dilation, stride=stride).transpose(1, 2)
        parts = zip(layers, columns.chunk(self.groups, dim=2), strict=True)
        y = torch.cat([layer(part) for layer, part in parts], dim=2)
        y = y if self.bias is None else y + self.bias
        y = y.transpose(1, 2).reshape(len(x), self.out_channels, *points)
        return y[:, :, 0] if len(self.kernel_size) == 1 else y


def _two_factors(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return factors `U: (out, rank)`, `V: (rank, in)` if the layer has them and they save elements."""
    if not isinstance(layer, NetworkModule) or len(layer.topology.cores) != 2:
        return None
    rows, columns = layer.topology.shape
    first, second = layer.topology.core_shapes.values()
    fits = len(first) == 4 and first == (1, rows, 1, first[-1]) and second == (first[-1], 1, columns, 1)
    if not fits or first[-1] * (rows + columns) >= rows * columns:
        return None
    left, right = layer.cores
    return left.reshape(rows, -1), right.reshape(-1, columns)


class _ConvolutionKind(CompoundKind):
    """Compound kind of convolutions, depthwise ones excluded: each of their channels has a kernel alone."""

    def matches(self, module: nn.Module) -> bool:
        if type(module) not in (nn.Conv1d, nn.Conv2d) or own_parameters(module).keys() - {"weight", "bias"}:
            return False
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        each = (module.in_channels // module.groups, module.out_channels // module.groups)
        return "weight" in own_parameters(module) and (module.groups == 1 or min(each) > 1)

    def take_apart(self, module: nn.Module, shared: Shared) -> nn.Module:
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        return MatrixConvolution(module, shared)


register_compound_kind(_ConvolutionKind())
