"""What is saved is cores, and what is loaded is the same model: with our loader, with transformers' own."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import ALL, ARCHITECTURES, EVERY_LAYER, Architecture, logits
from safetensors import safe_open
from torch import nn

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError
from tensornet.nn.module import NetworkModule
from tensornet_hf.checkpoint import read_checkpoint

each = pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)


def stored_names(folder: Path) -> set[str]:
    return set(read_checkpoint(folder).tensors)


def assert_same(a: nn.Module, b: nn.Module, architecture: Architecture, atol: float = 0.0) -> None:
    torch.testing.assert_close(logits(a, architecture), logits(b, architecture), atol=atol, rtol=0)


@each
def test_cores_are_saved_once_and_loaded_as_the_same_model(
    architecture: Architecture, tmp_path: Path
) -> None:
    model = architecture.compressed
    model.save_pretrained(tmp_path / "a")
    stored = read_checkpoint(tmp_path / "a").tensors
    layers = {name for name, module in model.named_modules() if isinstance(module, NetworkModule)}
    assert not stored.keys() & {f"{layer}.weight" for layer in layers}
    assert sum(x.numel for x in stored.values()) == sum(p.numel() for p in model.parameters())  # each once
    loaded = th.load(tmp_path / "a")
    assert type(loaded) is type(model)
    assert_same(loaded, model, architecture)
    assert sorted(n for n, _ in loaded.named_parameters()) == sorted(n for n, _ in model.named_parameters())
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    # and once more: a loaded model saves the same bytes
    loaded.save_pretrained(tmp_path / "b")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5_relu", "vit"])
def test_auto_classes_load_after_the_import(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.compressed
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    auto = {
        "bert": transformers.AutoModelForMaskedLM,
        "t5_relu": transformers.AutoModelForSeq2SeqLM,
        "vit": transformers.AutoModelForImageClassification,
    }.get(architecture.name, transformers.AutoModelForCausalLM)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_same(loaded, model, architecture)
    assert_same(th.load(tmp_path), model, architecture)


@each
def test_decompressed_folder_needs_transformers_alone(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.compressed
    th.decompress(model)
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    architecture.dense.save_pretrained(tmp_path / "dense")
    assert stored_names(tmp_path) == stored_names(tmp_path / "dense")
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(module, NetworkModule) for module in loaded.modules())
    assert_same(loaded, architecture.dense, architecture, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5_relu", "vit"])
def test_compressing_while_loading_saves_cores(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    architecture.dense.save_pretrained(tmp_path / "dense")
    options = th.TensorNetworkConfig(param_ratio=0.6, topology="low_rank", target_modules="all")
    model = type(architecture.dense).from_pretrained(tmp_path / "dense", quantization_config=options)
    layers = [name for name, module in model.named_modules() if isinstance(module, NetworkModule)]
    assert layers
    model.save_pretrained(tmp_path / "small")
    assert not stored_names(tmp_path / "small") & {f"{layer}.weight" for layer in layers}
    loaded = th.load(tmp_path / "small")
    assert_same(loaded, model, architecture)
    assert loaded.config.quantization_config.compression_config.param_ratio == 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_or_chosen(dtype: torch.dtype, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["gpt2"]
    architecture.compressed.to(dtype).save_pretrained(tmp_path)
    stored = {tensor.dtype for tensor in read_checkpoint(tmp_path).tensors.values()}
    assert stored == {"BF16" if dtype == torch.bfloat16 else "F16"}
    assert {p.dtype for p in th.load(tmp_path).parameters()} == {dtype}
    assert {p.dtype for p in th.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt2", "t5_relu"])
def test_pivoted_cores(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.dense
    config = tn.CompressionConfig(target_modules="all", max_bond=6, objective="weight", pivoted=True)
    tn.compress(model, config, progress=False)
    model.save_pretrained(tmp_path)
    kinds = {tensor.dtype for tensor in read_checkpoint(tmp_path).tensors.values()}
    assert kinds == {"F32", "I32"}
    loaded = th.load(tmp_path)
    assert_same(loaded, model, architecture, atol=1e-5)
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    assert_same(th.decompress(loaded), model, architecture, atol=1e-4)


def test_a_model_without_its_head(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["gpt2"]
    model = architecture.compressed
    model.save_pretrained(tmp_path / "whole")
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    ids = architecture.inputs()["input_ids"]
    torch.testing.assert_close(base(ids)[0], model.transformer(ids)[0], atol=0, rtol=0)
    base.save_pretrained(tmp_path / "base")
    torch.testing.assert_close(th.load(tmp_path / "base")(ids)[0], base(ids)[0], atol=0, rtol=0)
    again = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(again.transformer(ids)[0], base(ids)[0], atol=0, rtol=0)
    # transformers would tie a head to the table; with none stored it would be random
    with pytest.raises(FormatError, match=r"lm_head\.weight .* transformer\.wte.*made of cores"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_compressing_a_part_describes_that_part(tmp_path: Path) -> None:
    """The configuration is shared with the whole model, which is saved with longer names."""
    architecture = ARCHITECTURES["llama"]
    model = architecture.dense
    tn.compress(model.model, tn.CompressionConfig(max_bond=8), progress=False)
    model.save_pretrained(tmp_path)
    assert_same(th.load(tmp_path), model, architecture)


def test_what_was_changed_after_compressing_is_what_is_saved(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    model = architecture.dense
    tn.compress(model, tn.CompressionConfig(target_modules="*.mlp.*", max_bond=8), progress=False)
    tn.compress(model, tn.CompressionConfig(target_modules="q_proj", max_bond=8), progress=False)
    by_hand = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = by_hand.to_linear()
    model.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.up_proj.weight" in stored_names(tmp_path)
    assert_same(th.load(tmp_path), model, architecture)


def test_transformers_own_dequantize() -> None:
    architecture = ARCHITECTURES["gpt2"]
    model = architecture.compressed.dequantize()
    assert not any(isinstance(module, NetworkModule) for module in model.modules())
    assert_same(model, architecture.dense, architecture, atol=1e-4)


def test_experts_keep_the_names_of_the_model(tmp_path: Path) -> None:
    """Mixtral is stored expert by expert; transformers converts names and shapes when it loads and saves."""
    config = transformers.MixtralConfig(
        vocab_size=101,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "dense")
    architecture = ARCHITECTURES["llama"]
    expected = logits(model, architecture)
    tn.compress(model, EVERY_LAYER, progress=False)
    model.save_pretrained(tmp_path / "small")
    assert_same(th.load(tmp_path / "small"), model, architecture)
    th.decompress(model)
    model.save_pretrained(tmp_path / "again")
    assert stored_names(tmp_path / "again") == stored_names(tmp_path / "dense")
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again, architecture), expected, atol=1e-4, rtol=0)


def test_metadata_says_which_library_reads_it(tmp_path: Path) -> None:
    ARCHITECTURES["gpt2"].compressed.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "tensornet"
    assert entry["format_version"] == 1
    assert "import tensornet_hf" in entry["load_with"]


def test_hub_ids_are_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES["gpt2"]
    architecture.compressed.save_pretrained(tmp_path / "snapshot" / "part")
    asked = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = th.load("someone/model", revision="v2", subfolder="part", device_map="cpu")
    assert_same(loaded, architecture.compressed, architecture)
    assert (asked["name"], asked["revision"]) == ("someone/model", "v2")
    assert not any(fnmatch.fnmatch("pytorch_model.bin", pattern) for pattern in asked["allow_patterns"])
