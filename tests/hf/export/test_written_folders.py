"""Packed folders that are written block by block are those that are exported from a model in memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from sharded_folders import contents
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.apply import compress_layer, with_cores
from tensornet.errors import TargetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.targets import list_weights
from tensornet_hf.checkpoint import read_dense
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.folder_writer import FolderWriter
from tensornet_hf.lazy_model import open_lazily
from tensornet_hf.streaming import PACKED

pytestmark = pytest.mark.slow  # needs the extra `export`
SIZES = {
    "vocab_size": 48, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Formats of both menus, and four that are written dense in one of them.
FORMATS = ("int4", "int4:g32", "int8", "int6", "int5", "nvfp4", "int4:g128", "int8:row", "mxfp4")


def source_of(name: str, folder: Path) -> Path:
    if name == "gpt2":
        return gpt2_path()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=name == "tied")).bfloat16()  # type: ignore[arg-type]
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    return folder


def plan_of(source: Path, target: str, name: str) -> tn.CompressionPlan:
    """Layers in the formats by turns."""
    kept = {"target_modules": "all"} if target == "mlx" and name == "tied" else {}
    config = tn.CompressionConfig(bits_per_weight=9, formats=("int8",), objective="weight", **kept)  # type: ignore[arg-type]
    data = tn.plan(th.load(source), config).to_dict()
    for k, layer in enumerate(data["layers"]):
        layer["storage"] = {"number_format": FORMATS[k % len(FORMATS)]}
    return tn.CompressionPlan.from_dict(data)


@pytest.mark.parametrize(
    ("target", "name"),
    [("compressed-tensors", "llama"), ("compressed-tensors", "tied"), ("mlx", "llama"), ("mlx", "tied"),
     ("mlx", "gpt2")],
)  # fmt: skip
def test_the_same_folder_as_an_export(target: str, name: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path / "dense")
    plan = plan_of(source, target, name)
    th.compress_checkpoint(source, tmp_path / "ours", plan, target=target)
    model = th.load(source)
    tn.compress(model, plan, progress=False)
    th.export(model, tmp_path / "theirs", target=target, source=source)
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == set()


@pytest.mark.parametrize("target", PACKED)
def test_finished_layers_are_read_back(target: str, tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "dense")
    plan, folder, model = plan_of(source, target, "llama"), read_dense(source), th.load(source)
    found, _ = PACKED[target](folder, open_lazily(folder), plan)
    writer = FolderWriter(tmp_path, found, max_shard_bytes=50_000, key="")
    targets = {x.name: x for x in list_weights(model)}
    order = random.Random(0).sample([*plan], len(plan.layers) // 2)
    put = {}
    for layer in order:
        made, error = compress_layer(targets[layer.name].matrix, layer, Weighting(), plan.rounding)
        put[layer.name] = made
        writer.put("", {layer.name: (with_cores(targets[layer.name], made), error)})
    again, read = FolderWriter(tmp_path, found, max_shard_bytes=50_000, key=""), 0
    for layer in plan:
        back = again.finished(layer)
        assert back is None or layer.name in put
        if back is not None:
            read += 1
            assert torch.equal(back[0][0].to_matrix(), put[layer.name].to_matrix())  # type: ignore[operator]
    assert read > len(put) / 2  # all that are packed


def test_what_no_target_can_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compressed-tensors, mlx"):
        th.compress_checkpoint(gpt2_path(), tmp_path / "out", tn.CompressionConfig(max_bond=1), target="onnx")
    config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
    with pytest.raises(TargetError, match="No layer can be packed"):
        th.compress_checkpoint(gpt2_path(), tmp_path / "out", config, target="mlx")
    assert not (tmp_path / "out").exists()
