"""Small random mixtures whose experts are stacks: five families, three forms on the disk."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import tensornet_hf  # noqa: F401  (describes compressed layers in models of transformers)

EXPERTS, VOCAB = 3, 101
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "head_dim": 6,
}
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "qwen2_moe")


@cache
def _weights(family: str) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = _make(family)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)  # biases and norms too: a lost one would be seen
    return model.state_dict()


def mixture(family: str) -> PreTrainedModel:
    """A mixture with always the same weights, in evaluation mode."""
    model = _make(family)
    model.load_state_dict(_weights(family))
    return model.eval()


def planted(family: str) -> PreTrainedModel:
    """A mixture whose first stack of every layer reads few directions of its inputs."""
    model = mixture(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj"):
                side = 1 if family == "gpt_oss" else 2  # stored transposed there
                size, rank = parameter.shape[side], 8 if family == "qwen2_moe" else 14
                basis, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator))
                moved = parameter.movedim(side, -1) @ basis @ basis.T
                parameter.copy_(moved.movedim(-1, side))
    return model


def _make(family: str) -> PreTrainedModel:
    if family == "mixtral":  # stored expert by expert as w1, w2, w3, of which two make one stack
        return MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, **SIZES))
    if family == "qwen3_moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=20, **SIZES))
    if family == "olmoe":  # with as many key and value heads as others, and norms of queries and keys
        return OlmoeForCausalLM(OlmoeConfig(num_experts=EXPERTS, **SIZES))
    if family == "qwen2_moe":  # with an expert for every token, whose layers are single
        sizes = {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 12, **SIZES}
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts=EXPERTS, **sizes))
    # Stored as stacks, transposed, with biases.
    rope = {"rope_type": "default", "rope_theta": 150000.0}
    return GptOssForCausalLM(GptOssConfig(num_local_experts=EXPERTS, rope_parameters=rope, **SIZES))


def tokens(count: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (count, 11), generator=torch.Generator().manual_seed(7))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits
