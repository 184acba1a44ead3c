"""A receipt names what a result was made of; `verify` finds changed files and weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
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
    replace(Receipt.load(small), source="dense", target="mlx").save(small)
    with pytest.raises(TargetError, match="mlx"):
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
