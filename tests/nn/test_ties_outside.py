"""A head tied to an embedding of another type: it stays tied, whatever is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
)

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet.nn.targets import all_targets

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
GEMMA3N = {
    **GEMMA,
    "num_hidden_layers": 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "altup_num_inputs": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
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
MODELS = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "gemma3n": lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**GEMMA3N)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**ENCODER_DECODER)),
    "m2m100": lambda: M2M100ForConditionalGeneration(M2M100Config(**ENCODER_DECODER)),
}


def config(targets: str | list[str] | None) -> tn.CompressionConfig:
    return tn.CompressionConfig(
        target_modules=targets, param_ratio=0.5, topology="low_rank", objective="weight"
    )


@pytest.mark.filterwarnings("ignore:Left dense")
@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(x, marks=pytest.mark.slow) for x in [*MODELS][1:])]
)
def test_heads_of_scaled_embeddings_stay_tied(name: str, tmp_path: Path) -> None:
    model: PreTrainedModel = MODELS[name]().eval()
    before = sum(p.numel() for p in model.parameters())
    head = model.lm_head.weight
    with pytest.warns(UserWarning, match=r"lm_head \(tied to .*Scaled"):
        report = tn.compress(model, config("all"), progress=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight is head
    layers = [layer for layer in report.layers if layer.scheme != "dense"]
    saved = sum(layer.params_before - layer.params_after for layer in layers)
    assert sum(p.numel() for p in model.parameters()) == before - saved < before
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    ids = torch.arange(3, 12)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-6, rtol=1e-5)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = Scaled(40, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


def test_a_head_that_is_named_is_left_dense_too() -> None:
    model = Model()
    model.head.weight = model.table.weight
    with pytest.warns(UserWarning, match=r"head \(tied to Scaled: .*register_layer_kind"):
        report = tn.compress(model, config(["head", "inner"]), progress=False)
    assert [layer.name for layer in report.layers] == ["inner"]
    with pytest.raises(TargetError, match=r"head \(tied to Scaled: .*untie"):
        tn.compress(model, config("head"), progress=False)


def test_a_parameter_that_is_no_layers_weight_counts() -> None:
    model = Model()
    model.direction = nn.Parameter(torch.ones(12, 12))
    model.inner.weight = model.direction
    with pytest.warns(UserWarning, match=r"inner \(tied to "):
        tn.compress(model, config(["inner", "head"]), progress=False)
    assert model.inner.weight is model.direction


def test_parameters_in_one_memory_are_one_weight() -> None:
    """Tied by `.data`, as code does that must not share the parameter object."""
    model = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(3))
    model[1].weight.data = model[0].weight.data
    assert [target.names for target in all_targets(model)] == [("0", "1"), ("2",)]
    tn.compress(model, config(None), progress=False)
    assert model[0].core_0 is model[1].core_0
