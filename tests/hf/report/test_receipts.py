"""A receipt names what a result was made of; `verify` finds changed files and weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folder_runs import compress_files
from gguf_models import MODELS
from safetensors.torch import load_file, save_file
from sharded_folders import save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError, TargetError
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.receipts import Receipt, digests_of, receipt_path

CONFIG = tn.CompressionConfig(target_modules=["*.mlp.*"], formats=("int4",), method="nearest")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A dense folder, and the folder that was made of it."""
    source = save("llama", tmp_path / "dense")
    th.compress_folder(source, tmp_path / "small", CONFIG)
    return source, tmp_path / "small"


def test_the_receipt_names_what_the_result_was_made_of(made: tuple[Path, Path]) -> None:
    source, small = made
    receipt = Receipt.load(small)
    there = {x.name: x.read_bytes() for x in small.iterdir() if x.name != "receipt.json"}
    assert {name: x["sha256"] for name, x in receipt.files.items()} == {
        name: hashlib.sha256(x).hexdigest() for name, x in there.items()
    }
    assert {name: x["bytes"] for name, x in receipt.files.items()} == {k: len(x) for k, x in there.items()}
    assert receipt.source == "dense"
    assert receipt.source_files.keys() == {x.name for x in source.iterdir() if "index" not in x.name}
    assert receipt.plan is not None
    assert all(layer["error"] > 0 for layer in receipt.plan["layers"])
    th.compress_folder(source, small.parent / "again", CONFIG)
    assert (small.parent / "again" / "receipt.json").read_bytes() == (small / "receipt.json").read_bytes()


def test_every_tensor_is_compared_with_the_source(made: tuple[Path, Path]) -> None:
    source, small = made
    found = {x.name: x for x in th.verify(small, source).tensors}
    dense, after = th.load(source), th.decompress(th.load(small))
    names = {name.removesuffix(".weight") for name, _ in dense.named_parameters()}
    assert {x.removesuffix(".weight") for x in found} == names
    for name, tensor in found.items():
        key = name if name.endswith("weight") else f"{name}.weight"
        a, b = after.state_dict()[key].double(), dense.state_dict()[key].double()
        assert tensor.error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-5, abs=1e-12)
        assert (tensor.error > 0.01) == (".mlp." in name), name
        assert tensor.explained


def test_changed_files_are_found(made: tuple[Path, Path]) -> None:
    source, small = made
    file = small / "config.json"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"64", b"65", 1))
    with pytest.raises(FormatError, match=r"config\.json changed"):
        th.verify(small)
    file.write_bytes(before + b" ")
    with pytest.raises(FormatError, match=r"config\.json changed"):
        th.verify(small)
    file.unlink()
    with pytest.raises(FormatError, match=r"other files.*config\.json"):
        th.verify(small)
    file.write_bytes(before)
    (small / "notes.txt").write_text("later")
    assert th.verify(small).unlisted == ("notes.txt",)
    other = shutil.copytree(source, small.parent / "other")
    (other / "tokenizer.json").write_text('{"made": "anew"}')
    with pytest.raises(FormatError, match=r"not the source.*tokenizer\.json"):
        th.verify(small, other)
    with pytest.raises(FormatError, match="no receipt"):
        th.verify(source)
    receipt_path(small).write_text("{")
    with pytest.raises(FormatError, match="receipt"):
        th.verify(small)
    receipt_path(small).write_text('{"version": 1, "files": {"a": {}}}')
    with pytest.raises(FormatError, match="damaged"):
        th.verify(small)
    receipt_path(small).write_text('{"version": 99}')
    with pytest.raises(FormatError, match="version"):
        th.verify(small)


@pytest.mark.parametrize("part", ["mlp.up_proj.core_matrix.codes", "input_layernorm.weight"])
def test_a_tensor_further_off_than_its_format_is_found(made: tuple[Path, Path], part: str) -> None:
    source, small = made
    [file] = small.glob("*.safetensors")
    tensors = load_file(file)
    name = next(x for x in tensors if x.endswith(part))
    tensors[name] = tensors[name].flip(0) + 1
    save_file(tensors, file, metadata={"format": "pt"})
    receipt = Receipt.load(small)
    replace(receipt, files={**receipt.files, **digests_of({file.name: file})}).save(small)
    assert th.verify(small).tensors == ()
    [found] = th.verify(small, source).unexplained
    assert name.startswith(found.name)
    assert found.name in str(th.verify(small, source))


def test_a_model_that_is_made_of_a_result_does_not_get_its_receipt(made: tuple[Path, Path]) -> None:
    _, small = made
    th.save(th.load(small), small.parent / "saved", source=small)
    with pytest.raises(FormatError, match="no receipt"):
        th.verify(small.parent / "saved")


def test_layers_that_were_trained_are_not_judged(made: tuple[Path, Path]) -> None:
    source, small = made
    receipt = Receipt.load(small)
    replace(receipt, options={**receipt.options, "heal": 10}).save(small)
    found = th.verify(small, source).tensors
    assert {x.largest for x in found if ".mlp." in x.name} == {None}
    assert {x.largest for x in found if ".mlp." not in x.name} == {0.0}


def test_a_source_that_is_not_known_cannot_be_compared(made: tuple[Path, Path]) -> None:
    source, small = made
    replace(Receipt.load(small), source=None).save(small)
    with pytest.raises(TargetError, match="no source"):
        th.verify(small, source)
    replace(Receipt.load(small), source="dense", target="paper").save(small)
    with pytest.raises(TargetError, match=r"paper.*mlx"):
        th.verify(small, source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma3_text"])
def test_a_gguf_file_is_compared_with_its_source(kind: str, tmp_path: Path) -> None:
    """The converter permutes rows of Llama, adds one to norms of Gemma, and stacks experts of Mixtral."""
    torch.manual_seed(0)
    sizes = {**MODELS[kind.replace("3_text", "2")], "vocab_size": 1024}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(gpt2_path()).save_pretrained(source := tmp_path / "dense")
    config = tn.CompressionConfig(formats=("int4:g32:float16", "int8:g32:float16"), bits_per_weight=6.5)
    done = compress_files(source, tmp_path / "small.gguf", config, rotate=kind == "llama")
    found = th.verify(tmp_path / "small.gguf", source)
    assert found.unexplained == ()
    rounded = [x.error for x in found.tensors if x.largest]
    assert rounded
    least, most = (f(x.error for x in done.plan if x.error) for f in (min, max))
    assert all(least * 0.99 <= x <= most * 1.01 for x in rounded)
    data = bytearray((tmp_path / "small.gguf").read_bytes())
    data[-100] ^= 64
    (tmp_path / "small.gguf").write_bytes(data)
    with pytest.raises(FormatError, match="changed"):
        th.verify(tmp_path / "small.gguf")


#: Number formats of layers by turns; each target packs most of them, and writes the others dense.
FORMATS = ("int4:g32", "int8", "int5", "nvfp4", "int6", "int4:g128", "int8:row", "mxfp4", "int3:g32")


def packed_folder(kind: str, target: str, folder: Path) -> tuple[Path, Path]:
    """A dense folder, and the folder that a target wrote of it, with layers of many number formats."""
    sizes: dict[str, object] = {
        "vocab_size": 48, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": kind == "tied",
    }  # fmt: skip
    if kind == "mixtral":
        sizes |= {"num_local_experts": 3}
    torch.manual_seed(0)
    source = folder / "dense"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.replace("tied", "llama"), **sizes))
    model.bfloat16().save_pretrained(source)
    if kind == "gpt2":
        source = gpt2_path()
    config = tn.CompressionConfig("all", bits_per_weight=9, formats=("int8",), method="nearest")
    data = tn.plan(th.load(source), config).to_dict()
    if kind != "mixtral":  # vLLM and transformers need one format for all experts
        for k, layer in enumerate(data["layers"]):
            layer["storage"] = {"number_format": FORMATS[k % len(FORMATS)]}
    compress_files(source, folder / "packed", tn.CompressionPlan.from_dict(data), export=target)
    return source, folder / "packed"


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder, and write their digest to the receipt."""
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    receipt = Receipt.load(folder)
    replace(receipt, files={**receipt.files, **digests_of({file.name: file})}).save(folder)


PACKED = [
    *((kind, target) for target in ("compressed-tensors", "gptq") for kind in ("llama", "tied", "mixtral")),
    *(pytest.param(kind, "mlx", marks=pytest.mark.slow) for kind in ("llama", "tied", "mixtral", "gpt2")),
]


@pytest.mark.parametrize(("kind", "target"), PACKED)
def test_a_packed_folder_is_compared_with_its_source(kind: str, target: str, tmp_path: Path) -> None:
    source, packed = packed_folder(kind, target, tmp_path)
    found = th.verify(packed, source)
    assert found.unexplained == ()
    [file] = source.glob("*.safetensors")
    tied = {"lm_head.weight"} if kind in ("tied", "gpt2") else set()
    assert len(found.tensors) == len(load_file(file).keys() - tied)
    expected = sorted(x["error"] for x in found.receipt.plan["layers"])  # type: ignore[index]
    rounded = sorted(x.error for x in found.tensors if x.largest)
    assert sum(" bits" in x.scheme or "fp4" in x.scheme for x in found.tensors) > len(rounded) / 2
    if kind != "mixtral":  # where one layer is two tensors
        assert rounded == pytest.approx(expected, rel=0.1)
    assert min(expected) * 0.9 < min(rounded)
    assert max(rounded) < max(expected) * 1.1
    assert {x.error for x in found.tensors if not x.largest} == {0.0}


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("compressed-tensors", "weight_packed"),
        ("compressed-tensors", "weight_scale"),
        ("gptq", "qweight"),
        ("gptq", "scales"),
        ("gptq", "qzeros"),
        *(pytest.param("mlx", part, marks=pytest.mark.slow) for part in ("weight", "scales", "biases")),
    ],
)
def test_a_changed_part_of_a_packed_weight_is_found(target: str, part: str, tmp_path: Path) -> None:
    source, packed = packed_folder("mixtral", target, tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(x for x in tensors if x.endswith(f"q_proj.{part}"))
        words = tensors[name].view(torch.uint8).clone()
        words[-1] ^= 3  # the low bits of codes and zeros, and those of the exponents of scales
        tensors[name] = words.view(tensors[name].dtype)

    changed_weights(packed, change)
    assert th.verify(packed).tensors == ()
    [found] = th.verify(packed, source).unexplained
    assert found.name == "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("kind", "target"), [x for x in PACKED if "mixtral" in str(x)])
def test_a_changed_expert_is_found(kind: str, target: str, tmp_path: Path) -> None:
    """Another expert, or the gate in place of the up projection, has the same shape and the same scheme."""
    source, packed = packed_folder(kind, target, tmp_path)
    part = {"compressed-tensors": "weight_packed", "gptq": "qweight", "mlx": "weight"}[target]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if target == "mlx":
            first = "model.layers.1.block_sparse_moe.switch_mlp"
            gate, up = (tensors[f"{first}.{x}_proj.{part}"] for x in ("gate", "up"))
            tensors[f"{first}.gate_proj.{part}"] = torch.cat([gate[:2], up[2:]])
        else:
            first = "model.layers.1.block_sparse_moe.experts.2"
            tensors[f"{first}.w1.{part}"] = tensors[f"{first}.w3.{part}"].clone()

    changed_weights(packed, change)
    names = {"mlx": "switch_mlp.gate_proj.weight[2]"}
    [found] = th.verify(packed, source).unexplained
    assert found.name == f"model.layers.1.block_sparse_moe.{names.get(target, 'experts.2.w1.weight')}"


@pytest.mark.parametrize(
    "target", ["compressed-tensors", "gptq", pytest.param("mlx", marks=pytest.mark.slow)]
)
def test_a_packed_folder_without_a_tensor_or_its_description(target: str, tmp_path: Path) -> None:
    source, packed = packed_folder("llama", target, tmp_path)
    whole = shutil.copytree(packed, tmp_path / "whole")

    def refused(change: Callable[[dict[str, torch.Tensor]], object], match: str) -> None:
        shutil.rmtree(packed)
        shutil.copytree(whole, packed)
        changed_weights(packed, change)
        with pytest.raises(FormatError, match=match):
            th.verify(packed, source)

    scales = {"compressed-tensors": "weight_scale", "gptq": "scales", "mlx": "biases"}[target]
    scales = next(x for x in load_file(packed / "model.safetensors") if x.endswith(scales))
    refused(lambda x: x.pop("model.norm.weight"), r"no tensor model\.norm")
    refused(lambda x: x.pop(scales), f"{scales} is missing")
    refused(lambda x: x.update(more=torch.ones(1)), "does not have: more")
    config = json.loads((whole / "config.json").read_text())
    entry = config["quantization" if target == "mlx" else "quantization_config"]
    if target == "mlx":
        entry |= {name: {**x, "bits": 2} for name, x in entry.items() if isinstance(x, dict)}
    elif target == "gptq":
        entry["dynamic"] = {}
    else:
        entry["config_groups"]["group_0"]["weights"]["num_bits"] += 1
    (whole / "config.json").write_text(json.dumps(config))
    receipt = Receipt.load(whole)
    digests = digests_of({"config.json": whole / "config.json"})
    replace(receipt, files={**receipt.files, **digests}).save(whole)
    with pytest.raises(FormatError, match=r"not packed as config\.json says"):
        th.verify(whole, source)


def test_an_export_of_a_folder_is_compared_with_the_source_of_the_folder(tmp_path: Path) -> None:
    source, packed = packed_folder("mixtral", "compressed-tensors", tmp_path)
    config = tn.CompressionConfig(formats=("int4:g32",), method="nearest", exclude_modules=["*.o_proj"])
    th.compress_folder(source, tmp_path / "small", config)
    shutil.rmtree(packed)
    th.export(tmp_path / "small", packed, target="compressed-tensors")
    found = th.verify(packed, source)
    assert found.unexplained == ()
    assert len(found.tensors) == len(load_file(source / "model.safetensors"))
    assert {x.error > 0.05 for x in found.tensors if "experts" in x.name or "q_proj" in x.name} == {True}
    assert {x.error for x in found.tensors if "o_proj" in x.name} == {0.0}


@pytest.mark.slow
def test_an_export_has_the_plan_of_its_folder(tmp_path: Path) -> None:
    config = tn.CompressionConfig(target_modules=["*.mlp.*"], formats=("int4:g32:float16",), method="nearest")
    th.compress_folder(gpt2_path(), tmp_path / "small", config)
    th.export(tmp_path / "small", tmp_path / "small.gguf")
    found = th.verify(tmp_path / "small.gguf", gpt2_path())
    assert found.unexplained == ()
    assert found.receipt.exported_from is not None
    assert found.receipt.exported_from["name"] == "small"
    assert sum(x.error > 0 for x in found.tensors) == len(found.receipt.plan["layers"])  # type: ignore[index]


@pytest.mark.slow
def test_the_program_verifies(tmp_path: Path) -> None:
    def tensornet(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from tensornet_hf.cli.main import app; app()", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    data = ("--calibration", "default", "--calibration-tokens", 1024)
    made = tensornet("compress", gpt2_path(), "small.gguf", "--bits", 4.5, *data)
    assert made.returncode == 0, made.stderr
    good = tensornet("verify", "small.gguf", "--source", gpt2_path())
    assert good.returncode == 0, good.stderr
    assert "blk.0.attn_qkv.weight" in good.stdout
    listed = json.loads(tensornet("verify", "small.gguf", "--source", gpt2_path(), "--json").stdout)
    assert all(x["explained"] for x in listed["tensors"])
    receipt = json.loads((tmp_path / "small.gguf.receipt.json").read_text())
    assert receipt["measured"]["tokens"] > 0
    assert "compress" in receipt["command"]
    for layer in receipt["plan"]["layers"]:
        layer["error"] /= 2
    (tmp_path / "small.gguf.receipt.json").write_text(json.dumps(receipt))
    bad = tensornet("verify", "small.gguf", "--source", gpt2_path())
    assert bad.returncode == 1
    assert "further from" in bad.stderr
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    broken = tensornet("verify", "small.gguf")
    assert broken.returncode == 1
    assert broken.stderr.count("\n") == 1
    assert torch.__version__ in receipt["versions"]
