"""Multimodal models, whose parts have other names in each class and in older folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import tensornet as tn
import tensornet_hf as th

TEXT = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}
VISION = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "mlp_ratio": 2,
}
TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
IDS = torch.tensor([[3, 92, 90, 5, 6]])
IMAGE = {"pixel_values": torch.randn(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}
CONFIG = tn.CompressionConfig(target_modules="all", param_ratio=0.6, objective="weight")


def dense() -> PreTrainedModel:
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=TEXT, vision_config=VISION, **TOKENS)
    ).eval()


def outputs(model: PreTrainedModel) -> torch.Tensor:
    """Last hidden state, in which text and image are mixed."""
    types = (IDS == 90).int()
    with torch.no_grad():
        return model(
            input_ids=IDS, mm_token_type_ids=types, output_hidden_states=True, **IMAGE
        ).hidden_states[-1]


@pytest.mark.parametrize("how", ["memory", "files", "older files"])
def test_every_class_loads_all_parts(how: str, tmp_path: Path) -> None:
    model = dense()
    model.save_pretrained(tmp_path / "dense")
    if how == "memory":
        tn.compress(model, CONFIG, progress=False)
        model.save_pretrained(tmp_path / "made")
    else:
        if how == "older files":
            weights = tmp_path / "dense" / "model.safetensors"
            names = {"model.language_model.": "model.", "model.visual.": "visual."}
            tensors = load_file(weights)
            for new, old in names.items():
                tensors = {name.replace(new, old): x for name, x in tensors.items()}
            save_file(tensors, weights, metadata={"format": "pt"})
        th.compress_checkpoint(tmp_path / "dense", tmp_path / "made", CONFIG)
    whole = th.load(tmp_path / "made")
    assert any("visual" in name for name in whole.config.quantization_config.layers)
    expected = outputs(whole)
    if how == "memory":
        torch.testing.assert_close(outputs(model), expected)
    for kind in (AutoModel, AutoModelForImageTextToText):
        loaded, info = kind.from_pretrained(tmp_path / "made", output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(outputs(loaded), expected)
