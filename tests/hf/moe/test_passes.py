"""Models whose layers run in several passes: what they compute, their KV cache, files and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import TargetError

LAYERS, PASSES = 2, 3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS: dict[str, Any] = {
    "gpt2": lambda layers: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=60, n_embd=32, n_head=2, n_layer=layers, n_positions=40, bos_token_id=0, eos_token_id=0
        )
    ),
    "llama": lambda layers: LlamaForCausalLM(
        LlamaConfig(vocab_size=60, num_hidden_layers=layers, bos_token_id=0, eos_token_id=0, **SIZES)
    ),
    "qwen3, sliding": lambda layers: Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=60,
            num_hidden_layers=layers,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * (layers // 2),
            bos_token_id=0,
            eos_token_id=0,
            **SIZES,
        )
    ),
}
IDS = torch.arange(1, 25).reshape(2, 12)


def built(name: str, layers: int = LAYERS) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name](layers).eval()
    return model


def deepened(name: str, **options: Any) -> PreTrainedModel:
    model = built(name)
    th.upcycle(model, **{"experts": 2, "top_k": 1, "passes": PASSES, "rank": 2, **options})
    for parameter in model.parameters():  # deltas start at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_model_starts_as_its_stack_of_layers_repeated(name: str) -> None:
    model, longer = built(name), built(name, LAYERS * PASSES)
    stack = next(x for x, part in model.named_modules() if isinstance(part, nn.ModuleList))
    weights = {}
    for key, value in longer.state_dict().items():
        if key.startswith(f"{stack}."):
            number, _, rest = key.removeprefix(f"{stack}.").partition(".")
            key_in_one = f"{stack}.{int(number) % LAYERS}.{rest}"
        else:
            key_in_one = key
        weights[key] = model.state_dict().get(key_in_one, value)
    longer.load_state_dict(weights)
    before = count(model)
    report = th.upcycle(model, experts=2, top_k=1, passes=PASSES, rank=2)
    torch.testing.assert_close(logits(model), logits(longer), rtol=1e-4, atol=1e-5)
    assert report.num_experts == 2 * PASSES
    assert report.params == count(model) - before + report.dense_params
    assert count(model) < count(longer)


@pytest.mark.parametrize("name", MODELS)
def test_each_pass_has_its_own_cache(name: str) -> None:
    model = deepened(name)
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    cached = model.generate(input_ids=IDS, **options)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    assert len(cache) == LAYERS * PASSES


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_stays_tied(name: str, tmp_path: Path) -> None:
    model = deepened(name)
    want, size = logits(model), count(model)
    folder = tmp_path / "first"
    th.save(model, folder)
    assert (folder / "model.safetensors").stat().st_size < 4 * size + 100_000
    for number in range(2):  # what was loaded can be saved again
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(logits(loaded), want)
        assert count(loaded) == size
        folder = tmp_path / f"again{number}"
        loaded.save_pretrained(folder)
    loaded.train()
    loss = loaded(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.5).step()
    th.save(loaded, tmp_path / "trained")
    assert count(th.load(tmp_path / "trained")) == size
    torch.testing.assert_close(logits(th.load(tmp_path / "trained").eval()), logits(loaded.eval()))


def test_a_compressed_model_stays_tied(tmp_path: Path) -> None:
    model = deepened("gpt2")
    config = tn.CompressionConfig(bits_per_weight=8.5, formats=("int8",), exclude_modules=["lm_head"])
    tn.compress(model, config, calibration=[IDS], progress=False)
    th.save(model, tmp_path / "small")
    loaded = th.load(tmp_path / "small").eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    for number in (0, 1):  # all passes of a layer have the same integers and scales
        stored = [
            {id(x) for x in block.attn.state_dict(keep_vars=True).values()}
            for block in loaded.get_submodule("transformer.h")[number::LAYERS]
        ]
        assert len(stored) == PASSES
        assert all(x == stored[0] for x in stored)


def test_routers_and_experts_differ_between_passes() -> None:
    model = deepened("gpt2")
    mixtures = [part for part in model.modules() if isinstance(part, tm.SharedCoreMoE)]
    assert len({id(x.router.weight) for x in mixtures}) == LAYERS * PASSES
    used = [list(x.experts.experts) for x in mixtures]
    assert used == [[0, 1]] * LAYERS + [[2, 3]] * LAYERS + [[4, 5]] * LAYERS
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(x.router.weight.grad.any() for x in mixtures)
    for pool in (part for part in model.modules() if isinstance(part, tm.ExpertPool)):
        left = pool.experts.bank("c_fc").left.grad
        for number in range(PASSES):
            assert left[2 * number : 2 * number + 2].any()


def test_a_model_without_a_single_stack_is_refused_and_unchanged() -> None:
    sizes: dict[str, Any] = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 30,
    }
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    before = dict(t5.named_modules()).keys()
    with pytest.raises(TargetError, match="single stack"):
        th.upcycle(t5, passes=2)
    assert dict(t5.named_modules()).keys() == before
    with pytest.raises(TypeError):
        th.upcycle(built("gpt2").get_submodule("transformer.h.0"), passes=2)
    model = deepened("gpt2")
    with pytest.raises(TargetError):
        th.upcycle(model, passes=2)
    partly = built("llama")
    with pytest.raises(ValueError, match="share evenly"):
        th.upcycle(
            partly, passes=2, experts=lambda w: tm.LowRankDeltaExperts.from_dense(w[0], num_experts=3, rank=1)
        )
    assert not any(isinstance(part, tm.SharedCoreMoE) for part in partly.modules())
    assert partly.config.num_hidden_layers == LAYERS
    for options in ({"passes": 0}, {"passes": 2, "pool": "all"}):
        with pytest.raises(ValueError, match="passes"):
            th.UpcycleOptions(**options)
