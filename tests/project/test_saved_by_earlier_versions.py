"""Folders, plans, statistics and mixtures that earlier versions wrote load, and give the same numbers.

``tests/fixtures/saved_by_0_1_0`` was written by version 0.1.0 before its modules moved: a random GPT-2 (24
features, 2 layers) in several forms, with the logits that it gave then.
"""

from __future__ import annotations

from pathlib import Path

import hf_models
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tensornet as tn
import tensornet_hf as th

SAVED = Path(__file__).resolve().parents[1] / "fixtures" / "saved_by_0_1_0"
TOKENS = torch.arange(24).reshape(2, 12) * 7 % hf_models.VOCAB


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return load_file(SAVED / "outputs.safetensors")


def dense() -> nn.Module:
    torch.manual_seed(0)
    return hf_models.gpt2().eval()


@pytest.mark.parametrize("name", ["low_rank", "low_rank_int8", "chains", "rings", "mixture"])
def test_folders_give_the_same_logits(name: str, outputs: dict[str, torch.Tensor]) -> None:
    model = th.load(SAVED / name).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, outputs[name], rtol=1e-4, atol=1e-5)


def test_plan_and_statistics(outputs: dict[str, torch.Tensor]) -> None:
    model = dense()
    plan = tn.CompressionPlan.load(SAVED / "plan.json")
    tn.apply_plan(model, plan, tn.CalibrationStats.load(SAVED / "stats.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, outputs["plan"], rtol=1e-3, atol=1e-4)


def test_a_model_of_plain_pytorch(outputs: dict[str, torch.Tensor]) -> None:
    net = nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 10))
    net = tn.load_model(net, SAVED / "net.safetensors")
    given = torch.linspace(-1, 1, 60).reshape(3, 20)
    torch.testing.assert_close(net(given), outputs["net"], rtol=1e-4, atol=1e-5)
