"""Small random models whose classes read the weight of some layer past that layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    MambaConfig,
    MambaForCausalLM,
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCAB = 101
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODERN = {**SIZES, **TOKENS, "cls_token_id": 1, "sep_token_id": 2, "max_position_embeddings": 64}
GEMMA3N = {
    **SIZES,
    **TOKENS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "altup_num_inputs": 4,
    "altup_coef_clip": 100.0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
}
TEXT = {**SIZES, **TOKENS, "max_position_embeddings": 16, "projection_dim": 16}
VISION = {**SIZES, "image_size": 16, "patch_size": 4, "projection_dim": 16}
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
PATCHES = {
    "pixel_values": torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(2)),
    "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
    "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
}


def whisper() -> PreTrainedModel:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 44}
    sizes |= {"decoder_ffn_dim": 44, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(
        **sizes,
        **TOKENS,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def deberta() -> PreTrainedModel:
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    return DebertaV2ForMaskedLM(
        DebertaV2Config(**SIZES, **TOKENS, **NO_DROPOUT, max_position_embeddings=32, **more)
    )


def wavlm() -> PreTrainedModel:
    return WavLMModel(
        WavLMConfig(
            **SIZES,
            conv_dim=(8, 8),
            conv_kernel=(10, 8),
            conv_stride=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )


#: How to make each, and what to call it with.
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Tensor]]] = {
    "modernbert": (lambda: ModernBertForMaskedLM(ModernBertConfig(**MODERN)), {"input_ids": IDS}),
    "modernbert_decoder": (
        lambda: ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**MODERN)),
        {"input_ids": IDS},
    ),
    "whisper": (
        whisper,
        {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": IDS},
    ),
    "deberta_v2": (deberta, {"input_ids": IDS}),
    "clip": (
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)),
        {"input_ids": IDS, "pixel_values": IMAGES},
    ),
    "siglip": (
        lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
        {"input_ids": IDS, "pixel_values": IMAGES},
    ),
    "siglip2": (
        lambda: Siglip2Model(
            Siglip2Config(text_config=TEXT, vision_config={**SIZES, "num_patches": 16, "patch_size": 4})
        ),
        {"input_ids": IDS, **PATCHES},
    ),
    "gemma3n": (lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**GEMMA3N)), {"input_ids": IDS}),
    "wavlm": (wavlm, {"input_values": torch.randn(2, 400)}),
    "mamba": (
        lambda: MambaForCausalLM(
            MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=VOCAB, state_size=4)
        ),
        {"input_ids": IDS},
    ),
}
