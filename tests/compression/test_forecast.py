"""Predicted loss increases come true: on other text than the calibration text, and for encoders."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import tensornet as tn
from tensornet.compression import Survey, measure
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.text import load_tokenizer, token_ids


def windows(text: str) -> list[Tensor]:
    ids = token_ids(load_tokenizer(gpt2_path()), text)
    return list(ids[: len(ids) // 64 * 64].reshape(-1, 64).split(32))


@cache
def real() -> tuple[nn.Module, list[Tensor], Survey]:
    """The embedded GPT-2, its calibration batches, and a survey of its number formats."""
    model = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    batches = windows(calibration_text()[:60_000])
    survey = tn.survey(model, batches, tn.CompressionConfig(bits_per_weight=4.25))
    return model, batches, survey


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3.25, 6])
def test_the_predicted_loss_increase_is_measured_on_other_text(bits: float) -> None:
    """Its text is from other books than the calibration text."""
    model, batches, survey = real()
    copied = copy.deepcopy(model)
    plan = survey.plan(bits_per_weight=bits)
    report = tn.compress(copied, plan, calibration=batches, survey=survey, progress=False)
    found = measure(copied, model, windows(heldout_text()))
    predicted = report.plan.predicted_loss_increase
    assert predicted is not None
    # With 6 bits, the loss increase is not much larger than its standard error; the divergence is.
    noise = 3 * found.stderr
    assert 0.8 * (found.mean - noise) < predicted < 1.25 * (found.mean + noise)
    assert 0.7 < report.plan.predicted_kl / found.kl_mean < 1.25  # type: ignore[operator]


@pytest.mark.slow
def test_a_budget_of_the_loss_is_kept_by_the_prediction() -> None:
    _, _, survey = real()
    plan = survey.plan(loss_increase=0.02)
    assert plan.predicted_loss_increase == pytest.approx(0.02, rel=0.1)
    assert plan.predicted_loss_increase <= 0.02
    assert plan.predicted_kl == plan.predicted_loss_increase  # equal to second order
    with pytest.raises(tn.errors.BudgetError, match=r"loss_increase=0\.0001 contradict"):
        survey.plan(bits_per_weight=3.25, loss_increase=1e-4)


def test_an_encoder_needs_no_loss_of_its_own() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=60
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():  # outputs that depend on the input
        parameter.data.mul_(8.0 if parameter.ndim == 2 else 1.0)
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[:, 9:] = 0
    batches = [{"input_ids": torch.randint(0, 60, (6, 12)), "attention_mask": mask} for _ in range(12)]
    dense = copy.deepcopy(model)
    config = tn.CompressionConfig(bits_per_weight=6)
    report = tn.compress(model, config, calibration=batches[:8], progress=False)
    assert report.plan.predicted_loss_increase is not None
    assert report.plan.predicted_perplexity is None  # a cosine has none
    assert report.plan.predicted_kl is None
    with torch.no_grad():
        pooled = []
        for x in (model, dense):
            hidden = torch.cat([x(**batch).last_hidden_state[:, :9].mean(1) for batch in batches[8:]])
            pooled.append(torch.nn.functional.normalize(hidden, dim=-1))
    increase = float(1 - (pooled[0] * pooled[1]).sum(-1).mean())
    assert 0.5 < report.plan.predicted_loss_increase / increase < 3
