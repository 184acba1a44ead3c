"""Cross entropy a few tokens at a time, against torch's; labels drawn by their probabilities."""

from __future__ import annotations

import pytest
import torch
from hf_models import llama
from torch import nn

import tensornet as tn
from tensornet.calibration import losses as losses_module
from tensornet.calibration.losses import drawn_labels, token_entropies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 5, 12])
def test_losses_and_gradients_are_those_of_torch(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "_CACHED", 3 * 7)
    torch.manual_seed(0)
    logits = (3 * torch.randn(12, 7)).to(dtype).requires_grad_()
    places, labels = torch.randperm(12)[:count], torch.randint(7, (count,))
    weights = torch.randn(count)
    wanted = nn.functional.cross_entropy(logits[places].float(), labels, reduction="none")
    (expected,) = torch.autograd.grad((weights * wanted).sum(), logits)
    found = token_entropies(logits, places, labels)
    (gradient,) = torch.autograd.grad((weights * found).sum(), logits)
    torch.testing.assert_close(found, wanted)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4]]).requires_grad_()
    losses = token_entropies(logits, torch.tensor([0]), torch.tensor([1]))
    losses.sum().backward()
    assert losses.tolist() == [1e4]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_labels_are_drawn_by_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "_CACHED", 4 * 1000)
    torch.manual_seed(0)
    shares = torch.tensor([0.5, 0.0, 0.2, 0.3])
    logits = torch.stack([shares.log(), torch.full((4,), -1e9)]).expand(9000, 2, 4)[:, 0]
    drawn = drawn_labels(logits, torch.arange(1, 9000))
    assert drawn.shape == (8999,)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 8999, shares, atol=0.02, rtol=0)
    assert not bool((drawn == 1).any())


def test_the_first_batch_costs_one_run_more() -> None:
    torch.manual_seed(0)
    model, runs = llama(), []
    model.register_forward_hook(lambda *_: runs.append(0))
    tn.calibrate(model, [torch.randint(1, 60, (2, 12)) for _ in range(2)])
    assert len(runs) == 2 + 1


def test_an_infinite_input_is_met_on_the_diagonal() -> None:
    x = torch.zeros(4, 6)
    x[2, 3] = torch.inf
    with pytest.raises(tn.errors.NonFiniteError, match="layer '0'"):
        tn.calibrate(nn.Sequential(nn.Linear(6, 3)), [x], gradient_batches=0)
