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
from tensornet_hf.upcycling import INSIDE, DoneBefore

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


ENCODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
WHISPER = {"max_source_positions": 20, "suppress_tokens": None, "begin_suppress_tokens": None}
BLOOM = {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
OPT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
}
#: Models whose networks lie inside larger layers, by the name of their configuration.
LARGER = {
    "Bert": ("BertForMaskedLM", ENCODER),
    "Roberta": ("RobertaForMaskedLM", ENCODER),
    "XLMRoberta": ("XLMRobertaForMaskedLM", ENCODER),
    "Camembert": ("CamembertForMaskedLM", ENCODER),
    "Electra": ("ElectraForMaskedLM", ENCODER),
    "Bart": ("BartForConditionalGeneration", SMALL),
    "MBart": ("MBartForConditionalGeneration", SMALL),
    "Marian": ("MarianMTModel", SMALL),
    "Whisper": ("WhisperForConditionalGeneration", SMALL | WHISPER),
    "OPT": ("OPTForCausalLM", OPT),
    "Bloom": ("BloomForCausalLM", BLOOM),
}


def larger(name: str) -> transformers.PreTrainedModel:
    kind, options = LARGER[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, kind)(config).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 3, 7], [4, 8, 6, 2]])
    sound = {"input_features": torch.linspace(-1, 1, 6400).reshape(2, 80, 40), "decoder_input_ids": ids}
    with torch.no_grad():
        if "Whisper" in type(model).__name__:
            return model(**sound).logits
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(ids, **decoder).logits


# --- named by the caller -------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, *, between: float = 1.0) -> None:
        super().__init__()
        self.expand, self.shrink, self.activation = nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shrink(self.between * self.activation(self.expand(x)))


def test_a_network_that_the_caller_names() -> None:
    model = nn.Sequential(Own(), Own())
    x = torch.randn(5, 8)
    wanted = model(x)
    config = th.MoEConfig(num_experts=2, sites=2, target_modules=["0"], matrices=("expand", "shrink"))
    th.upcycle(model, config)
    assert isinstance(model[0], tm.SharedCoreMoE)
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
            "0 computes something else than expand and shrink alone, and no network inside a Own is known",
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


@pytest.mark.parametrize("name", LARGER)
def test_networks_inside_larger_layers(name: str) -> None:
    model = larger(name)
    wanted, before = outputs(model), sum(p.numel() for p in model.parameters())
    report = th.upcycle(model, CONFIG)
    assert 2 * len(mixtures(model)) == sum(isinstance(m, DoneBefore) for m in model.modules()) > 0
    torch.testing.assert_close(outputs(model), wanted, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == before - report.dense_params + report.params


def test_every_class_that_is_listed_is_tested() -> None:
    found = {type(module).__name__ for name in LARGER for module in larger(name).modules()}
    assert INSIDE.keys() <= found


@pytest.mark.parametrize("name", ["Bert", "Bart"])
def test_they_are_saved_loaded_and_trained(name: str, tmp_path: Path) -> None:
    model, ids = larger(name), torch.tensor([[5, 9, 3, 7], [4, 8, 6, 2]])
    th.upcycle(model, CONFIG)
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    assert torch.equal(outputs(loaded.eval()), outputs(model))
    assert len(mixtures(transformers.AutoModel.from_pretrained(tmp_path))) == len(mixtures(model))
    loaded.train()(ids, labels=ids).loss.backward()
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
    model = larger("Whisper")
    th.upcycle(model, CONFIG)
    sound = torch.randn(2, 80, 40)
    mask = torch.ones(2, 40)
    mask[0, 20:] = 0
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    model.train()(input_features=sound, attention_mask=mask, labels=labels).loss.backward()
    encoder, decoder = mixtures(model)
    assert encoder.stats.tokens == 2 * 20
    assert decoder.stats.tokens == 5
