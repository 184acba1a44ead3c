"""Which networks may become mixtures of which kind: routers that look ahead, experts of other mixtures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hf.moe.test_upcycle import CONFIG, mixtures, upcycled
from hf_models import ARCHITECTURES, logits
from torch import nn
from transformers import (
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import tensornet_hf as th
from tensornet.errors import TargetError

CHOICE = th.MoEConfig(num_experts=4, sites=3, router="expert_choice", capacity_factor=4.0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "opt"])
def test_expert_choice_is_refused_where_tokens_see_only_earlier_ones(name: str) -> None:
    model = ARCHITECTURES[name].dense
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError, match=r"looks at later tokens, but 2 of 2 .* are causal"):
        th.upcycle(model, CHOICE)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_expert_choice_on_encoders_computes_what_the_dense_one_did(name: str) -> None:
    architecture = ARCHITECTURES[name]
    matrices = ("fc1", "fc2") if name == "vit" else None
    model = upcycled(name, replace(CHOICE, matrices=matrices))
    torch.testing.assert_close(
        logits(model, architecture), logits(architecture.dense, architecture), atol=1e-4, rtol=1e-4
    )
    assert all(not type(m.router).causal for m in mixtures(model))


def test_expert_choice_in_an_encoder_decoder_is_for_the_encoder() -> None:
    model = ARCHITECTURES["t5_relu"].dense
    with pytest.raises(TargetError, match=r"2 of 4 .* is decoder\.block\.0.*such as encoder\.block"):
        th.upcycle(model, CHOICE)
    th.upcycle(model, replace(CHOICE, target_modules=["encoder.block.*.DenseReluDense"]))
    assert len(mixtures(model)) == len(mixtures(model.get_encoder())) == 2


class Network(nn.Module):
    """A model that declares nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.act, self.down_proj = nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


@pytest.mark.parametrize("causal", [None, True])
def test_other_models_are_refused_unless_the_caller_declares_them(causal: bool | None) -> None:
    with pytest.raises(TargetError, match="causal=False"):
        th.upcycle(nn.ModuleDict({"ffn": Network()}), CHOICE, causal=causal)
    model = nn.ModuleDict({"ffn": Network()})
    assert len(th.upcycle(model, CHOICE, causal=False).layers) == 1


def switch_transformers() -> PreTrainedModel:
    """One dense and one sparse block in the encoder and in the decoder."""
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    sparse = {"num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = SwitchTransformersConfig(
        **sizes, **sparse, vocab_size=101, decoder_start_token_id=0, pad_token_id=0
    )
    return SwitchTransformersForConditionalGeneration(config).eval()


def test_experts_of_a_model_are_not_upcycled() -> None:
    model = switch_transformers()
    report = th.upcycle(model, CONFIG)
    assert [layer.name for layer in report.layers] == [
        "encoder.block.0.layer.1.mlp",
        "decoder.block.0.layer.2.mlp",
    ]
    with pytest.raises(TargetError, match=r"expert_0 is an expert of a mixture"):
        th.upcycle(model, replace(CONFIG, target_modules=["encoder.*.expert_0"]))
    with pytest.raises(TargetError, match=r"no feed-forward network.*expert_0 is an expert of"):
        th.upcycle(model, CONFIG)
