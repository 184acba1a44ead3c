"""Refitting behind compressed layers: against least squares, and on a trained model's held-out text."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
from tensornet.compression import refine
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.text import load_tokenizer, token_ids


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(input_ids)))


def windows(text: str, count: int) -> Tensor:
    return token_ids(load_tokenizer(gpt2_path()), text)[: count * 128].reshape(count, 128)


@cache
def _trained() -> tuple[PreTrainedModel, PreTrainedModel, tn.CalibrationStats, list[Tensor]]:
    dense = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    batches = list(windows(calibration_text(), 96).split(16))
    stats = tn.calibrate(dense, batches)
    small = copy.deepcopy(dense)
    tn.compress(small, tn.CompressionConfig(param_ratio=0.4), calibration=stats, progress=False)
    return dense, small, stats, batches


@torch.no_grad()
def loss(model: PreTrainedModel) -> float:
    ids = windows(heldout_text(), 16)
    return float(model(input_ids=ids, labels=ids).loss)


def test_a_full_rank_layer_is_the_least_squares_solution() -> None:
    teacher = Chain().eval()
    model = copy.deepcopy(teacher)
    tn.compress(
        model,
        tn.CompressionConfig(target_modules="first", max_bond=3, objective="weight", topology="low_rank"),
        progress=False,
    )
    tn.compress(model, tn.CompressionConfig(target_modules="second", topology="low_rank"), progress=False)
    x = torch.randn(4000, 10)
    report = refine(model, teacher, [x[:2000], x[2000:]], passes=2)
    with torch.no_grad():
        real, dense = torch.tanh(model.first(x)), torch.tanh(teacher.first(x))
        weight = teacher.second.weight
        # Least squares with the dense weight as 1 % of further observations: the rows of a scaled identity.
        ridge = (0.01 * real.square().sum() / 12).sqrt() * torch.eye(12)
        inputs, wanted = torch.cat([real, ridge]), torch.cat([dense @ weight.T, ridge @ weight.T])
        solution = torch.linalg.lstsq(inputs, wanted).solution.T
    torch.testing.assert_close(model.second.to_matrix().detach(), solution, rtol=1e-3, atol=1e-4)
    error = float((real @ solution.T - dense @ weight.T).detach().square().sum())
    assert report.after["second"] == pytest.approx(
        error / float((dense @ weight.T).detach().square().sum()), rel=1e-3
    )
    assert report.after["second"] < report.before["second"]


def test_held_out_text_gains() -> None:
    dense, small, stats, batches = _trained()
    model = copy.deepcopy(small)
    sizes = [p.shape for p in model.parameters()]
    report = refine(model, dense, batches, stats)
    assert [p.shape for p in model.parameters()] == sizes
    before, after = loss(small) - loss(dense), loss(model) - loss(dense)
    assert after < before
    assert sum(report.after.values()) < sum(report.before.values())


def test_more_passes_correct_more() -> None:
    dense, small, stats, batches = _trained()
    rises = []
    for passes in (1, 4):
        model = copy.deepcopy(small)
        refine(model, dense, batches, stats, passes=passes)
        rises.append(loss(model) - loss(dense))
    assert rises[1] < rises[0] * 1.05


def test_an_exact_model_stays_as_it_is() -> None:
    teacher = Chain().eval()
    model = copy.deepcopy(teacher)
    tn.compress(model, tn.CompressionConfig(topology="low_rank"), progress=False)
    x = torch.randn(50, 10)
    refine(model, teacher, [x])
    torch.testing.assert_close(model(x), teacher(x), rtol=1e-3, atol=1e-4)


def test_nothing_to_refine() -> None:
    with pytest.raises(tn.TargetError, match="compressed linear layers"):
        refine(Chain(), Chain(), [torch.randn(3, 10)])
    model = Chain()
    tn.compress(model, tn.CompressionConfig(), progress=False)
    with pytest.raises(tn.TargetError, match="at least one batch"):
        refine(model, Chain(), [])
