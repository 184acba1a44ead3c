"""Measured rises of the loss: what is linear in the error is noise, and is removed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration.losses import label_losses
from tensornet.compression.forecast import Rise, all_losses, measured_rise


def linear_model(seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A regression near its optimum, whose targets are noisy."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 16))
    x = torch.randn(400, 32)
    with torch.no_grad():
        targets = model(x) + torch.randn(400, 16)
    return model, [(x, targets)]


def rounded(model: nn.Module, bits: str) -> nn.Module:
    made = copy.deepcopy(model)
    tn.compress(made, tn.CompressionConfig(bits_per_weight=8.5, formats=(bits,)), progress=False)
    return made


def test_a_small_rise_is_measured_far_below_the_noise_of_its_text() -> None:
    """The expected rise is `|E x|^2` in the mean over outputs, known here."""
    model, text = linear_model(0)
    made = rounded(model, "int8")
    x, _ = text[0]
    with torch.no_grad():
        true = float((made(x) - model(x)).square().mean())
    dense = all_losses(model, text, label_losses)
    plain = Rise.of(all_losses(made, text, label_losses) - dense)
    found = measured_rise(model, made, text, label_losses, dense)
    assert plain.standard_error > 5 * true  # hopeless
    assert found.value == pytest.approx(true, rel=0.01)
    assert found.standard_error < 0.1 * true
    assert found.significant
    assert not plain.significant


def test_a_shift_that_is_no_noise_stays() -> None:
    """An error along the gradient of the text lowers its loss, and is not taken for noise."""
    model, text = linear_model(1)
    made = rounded(model, "int2")
    x, targets = text[0]
    with torch.no_grad():
        better = [(x, 0.5 * (targets + made(x)))]
    dense = all_losses(model, better, label_losses)
    found = measured_rise(model, made, better, label_losses, dense)
    direct = Rise.of(all_losses(made, better, label_losses) - dense)
    assert found == direct


def test_nothing_of_the_measurement_stays_in_the_model() -> None:
    model, text = linear_model(0)
    made = rounded(model, "int4")
    before = made(text[0][0])
    measured_rise(model, made, text, label_losses, all_losses(model, text, label_losses))
    assert torch.equal(made(text[0][0]), before)
    assert not any(module._forward_hooks for module in made.modules())


def test_one_token_has_no_error() -> None:
    assert Rise.of(torch.tensor([0.5])) == Rise(0.5, 0.0)
    assert Rise(0.5, 0.0).significant
    assert not Rise(0.5, 0.3).significant
