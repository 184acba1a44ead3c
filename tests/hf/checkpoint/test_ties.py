"""Weights used in several places, and what transformers does to them by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import ALL, ARCHITECTURES, EVERY_LAYER, NO_DROPOUT, TOKENS, Architecture, logits
from transformers import (
    AutoModel,
    CamembertConfig,
    CamembertForMaskedLM,
    FunnelConfig,
    FunnelForMaskedLM,
    PreTrainedModel,
    T5EncoderModel,
)

import tensornet as tn
import tensornet_hf as th

each = pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)

#: Modules that share one table in each architecture.
TIED = {
    "gpt2": [("transformer.wte", "lm_head")],
    "t5_relu": [
        ("shared", "encoder.embed_tokens"),
        ("shared", "decoder.embed_tokens"),
        ("shared", "lm_head"),
    ],
    "t5_gated": [("shared", "encoder.embed_tokens"), ("shared", "decoder.embed_tokens")],
    "bert": [("bert.embeddings.word_embeddings", "cls.predictions.decoder")],
    "qwen2": [("model.embed_tokens", "lm_head")],
    "opt": [("model.decoder.embed_tokens", "lm_head")],
}
tied = pytest.mark.parametrize("architecture", [ARCHITECTURES[name] for name in TIED], ids=lambda a: a.name)


def assert_tied(model: PreTrainedModel, architecture: Architecture) -> None:
    for first, second in TIED[architecture.name]:
        pair = model.get_submodule(first), model.get_submodule(second)
        assert all(a is b for a, b in zip(pair[0].cores, pair[1].cores, strict=True))
    if architecture.name == "t5_gated":
        assert model.lm_head.cores[0] is not model.shared.cores[0]


@tied
def test_tied_tables_stay_tied(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.compressed
    assert_tied(model, architecture)
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    assert_tied(loaded, architecture)
    assert_tied(loaded.to(torch.float64), architecture)


def test_a_training_step_keeps_them_tied() -> None:
    architecture = ARCHITECTURES["gpt2"]
    model = architecture.compressed
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**architecture.inputs(labels=True)).loss.backward()
    optimizer.step()
    assert_tied(model, architecture)


@each
def test_tie_weights_leaves_cores_and_biases_alone(architecture: Architecture, tmp_path: Path) -> None:
    """`_adjust_bias` would cut the bias of BERT's decoder to the first dimension of a core: 1."""
    model = architecture.compressed
    model.save_pretrained(tmp_path)
    for other in (model, th.load(tmp_path)):
        shapes = {name: p.shape for name, p in other.named_parameters()}
        other.tie_weights()
        assert {name: p.shape for name, p in other.named_parameters()} == shapes
        torch.testing.assert_close(logits(other, architecture), logits(model, architecture), atol=0, rtol=0)


def test_bias_of_berts_head_stays_tied(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].compressed
    model.save_pretrained(tmp_path)
    for other in (model, th.load(tmp_path), th.decompress(th.load(tmp_path))):
        assert other.cls.predictions.decoder.bias is other.cls.predictions.bias
        assert other.cls.predictions.bias.shape == (101,)


@tied
def test_decompressing_ties_again(architecture: Architecture) -> None:
    model = th.decompress(architecture.compressed)
    for first, second in TIED[architecture.name]:
        assert model.get_submodule(first).weight is model.get_submodule(second).weight
    assert model.all_tied_weights_keys == architecture.dense.all_tied_weights_keys
    assert type(model)._tied_weights_keys is model._tied_weights_keys


@tied
def test_ties_that_are_not_touched_are_left_to_transformers(
    architecture: Architecture, tmp_path: Path
) -> None:
    model = architecture.dense
    tn.compress(model, tn.CompressionConfig(max_bond=8), progress=False)  # leaves embeddings and heads dense
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    loaded.tie_weights()
    for first, second in TIED[architecture.name]:
        assert loaded.get_submodule(first).weight is loaded.get_submodule(second).weight
    torch.testing.assert_close(logits(loaded, architecture), logits(model, architecture), atol=0, rtol=0)


def test_part_of_t5_v1_1_compressed(tmp_path: Path) -> None:
    """Its configuration claims that the head is tied; only the table of the encoder and decoder is."""
    architecture = ARCHITECTURES["t5_gated"]
    for targets in ("shared", "lm_head"):
        model = architecture.dense
        tn.compress(model, tn.CompressionConfig(target_modules=targets, max_bond=8), progress=False)
        model.save_pretrained(tmp_path / targets)
        loaded = th.load(tmp_path / targets)
        torch.testing.assert_close(logits(loaded, architecture), logits(model, architecture), atol=0, rtol=0)


def test_encoder_alone_of_a_whole_t5(tmp_path: Path) -> None:
    model = ARCHITECTURES["t5_relu"].compressed
    model.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path)
    ids = ARCHITECTURES["t5_relu"].inputs()["input_ids"]
    torch.testing.assert_close(encoder(ids)[0], model.encoder(ids)[0], atol=0, rtol=0)
    assert encoder.encoder.embed_tokens.cores[0] is encoder.shared.cores[0]


def test_base_model_alone_where_the_head_comes_first(tmp_path: Path) -> None:
    """CamemBERT registers its head before its table; the base model owns the shared cores nevertheless."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 44}
    model = CamembertForMaskedLM(CamembertConfig(**sizes, **NO_DROPOUT, **TOKENS)).eval()
    assert next(iter(model.state_dict())).startswith("lm_head")
    tn.compress(model, EVERY_LAYER, progress=False)
    model.save_pretrained(tmp_path)
    ids = ARCHITECTURES["bert"].inputs()["input_ids"]
    base = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base(ids)[0], model.roberta(ids)[0], atol=0, rtol=0)
    table = th.load(tmp_path).roberta.embeddings.word_embeddings
    assert torch.equal(table.cores[0], model.lm_head.decoder.cores[0])


def test_classes_that_initialize_by_the_name_of_a_type(tmp_path: Path) -> None:
    """Funnel reads the shape of `weight` of every module with "Linear" in the name of its type."""
    sizes = {"block_sizes": [1], "d_model": 24, "n_head": 4, "d_head": 6, "d_inner": 44}
    model = FunnelForMaskedLM(FunnelConfig(**sizes, **TOKENS)).eval()
    tn.compress(model, tn.CompressionConfig(topology="mpo"), progress=False)
    model.save_pretrained(tmp_path)
    ids = ARCHITECTURES["bert"].inputs()["input_ids"]
    torch.testing.assert_close(th.load(tmp_path)(ids).logits, model(ids).logits, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["t5_relu", "t5_gated"])
def test_t5_keeps_wo_in_float32_when_loaded_in_float16(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].compressed
    model.save_pretrained(tmp_path / "a")
    half = th.load(tmp_path / "a", dtype=torch.float16)
    wo = half.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32  # what T5's forward asks
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.cores[1].dtype == torch.float32
    assert half.encoder.block[0].layer[0].SelfAttention.q.cores[0].dtype == torch.float16
    got = logits(half, ARCHITECTURES[name])
    torch.testing.assert_close(got.float(), logits(model, ARCHITECTURES[name]), atol=0.2, rtol=0.1)
    half.save_pretrained(tmp_path / "b")  # two dtypes in one folder, each described
    torch.testing.assert_close(logits(th.load(tmp_path / "b"), ARCHITECTURES[name]), got, atol=0, rtol=0)


@pytest.mark.parametrize(
    "architecture", [ARCHITECTURES["t5_relu"], ARCHITECTURES["vit"]], ids=lambda a: a.name
)
def test_initialising_again_does_not_touch_what_was_loaded(
    architecture: Architecture, tmp_path: Path
) -> None:
    """T5 initialises `wo.weight` of its blocks from outside, which here is a core."""
    model = architecture.compressed
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    for module in loaded.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    loaded.initialize_weights()
    torch.testing.assert_close(logits(loaded, architecture), logits(model, architecture), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "t5_relu"])
def test_resizing_tables_of_cores_is_refused(name: str) -> None:
    model = ARCHITECTURES[name].compressed
    for options in ({"new_num_tokens": 120}, {"pad_to_multiple_of": 8}):
        with pytest.raises(TypeError, match="MPOEmbedding"):
            model.resize_token_embeddings(**options)
    table = model.get_input_embeddings()
    assert model.resize_token_embeddings() is table
    assert model.resize_token_embeddings(table.num_embeddings) is table  # nothing to change
