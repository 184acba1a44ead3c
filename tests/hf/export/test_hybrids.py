"""Mamba, hybrids, latent attention and mixtures with shared experts: llama.cpp computes the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import HEADS, SIZES, WORDS
from transformers import AutoConfig, AutoModelForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError

pytestmark = pytest.mark.slow  # needs the extra `gguf` and llama.cpp
ROUTED = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
GRANITE = {
    **SIZES, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
    "mamba_d_state": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
    "intermediate_size": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mamba": SIZES,
    "mamba2": {**SIZES, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    "llama4_text": {**HEADS, "num_local_experts": 4, "intermediate_size": 64, "num_hidden_layers": 4},
    "deepseek_v2": {**SIZES, **LATENT, **ROUTED, "n_group": 1},
    "deepseek_v3": {**SIZES, **LATENT, **ROUTED, "n_group": 2},
    "glm4_moe": {**HEADS, **ROUTED, "n_group": 1},
    "granitemoehybrid": GRANITE,
}


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_are_those_of_the_model(name: str, rounded: bool, tmp_path: Path) -> None:
    from tests.hf.export.llama_cpp import logits

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name])).eval()
    if rounded:
        read = ["*.dt_proj"] if name == "mamba" else None  # its weight is read outside of the layer
        formats = ("int8:g32:float16",)
        config = tn.CompressionConfig(
            formats=formats, method="nearest", target_modules="all", exclude_modules=read
        )
        tn.compress(model, config, progress=False)
    report = th.export(model, path := tmp_path / "model.gguf")
    assert bool(report.packed) == rounded
    ids = torch.randint(3, WORDS, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    found = logits(path, ids)
    # llama.cpp rounds activations to 8 bits before integers, and a router may then choose another expert.
    assert float((found - expected).norm() / expected.norm()) < (0.1 if rounded else 5e-3)
    if not rounded:
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_a_granite_hybrid_that_llama_cpp_would_abort_on_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("granitemoehybrid", **{**GRANITE, "mamba_expand": 1, "mamba_n_heads": 4})
    with pytest.raises(TargetError, match="mamba_expand"):
        th.export(AutoModelForCausalLM.from_config(config), tmp_path / "model.gguf")
