"""Mixtures of transformers in the whole pipeline: targets, tokens of each expert, forecast, round trip."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import tensornet as tn
import tensornet_hf as th
from tensornet.nn.targets import LayerSelection, find_targets
from tensornet.nn.unfuse import unfused
from tensornet_hf.cli.main import run

EXPERTS, TOP, LAYERS, VOCAB = 8, 2, 2, 1024
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=32, **SIZES),
    "mixtral": lambda: MixtralConfig(num_local_experts=EXPERTS, **SIZES),
    # Shared experts, a dense first layer, and a sigmoid router that first chooses two of four groups.
    "deepseek_v3": lambda: DeepseekV3Config(
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
        kv_lora_rank=8,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **{**SIZES, "num_key_value_heads": 4, "head_dim": 4},
    ),
    # Biases, transposed stacks, and rows of gate and up in turn.
    "gpt_oss": lambda: GptOssConfig(
        num_local_experts=EXPERTS, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **SIZES
    ),
    # Every expert gets all tokens, but those of other experts are multiplied by zero.
    "llama4": lambda: Llama4TextConfig(
        num_local_experts=EXPERTS,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
        **{**SIZES, "num_experts_per_tok": 1},
    ),
}


def mixture(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).float().eval()


def mixtures(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that own the experts' stacks, by name."""
    return {
        name: x for name, x in model.named_modules() if hasattr(x, "num_experts") and hasattr(x, "down_proj")
    }


def ids(rows: int, length: int = 24) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def routed(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Counter[int]]:
    """Count the tokens of each expert from what the stock modules receive."""
    found: dict[str, Counter[int]] = {}
    handles = []
    for name, experts in mixtures(model).items():

        def count(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            if len(args) > 1:
                chosen = args[1].flatten().tolist()
            else:  # Llama 4
                chosen = args[0].view(EXPERTS, -1, args[0].shape[-1]).any(-1).nonzero()[:, 0].tolist()
            found[name] = Counter(chosen)

        handles.append(experts.register_forward_pre_hook(count))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_every_matrix_of_every_expert_is_a_target(family: str) -> None:
    model = mixture(family)
    with unfused(model):
        targets = find_targets(model, LayerSelection())
    names = {x.name for x in targets if not x.skip}
    assert len(mixtures(model)) == (1 if family == "deepseek_v3" else LAYERS)
    for name in mixtures(model):
        experts = {f"{name}.{number}.{x}" for number in range(EXPERTS) for x in ("gate_up_proj", "down_proj")}
        assert experts == {x for x in names if x.startswith(f"{name}.")}
    matrices = sum(x.matrix.numel() for x in targets if ".experts." in x.name and not x.skip)
    stacks = sum(
        x.get_parameter(stack).numel()
        for x in mixtures(model).values()
        for stack in ("gate_up_proj", "down_proj")
    )
    assert matrices == stacks
    if family == "deepseek_v3":
        assert {f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")} <= names
        assert {f"model.layers.1.mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")} <= names


@pytest.mark.parametrize("family", CONFIGS)
def test_calibration_counts_the_tokens_of_each_expert(family: str) -> None:
    model, batch = mixture(family), {"input_ids": ids(8), "labels": ids(8)}
    expected = routed(model, batch)
    stats = tn.calibrate(model, [batch])
    for name, counts in expected.items():
        for layer in ("gate_up_proj", "down_proj"):
            found = {k: stats.counts[f"{name}.{k}.{layer}"] for k in range(EXPERTS)}
            assert found == {k: counts[k] for k in range(EXPERTS)}
        assert min(counts.values()) > 0
        assert len({*counts.values()}) > 1


@pytest.mark.parametrize("family", CONFIGS)
def test_experts_without_tokens_are_named(family: str) -> None:
    model, batch = mixture(family), {"input_ids": ids(1, 9), "labels": ids(1, 9)}
    expected = {
        f"{name}.{number}.{layer}"
        for name, counts in routed(model, batch).items()
        for number in range(EXPERTS)
        for layer in ("gate_up_proj", "down_proj")
        if not counts[number]
    }
    assert expected
    config = tn.CompressionConfig(bits_per_weight=8.5, formats=("int4:g16", "int8:g16"), method="nearest")
    report = tn.compress(model, config, calibration=[batch], progress=False)
    assert set(report.plan.unrouted) == expected
    assert report.to_dict()["unrouted"] == list(report.plan.unrouted)
    assert "other experts of their layer" in str(report)
    assert expected <= {layer.name for layer in report.layers}


@pytest.mark.slow
@pytest.mark.parametrize("family", [x for x in CONFIGS if x != "llama4"])
def test_the_command_compresses_saves_and_generates(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mixture(family).save_pretrained("dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(th.embedded.gpt2_path() / name, "dense")
    Path("text.txt").write_text(th.embedded.heldout_text()[:6000])
    options = ["--bits", "5", "--calibration", "text.txt", "--exclude", "lm_head"]
    assert run(["compress", "dense", "small", *options]) == 0
    assert run(["generate", "small", "In the beginning", "--max-new-tokens", "3"]) == 0
    tokenizer = AutoTokenizer.from_pretrained("small")
    batch = tokenizer("In the beginning", return_tensors="pt")
    loaded, other = th.load("small").eval(), AutoModelForCausalLM.from_pretrained("small").eval()
    dense = AutoModelForCausalLM.from_pretrained("dense").eval()
    with torch.no_grad():
        found, expected = loaded(**batch).logits, dense(**batch).logits
        torch.testing.assert_close(other(**batch).logits, found, rtol=1e-4, atol=1e-4)
    assert float((found - expected).norm() / expected.norm()) < 0.6
    compressed = [x for x in tn.nn.targets.compressed_names(loaded) if ".experts." in x]
    assert len(compressed) == 2 * EXPERTS * len(mixtures(dense))


@pytest.mark.slow
def test_the_forecast_of_a_trained_mixture() -> None:
    """Trained until its experts differ; calibrated on few tokens, and measured on other text."""
    tokenizer = AutoTokenizer.from_pretrained(th.embedded.gpt2_path())
    known, held = (
        torch.tensor(tokenizer(text, verbose=False).input_ids)
        for text in (th.embedded.calibration_text(), th.embedded.heldout_text())
    )
    model = mixture("qwen3_moe")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.04)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(150):
        starts = torch.randint(len(known) - 64, (16,)).tolist()
        batch = torch.stack([known[k : k + 64] for k in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()
    windows = known[: 64 * 32].view(32, 64)
    calibration = [{"input_ids": x, "labels": x} for x in windows.split(8)]
    config = tn.CompressionConfig(
        bits_per_weight=3.25, formats=("int2:g16", "int3:g16", "int4:g16", "int8:g16")
    )
    stats = tn.calibrate(model, calibration, config=config, tokens=2048)
    judged, outputs = held[: 64 * 64].view(64, 64), []
    for _ in range(2):
        with torch.no_grad():
            outputs.append(model(input_ids=judged).logits.log_softmax(-1).flatten(0, 1))
        if len(outputs) == 1:
            report = tn.compress(model, config, calibration=stats, progress=False)
    losses = nn.functional.nll_loss(
        outputs[0].view(64, 64, -1)[:, :-1].flatten(0, 1), judged[:, 1:].flatten()
    )
    divergence = nn.functional.kl_div(outputs[1], outputs[0], log_target=True, reduction="batchmean")

    assert losses < 5  # 6.9 without training
    assert report.plan.predicted_kl is not None
    assert 0.5 < float(divergence) / report.plan.predicted_kl < 2
