"""Tied layers share what stores their cores: moved, copied, averaged, saved and loaded as one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES, logits
from pivoted_plans import pivoted
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
)

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet.nn.targets import all_targets
from tensornet_hf.checkpoint import read_checkpoint

FORMS: dict[str, dict[str, Any]] = {
    "pivoted": {"topology": "low_rank", "param_ratio": 0.7, "method": "svd"},
    "int8": {"formats": ("int8",), "method": "nearest"},
    "bf16": {"formats": ("bf16",), "method": "nearest"},
}
IDS = torch.arange(30)
each_form = pytest.mark.parametrize("form", FORMS)


def compress(model: nn.Module, form: str) -> None:
    config = tn.CompressionConfig(target_modules="all", **FORMS[form])
    plan = tn.plan(model, config)
    tn.apply_plan(model, pivoted(plan) if form == "pivoted" else plan)


class Tied(nn.Module):
    """An embedding tied to its head, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(30, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


def compressed(form: str) -> Tied:
    torch.manual_seed(1)
    model = Tied()
    compress(model, form)
    return model.eval()


@each_form
def test_every_parameter_can_require_gradients(form: str) -> None:
    model = compressed(form).requires_grad_(True)
    assert all(p.is_floating_point() for p in model.parameters())
    model(IDS).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@each_form
def test_moves_copies_and_averages_keep_them_tied(form: str) -> None:
    model = compressed(form)
    expected = model(IDS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    torch.testing.assert_close(average(IDS), expected)
    model._apply(torch.clone)  # as moving to a device makes new tensors
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        stored = moved.table.stored
        assert all(tensor is moved.head.stored[name] for name, tensor in stored.items())
        torch.testing.assert_close(moved(IDS).float(), expected, rtol=1e-4, atol=1e-5)
    other = compressed(form)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(IDS), expected)


@each_form
def test_files_and_folders_keep_them_tied(form: str, tmp_path: Path) -> None:
    small = compressed(form)
    tn.save_model(small, tmp_path / "net.safetensors")
    again = tn.load_model(Tied(), tmp_path / "net.safetensors").eval()
    torch.testing.assert_close(again(IDS), small(IDS), rtol=1e-4, atol=1e-4)
    assert again.head.stored_cores[0] is again.table.stored_cores[0]
    model = ARCHITECTURES["gpt2"].dense
    compress(model, form)
    model.save_pretrained(tmp_path / "gpt2")
    loaded = th.load(tmp_path / "gpt2")
    torch.testing.assert_close(loaded(IDS[None]).logits, model(IDS[None]).logits, rtol=1e-4, atol=1e-4)
    assert loaded.lm_head.stored_cores[0] is loaded.transformer.wte.stored_cores[0]
    assert not any(name.startswith("lm_head.core") for name in read_checkpoint(tmp_path / "gpt2").tensors)
    loaded.tie_weights()
    got = logits(loaded, ARCHITECTURES["gpt2"])
    torch.testing.assert_close(got, logits(model, ARCHITECTURES["gpt2"]), rtol=1e-4, atol=1e-4)


# --- heads tied to an embedding that multiplies its rows by a constant

GEMMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER_DECODER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "scale_embedding": True,
    "pad_token_id": 0,
}
SCALED = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**ENCODER_DECODER)),
}


def low_rank(targets: str | list[str] | None) -> tn.CompressionConfig:
    return tn.CompressionConfig(target_modules=targets, param_ratio=0.5, topology="low_rank", method="svd")


@pytest.mark.parametrize("form", ["pivoted", "int8"])
@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(x, marks=pytest.mark.slow) for x in [*SCALED][1:])]
)
def test_heads_of_scaled_embeddings_stay_tied(name: str, form: str, tmp_path: Path) -> None:
    model: PreTrainedModel = SCALED[name]().eval()
    compress(model, form)
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    ids = torch.arange(3, 12)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    expected = model(**inputs).logits
    for each in (model, loaded):
        table, head = each.get_input_embeddings(), each.get_output_embeddings()
        assert all(head.stored[name] is tensor for name, tensor in table.stored.items())
        torch.testing.assert_close(each(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="MPOEmbedding"):
        loaded.resize_token_embeddings(70)
    tn.decompress(loaded)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


# --- heads tied to an embedding of an unknown type: they stay tied, whatever is asked for


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = Scaled(40, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


def test_a_head_that_is_named_is_left_dense_too() -> None:
    model = Outside()
    model.head.weight = model.table.weight
    with pytest.warns(UserWarning, match=r"Scaled.*register_layer_kind"):
        report = tn.compress(model, low_rank(["head", "inner"]), progress=False)
    assert [layer.name for layer in report.layers] == ["inner"]
    with pytest.raises(TargetError, match=r"Scaled.*untie"):
        tn.compress(model, low_rank("head"), progress=False)


def test_a_parameter_that_is_no_layers_weight_counts() -> None:
    model = Outside()
    model.direction = nn.Parameter(torch.ones(12, 12))
    model.inner.weight = model.direction
    with pytest.warns(UserWarning, match=r"inner \(tied to "):
        tn.compress(model, low_rank(["inner", "head"]), progress=False)
    assert model.inner.weight is model.direction


def test_parameters_in_one_memory_are_one_weight() -> None:
    """Tied by `.data`, as code does that must not share the parameter object."""
    model = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(3))
    model[1].weight.data = model[0].weight.data
    assert [target.names for target in all_targets(model)] == [("0", "1"), ("2",)]
    tn.compress(model, low_rank(None), progress=False)
    assert model[0].core_0 is model[1].core_0
