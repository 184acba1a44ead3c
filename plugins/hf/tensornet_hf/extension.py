"""Extension of tensornet for transformers models."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from tensornet.nn.extension import ModelExtension, ProvidedData
from tensornet_hf.experts import experts_apart, tell_padding
from tensornet_hf.quantizer import prepare_for_saving
from tensornet_hf.sample_batch import sample_batch
from tensornet_hf.text import embedded_text


class TransformersExtension(ModelExtension):
    """Show stacked experts as layers, describe models for saving, and offer calibration text."""

    def unfused(self, model: nn.Module) -> AbstractContextManager[None]:
        """Show every matrix of stacked experts as a layer."""
        return experts_apart(model)

    def next_batch(self, block: nn.Module, batch: Mapping[str, Any]) -> None:
        """Pass the padding of a batch to stacked experts."""
        tell_padding(block, batch)

    def layers_replaced(self, model: nn.Module) -> bool:
        """Attach a transformers model for saving; return False for any other model."""
        return prepare_for_saving(model)

    def calibration_data(self, model: nn.Module) -> ProvidedData | None:
        """Return the embedded text in the tokens of a causal language model."""
        return embedded_text(model)

    def sample_batch(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Make a small batch from the configuration of a transformers model."""
        return sample_batch(model)
