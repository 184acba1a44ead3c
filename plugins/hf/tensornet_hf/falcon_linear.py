"""Layer kinds for linear layers of Hugging Face models that are not `nn.Linear`."""

from importlib import import_module

from torch import Tensor, nn

from tensornet.nn.layer_kinds import LayerKind, is_plain, register_layer_kind


class _FalconLinear(LayerKind):
    """Falcon's subclass of `nn.Linear`, which rounds the product before adding the bias in half precision."""

    name = "falcon_linear"
    _module = "transformers.models.falcon.modeling_falcon"

    def matches(self, module: nn.Module) -> bool:
        # By name, so that the model's file is not imported for everybody.
        known = type(module).__name__ == "FalconLinear" and type(module).__module__ == self._module
        return known and is_plain(module)

    def matrix(self, module: nn.Module) -> Tensor:
        return module.weight  # type: ignore[return-value]

    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = matrix.shape
        kind: type[nn.Linear] = import_module(self._module).FalconLinear
        layer = kind(in_features, out_features, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(matrix)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer


register_layer_kind(_FalconLinear())
