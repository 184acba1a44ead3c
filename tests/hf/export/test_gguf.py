"""GGUF files hold the same weights bit for bit, and llama.cpp computes the same logits from them."""

from __future__ import annotations

import copy
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import HEADS, MODELS, WORDS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertTokenizerFast,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError, FormatError, TargetError
from tensornet_hf.checkpoint import load_gguf
from tensornet_hf.exporters.gguf import _encoded, _float_type

pytestmark = [
    pytest.mark.slow,  # needs the extra `gguf`
]

#: A Gemma 3 is written with a tokenizer.
CONFIGS = {
    **MODELS,
    "gemma3_text": {
        **HEADS,
        "vocab_size": 1024,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention"] * 2,
    },
}
#: What transformers itself reads of these.
READ_BACK = ("llama", "qwen2", "gemma2", "phi3", "gpt2")


def model_of(name: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**CONFIGS[name], **more})
    kinds = MODEL_MAPPING if name == "bert" else MODEL_FOR_CAUSAL_LM_MAPPING
    return kinds[type(config)](config).eval()


def compressed(name: str, *formats: str, **more: Any) -> PreTrainedModel:
    """Model in the formats by turns."""
    model = model_of(name, **more)
    config = tn.CompressionConfig("all", bits_per_weight=9, formats=("int8:g32:float16",), method="nearest")
    data = tn.plan(model, config).to_dict()
    for k, layer in enumerate(data["layers"]):
        layer["storage"] = {"number_format": formats[k % len(formats)]}
    tn.compress(model, tn.CompressionPlan.from_dict(data), progress=False)
    return model


def tokenizer(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{k}" for k in range(WORDS - 5))]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    from tests.hf.export.llama_cpp import logits

    model = compressed(name, "int8:g32:float16", "int8:g32:float8", "int5:g32:float16")
    source = tokenizer(tmp_path / "words") if name == "bert" else None
    report = th.export(model, tmp_path / "model.gguf", source=source)
    assert {"Q8_0", "Q5_0"} <= set(report.packed.values())
    ids = torch.randint(5, WORDS, (12,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids[None])
    ours = found.last_hidden_state[0] if name == "bert" else found.logits[0]
    theirs = logits(tmp_path / "model.gguf", ids)  # products with activations of 8 bits
    assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.998


S, F = "sliding_attention", "full_attention"
WINDOWS: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 8}


def rope(kind: str = "default", theta: float = 500.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma2", {**WINDOWS, "layer_types": [S, S, F, S]}),
        ("gemma3_text", {**WINDOWS, "layer_types": [F, S, S, F]}),
        ("gemma", rope()),
        ("gemma2", rope()),
        ("gpt_neox", rope(partial_rotary_factor=0.25)),
        ("phi", rope(partial_rotary_factor=0.5)),
        ("stablelm", rope(partial_rotary_factor=0.25)),
    ],
)
def test_llama_cpp_computes_what_the_configuration_says(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from tests.hf.export.llama_cpp import logits

    model = model_of(name, **options)
    th.export(model, tmp_path / "model.gguf", source=th.embedded.gpt2_path() if "gemma3" in name else None)
    ids = torch.randint(5, WORDS, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    theirs = logits(tmp_path / "model.gguf", ids)
    assert float((ours - theirs).norm() / ours.norm()) < 0.01


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 32}, "scalar = 16"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("gemma2", rope("linear", factor=4.0), "linear"),
        ("qwen2", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=16), "llama3"),
        ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.7),
         "attention_factor"),
        ("llama", rope("longrope", factor=4.0, original_max_position_embeddings=16, short_factor=[1.5] * 8,
                       long_factor=[3.0] * 8), "longrope"),
        ("llama", rope("proportional", partial_rotary_factor=0.5), "proportional"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, options: dict[str, Any], word: str, tmp_path: Path
) -> None:
    model = model_of(name, **options)
    source = th.embedded.gpt2_path() if name == "gemma3_text" else None
    with pytest.raises(TargetError, match=word):
        th.export(model, tmp_path / "model.gguf", source=source)
    assert not list(tmp_path.iterdir())


def test_a_plan_for_another_computation_is_refused(tmp_path: Path) -> None:
    """Nothing is planned or compressed first."""
    model_of("gemma2", query_pre_attn_scalar=64).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "words")
    for file in (tmp_path / "words").iterdir():
        file.rename(tmp_path / "model" / file.name)
    config = tn.CompressionConfig(bits_per_weight=5, method="nearest", formats="gguf")
    with pytest.raises(TargetError, match="query_pre_attn_scalar"):
        th.plan_folder(tmp_path / "model", config, th.CompressOptions(export="gguf"))


@pytest.mark.parametrize(("name", "warned"), [("mistral", True), ("gemma2", False)])
def test_a_window_that_llama_cpp_does_not_apply_is_reported(name: str, warned: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        th.export(model_of(name, sliding_window=8), tmp_path / "model.gguf")
    assert any("sliding" in str(x.message) for x in caught) == warned


@pytest.mark.parametrize("name", READ_BACK)
def test_transformers_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    model = compressed(
        name,
        "int4:g32:float16",
        "int5:g64",
        "int8:g32:float8",
        "int6:row",
        "nl4:g32:float16",
    )
    plain = model_of(name).config  # without the entry of this library
    th.export(model, tmp_path / "model.gguf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=plain)
    dense = th.decompress(model).state_dict()
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, dense[key]), key


@pytest.mark.parametrize(
    ("kinds", "formats"),
    [
        ({"IQ4_NL", "IQ4_XS"}, ("nl4:g32:float16", "nl4:g32:float16", "nl4:g32:float8", "nl4:row:float16")),
        (
            {"Q2_K", "IQ4_XS", "Q3_K", "Q6_K"},
            ("int2:g16:s4:min", "nl4:g32:s6", "int6:g16:s8", "int3:g16:s6"),
        ),
        ({"Q4_K", "Q5_K"}, ("int5:g32:s6:min", "int4:g32:s6:min")),
        (
            {"IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"},
            ("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"),
        ),
    ],
)
def test_tables_of_levels_and_integer_scales(
    kinds: set[str], formats: tuple[str, ...], tmp_path: Path
) -> None:
    from tests.hf.export.llama_cpp import logits

    model = compressed("llama", *formats, hidden_size=256, intermediate_size=512)
    report = th.export(model, tmp_path / "model.gguf")
    assert set(report.packed.values()) == kinds
    assert not report.dense
    ids = torch.randint(5, WORDS, (12,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    theirs = logits(tmp_path / "model.gguf", ids)
    assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.998


def test_networks_are_written_dense_or_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    tn.compress(
        model, tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd"), progress=False
    )
    report = th.export(model, tmp_path / "model.gguf")
    assert not report.packed
    assert all("low_rank" in why for why in report.dense.values())
    with pytest.raises(TargetError, match="low_rank"):
        th.export(model, tmp_path / "other.gguf", networks="refuse")
    assert {x.name for x in tmp_path.iterdir()} == {"model.gguf", "model.gguf.receipt.json"}


def test_trained_tokenizer_of_bytes_and_metadata(tmp_path: Path) -> None:
    import gguf

    th.export(th.embedded.gpt2_path(), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    vocabulary = json.loads((Path(th.embedded.gpt2_path()) / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(vocabulary) <= set(fields["tokenizer.ggml.tokens"].contents())


def test_the_smallest_exact_type() -> None:
    """The decoder has the last word."""
    import gguf
    import numpy as np

    points, scales = np.ones((4, 64), np.float32), np.full((4, 64), 0.5, np.float32)
    assert _encoded(gguf, "Q4_0", points, scales) is not None
    scales[:, ::32] = 0.25  # not all scales of a block are equal
    assert _encoded(gguf, "Q4_0", points, scales) is None
    values = {"F16": 1.5, "BF16": 2.0**20, "F32": 1 + 2.0**-12}
    for kind, value in values.items():
        assert _float_type(points * np.float32(value)) == kind


def test_what_the_converter_lacks_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("opt", vocab_size=32, hidden_size=32, ffn_dim=32, num_hidden_layers=1,
                                  num_attention_heads=2, word_embed_proj_dim=32)  # fmt: skip
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with pytest.raises(TargetError, match="OPTForCausalLM"):
        th.export(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Cut short, or with a size that the file does not have: never a guess, and nothing is allocated."""
    file, damaged = tmp_path / "model.gguf", tmp_path / "damaged.gguf"
    th.export(compressed("llama", "int4:g32:float16"), file, source=tokenizer(tmp_path / "tokenizer"))
    content = file.read_bytes()
    name = b"blk.0.attn_q.weight"
    sizes = content.index(name) + len(name) + 4  # behind the number of dimensions
    changes = {"size": (sizes, 1 << 44), "tensors": (8, 1 << 40), "entries": (16, 1 << 40)}
    cases = {"empty": b"", "header": content[:100], "half": content[: len(content) // 2]}
    for what, (place, number) in changes.items():
        cases[what] = content[:place] + struct.pack("<Q", number) + content[place + 8 :]
    assert load_gguf(file).config.model_type == "llama"
    for changed in cases.values():
        damaged.write_bytes(changed)
        with pytest.raises(FormatError, match=r"damaged\.gguf"):
            load_gguf(damaged)


def test_a_mixture_is_not_read_as_a_llama(tmp_path: Path) -> None:
    th.export(model_of("mixtral"), tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="4 experts"):
        load_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("target", ["gguf", "mlx", "compressed-tensors"])
def test_mixtures_of_this_library_are_refused_or_converted_first(target: str, tmp_path: Path) -> None:
    model = model_of("llama")
    th.upcycle(model, share="center", experts=2, top_k=1)
    config = tn.CompressionConfig(formats=("int4:g32:float16",), method="nearest")
    rounded, stock = copy.deepcopy(model), th.stock_mixture(model)
    for each in (rounded, stock):
        tn.compress(each, config, progress=False)
    name = "model.gguf" if target == "gguf" else "model"
    with pytest.raises(TargetError, match="stock_mixture"):
        th.export(rounded, tmp_path / name, target=target)
    assert not list(tmp_path.iterdir())
    if target == "gguf":
        assert "blk.0.ffn_gate_exps.weight" in th.export(stock, tmp_path / name).packed


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    """The converter reads the tokenizer of Gemma 3 even if the file gets no vocabulary."""
    with pytest.raises(TargetError, match="source=") as caught:
        th.export(model_of("gemma3_text"), tmp_path / "model.gguf")
    assert "tokenizer" in str(caught.value)
    assert "Update" not in str(caught.value)


def test_bad_destinations(tmp_path: Path) -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="No export target"):
        th.export(model, tmp_path / "model")
    with pytest.raises(ValueError, match="onnx"):
        th.export(model, tmp_path / "model", target="onnx")
    with pytest.raises(DestinationError, match="gguf"):
        th.export(model, tmp_path / "model.bin", target="gguf")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(DestinationError, match="exists"):
        th.export(model, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"
    th.export(model, tmp_path / "model.gguf", force=True)
