"""Predictions that measurements correct, on a real model."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import tensornet as tn
from tensornet.calibration import sampled_losses
from tensornet.calibration.losses import label_losses
from tensornet.compression import PriceList, correct_by_measuring, measure, price, record_losses
from tensornet.compression.config import CompressionConfig
from tensornet.errors import BudgetError, FormatError, TargetError
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.text import load_tokenizer, token_ids


def windows(text: str) -> list[Tensor]:
    ids = token_ids(load_tokenizer(gpt2_path()), text)
    return list(ids[: len(ids) // 64 * 64].reshape(-1, 64).split(32))


@cache
def real() -> tuple[nn.Module, tn.CalibrationStats, PriceList, list[Tensor], list[Tensor]]:
    """The embedded GPT-2, and held-out text in two parts: to measure on, and to be foreseen."""
    model = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    stats = tn.calibrate(model, windows(calibration_text()[:60_000]), loss_fn=sampled_losses)
    prepared = price(model, CompressionConfig(param_ratio=0.5), stats)
    lines = heldout_text().splitlines()
    parts = [windows("\n".join(lines[k::2])) for k in range(2)]
    return model, stats, prepared, parts[0], parts[1]


def shares(*values: float) -> list[dict[str, float]]:
    return [{"param_ratio": value} for value in values]


def mean_loss(model: nn.Module, text: list[Tensor]) -> float:
    recorded = record_losses(model, text, loss_fn=label_losses, tokens=None)
    assert recorded is not None
    return float(recorded.losses.mean())


def rise_of(model: nn.Module, plan: tn.CompressionPlan, text: list[Tensor]) -> float:
    twin = copy.deepcopy(model)
    _, stats, *_ = real()
    tn.apply_plan(twin, plan, stats)
    return mean_loss(twin, text) - mean_loss(model, text)


@pytest.mark.slow
def test_a_measured_forecast_comes_true() -> None:
    """On other windows, at a size that was not measured; the price alone misses by far more."""
    model, stats, prepared, text, others = real()
    measured = correct_by_measuring(prepared, model, text, stats, budgets=shares(0.6, 0.4))
    plan = measured.plan(param_ratio=0.5)
    actual = rise_of(model, plan, others)
    assert plan.predicted_loss_increase == pytest.approx(actual, rel=0.12)
    copied = copy.deepcopy(model)
    tn.apply_plan(copied, plan, stats)
    assert plan.predicted_kl == pytest.approx(measure(copied, model, others).kl_mean, rel=0.12)
    assert prepared.plan(param_ratio=0.5).predicted_loss_increase < actual / 1.3  # type: ignore[operator]
    assert [layer.topology for layer in plan] == [x.topology for x in prepared.plan(param_ratio=0.5)]
    for size, found in plan.curve():
        assert found >= 0
        if size <= 0.9 * plan.bytes_before:
            assert found > 0


@pytest.mark.slow
def test_a_rise_of_the_loss_buys_what_was_measured() -> None:
    model, stats, prepared, text, others = real()
    measured = correct_by_measuring(
        prepared, model, text, stats, budgets=shares(0.8, 0.6), source="the other half"
    )
    plan = measured.plan(loss_increase=0.1)
    assert plan.predicted_loss_increase == pytest.approx(0.1, rel=0.05)
    assert plan.predicted_loss_increase <= 0.1  # type: ignore[operator]
    assert rise_of(model, plan, others) == pytest.approx(0.1, rel=0.25)
    assert "corrected by measuring on the other half" in str(plan)
    with pytest.raises(BudgetError, match=r"loss_increase=0\.0001 contradict"):
        measured.plan(param_ratio=0.3, loss_increase=1e-4)


def test_a_measured_plan_is_kept() -> None:
    model, stats, prepared, text, _ = real()
    plan = correct_by_measuring(prepared, model, text[:2], stats, budgets=shares(0.5)).plan(param_ratio=0.6)
    loaded = tn.CompressionPlan.from_dict(plan.to_dict())
    assert loaded == plan
    assert loaded.predicted_loss_increase == plan.predicted_loss_increase
    assert loaded.predicted_kl == plan.predicted_kl != plan.predicted_loss_increase
    alone = prepared.plan(param_ratio=0.6)
    assert alone.predicted_kl == alone.predicted_loss_increase  # equal to second order
    assert f"KL divergence {plan.predicted_kl:.4f}" in str(plan)
    with pytest.raises(FormatError, match="increase"):
        tn.CompressionPlan.from_dict(
            {**plan.to_dict(), "forecast": {"points": [[1, -1]], "source": None, "kl_points": []}}
        )


def test_what_cannot_be_measured() -> None:
    model, stats, prepared, _, _ = real()
    weight, inputs = (
        CompressionConfig(param_ratio=0.5, objective=objective)  # type: ignore[arg-type]
        for objective in ("weight", "activation")
    )
    with pytest.raises(TargetError, match="validation"):
        tn.compress(copy.deepcopy(model), weight, validation=[torch.ones(1, 4).long()], progress=False)
    with pytest.raises(BudgetError, match="curvature"):
        correct_by_measuring(price(model, inputs, stats), model, [torch.ones(1, 4).long()], stats)
    with pytest.raises(TargetError, match="No loss"):
        correct_by_measuring(prepared, model, [], stats)


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
    twin = copy.deepcopy(model)
    report = tn.compress(
        model,
        tn.CompressionConfig(param_ratio=0.7, objective="curvature"),
        calibration=batches[:8],
        validation=batches[8:],
        progress=False,
    )
    assert report.plan is not None
    assert report.plan.predicted_loss_increase is not None
    assert report.plan.predicted_perplexity is None  # a cosine has none
    assert report.plan.predicted_kl is None
    with torch.no_grad():
        pooled = []
        for x in (model, twin):
            hidden = torch.cat([x(**batch).last_hidden_state[:, :9].mean(1) for batch in batches[8:]])
            pooled.append(torch.nn.functional.normalize(hidden, dim=-1))
    rise = float(1 - (pooled[0] * pooled[1]).sum(-1).mean())
    assert report.plan.predicted_loss_increase == pytest.approx(rise, rel=0.2)
