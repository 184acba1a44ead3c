"""Support of transformers models in tensornet: an extension, and one kind of linear layer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from tensornet.nn.extension import ModelExtension, ProvidedData, register_extension
from tensornet.nn.layer_kinds import LayerKind, is_plain, register_layer_kind
from tensornet_hf.experts import experts_apart, tell_padding
from tensornet_hf.quantizer import prepare_for_saving
from tensornet_hf.sample_batch import sample_batch
from tensornet_hf.text import embedded_text


class TransformersExtension(ModelExtension):
    """Expose stacked experts as layers, describe models for saving, and provide calibration text."""

    def unfused(self, model: nn.Module) -> AbstractContextManager[None]:
        """Expose every matrix of stacked experts as a layer."""
        return experts_apart(model)

    def next_batch(self, block: nn.Module, batch: Mapping[str, Any]) -> None:
        """Pass the padding of a batch to stacked experts."""
        tell_padding(block, batch)

    def layers_replaced(self, model: nn.Module) -> bool:
        """Prepare a transformers model for saving; return False for any other model."""
        return prepare_for_saving(model)

    def calibration_data(self, model: nn.Module) -> ProvidedData | None:
        """Return the embedded text as tokens for a causal language model."""
        return embedded_text(model)

    def sample_batch(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Make a small batch from the configuration of a transformers model."""
        return sample_batch(model)


class _FalconLinear(LayerKind):
    """Falcon's subclass of `nn.Linear`, which rounds the product before adding the bias in half precision."""

    name = "falcon_linear"
    _module = "transformers.models.falcon.modeling_falcon"

    def matches(self, module: nn.Module) -> bool:
        # Compared by name, so that the module of Falcon need not be imported.
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


register_extension(TransformersExtension())
register_layer_kind(_FalconLinear())
