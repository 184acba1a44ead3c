"""Upcycling networks that the caller names, and networks without a module of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import ARCHITECTURES, logits
from torch import nn

import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import TargetError
from tensornet_hf.feed_forward import DoneBefore

CONFIG = th.MoEConfig(num_experts=3, sites=3)
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def mixtures(model: nn.Module) -> list[tm.SharedCoreMoE]:
    return [module for module in model.modules() if isinstance(module, tm.SharedCoreMoE)]


def bart() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL)).eval()


def whisper() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **SMALL, max_source_positions=20, suppress_tokens=None, begin_suppress_tokens=None
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def bloom() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=40, hidden_size=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.BloomForCausalLM(config).eval()


# --- named by the caller -------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, *, plus: float = 0.0, between: float = 1.0) -> None:
        super().__init__()
        self.expand, self.shrink, self.activation = nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()
        self.plus, self.between = plus, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shrink(self.between * self.activation(self.expand(x))) + self.plus


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_a_network_that_the_caller_names(plus: float) -> None:
    model = nn.Sequential(Own(plus=plus), Own())
    x = torch.randn(5, 8)
    wanted = model(x)
    config = th.MoEConfig(num_experts=2, sites=2, target_modules=["0"], matrices=("expand", "shrink"))
    th.upcycle(model, config)
    # What does more than the network stays, with the mixture inside.
    assert isinstance(model[0] if plus == 0 else model[0].expand, tm.SharedCoreMoE)
    assert isinstance(model[1], Own)
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    tm.collect_aux_losses(model).total.backward()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 4)),
            {},
            "no feed-forward network that can become experts.*Looked for modules",
        ),
        (nn.Sequential(Own()), {"target_modules": ["mlp"]}, "Pattern 'mlp' matches no feed-forward network"),
        (
            nn.Sequential(Own(between=2.0)),
            {"matrices": ("expand", "shrink"), "target_modules": ["0"]},
            "0 computes something else than expand and shrink alone",
        ),
        (
            nn.Sequential(Own(between=2.0)),
            {"matrices": ("expand", "shrink")},
            "Looked at, and not such a network: 0",
        ),
        (
            nn.Sequential(nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})),
            {"matrices": ("up", "down"), "target_modules": ["0"]},
            "it has no activation named act, ",
        ),
    ],
)
def test_no_expert_network_is_one_clear_error(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=message):
        th.upcycle(model, th.MoEConfig(num_experts=2, **options))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(isinstance(module, DoneBefore | tm.SharedCoreMoE) for module in model.modules())


@pytest.mark.parametrize("arguments", [("gpt2", CONFIG), (nn.Linear(2, 2), {"num_experts": 3})])
def test_what_is_no_model_or_no_configuration_is_refused(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="upcycle takes a model and a MoEConfig, got a"):
        th.upcycle(*arguments)


def test_looking_leaves_a_model_as_it_was() -> None:
    model = nn.Sequential(Own(between=2.0)).train()
    model[0].activation.eval()
    with pytest.raises(TargetError, match="Looked at"):
        th.upcycle(model, th.MoEConfig(num_experts=2, matrices=("expand", "shrink")))
    assert [m.training for m in model[0].children()] == [True, True, False]
    assert [type(m) for m in model[0].children()] == [nn.Linear, nn.Linear, nn.SiLU]


# --- without a module of their own ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "opt", "bart", "bloom"])
def test_networks_inside_larger_layers(name: str, tmp_path: Path) -> None:
    own = {"bart": bart, "bloom": bloom}
    model = own[name]() if name in own else ARCHITECTURES[name].dense.eval()
    ids = torch.tensor([[5, 9, 3, 7], [4, 8, 6, 2]])

    @torch.no_grad()
    def outputs(of: nn.Module) -> torch.Tensor:
        return of(ids).logits

    wanted = outputs(model)
    before = sum(p.numel() for p in model.parameters())
    report = th.upcycle(model, CONFIG)
    assert len(mixtures(model)) == len(report.layers) == 2
    assert sum(isinstance(m, DoneBefore) for m in model.modules()) == 4
    torch.testing.assert_close(outputs(model), wanted, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == before - report.dense_params + report.params

    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    assert torch.equal(outputs(loaded.eval()), outputs(model))
    automatic = transformers.AutoModel.from_pretrained(tmp_path)
    assert len(mixtures(automatic)) == 2

    loss = loaded.train()(ids, labels=ids).loss
    loss.backward()
    assert all(m.router.weight.grad is not None for m in mixtures(loaded))
    assert all(m.stats.tokens == ids.numel() for m in mixtures(loaded))


def test_bert_is_found_by_the_dotted_names_of_its_layers() -> None:
    architecture = ARCHITECTURES["bert"]
    model = architecture.dense
    config = th.MoEConfig(
        num_experts=2,
        sites=3,
        target_modules=["*.layer.1"],
        matrices=("intermediate.dense", "output.dense"),
        share_across_layers=True,
    )
    report = th.upcycle(model, config)
    assert [layer.name for layer in report.layers] == ["bert.encoder.layer.1"]
    torch.testing.assert_close(
        logits(model, architecture), logits(architecture.dense, architecture), atol=1e-4, rtol=1e-4
    )


def test_bert_shares_a_center_across_its_layers(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].dense
    options = {"num_experts": 2, "sites": 3, "max_bond": 4}
    report = th.upcycle(model, th.MoEConfig(**options, share_across_layers=True))
    assert len(tm.shared_parameters(model)) == 2
    assert report.across_params == sum(p.numel() for p in tm.shared_parameters(model))
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 3]])
    with torch.no_grad():
        assert torch.equal(th.load(tmp_path).eval()(ids).logits, model.eval()(ids).logits)


def test_a_mask_over_sound_is_no_mask_over_tokens() -> None:
    model = whisper()
    th.upcycle(model, CONFIG)
    sound = torch.randn(2, 80, 40)
    mask = torch.ones(2, 40)
    mask[0, 20:] = 0
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    model.train()(input_features=sound, attention_mask=mask, labels=labels).loss.backward()
    encoder, decoder = mixtures(model)
    assert encoder.stats.tokens == 2 * 20
    assert decoder.stats.tokens == 5
