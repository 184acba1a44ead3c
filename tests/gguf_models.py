"""Sizes of small models that llama.cpp's converter accepts, by model type."""

from __future__ import annotations

from typing import Any

WORDS = 96
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS = {**SIZES, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": {**HEADS, "query_pre_attn_scalar": 16},
    "phi": {**SIZES, "num_key_value_heads": 4, "intermediate_size": 256},
    "phi3": SIZES,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **SIZES},
    "gpt_neox": SIZES,
    "starcoder2": SIZES,
    "stablelm": SIZES,
    "bloom": {"vocab_size": WORDS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "nemotron": SIZES,
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen2_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "norm_topk_prob": True},
    "bert": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
}  # fmt: skip
