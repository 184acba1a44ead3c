"""Compressing a folder tensor by tensor gives the folder that compressing the model gives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES
from safetensors.torch import load_file, save_file
from sharded_folders import HALF, contents, save, save_tensors

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError, FormatError, TargetError
from tensornet.io import (
    ShardTask,
    Slice,
    load_slice,
    read_header,
    write_shard,
    write_tensors,
)
from tensornet_hf.streaming.shards import Part, layout

EVERYTHING = tn.CompressionConfig(target_modules="all", topology="mpo", param_ratio=0.6)
LINEARS = tn.CompressionConfig(**HALF)
PACKED = tn.CompressionConfig(pivoted=True, objective="weight", **HALF)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("config", [LINEARS, EVERYTHING, PACKED], ids=["linears", "everything", "packed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_folder_as_compressing_the_model(
    name: str, config: tn.CompressionConfig, tmp_path: Path
) -> None:
    source = save(name, tmp_path / "dense")
    before = contents(source)
    report = th.compress_checkpoint(source, tmp_path / "ours", config)
    model = th.load(source)
    expected = tn.compress(model, config, progress=False)
    model.save_pretrained(tmp_path / "reference")

    assert contents(source) == before
    # One shard, so the file is the same to the byte: tensors, their order, dtypes and header.
    ours, reference = (tmp_path / x / "model.safetensors" for x in ("ours", "reference"))
    assert ours.read_bytes() == reference.read_bytes()
    for key in ("layers", "ties", "dtype", "other_dtypes", "format_version"):
        assert described(tmp_path / "ours")[key] == described(tmp_path / "reference")[key]
    assert [x.name for x in report.compression.layers] == [x.name for x in expected.layers]
    assert report.compression.param_ratio == expected.param_ratio
    loaded, inputs = th.load(tmp_path / "ours").eval(), ARCHITECTURES[name].inputs()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "dense", dtype=dtype)
    th.compress_checkpoint(source, tmp_path / "ours", LINEARS)
    assert {x.dtype for x in weights(tmp_path / "ours").values()} == {dtype}
    assert th.load(tmp_path / "ours").dtype == dtype


def test_shards_and_index(tmp_path: Path) -> None:
    source = save("gpt2", tmp_path / "dense")
    th.compress_checkpoint(source, tmp_path / "one", LINEARS)
    th.compress_checkpoint(source, tmp_path / "many", LINEARS, max_shard_bytes=6_000)
    files = sorted(x.name for x in (tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"]) == set(one)
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in one.values())
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert all(x.stat().st_size < 12_000 for x in (tmp_path / "many").glob("*.safetensors"))
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / "many" / file)
    assert th.load(tmp_path / "many").lm_head.weight.shape == (101, 24)


def test_everything_else_is_copied(tmp_path: Path) -> None:
    source = save("bert", tmp_path / "dense")
    (source / "README.md").write_text("# mine")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"dense weights in another form")
    (source / "onnx" / "notes.txt").write_text("kept")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("left")
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    th.compress_checkpoint(source, tmp_path / "ours", LINEARS)
    copied = contents(tmp_path / "ours")
    assert set(copied) == {
        "README.md", "config.json", "model.safetensors", "onnx/notes.txt", "tensornet_manifest.json",
        "tokenizer.json",
    }  # fmt: skip
    for name in ("README.md", "onnx/notes.txt", "tokenizer.json"):
        assert copied[name] == contents(source)[name]
    assert th.verify_manifest(tmp_path / "ours") == 5


def test_manifest_finds_every_change(tmp_path: Path) -> None:
    out = tmp_path / "ours"
    th.compress_checkpoint(save("llama", tmp_path / "dense"), out, LINEARS)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    (out / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"model\.safetensors, tokenizer\.json missing or not as written"):
        th.verify_manifest(out)


def test_names_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    """GPT-2 on the hub is stored without `transformer.` and with masks that are no parameters."""
    source = save("gpt2", tmp_path / "dense", shard="1GB")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = th.compress_checkpoint(source, tmp_path / "ours", LINEARS)
    th.compress_checkpoint(save("gpt2", tmp_path / "full"), tmp_path / "reference", LINEARS)
    assert report.left_out == ("h.0.attn.bias",)
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (
        tmp_path / "reference/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "of_tomorrow", "architectures": ["TomorrowForCausalLM"]},
        {"model_type": "of_tomorrow"},
        {"model_type": "llama"},
        {"model_type": "llama", "architectures": ["of.tomorrow"]},
        {"model_type": "llama", "architectures": ["LlamaConfig"]},
        {"model_type": ["llama"], "architectures": [["LlamaForCausalLM"]]},
    ],
)
def test_a_model_that_transformers_lacks_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    """Nothing is guessed from the names of tensors."""
    tensors = {"embed_tokens.weight": torch.ones(30, 16), "layers.0.mlp.up_proj.weight": torch.ones(64, 16)}
    source = save_tensors(tensors, tmp_path / "dense", config)
    with pytest.raises(FormatError, match=r"names the class .* does not have.*convert .*tensornet\.compress"):
        th.compress_checkpoint(source, tmp_path / "ours", LINEARS)
    assert os.listdir(tmp_path) == ["dense"]


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        ((3, 3, 3), [[0, 1, 2]]),
        ((6, 6, 2, 6, 2, 2), [[0], [1, 2], [3, 4, 5]]),
        ((4, 20, 4), [[1], [0, 2]]),  # what is larger than a file has one of its own
        ((0,), [[0]]),
        ((10, 0, 10), [[0, 1], [2]]),
    ],
)
def test_files_are_filled_as_transformers_fills_them(sizes: tuple[int, ...], files: list[list[int]]) -> None:
    parts = [Part(str(k), {"x": Slice(Path("file"), "U8", (n,), 0, n)}) for k, n in enumerate(sizes)]
    made = layout(parts, 10)
    assert [[int(part.key) for part in content] for content in made.values()] == files
    names = [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)]
    assert list(made) == (names if len(files) > 1 else ["model.safetensors"])


def test_a_given_plan_is_carried_out(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "dense")
    config = tn.CompressionConfig(target_modules="*.mlp.*", topology="mpo", max_bond=4)
    plan = tn.plan(th.load(source), config)
    report = th.compress_checkpoint(source, tmp_path / "ours", tn.CompressionConfig(**HALF), plan=plan)
    assert [(x.name, x.topology) for x in report.compression.plan] == [(x.name, x.topology) for x in plan]
    other = tn.plan(ARCHITECTURES["gpt2"].dense, tn.CompressionConfig(**HALF))
    with pytest.raises(TargetError, match="names a layer"):
        th.compress_checkpoint(source, tmp_path / "other", tn.CompressionConfig(**HALF), plan=other)


def test_the_report_says_what_it_took(tmp_path: Path) -> None:
    report = th.compress_checkpoint(save("gpt2", tmp_path / "dense"), tmp_path / "ours", LINEARS)
    text, data = str(report), report.to_dict()
    assert "peak memory" in text
    assert "largest tensor" in text
    assert json.loads(json.dumps(data))["param_ratio"] == report.param_ratio
    assert data["largest_tensor"] == 101 * 24 * 4
    assert data["peak_memory"] > 50e6
    assert data["files"] == {k: v for k, v in contents(tmp_path / "ours").items() if "manifest" not in k}
    before = sum(x.numel() for x in weights(tmp_path / "dense").values())
    assert report.compression.model_params_before == before
    assert report.compression.model_params_after == sum(
        x.numel() for x in weights(tmp_path / "ours").values()
    )


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "dense")
    with pytest.raises(DestinationError, match="source"):
        th.compress_checkpoint(source, source, LINEARS, force=True)
    with pytest.raises(DestinationError, match="inside the source"):
        th.compress_checkpoint(source, source / "out", LINEARS)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    with pytest.raises(DestinationError, match="exists already"):
        th.compress_checkpoint(source, tmp_path / "taken", LINEARS)
    th.compress_checkpoint(source, tmp_path / "taken", LINEARS, force=True)
    with pytest.raises(FormatError, match="compressed already"):
        th.compress_checkpoint(tmp_path / "taken", tmp_path / "again", LINEARS)
    with pytest.raises(ValueError, match="workers"):
        th.compress_checkpoint(source, tmp_path / "none", LINEARS, workers=0)
    assert sorted(os.listdir(tmp_path)) == ["dense", "taken"]


def test_written_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(4, 1).double(),
        "ä\n.weight": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2).half(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "counter": torch.tensor(3),
        "mask": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    slices = read_header(tmp_path / "theirs")
    assert all(torch.equal(load_slice(part), tensors[name]) for name, part in slices.items())
    write_shard(ShardTask(tmp_path / "again", slices))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_dtype_that_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "file")
    with pytest.raises(FormatError, match=r"holds a tensor of dtype F8_E4M3.*mapped are F64.*save it in"):
        load_slice(read_header(tmp_path / "file")["x"])


def test_a_mapped_tensor_does_not_write_to_its_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"x": torch.ones(1000)})
    before = (tmp_path / "file").read_bytes()
    load_slice(read_header(tmp_path / "file")["x"]).zero_()
    assert (tmp_path / "file").read_bytes() == before
