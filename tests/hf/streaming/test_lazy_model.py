"""Weights are read from their files when they are needed, for as long as needed, or there is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from hf_models import ARCHITECTURES
from mixture_models import FAMILIES, mixture
from safetensors.torch import load_file, save_file
from sharded_folders import contents, save

import tensornet as tn
import tensornet_hf as th
from tensornet.compression import road
from tensornet.compression.plan import LayerPlan
from tensornet.errors import FormatError
from tensornet.nn.unfuse import PartMatrix, unfused
from tensornet_hf.lazy_model import open_model


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_modules_are_loaded_and_given_back(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    lazy = open_model(save(name, tmp_path / "dense", dtype=torch.bfloat16))
    before = dict(lazy.model.named_parameters(remove_duplicate=False))
    loaded = th.load(tmp_path / "dense").state_dict()
    with lazy.loaded(lazy.model.modules(), dtype=dtype):
        own = dict(lazy.model.named_parameters(remove_duplicate=False))
        for key, x in own.items():
            assert x is not before[key]
            assert torch.equal(x, loaded[key].to(dtype or torch.bfloat16))
            assert x.dtype == (dtype or torch.bfloat16)
        ties = {(a, b) for a in own for b in own if before[a] is before[b]}
        assert ties == {(a, b) for a in own for b in own if own[a] is own[b]}
    after = dict(lazy.model.named_parameters(remove_duplicate=False))
    assert all(after[key] is x for key, x in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_read_one_by_one(family: str, tmp_path: Path) -> None:
    """Their stack is never made, neither in memory nor on disk."""
    mixture(family).save_pretrained(tmp_path / "dense", max_shard_size="15KB")
    lazy, whole = open_model(tmp_path / "dense"), th.load(tmp_path / "dense")
    temporary = set(os.listdir("/proc/self/fd"))
    with unfused(lazy.model), unfused(whole):
        names = [name for name, x in whole.named_modules() if isinstance(x, PartMatrix)]
        assert names
        for name in names:
            ours, theirs = lazy.model.get_submodule(name), whole.get_submodule(name)
            assert isinstance(ours, PartMatrix)
            assert isinstance(theirs, PartMatrix)
            mapped = not ours.matrix.is_meta
            with lazy.loaded([ours]):
                assert torch.equal(ours.matrix, theirs.matrix)
                others = (lazy.model.get_submodule(x) for x in names if x != name)
                assert mapped or all(x.matrix.is_meta for x in others if isinstance(x, PartMatrix))
            assert ours.matrix.is_meta != mapped
    assert set(os.listdir("/proc/self/fd")) == temporary


def test_a_file_that_changes_while_it_is_used(tmp_path: Path) -> None:
    lazy = open_model(save("llama", tmp_path / "dense"))
    (block,) = [x for name, x in lazy.model.named_modules() if name == "model.layers.1.mlp.up_proj"]
    file = lazy.origins["model.layers.1.mlp.up_proj.weight"].parts[0].file
    content = file.read_bytes()
    os.truncate(file, len(content) - 100)
    with pytest.raises(FormatError, match=f"{file.name} changed"), lazy.loaded([block]):
        pass
    assert block.weight is lazy.model.model.layers[1].mlp.up_proj.weight
    file.unlink()
    with pytest.raises(FormatError, match=f"{file.name} changed"), lazy.loaded([block]):
        pass


def test_a_dtype_that_cannot_be_read(tmp_path: Path) -> None:
    file = save("llama", tmp_path / "dense", shard="1GB") / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    lazy = open_model(tmp_path / "dense")
    match = f"{name}.weight is stored as F8_E4M3"
    with pytest.raises(FormatError, match=match), lazy.loaded(lazy.model.modules()):
        pass
    assert lazy.model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.float32


def test_damage_between_two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished stays, and the run goes on once the file is restored."""
    source, out = save("llama", tmp_path / "dense"), tmp_path / "out"
    config, original = tn.CompressionConfig(param_ratio=0.5), road.compress_alone
    plan = compress_files(source, tmp_path / "expected", config).plan
    last = open_model(source).origins["model.layers.1.mlp.down_proj.weight"].parts[0].file
    content, stat, done = last.read_bytes(), last.stat(), []

    def damage(matrix: torch.Tensor, layer: LayerPlan, *rest: Any) -> Any:
        done.append(layer.name)
        last.write_bytes(content[:-100])
        return original(matrix, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(road, "compress_alone", damage)
        with pytest.raises(FormatError, match=f"{last.name} changed"):
            compress_files(source, out, plan)
    assert not out.exists()
    assert all(name.startswith("model.layers.0.") for name in done)
    with pytest.raises(FormatError, match=f"{last.name} is truncated or damaged"):
        compress_files(source, out, plan)
    last.write_bytes(content)
    with pytest.raises(FormatError, match=f"{last.name}.*changed since the interrupted run"):
        compress_files(source, out, plan)
    os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def count(matrix: torch.Tensor, layer: LayerPlan, *rest: Any) -> Any:
        done.append(layer.name)
        return original(matrix, layer, *rest)

    monkeypatch.setattr(road, "compress_alone", count)
    compress_files(source, out, plan)
    assert len(done) == len(set(done)) == len(plan)
    assert contents(out) == contents(tmp_path / "expected")
