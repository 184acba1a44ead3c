"""Experts that transformers keeps in stacks are layers like others: observed, planned, compressed, saved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from mixture_models import EXPERTS, FAMILIES, logits, mixture, tokens
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import tensornet as tn
import tensornet_hf as th
from tensornet.nn.unfuse import unfuse
from tensornet_hf.experts import SplitExperts, experts_apart

EXACT = tn.CompressionConfig(topology="mpo", method="svd")
HALF = tn.CompressionConfig(param_ratio=0.5, method="svd")
ONE_EXPERT = tn.CompressionConfig(
    target_modules=["re:.*layers.0.mlp.experts.1.*"], param_ratio=0.5, method="svd"
)


def expert_modules(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_split_experts_compute_the_same(family: str) -> None:
    model = mixture(family)
    expected = logits(model)
    with experts_apart(model):
        assert all(isinstance(x, SplitExperts) for x in expert_modules(model))
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_split_experts(family: str) -> None:
    """With respect to the input and to every matrix, against the stacks."""
    whole, apart = mixture(family), mixture(family)
    unfuse(apart)
    for model in (whole, apart):
        model(tokens(), labels=tokens()).loss.backward()
    for stock, split in zip(expert_modules(whole), expert_modules(apart), strict=True):
        for number, expert in enumerate(split.experts):
            for name in split.names:
                gradient = stock.get_parameter(name).grad[number]
                ours = expert.get_submodule(name).matrix.grad
                ours = torch.zeros_like(expert.get_submodule(name).matrix) if ours is None else ours
                torch.testing.assert_close(
                    ours.T if stock.is_transposed else ours, gradient, rtol=1e-4, atol=1e-6
                )
    reference = whole.model.embed_tokens.weight.grad
    torch.testing.assert_close(apart.model.embed_tokens.weight.grad, reference, rtol=1e-4, atol=1e-6)


def test_slots_that_the_router_left_empty() -> None:
    """transformers marks them by the number of experts, as its own code does."""
    config = MixtralConfig(hidden_size=6, intermediate_size=10, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    stock = MixtralExperts(config)
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    x, weights = torch.randn(4, 6), torch.rand(4, 2)
    index = torch.tensor([[0, EXPERTS], [2, 1], [EXPERTS, EXPERTS], [1, 0]])
    torch.testing.assert_close(SplitExperts(stock)(x, index, weights), stock(x, index, weights))


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_compression_and_back(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    expected, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    report = tn.compress(model, EXACT, progress=False)
    names = [layer.name for layer in report.layers]
    assert f"model.layers.1.mlp.experts.{EXPERTS - 1}.down_proj" in names
    assert sum(".experts." in name for name in names) == 2 * 2 * EXPERTS
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "made")
    for loaded in (th.load(tmp_path / "made"), AutoModelForCausalLM.from_pretrained(tmp_path / "made")):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
        assert not any("up_proj" in k and "core" not in k and "bias" not in k for k in loaded.state_dict())
    assert len(model.generate(tokens()[:, :4], max_new_tokens=3, do_sample=False)[0]) <= 7
    tn.decompress(model)
    after = model.state_dict()
    assert list(after) == list(before)  # in their stacks, under the names of the class
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_alone(family: str, tmp_path: Path) -> None:
    """Its mixture is taken apart and the other experts are kept as they are; the second one stays whole."""
    model = mixture(family)
    report = tn.compress(model, ONE_EXPERT, progress=False)
    assert len(report.layers) == 2
    first, second = expert_modules(model)
    assert isinstance(first, SplitExperts)
    assert not isinstance(second, SplitExperts)
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in first.parameters()}
    assert sum(stored.values()) == sum(p.nbytes for p in first.parameters())  # the stack is gone
    model.save_pretrained(tmp_path / "made")
    torch.testing.assert_close(logits(th.load(tmp_path / "made")), logits(model), rtol=1e-4, atol=1e-4)
    before = report.model_params_before
    assert report.model_params_after == sum(p.numel() for p in model.parameters()) < before


def test_planning_and_observing_change_nothing() -> None:
    model = mixture("mixtral")
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    config = tn.CompressionConfig(param_ratio=0.7)
    stats = tn.calibrate(model, [{"input_ids": tokens(8), "labels": tokens(8)}], config=config)
    plan = tn.plan(model, config, stats)
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert any(name.endswith("experts.0.down_proj") for name in stats.columns)
    assert sum(".experts." in layer.name for layer in plan) == 2 * 2 * EXPERTS
    tn.apply_plan(model, plan, stats)
    assert all(isinstance(x, SplitExperts) for x in expert_modules(model))


def test_copies_and_pickles() -> None:
    model = mixture("gpt_oss")
    tn.compress(model, HALF, progress=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        expert_modules(twin)[0].gate_up_proj_bias.data += 1
        assert not torch.equal(logits(twin), logits(model))


def test_half_precision_and_training(tmp_path: Path) -> None:
    model = mixture("qwen3_moe").to(torch.bfloat16)
    tn.compress(model, HALF, progress=False)
    model.save_pretrained(tmp_path / "made")
    loaded = th.load(tmp_path / "made")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded.train()
    loaded(tokens(), labels=tokens()).loss.backward()
    cores = [p for n, p in loaded.named_parameters() if ".experts." in n]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in cores)
