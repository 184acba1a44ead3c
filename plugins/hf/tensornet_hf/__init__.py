"""Tensor networks for Hugging Face models: compressing, checkpoints, mixtures of experts, command line."""

from tensornet._optional import require

require(("transformers", "accelerate", "safetensors"), extra="hf", user="tensornet_hf")

__all__: list[str] = []
