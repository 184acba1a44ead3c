"""Every tensor of the source is accounted for, and what is left out is named before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded_folders import save

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.manifest import why_left_out

CONFIG = tn.CompressionConfig(target_modules=["*.mlp.*"], formats=("int8",), method="nearest")


def with_draft_head(folder: Path) -> Path:
    source = save("llama", folder, shard="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.99.eh_proj.weight"] = torch.ones(8, 16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_every_tensor_is_listed_with_what_became_of_it(tmp_path: Path) -> None:
    source = with_draft_head(tmp_path / "dense")
    with pytest.warns(UserWarning, match="draft head"):
        done = th.compress_folder(source, tmp_path / "small", CONFIG)
    stored = load_file(source / "model.safetensors")
    listed = {x.name: x for x in done.tensors}
    assert {x.name: (x.shape, x.num_bytes) for x in done.tensors} == {
        name: (tuple(x.shape), x.nbytes) for name, x in stored.items()
    }
    schemes = {f"{layer.name}.weight": layer.scheme for layer in done.plan}
    for name, tensor in listed.items():
        expected = "left out" if "eh_proj" in name else schemes.get(name, "dense")
        assert tensor.became == expected, name
    assert listed["model.layers.99.eh_proj.weight"].reason == "draft head (MTP)"
    assert "left out" in str(done)


def test_a_plan_names_what_would_be_left_out(tmp_path: Path) -> None:
    source = with_draft_head(tmp_path / "dense")
    with pytest.warns(UserWarning, match=r"draft head.*eh_proj"):
        th.plan_folder(source, CONFIG)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.4.self_attn.q_proj.weight", "draft"),
        ("mtp.fc.weight", "draft"),
        ("visual.blocks.0.attn.qkv.weight", "vision"),
        ("h.0.attn.bias", "constant"),
        ("model.extra.weight", "not in the model"),
    ],
)
def test_kinds_of_tensors_are_told_apart(name: str, kind: str) -> None:
    assert kind in why_left_out(name, 4)
