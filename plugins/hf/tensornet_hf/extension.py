"""The extension by which tensornet supports transformers models."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from tensornet.nn.extension import ModelExtension, ProvidedData, register_extension
from tensornet.nn.layer_kinds import LayerKind, is_plain, register_layer_kind
from tensornet_hf.experts import experts_apart, tell_padding
from tensornet_hf.quantizer import prepare_for_saving
from tensornet_hf.text import default_batches

#: Reason why the layers of `READ_OUTSIDE` stay dense.
READ_REASON = "weight read outside of the layer"
#: Maps the class of a module to those of its layers whose `weight` transformers uses without calling the
#: layer. Names of classes and layers are patterns.
READ_OUTSIDE: Mapping[str, Sequence[str]] = {
    "*MambaMixer": ("dt_proj",),
    "Rwkv*": ("output", "value"),
    "Gemma3nTextAltUp": ("prediction_coefs", "correction_coefs"),
    "Gemma4Model": ("language_model.embed_tokens",),
    "DiffusionGemmaDecoderModel": ("embed_tokens",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "Deberta*Encoder": ("rel_embeddings",),
    "SEWDTransformerEncoder": ("rel_embeddings",),
    "ProphetNetDecoder": ("ngram_embeddings",),
    "*Detr*": ("query_position_embeddings",),
    "Sam*PromptEncoder": ("not_a_point_embed", "no_mask_embed", "point_embed", "point_embed.*"),
    "Sam*MaskDecoder": ("iou_token", "mask_tokens", "hq_token"),
    "Siglip2VisionEmbeddings": ("position_embedding",),
    "CLIPSegVisionEmbeddings": ("position_embedding",),
}


class TransformersExtension(ModelExtension):
    """Expose stacked experts as layers, describe models for saving, and provide calibration text."""

    def unfused(self, model: nn.Module) -> AbstractContextManager[None]:
        """Expose every matrix of stacked experts as a layer within a `with` block."""
        return experts_apart(model)

    def next_batch(self, block: nn.Module, batch: Mapping[str, Any]) -> None:
        """Give the padding mask of a batch to stacked experts."""
        tell_padding(block, batch)

    def layers_replaced(self, model: nn.Module) -> bool:
        """Prepare a transformers model for saving; return False for any other model."""
        return prepare_for_saving(model)

    def calibration_data(self, model: nn.Module) -> ProvidedData | None:
        """Return calibration batches from the package's text, or None (see `default_batches`)."""
        return default_batches(model)

    def dense_layers(self, model: nn.Module) -> dict[str, str]:
        """Return the layers of `READ_OUTSIDE`, whose weight transformers reads outside of the layer."""
        return {
            ".".join(filter(None, (name, child))): READ_REASON
            for name, module in model.named_modules(remove_duplicate=False)
            if type(module).__module__.startswith("transformers")
            for kind, layers in READ_OUTSIDE.items()
            if fnmatchcase(type(module).__name__, kind)
            for child, _ in module.named_modules(remove_duplicate=False)
            if any(fnmatchcase(child, layer) for layer in layers)
        }


class _FalconLinear(LayerKind):
    """Falcon's subclass of `nn.Linear`; in half precision, it rounds the product before it adds the bias."""

    name = "falcon_linear"
    _module = "transformers.models.falcon.modeling_falcon"

    def matches(self, module: nn.Module) -> bool:
        # Types are compared by name, so that transformers' module of Falcon need not be imported.
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
