"""Files that are laid out first and filled tensor by tensor are those that `save_pretrained` writes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from folder_runs import compress_files
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
from tensornet_hf.file_sink import FileSink, PlannedModel
from tensornet_hf.lazy_model import open_lazily
from tensornet_hf.model_folder import lay_out_folder
from tensornet_hf.staging import staging_folder

#: Plain cores in every layer, integers, and integers of tied embeddings.
CONFIGS = {
    "everything": tn.CompressionConfig(target_modules="all", topology="mpo", param_ratio=0.6),
    "integers": tn.CompressionConfig(bits_per_weight=5, formats=("int8", "int4"), method="nearest"),
    "tied integers": tn.CompressionConfig(
        target_modules="all", bits_per_weight=8, formats=("int6",), method="nearest"
    ),
}


@pytest.mark.parametrize(("name", "config"), [*(("gpt2", x) for x in CONFIGS), ("t5_gated", "tied integers")])
def test_the_same_shards(name: str, config: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "dense")
    compress_files(source, tmp_path / "ours", CONFIGS[config], max_shard_bytes=7_000)
    model = th.load(source)
    tn.compress(model, CONFIGS[config], progress=False)
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
    config = tn.CompressionConfig(target_modules=[name], param_ratio=0.5, method="svd")
    compress_files(tmp_path / "dense", tmp_path / "ours", config)
    model = th.load(tmp_path / "dense")
    tn.compress(model, config, progress=False)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (tmp_path / x / "model.safetensors" for x in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_interrupted_sink_knows_what_was_written(
    config: tn.CompressionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save("gpt2", tmp_path / "dense")
    model, plan = th.load(source), tn.plan(th.load(source), config)

    def opened(key: str = "a") -> FileSink:
        planned = PlannedModel.of(open_lazily(read_dense(source)), plan, max_shard_bytes=7_000)
        return FileSink(lay_out_folder(planned), tmp_path / "made", tmp_path, key=key)

    sink, order = opened(), [x for x in plan if x.topology is not None]
    targets = {target.name: target for target in list_weights(model)}
    random.Random(0).shuffle(order)
    put = {}
    for layer in order:
        made, error = compress_layer(targets[layer.name].matrix, layer, Weighting(), plan.rounding)
        put[layer.name] = with_cores(targets[layer.name], made), error
    assert list(tmp_path.iterdir()) == [source]  # nothing is reserved before the first layer is there
    half = {x.name for x in order[: len(order) // 2]}
    for name in half:
        sink.put("", {name: put[name]})
    with monkeypatch.context() as patch:  # the room of its files is reserved already
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        again = opened()
    assert {x.name for x in order if again.written(x.name)} == half
    assert {name: again.errors[name] for name in half} == {name: put[name][1] for name in half}
    with pytest.raises(ValueError, match="not been written"):
        again.finish()
    with pytest.raises(FormatError, match="other options"):
        opened("b")
    again.put("", {name: x for name, x in put.items() if name not in half})
    (again.out / ".config.json.1-ab.tmp").touch()  # from a run that was killed while it wrote this file
    again.finish()
    assert not [*(tmp_path / "made").glob("*.tmp")]
    tn.apply_plan(model, plan)
    found = th.load(tmp_path / "made").state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(found[name], x)


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save("llama", tmp_path / "dense"), tmp_path / "out"
    config = tn.CompressionConfig(**HALF)
    compress_files(source, tmp_path / "expected", config)
    (file,) = (tmp_path / "expected").glob("*.safetensors")
    need = file.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
        with pytest.raises(DestinationError, match="Free some space"):
            compress_files(source, out, config)
        assert not [*staging_folder(out).rglob("*.safetensors")]
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need))
        compress_files(source, out, config)
    assert ARCHITECTURES["llama"].dense.config.vocab_size == th.load(out).config.vocab_size
