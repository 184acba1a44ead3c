"""What is saved is cores, and what is loaded is the same model: by our loader and by transformers' own."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import io
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folder_runs import compress_files
from hf_models import (
    ALL,
    ARCHITECTURES,
    EVERY_LAYER,
    NO_DROPOUT,
    TOKENS,
    Architecture,
    enable_checkpointing,
    logits,
)
from pivoted_plans import pivoted
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError
from tensornet.nn.module import NetworkModule
from tensornet_hf.checkpoint import read_checkpoint
from tensornet_hf.inspect import inspect_folder

each = pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)
GPT2 = ARCHITECTURES["gpt2"]
CONFIG = tn.CompressionConfig(topology_options={"max_bond": 4}, topology="low_rank", method="svd")
#: Modules that share one table in each architecture.
TIED = {
    "gpt2": [("transformer.wte", "lm_head")],
    "t5_relu": [("shared", x) for x in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")],
    "t5_gated": [("shared", "encoder.embed_tokens"), ("shared", "decoder.embed_tokens")],
    "bert": [("bert.embeddings.word_embeddings", "cls.predictions.decoder")],
    "qwen2": [("model.embed_tokens", "lm_head")],
    "opt": [("model.decoder.embed_tokens", "lm_head")],
}


def same(a: nn.Module, b: nn.Module, architecture: Architecture, atol: float = 1e-4) -> None:
    torch.testing.assert_close(logits(a, architecture), logits(b, architecture), atol=atol, rtol=0)


def pairs(model: PreTrainedModel, architecture: Architecture) -> list[tuple[nn.Module, nn.Module]]:
    tied = TIED.get(architecture.name, [])
    return [(model.get_submodule(first), model.get_submodule(second)) for first, second in tied]


def check_tied(model: PreTrainedModel, architecture: Architecture) -> None:
    for first, second in pairs(model, architecture):
        assert all(a is b for a, b in zip(first.cores, second.cores, strict=True))


def names_in(folder: Path) -> set[str]:
    return set(read_checkpoint(folder).tensors)


def guards_of(folder: Path) -> set[str]:
    """Names of the empty tensors, which let transformers refuse the folder where we are not imported."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
            found |= {name for name in opened.keys() if opened.get_slice(name).get_shape() == [0]}  # noqa: SIM118
    return found


@each
def test_saved_once_and_loaded_as_the_same_model(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.compressed
    same(model, architecture.dense, architecture, atol=1e-4)  # full rank
    model.save_pretrained(tmp_path / "a")
    stored, entry = read_checkpoint(tmp_path / "a").tensors, model.config.quantization_config
    assert sum(x.numel for x in stored.values()) == sum(p.numel() for p in model.parameters())
    assert inspect_folder(tmp_path / "a")["params"] == sum(p.numel() for p in model.parameters())
    # The matrix of a convolution lies in a layer of its own, under the name of the stock kernel.
    assert guards_of(tmp_path / "a") == {f"{name.removesuffix('.matrix')}.weight" for name in entry.layers}
    assert not guards_of(tmp_path / "a") & stored.keys()
    written = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["format_version"]) == ("tensornet", 1)
    assert "import tensornet_hf" in written["load_with"]
    theirs, info = type(model).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for loaded in (theirs, th.load(tmp_path / "a")):
        assert type(loaded) is type(model)
        assert {n: p.shape for n, p in loaded.named_parameters()} == {
            n: p.shape for n, p in model.named_parameters()
        }
        assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
        check_tied(loaded, architecture)
        same(loaded, model, architecture)
        loaded.tie_weights()  # `_adjust_bias` would cut the bias of BERT's decoder to the first dim of a core
        for module in loaded.modules():
            module.__dict__.pop("_is_hf_initialized", None)
        loaded.initialize_weights()  # T5 initializes `wo.weight` of its blocks from outside
        same(loaded, model, architecture)
        check_tied(loaded.double(), architecture)
    th.load(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


@each
def test_every_core_is_trained_and_checkpointing_changes_nothing(architecture: Architecture) -> None:
    inputs, model, again = architecture.inputs(labels=True), architecture.compressed, architecture.compressed
    assert sum(isinstance(module, NetworkModule) for module in model.modules()) > 8
    model(**inputs).loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters() if ".core_" in name}
    assert [name for name, grad in plain.items() if grad is None] == []
    enable_checkpointing(again.train())  # no dropout in these models
    again(**inputs, **({"use_cache": False} if architecture.generates else {})).loss.backward()
    for name, parameter in again.named_parameters():
        if ".core_" in name:
            torch.testing.assert_close(parameter.grad, plain[name], atol=1e-4, rtol=1e-3)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    check_tied(model, architecture)


@each
def test_decompressed_folder_needs_transformers_alone(architecture: Architecture, tmp_path: Path) -> None:
    dense, model = architecture.dense, architecture.compressed
    dense.save_pretrained(tmp_path / "dense")
    model = model.dequantize() if architecture is GPT2 else th.decompress(model)  # transformers' own way
    assert not hasattr(model, "hf_quantizer")
    assert all(a.weight is b.weight for a, b in pairs(model, architecture))
    assert model.all_tied_weights_keys == dense.all_tied_weights_keys
    assert type(model)._tied_weights_keys is model._tied_weights_keys
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert names_in(tmp_path / "out") == names_in(tmp_path / "dense")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert not any(isinstance(module, NetworkModule) for module in loaded.modules())
    same(loaded, dense, architecture, atol=1e-4)


@pytest.mark.parametrize("name", TIED)
def test_ties_that_are_not_touched_are_left_to_transformers(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.dense
    tn.compress(
        model, tn.CompressionConfig(topology_options={"max_bond": 8}), progress=False
    )  # leaves embeddings and heads dense
    model.save_pretrained(tmp_path)
    loaded = th.load(tmp_path)
    loaded.tie_weights()
    assert all(a.weight is b.weight for a, b in pairs(loaded, architecture))
    same(loaded, model, architecture)


# --- other ways to make and to load a model ------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5_relu", "vit"])
def test_auto_classes_load_shards(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    architecture.compressed.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    auto = {
        "bert": transformers.AutoModelForMaskedLM,
        "t5_relu": transformers.AutoModelForSeq2SeqLM,
        "vit": transformers.AutoModelForImageClassification,
    }.get(name, AutoModelForCausalLM)
    for loaded in (auto.from_pretrained(tmp_path), th.load(tmp_path)):
        assert type(loaded) is type(architecture.dense)
        same(loaded, architecture.compressed, architecture)


@pytest.mark.parametrize("name", ["gpt2", "t5_relu", "vit"])
def test_compressing_while_loading_saves_cores(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    architecture.dense.save_pretrained(tmp_path / "dense")
    options = th.TensorNetworkConfig(param_ratio=0.6, topology="low_rank", target_modules="all")
    model = type(architecture.dense).from_pretrained(tmp_path / "dense", quantization_config=options)
    model.save_pretrained(tmp_path / "small")
    assert guards_of(tmp_path / "small")
    loaded = th.load(tmp_path / "small")
    same(loaded, model, architecture)
    assert loaded.config.quantization_config.compression_config.param_ratio == 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_or_chosen(dtype: torch.dtype, tmp_path: Path) -> None:
    model = GPT2.compressed.to(dtype)
    model.save_pretrained(tmp_path)
    stored = {tensor.dtype for tensor in read_checkpoint(tmp_path).tensors.values()}
    assert stored == {"BF16" if dtype == torch.bfloat16 else "F16"}
    assert {p.dtype for p in th.load(tmp_path).parameters()} == {dtype}
    assert {p.dtype for p in th.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    assert (model.half().dtype, model.float().dtype) == (torch.float16, torch.float32)
    same(model, GPT2.dense, GPT2, atol=0.1)


@pytest.mark.parametrize("name", ["gpt2", "t5_gated", "vit"])
def test_bfloat16_and_autocast(name: str) -> None:
    architecture = ARCHITECTURES[name]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(architecture.compressed, architecture)
    for got in (mixed, logits(architecture.compressed.to(torch.bfloat16), architecture)):
        expected = logits(architecture.dense, architecture)
        torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5_gated", "bert", "vit"])
def test_compiles_without_graph_breaks(name: str) -> None:
    architecture = ARCHITECTURES[name]
    torch.compiler.reset()
    compiled = torch.compile(architecture.compressed, fullgraph=True, backend="eager")
    same(compiled, architecture.compressed, architecture, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5_relu"])
def test_pivoted_cores(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.dense
    config = tn.CompressionConfig(target_modules="all", topology_options={"max_bond": 6}, method="svd")
    tn.apply_plan(model, pivoted(tn.plan(model, config)))
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read_checkpoint(tmp_path).tensors.values()} == {"F32", "I32"}
    loaded = th.load(tmp_path)
    same(loaded, model, architecture, atol=1e-5)
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    same(th.decompress(loaded), model, architecture, atol=1e-4)


def by_hand(model: PreTrainedModel) -> None:
    mlp = model.transformer.h[0].mlp
    mlp.c_fc = tn.nn.TensorNetworkLinear.from_linear(mlp.c_fc, topology="low_rank", max_bond=4)


def test_a_folder_that_does_not_describe_its_layers_says_what_helps(tmp_path: Path) -> None:
    model = ARCHITECTURES["gpt2"].dense
    by_hand(model)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(FormatError, match=r"tensornet_hf\.save"):
        th.load(tmp_path / "bare")
    same(th.load(th.save(model, tmp_path / "whole")), model, ARCHITECTURES["gpt2"])


def tied_table(model: PreTrainedModel) -> None:
    model.transformer.wte = tn.nn.MPOEmbedding.from_embedding(model.transformer.wte, max_bond=4)


def part(*names: str) -> Callable[[PreTrainedModel], object]:
    def change(model: PreTrainedModel) -> None:
        for name in names:
            tn.compress(model.get_submodule(name), CONFIG, progress=False)

    return change


def dense_again(model: PreTrainedModel) -> None:
    tn.compress(model, dataclasses.replace(CONFIG, target_modules="*.mlp.*"), progress=False)
    tn.compress(model, dataclasses.replace(CONFIG, target_modules="c_attn"), progress=False)
    model.transformer.h[0].mlp.c_fc = model.transformer.h[0].mlp.c_fc.to_linear()


@pytest.mark.parametrize(
    "change",
    [
        by_hand,
        tied_table,
        dense_again,
        part("transformer"),
        part("transformer.h"),
        part("transformer.h.0.mlp", "transformer.h.0.attn"),
    ],
)
def test_layers_replaced_by_hand_or_in_a_part(
    change: Callable[[PreTrainedModel], object], tmp_path: Path
) -> None:
    """The model that is saved is the one that is there, however it came about."""
    model = GPT2.dense
    change(model)
    if change is dense_again:
        model.save_pretrained(tmp_path / "made")
    else:
        th.save(model, tmp_path / "made")
    for load in (AutoModelForCausalLM.from_pretrained, th.load):
        same(load(tmp_path / "made").eval(), model.eval(), GPT2)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda x: torch.compile(x, backend="eager")])
def test_wrapped_models_are_saved_without_the_wrapper(wrap: Any, tmp_path: Path) -> None:
    model = GPT2.dense
    wrapped = nn.DataParallel(wrap(model))
    tn.compress(wrapped, CONFIG, progress=False)
    same(th.load(th.save(wrapped, tmp_path / "made")), model, GPT2)


@pytest.mark.parametrize("value", [nn.Linear(3, 3), nn.DataParallel(nn.Linear(3, 3)), "folder"])
def test_what_is_no_model_of_transformers_is_not_saved(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="str" if isinstance(value, str) else "Linear"):
        th.save(value, tmp_path / "made")


def test_hub_ids_are_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPT2.compressed.save_pretrained(tmp_path / "snapshot" / "part")
    asked = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    same(th.load("someone/model", revision="v2", subfolder="part", device_map="cpu"), GPT2.compressed, GPT2)
    assert (asked["name"], asked["revision"]) == ("someone/model", "v2")
    assert not any(fnmatch.fnmatch("pytorch_model.bin", pattern) for pattern in asked["allow_patterns"])


# --- parts of models, and classes with names and initializations of their own ---------------------------


def test_a_model_without_its_head(tmp_path: Path) -> None:
    model, ids = GPT2.compressed, GPT2.inputs()["input_ids"]
    model.save_pretrained(tmp_path / "whole")
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(base(ids)[0], model.transformer(ids)[0], rtol=1e-4, atol=1e-4)
    base.save_pretrained(tmp_path / "base")
    torch.testing.assert_close(th.load(tmp_path / "base")(ids)[0], base(ids)[0], rtol=1e-4, atol=1e-4)
    again = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(again.transformer(ids)[0], base(ids)[0], rtol=1e-4, atol=1e-4)
    # transformers would tie a head to the table; with none stored it would be random
    with pytest.raises(FormatError, match=r"lm_head\.weight.*transformer\.wte"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_parts_of_t5(tmp_path: Path) -> None:
    """The configuration of v1.1 claims that the head is tied; only the table of both stacks is."""
    architecture = ARCHITECTURES["t5_gated"]
    for targets in ("shared", "lm_head"):
        model = architecture.dense
        tn.compress(
            model,
            tn.CompressionConfig(target_modules=targets, topology_options={"max_bond": 8}),
            progress=False,
        )
        model.save_pretrained(tmp_path / targets)
        same(th.load(tmp_path / targets), model, architecture)
    model = ARCHITECTURES["t5_relu"].compressed
    model.save_pretrained(tmp_path / "whole")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "whole")
    ids = ARCHITECTURES["t5_relu"].inputs()["input_ids"]
    torch.testing.assert_close(encoder(ids)[0], model.encoder(ids)[0], rtol=1e-4, atol=1e-4)
    assert encoder.encoder.embed_tokens.cores[0] is encoder.shared.cores[0]


@pytest.mark.parametrize("name", ["t5_relu", "t5_gated"])
def test_t5_keeps_wo_in_float32_when_loaded_in_float16(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.compressed
    model.save_pretrained(tmp_path / "a")
    half = th.load(tmp_path / "a", dtype=torch.float16)
    wo = half.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == wo.cores[1].dtype == torch.float32  # what T5's forward asks
    assert half.encoder.block[0].layer[0].SelfAttention.q.cores[0].dtype == torch.float16
    got = logits(half, architecture)
    torch.testing.assert_close(got.float(), logits(model, architecture), atol=0.2, rtol=0.1)
    half.save_pretrained(tmp_path / "b")  # two dtypes in one folder, each described
    torch.testing.assert_close(logits(th.load(tmp_path / "b"), architecture), got, atol=1e-2, rtol=1e-2)


def test_classes_with_rules_of_their_own(tmp_path: Path) -> None:
    """CamemBERT registers its head before its table; Funnel initializes by the name of a module's type."""
    ids, sizes = ARCHITECTURES["bert"].inputs()["input_ids"], {"hidden_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 44}
    model = transformers.CamembertForMaskedLM(transformers.CamembertConfig(**sizes, **NO_DROPOUT, **TOKENS))
    assert next(iter(model.eval().state_dict())).startswith("lm_head")
    tn.compress(model, EVERY_LAYER, progress=False)
    model.save_pretrained(tmp_path / "camembert")
    base = transformers.AutoModel.from_pretrained(tmp_path / "camembert")
    torch.testing.assert_close(base(ids)[0], model.roberta(ids)[0], rtol=1e-4, atol=1e-4)
    table = th.load(tmp_path / "camembert").roberta.embeddings.word_embeddings
    assert torch.equal(table.cores[0], model.lm_head.decoder.cores[0])
    sizes = {"block_sizes": [1], "d_model": 24, "n_head": 4, "d_head": 6, "d_inner": 44}
    model = transformers.FunnelForMaskedLM(transformers.FunnelConfig(**sizes, **TOKENS)).eval()
    tn.compress(model, tn.CompressionConfig(topology="mpo"), progress=False)
    model.save_pretrained(tmp_path / "funnel")
    torch.testing.assert_close(
        th.load(tmp_path / "funnel")(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_experts_keep_the_names_of_the_model(tmp_path: Path) -> None:
    """Mixtral is stored expert by expert; transformers converts names and shapes when it loads and saves."""
    sizes = {"vocab_size": 101, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "pad_token_id": 0}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "dense")
    architecture = ARCHITECTURES["llama"]
    expected = logits(model, architecture)
    tn.compress(model, EVERY_LAYER, progress=False)
    model.save_pretrained(tmp_path / "small")
    same(th.load(tmp_path / "small"), model, architecture)
    th.decompress(model).save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == names_in(tmp_path / "dense")
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again, architecture), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["memory", "files", "older files"])
def test_parts_of_multimodal_models_have_other_names_in_each_class(how: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
    text = {**sizes, **heads, "rope_parameters": rope}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, 92, 90, 5, 6]])
    image = {"pixel_values": torch.randn(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == 90).int(), "output_hidden_states": True, **image}

    @torch.no_grad()
    def outputs(model: PreTrainedModel) -> torch.Tensor:
        return model(**inputs).hidden_states[-1]  # in which text and image are mixed

    options = tn.CompressionConfig(target_modules="all", param_ratio=0.6, method="svd")
    model.save_pretrained(tmp_path / "dense")
    if how == "memory":
        tn.compress(model, options, progress=False)
        model.save_pretrained(tmp_path / "made")
    else:
        if how == "older files":
            weights = tmp_path / "dense" / "model.safetensors"
            tensors = load_file(weights)
            for new, old in {"model.language_model.": "model.", "model.visual.": "visual."}.items():
                tensors = {name.replace(new, old): x for name, x in tensors.items()}
            save_file(tensors, weights, metadata={"format": "pt"})
        compress_files(tmp_path / "dense", tmp_path / "made", options)
    whole = th.load(tmp_path / "made")
    assert any("visual" in name for name in whole.config.quantization_config.layers)
    expected = outputs(model if how == "memory" else whole)
    for kind in (transformers.AutoModel, transformers.AutoModelForImageTextToText):
        loaded, info = kind.from_pretrained(tmp_path / "made", output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(outputs(loaded), expected)


# --- an ordinary object of its class --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "t5_relu"])
def test_resizing_tables_of_cores_is_refused(name: str) -> None:
    model = ARCHITECTURES[name].compressed
    for options in ({"new_num_tokens": 120}, {"pad_to_multiple_of": 8}):
        with pytest.raises(TypeError, match="MPOEmbedding"):
            model.resize_token_embeddings(**options)
    table = model.get_input_embeddings()
    assert model.resize_token_embeddings() is table
    assert model.resize_token_embeddings(table.num_embeddings) is table  # nothing to change
    assert ARCHITECTURES[name].dense.resize_token_embeddings(60).num_embeddings == 60
    assert th.decompress(model).resize_token_embeddings(7).num_embeddings == 7  # a dense table again


def test_pickles_and_copies_are_compressed_models(tmp_path: Path) -> None:
    model, buffer = GPT2.compressed, io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(buffer, weights_only=False))
    for number, made in enumerate(copies):
        made.save_pretrained(tmp_path / str(number))
        assert made.training == model.training
        same(th.load(tmp_path / str(number)), model, GPT2)
    alive = weakref.ref(model)
    del model
    assert alive() is None


@pytest.mark.slow
def test_importing_the_plugin_leaves_the_classes_of_transformers_alone() -> None:
    code = """
import transformers
from transformers.quantizers import HfQuantizer
classes = [transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.GenerationMixin,
           transformers.Trainer, transformers.GPT2LMHeadModel, HfQuantizer]
before = [dict(vars(x)) for x in classes]
import tensornet_hf
assert before == [dict(vars(x)) for x in classes]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=1200)


def test_nothing_dense_is_made_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the weights are read the model has its cores alone, and none of them is allocated."""
    model = GPT2.compressed
    model.save_pretrained(tmp_path)
    seen: list[PreTrainedModel] = []
    kind = type(model.hf_quantizer)
    original = kind._process_model_before_weight_loading

    def watched(self: Any, empty: PreTrainedModel, **kwargs: Any) -> None:
        original(self, empty, **kwargs)
        seen.append(empty)
        assert all(x.is_meta for x in empty.state_dict().values())
        names = {name: x.shape for name, x in empty.named_parameters(remove_duplicate=False)}
        assert names == {name: x.shape for name, x in model.named_parameters(remove_duplicate=False)}

    monkeypatch.setattr(kind, "_process_model_before_weight_loading", watched)
    th.load(tmp_path)
    assert seen
