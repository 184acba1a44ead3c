"""Files that are laid out first and filled tensor by tensor are those that `save_pretrained` writes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_models import ARCHITECTURES
from mixture_models import FAMILIES, mixture
from sharded_folders import HALF, save

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.apply import compress_layer, with_cores
from tensornet.errors import DestinationError, FormatError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.targets import list_weights
from tensornet_hf.checkpoint import read_dense
from tensornet_hf.folder_writer import FolderWriter, planned_contents
from tensornet_hf.lazy_model import open_lazily
from tensornet_hf.streaming import staging_folder

#: Plain cores in every layer, pivoted cores, integers, and integers of tied embeddings.
CONFIGS = {
    "everything": tn.CompressionConfig(target_modules="all", topology="mpo", param_ratio=0.6),
    "pivoted": tn.CompressionConfig(pivoted=True, objective="weight", **HALF),
    "integers": tn.CompressionConfig(bits_per_weight=5, formats=("int8", "int4"), objective="weight"),
    "tied integers": tn.CompressionConfig(
        target_modules="all", bits_per_weight=8, formats=("int6",), objective="weight"
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["gpt2", "t5_gated"])
def test_the_same_shards(name: str, config: tn.CompressionConfig, tmp_path: Path) -> None:
    source = save(name, tmp_path / "dense")
    th.compress_checkpoint(source, tmp_path / "ours", config, max_shard_bytes=7_000)
    model = th.load(source)
    tn.compress(model, config, progress=False)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=7_000)
    ours, theirs = ({x.name: x for x in (tmp_path / y).glob("*.safetensors")} for y in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert len(ours) > 2
    assert all(x.read_bytes() == theirs[file].read_bytes() for file, x in ours.items())
    found, expected = (
        json.loads((tmp_path / x / "model.safetensors.index.json").read_text()) for x in ("ours", "theirs")
    )
    assert found["weight_map"] == expected["weight_map"]
    assert found["metadata"]["total_size"] == expected["metadata"]["total_size"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_of_many(family: str, tmp_path: Path) -> None:
    """The other matrices of its stack are stored one by one, and other stacks as they are."""
    mixture(family).save_pretrained(tmp_path / "dense")
    name = "re:.*layers.0.mlp.experts.1.*"
    config = tn.CompressionConfig(target_modules=[name], param_ratio=0.5, objective="weight")
    th.compress_checkpoint(tmp_path / "dense", tmp_path / "ours", config)
    model = th.load(tmp_path / "dense")
    tn.compress(model, config, progress=False)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (tmp_path / x / "model.safetensors" for x in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_finished_layers_are_read_back(config: tn.CompressionConfig, tmp_path: Path) -> None:
    source = save("gpt2", tmp_path / "dense")
    folder, model = read_dense(source), th.load(source)
    plan = tn.plan(model, config)
    found = planned_contents(folder, open_lazily(folder), plan)
    key = {"max_shard_bytes": 7_000, "key": "a"}
    writer, order = FolderWriter(tmp_path, found, **key), list(plan)  # type: ignore[arg-type]
    targets = {target.name: target for target in list_weights(model)}
    random.Random(0).shuffle(order)
    put = {}
    for layer in order[: len(order) // 2]:
        made, error = compress_layer(targets[layer.name].matrix, layer, Weighting(), plan.rounding)
        put[layer.name] = with_cores(targets[layer.name], made), error
        writer.put("", {layer.name: put[layer.name]})
    again = FolderWriter(tmp_path, found, **key)  # type: ignore[arg-type]
    for layer in plan:
        back = again.finished(layer)
        assert (back is not None) == (layer.name in put)
        if back is None:
            continue
        modules, error = put[layer.name]
        assert back[1] == error
        for new, old in zip(back[0], modules, strict=True):
            assert type(new) is type(old)
            assert torch.equal(new.to_matrix(), old.to_matrix())  # type: ignore[operator]
            assert new.stored.keys() == old.stored.keys()  # type: ignore[operator,union-attr]
        first = [next(iter(x.stored.values())) for x in back[0]]  # type: ignore[operator]
        assert all(x is first[0] for x in first)
    with pytest.raises(ValueError, match="not been written"):
        again.finish()
    with pytest.raises(FormatError, match="other options"):
        FolderWriter(tmp_path, found, max_shard_bytes=7_000, key="b")


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save("llama", tmp_path / "dense"), tmp_path / "out"
    config = tn.CompressionConfig(**HALF)
    th.compress_checkpoint(source, tmp_path / "expected", config)
    (file,) = (tmp_path / "expected").glob("*.safetensors")
    need = file.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
        with pytest.raises(DestinationError, match="Free some space"):
            th.compress_checkpoint(source, out, config)
        assert not [*staging_folder(out).rglob("*.safetensors")]
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need))
        th.compress_checkpoint(source, out, config)
    assert ARCHITECTURES["llama"].dense.config.vocab_size == th.load(out).config.vocab_size
