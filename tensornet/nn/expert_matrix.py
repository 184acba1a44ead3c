"""A matrix of one expert among many: the layer that a stack of experts is made of when it is taken apart."""

from torch import Tensor, nn
from torch.nn import functional as F

from tensornet.nn.stock_layers import LayerKind, register_layer_kind


class ExpertMatrix(nn.Module):
    """One matrix `(out_features, in_features)` of one expert.

    Not an `nn.Linear`: loading would take a parameter called `weight` here for a part of a stack.

    Args:
        matrix: the matrix; a parameter is taken as it is.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix if isinstance(matrix, nn.Parameter) else nn.Parameter(matrix)

    @property
    def weight(self) -> nn.Parameter:
        """The matrix, under the name that other layers have for it."""
        return self.matrix

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: (tokens, in_features)` to `(tokens, out_features)`."""
        return F.linear(x, self.matrix)


class _ExpertKind(LayerKind):
    name = "expert"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is ExpertMatrix

    def matrix(self, module: nn.Module) -> Tensor:
        assert isinstance(module, ExpertMatrix)
        return module.matrix

    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        assert bias is None  # biases stay stacked
        return ExpertMatrix(matrix)


register_layer_kind(_ExpertKind())
