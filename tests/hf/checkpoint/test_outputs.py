"""A compressed model computes and trains like the one it was made from."""

from __future__ import annotations

import pytest
import torch
from hf_models import ALL, ARCHITECTURES, Architecture, enable_checkpointing, logits

from tensornet.nn.module import NetworkModule

each = pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)


@each
def test_full_rank_reproduces_the_logits(architecture: Architecture) -> None:
    model = architecture.compressed
    torch.testing.assert_close(
        logits(model, architecture), logits(architecture.dense, architecture), atol=1e-4, rtol=0
    )
    assert sum(isinstance(module, NetworkModule) for module in model.modules()) > 8


@pytest.mark.parametrize("name", ["gpt2", "t5_gated", "vit"])
def test_bfloat16_and_autocast(name: str) -> None:
    architecture = ARCHITECTURES[name]
    expected = logits(architecture.dense, architecture)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(architecture.compressed, architecture)
    for got in (mixed, logits(architecture.compressed.to(torch.bfloat16), architecture)):
        torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)


@each
def test_every_core_is_trained_and_checkpointing_changes_nothing(architecture: Architecture) -> None:
    model = architecture.compressed
    inputs = architecture.inputs(labels=True)
    model(**inputs).loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters() if ".core_" in name}
    assert [name for name, grad in plain.items() if grad is None] == []

    again = architecture.compressed.train()  # no dropout in these models
    enable_checkpointing(again)
    again(**inputs, **({"use_cache": False} if architecture.generates else {})).loss.backward()
    for name, parameter in again.named_parameters():
        if ".core_" in name:
            torch.testing.assert_close(parameter.grad, plain[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5_gated", "bert", "vit"])
def test_compiles_without_graph_breaks(name: str) -> None:
    architecture = ARCHITECTURES[name]
    torch.compiler.reset()
    model = architecture.compressed
    expected = logits(model, architecture)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, architecture), expected, atol=1e-5, rtol=0)


def test_half_float_and_to_work_as_on_any_model() -> None:
    architecture = ARCHITECTURES["gpt2"]
    model = architecture.compressed
    expected = logits(model, architecture)
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    torch.testing.assert_close(logits(model, architecture), expected, atol=1e-2, rtol=1e-2)
    assert {p.dtype for p in model.to(torch.float64).parameters()} == {torch.float64}
