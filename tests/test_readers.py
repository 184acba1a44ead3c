"""Layers whose weight somebody reads past them: left dense, and said; found by the owner's source."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tensornet as tn


class Reader(nn.Module):
    """Multiplies by one weight, passes one on, asks one for its dtype only, and calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied, self.passed, self.asked, self.called = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.multiplied.weight @ x.unsqueeze(-1)).squeeze(-1)
        y = F.linear(y, self.passed.weight.t())
        if isinstance(self.asked.weight, Tensor):
            y = self.asked(y.to(self.asked.weight.dtype))
        return self.called(y)


def test_a_weight_read_by_its_owner_stays_dense_and_that_is_said() -> None:
    model, x = nn.Sequential(Reader(), nn.Linear(24, 24)), torch.randn(3, 24)
    with pytest.warns(UserWarning, match=r"Left dense.*: 0\.multiplied, 0\.passed\. Name them"):
        report = tn.compress(model, config("all"), progress=False)
    assert [layer.name for layer in report.layers] == ["0.asked", "0.called", "1"]
    assert model(x).shape == (3, 24)


def test_a_layer_that_is_named_is_compressed_nevertheless() -> None:
    report = tn.compress(nn.Sequential(Reader()), config("0.multiplied"), progress=False)
    assert [layer.name for layer in report.layers] == ["0.multiplied"]


def test_an_inherited_forward_counts() -> None:
    class Heir(Reader):
        pass

    with pytest.warns(UserWarning, match=r"Left dense.*multiplied"):
        tn.compress(nn.Sequential(Heir()), config(None), progress=False)


def test_an_unknown_subclass_of_a_stock_layer_is_named() -> None:
    class MyLinear(nn.Linear):
        pass

    with pytest.raises(tn.TargetError, match=r"types MyLinear here.*subclasses.*register_layer_kind"):
        tn.compress(nn.Sequential(MyLinear(24, 24)), config(None), progress=False)


def config(targets: str | None) -> tn.CompressionConfig:
    return tn.CompressionConfig(
        target_modules=targets, param_ratio=0.5, topology="low_rank", objective="weight"
    )


def test_a_state_space_model_keeps_what_it_multiplies_itself() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=31, state_size=4))
    with pytest.warns(UserWarning, match=r"Left dense.*dt_proj"):
        report = tn.compress(model, config(None), progress=False)
    assert [layer.name for layer in report.layers] == ["backbone.layers.0.mixer.in_proj"]
    assert model(torch.arange(1, 9)[None]).logits.isfinite().all()
