"""The extension by which tensornet supports transformers models, and sample batches for any such model."""

import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet.nn.extension import ModelExtension, ProvidedData, register_extension
from tensornet.nn.layer_kinds import LayerKind, is_plain, register_layer_kind
from tensornet_hf.experts import experts_apart, tell_padding
from tensornet_hf.quantizer import prepare_for_saving
from tensornet_hf.text import embedded_text

#: Tokens in a sample batch, and height and width in pixels of its image if the model takes any size.
TOKENS, SIDE = 8, 224
#: Shapes of the prompts that Segment Anything takes in addition to an image: one point, one box.
_PROMPTS = {"input_points": (1, 1, 1, 2), "input_boxes": (1, 1, 4)}


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
        """Return calibration batches of the package's text, or None, see `embedded_text`."""
        return embedded_text(model)

    def sample_batch(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Make a small batch from the configuration of a transformers model."""
        return sample_batch(model)


def sample_batch(model: nn.Module) -> dict[str, Tensor] | None:
    """Make a batch of one example with which a transformers model, or a model inside it, can be called.

    Shapes and ranges fit the model, but the values are arbitrary. If a multimodal model marks images by
    placeholders in its text, the batch has text alone, because only the model's processor can match text and
    images. Call this function with the vision tower to get an image.

    Args:
        model: a transformers model.

    Returns:
        Keyword arguments of `forward` on the model's device, or None if the model is not a transformers
        model, or its inputs are not text, images or sound.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    names = inspect.signature(model.forward).parameters
    config, text = model.config, model.config.get_text_config()
    vision = getattr(config, "vision_config", None) or config
    batch: dict[str, Tensor] = {}

    vocabulary = getattr(text, "vocab_size", None)
    if isinstance(vocabulary, int):
        ids = torch.arange(TOKENS)[None] % vocabulary
        tokens = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
        batch |= {name: ids for name in tokens if name in names}

    placed_by_text = any(hasattr(config, f"image_token_{which}") for which in ("id", "index"))
    if "pixel_values" in names and not ("input_ids" in batch and placed_by_text):
        batch |= _image(vision, names)
        batch |= {name: torch.zeros(shape) for name, shape in _PROMPTS.items() if name in names}

    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None)
    if "input_features" in names and bins is not None:
        # Whisper reads spectra (bins, frames) of a fixed length; Speech2Text and others read (frames, bins).
        length = getattr(config, "max_source_positions", None)
        if length is not None and not hasattr(config, "input_feat_per_channel"):
            batch["input_features"] = torch.zeros(1, bins, 2 * length)
        else:
            batch["input_features"] = torch.zeros(1, 64, bins)
    if "input_values" in names and hasattr(config, "conv_stride"):  # a waveform
        length = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            length = length * stride + kernel
        batch["input_values"] = torch.zeros(1, 16 * length)
    elif "input_values" in names and bins is not None:  # a spectrogram
        batch["input_values"] = torch.zeros(1, config.max_length, bins)

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    placed = {
        name: x.to(model.device, dtype if x.is_floating_point() else x.dtype) for name, x in batch.items()
    }
    return placed or None


def _image(config: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Make an image `(1, channels, height, width)`, or a list of patches for models like SigLIP 2."""
    channels = getattr(config, "num_channels", 3)
    if "spatial_shapes" in names:
        count, patch = config.num_patches, config.patch_size
        return {
            "pixel_values": torch.zeros(1, count, channels * patch**2),
            "pixel_attention_mask": torch.ones(1, count, dtype=torch.long),
            "spatial_shapes": torch.tensor([[1, count]]),
        }
    size = getattr(config, "image_size", None) or SIDE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return {"pixel_values": torch.zeros(1, channels, height, width)}


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
