"""Damaged, changing and hostile source folders: one clear error each, before anything is allocated."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded_folders import HALF, contents, save

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import BudgetError, FormatError, NonFiniteError, TargetError, TensorNetError
from tensornet_hf.streaming import run
from tensornet_hf.streaming.journal import staging_folder

CONFIG = tn.CompressionConfig(**HALF)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("faults") / "dense")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "dense")


def shard(source: Path) -> Path:
    return min(source.glob("*.safetensors"))


def refused(source: Path, match: str, error: type[Exception] = FormatError) -> None:
    """The run ends with this error and leaves neither a destination nor a trace in the source."""
    before, out = contents(source), source.parent / "out"
    with pytest.raises(error, match=match):
        th.compress_checkpoint(source, out, CONFIG)
    assert not out.exists()
    assert contents(source) == before


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- shards ----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"surplus")


def claim_a_long_header(path: Path) -> None:
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def break_the_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10] = 0
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return edit


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def huge(header: dict[str, Any]) -> None:
    first(header)["shape"] = [2**40, 2**40]


def negative(header: dict[str, Any]) -> None:
    first(header)["shape"] = [-1, -24]


def overlapping(header: dict[str, Any]) -> None:
    entry = first(header)
    length = entry["data_offsets"][1] - entry["data_offsets"][0]
    entry["data_offsets"] = [4, 4 + length]


@pytest.mark.parametrize(
    "damage",
    [
        cut, lengthen, claim_a_long_header, break_the_header, empty,
        edit_header(huge), edit_header(negative), edit_header(overlapping),
    ],
    ids=["cut", "longer", "long header", "no JSON", "empty", "huge shape", "negative shape", "overlap"],
)  # fmt: skip
def test_damaged_shard(source: Path, damage: Callable[[Path], None]) -> None:
    damage(shard(source))
    refused(source, rf"{shard(source).name} is truncated or damaged")


def test_missing_shard(source: Path) -> None:
    name = shard(source).name
    shard(source).unlink()
    refused(source, f"lacks {name}")


def test_shard_of_other_tensors(source: Path) -> None:
    files = sorted(source.glob("*.safetensors"))
    shutil.copyfile(files[1], files[0])
    refused(source, "both store|says that .* holds")


def test_not_a_number(source: Path) -> None:
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if (name := "model.layers.1.mlp.up_proj.weight") in tensors:
            tensors[name][3, 5] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
    refused(source, r"'model\.layers\.1\.mlp\.up_proj' holds 1 NaN or infinite value", NonFiniteError)


def test_changed_between_two_runs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source.parent / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "_write_shards", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            th.compress_checkpoint(source, out, CONFIG)
    name = shard(source).name
    tensors = load_file(shard(source))
    save_file({k: v + 1 for k, v in tensors.items()}, shard(source), metadata={"format": "pt"})
    refused(source, f"{name} in .* changed since the interrupted run.*resume=False")
    report = th.compress_checkpoint(source, out, CONFIG, resume=False)
    assert report.resumed == 0


@pytest.mark.parametrize("change", ["touched", "cut", "removed"])
def test_changed_during_a_run(source: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    original = run._write_shards

    def write(*arguments: Any) -> Any:
        if change == "touched":
            os.utime(shard(source))
        elif change == "cut":
            shard(source).write_bytes(shard(source).read_bytes()[:2000])
        else:
            shard(source).unlink()
        return original(*arguments)

    monkeypatch.setattr(run, "_write_shards", write)
    with pytest.raises(FormatError, match=r"changed since this run began|become shorter|Reading .* failed"):
        th.compress_checkpoint(source, source.parent / "out", CONFIG)
    assert not (source.parent / "out").exists()


# --- index and links -------------------------------------------------------------------------------


def test_index_names_an_absent_tensor(source: Path) -> None:
    name = shard(source).name
    edit_json(source / INDEX, lambda x: x["weight_map"].update(ghost=name))
    refused(source, f"{name} holds 'ghost', and it does not")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/hosts", "sub/x.safetensors", "", "model.bin"]
)
def test_index_that_leads_out_of_the_folder(source: Path, name: str) -> None:
    save_file({"ghost": torch.ones(2)}, source.parent / "secret.safetensors")
    edit_json(source / INDEX, lambda x: x["weight_map"].update(ghost=name))
    refused(source, "nothing outside the folder")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\0", "[" * 10**5]
)
def test_index_that_is_none(source: Path, content: str) -> None:
    (source / INDEX).write_text(content)
    refused(source, "weight_map|JSON")


@pytest.mark.parametrize("name", ["shard", "tokenizer.json", "notes"])
def test_link_out_of_the_folder(source: Path, name: str) -> None:
    path = shard(source) if name == "shard" else source / name
    elsewhere = source.parent / "elsewhere"
    if name == "notes":
        elsewhere.mkdir()
    else:
        shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(FormatError, match=r"is a link to .*elsewhere, outside the folder"):
        th.compress_checkpoint(source, source.parent / "out", CONFIG)
    assert not (source.parent / "out").exists()


def test_links_of_the_hub_cache_are_followed(pristine: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(pristine.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    th.compress_checkpoint(snapshot, tmp_path / "out", CONFIG)
    th.compress_checkpoint(pristine, tmp_path / "reference", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


# --- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_hidden_layers", -1, "num_hidden_layers"),
        ("hidden_size", 10**15, "hidden_size"),
        ("hidden_size", 4096, "stored with shape"),
        ("hidden_size", -24, "hidden_size"),
        ("hidden_size", "24", "does not describe|stored with shape"),
        ("vocab_size", 2**30, "stored with shape"),
        ("num_attention_heads", 0, "does not describe"),
        ("intermediate_size", None, "does not describe"),
        ("num_hidden_layers", [2], "does not describe"),
        ("rope_scaling", {"num_layers": 10**12}, "num_layers"),
        ("hidden_act", "os.system", "does not describe"),
        ("quantization_config", {"quant_method": "fp8"}, "quantized or compressed already"),
        ("quantization_config", "tensornet", "quantized or compressed already"),
    ],
)
def test_hostile_configuration(source: Path, key: str, value: object, match: str) -> None:
    edit_json(source / "config.json", lambda x: x.update({key: value}))
    refused(source, match)


def test_code_is_never_run(source: Path) -> None:
    marker = source.parent / "ran"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_json(source / "config.json", lambda x: x.update(model_type="evil", auto_map=auto_map))
    refused(source, "names code to run.*never run here")
    # A class that transformers has is used, whatever the map says.
    edit_json(source / "config.json", lambda x: x.update(model_type="llama"))
    th.compress_checkpoint(source, source.parent / "out", CONFIG)
    assert not marker.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '"a"', "nul", "[" * 10**5, '{"a": ' + "9" * 5000 + "}"])
def test_configuration_that_is_none(source: Path, content: str) -> None:
    (source / "config.json").write_text(content)
    refused(source, "JSON")


def test_negative_bonds(source: Path) -> None:
    with pytest.raises(BudgetError, match="max_bond must be an integer of at least 1"):
        th.compress_checkpoint(source, source.parent / "out", tn.CompressionConfig(max_bond=-3))
    out = source.parent / "out"
    th.compress_checkpoint(source, out, CONFIG)

    def spoil(content: dict[str, Any]) -> None:
        layers = content["quantization_config"]["layers"]
        sizes = next(iter(layers.values()))["topology"]["sizes"]
        sizes["b1"] = -sizes["b1"]

    edit_json(out / "config.json", spoil)
    with pytest.raises(FormatError, match=r"label .b1. must be an integer of at least 1, got -"):
        th.load(out)


# --- folders ---------------------------------------------------------------------------------------


def test_no_model_at_all(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    refused(tmp_path / "dense", r"has no config\.json")


def test_pickles_are_not_opened(source: Path) -> None:
    for file in [*source.glob("*.safetensors"), source / INDEX]:
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused(source, r"only pytorch_model\.bin.*never opened")


def test_integer_weights(tmp_path: Path) -> None:
    file = save("llama", tmp_path / "dense", shard="1GB") / "model.safetensors"
    name = "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TargetError, match=rf"'{name}' is stored as I8; .*before quantization, or exclude"):
        th.compress_checkpoint(tmp_path / "dense", tmp_path / "out", CONFIG)


def test_a_pipe_is_not_copied(source: Path) -> None:
    os.mkfifo(source / "pipe")
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        th.compress_checkpoint(source, source.parent / "out", CONFIG)


def test_read_only_source(source: Path) -> None:
    before = {x: (x.stat().st_mtime_ns, x.stat().st_atime_ns) for x in source.parent.rglob("*")}
    for file in source.iterdir():
        file.chmod(0o444)
    source.chmod(0o555)
    out = source.parent / "out"
    th.compress_checkpoint(source, out, CONFIG)
    assert {x: x.stat().st_mtime_ns for x in before} == {x: times[0] for x, times in before.items()}
    assert os.access(out / "config.json", os.W_OK)
    source.chmod(0o755)


def test_destination_on_another_file_system(source: Path) -> None:
    """`/dev/shm` is one of its own everywhere we run; nothing is ever renamed across."""
    out = Path("/dev/shm") / f"tensornet-test-{os.getpid()}" / "new" / "out"
    try:
        th.compress_checkpoint(source, out, CONFIG)
        assert out.stat().st_dev != source.stat().st_dev
        assert th.verify_manifest(out) > 2
        assert os.listdir(out.parent) == ["out"]
    finally:
        shutil.rmtree(out.parent.parent, ignore_errors=True)


def test_destination_that_cannot_be_made(source: Path) -> None:
    (source.parent / "file").write_text("in the way")
    with pytest.raises(TensorNetError, match="file"):
        th.compress_checkpoint(source, source.parent / "file" / "out", CONFIG)


@pytest.mark.parametrize("device", ["nonsense", "", "xla:7"])
def test_a_device_that_is_not_there(source: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device={device!r} cannot be used here"):
        th.compress_checkpoint(source, source.parent / "out", CONFIG, device=device)
    assert sorted(x.name for x in source.parent.iterdir()) == ["dense"]


def test_failed_runs_keep_what_is_finished(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source.parent / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "_write_shards", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            th.compress_checkpoint(source, out, CONFIG)
    assert len(list((staging_folder(out) / "pieces").iterdir())) == 14
    assert th.compress_checkpoint(source, out, CONFIG).resumed == 14


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt
