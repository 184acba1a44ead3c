"""Upcycled models as ordinary mixtures: equal logits, loaded without this library, refused with a reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import TargetError
from tensornet_hf.checkpoint import read_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=500.0)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3, hidden_act="gelu")),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, rms_norm_eps=1e-3)),
}
IDS = torch.tensor([[5, 9, 3, 7, 8, 4, 6, 11], [4, 8, 6, 2, 13, 17, 19, 5]])


def upcycled(name: str, **words: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MAKE[name]().eval()
    for parameter in model.parameters():  # norms of one would hide an epsilon or a lost norm
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    th.upcycle(model, **{"share": "none", "experts": 4, "noise": 0.5, **words})
    for part in model.modules():
        if isinstance(part, tm.Router):
            nn.init.normal_(part.weight)
    return model


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", {}),
        ("llama", {"share": "center", "top_k": 3}),
        ("llama", {"router": "switch"}),
        ("mistral", {}),
        ("qwen3", {}),
        ("qwen3", {"combine": "prob"}),
    ],
)
def test_plain_transformers_loads_the_same_function(name: str, words: dict[str, Any], tmp_path: Path) -> None:
    model = upcycled(name, **words)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    stock = th.stock_mixture(model)
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not type(loaded).__module__.startswith("tensornet")
    assert read_checkpoint(tmp_path).compression is None
    with torch.no_grad():
        wanted = model(IDS).logits
        for made in (stock, loaded):
            torch.testing.assert_close(made(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    stock.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in stock.parameters())
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


@pytest.mark.slow
def test_the_library_is_not_needed_for_loading(tmp_path: Path) -> None:
    model = upcycled("llama")
    th.stock_mixture(model).save_pretrained(tmp_path)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"logits = model(torch.tensor({IDS.tolist()})).logits\n"
        "assert not [name for name in sys.modules if name.startswith('tensornet')]\n"
        f"torch.save(logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, model(IDS).logits.detach(), atol=1e-4, rtol=1e-4)


def test_integers_and_pools_become_dense_experts() -> None:
    pooled = upcycled("llama", pool="all", experts=4, top_k=2, noise=0.0)
    for part in pooled.modules():
        if isinstance(part, tm.Router):
            part.bias_steps.zero_()
        if isinstance(part, tm.SharedCoreExperts):
            part.quantize("int8")
    stock = th.stock_mixture(pooled)
    torch.testing.assert_close(stock(IDS).logits, pooled(IDS).logits, atol=1e-4, rtol=1e-4)


def with_bias(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.router.bias_steps[2] += 1


def with_capacity(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.capacity_factor = 1.0


def without_one(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = MAKE["llama"]().model.layers[1].mlp


def with_cores(model: PreTrainedModel) -> None:
    config = tn.CompressionConfig(
        "q_proj", topology="low_rank", topology_options={"max_bond": 4}, method="svd"
    )
    tn.compress(model, config, progress=False)


def with_other_counts(model: PreTrainedModel) -> None:
    words = {"d_model": 24, "d_ff": 32, "experts": 5, "combine": "unit", "share": "none"}
    model.model.layers[1].mlp = tm.mixture(**words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        ({"combine": "sigmoid"}, None, "combine='sigmoid'"),
        ({"combine": "prob"}, None, "combine='prob'"),
        ({"normalize": True}, None, "normalized logits"),
        ({"bias_rate": 0.001}, with_bias, "biases of the router"),
        ({}, with_capacity, "a capacity"),
        ({}, without_one, "not a mixture"),
        ({}, with_cores, "q_proj.* are compressed"),
        ({}, with_other_counts, "layer 1 .*'experts': 5"),
    ],
)
def test_what_has_no_ordinary_counterpart_is_refused(
    words: dict[str, Any], change: Callable[[PreTrainedModel], None] | None, message: str
) -> None:
    model = upcycled("llama", **words)
    if change is not None:
        change(model)
    with pytest.raises(TargetError, match=message):
        th.stock_mixture(model)


def test_other_models_are_refused() -> None:
    with pytest.raises(TargetError, match="GPT2LMHeadModel"):
        th.stock_mixture(ARCHITECTURES["gpt2"].dense)
    with pytest.raises(TypeError, match="got Linear"):
        th.stock_mixture(nn.Linear(2, 2))  # type: ignore[arg-type]
    biased = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    th.upcycle(biased, share="none", experts=2, top_k=1)
    with pytest.raises(TargetError, match="attention_bias"):
        th.stock_mixture(biased)
