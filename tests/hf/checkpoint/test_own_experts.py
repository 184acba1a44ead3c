"""Experts of classes with code of their own (JetMoE, DBRX, Llama 4): one layer for each matrix, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
)

import tensornet as tn
import tensornet_hf as th

EXACT = tn.CompressionConfig(topology="mpo", method="svd")
SMALL = tn.CompressionConfig(param_ratio=0.6)
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 1, "pad_token_id": 0}
IDS = torch.arange(1, 25).reshape(3, 8)


def jetmoe() -> PreTrainedModel:
    sizes = {"num_key_value_heads": 2, "kv_channels": 4, "intermediate_size": 20}
    return JetMoeForCausalLM(JetMoeConfig(**SIZES, **sizes, num_local_experts=3, num_experts_per_tok=2))


def dbrx() -> PreTrainedModel:
    experts = {"ffn_hidden_size": 20, "moe_num_experts": 3, "moe_top_k": 2}
    sizes = {"d_model": 12, "n_heads": 2, "n_layers": 1, "vocab_size": 31, "max_seq_len": 16}
    attention = {"kv_n_heads": 1, "clip_qkv": 9.0, "rope_theta": 1e4}
    return DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=experts, pad_token_id=0))


def llama4() -> PreTrainedModel:
    sizes = {"intermediate_size": 20, "intermediate_size_mlp": 20, "head_dim": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **sizes, **heads, **experts))


LAYERS = {
    jetmoe: "model.layers.0.mlp.input_linear.2.weight",
    dbrx: "transformer.blocks.0.ffn.experts.2.mlp_w2",
    llama4: "model.layers.0.feed_forward.experts.2.down_proj",
}


def _dense(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", LAYERS)
def test_models_of_transformers(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = _dense(make)
    expected, before = model(IDS).logits, list(model.state_dict())
    model.save_pretrained(tmp_path / "dense")
    report = tn.compress(model, EXACT, progress=False)
    assert LAYERS[make] in [layer.name for layer in report.layers]
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    th.decompress(model)
    assert list(model.state_dict()) == before
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    stats = tn.calibrate(model, [{"input_ids": IDS, "labels": IDS}], config=SMALL)
    tn.compress(model, SMALL, calibration=stats, progress=False)
    model.save_pretrained(tmp_path / "made")
    for loaded in (th.load(tmp_path / "made"), AutoModelForCausalLM.from_pretrained(tmp_path / "made")):
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    model.train()(IDS, labels=IDS).loss.backward()
