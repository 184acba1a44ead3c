"""Every tensor of the source is accounted for, and what is left out is named before anything is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded_folders import save

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.lazy_model import open_lazily, read_source
from tensornet_hf.manifest import draft_heads, why_left_out

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


def test_draft_heads_follow_the_blocks(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "dense", shard="1GB")
    layers = th.load(source).config.num_hidden_layers
    tensors = load_file(source / "model.safetensors")
    first, second = f"model.layers.{layers}.eh_proj.weight", "mtp.layers.1.fc.weight"
    names = (first, second, "mtp.norm.weight", "extra.weight")
    tensors |= {name: torch.ones(8, 16) for name in names}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = draft_heads(open_lazily(read_source(source)))
    assert {block: sorted(x) for block, x in found.items()} == {
        layers: sorted([first, "mtp.norm.weight"]),
        layers + 1: [second],
    }


def test_draft_heads_have_eight_bits_in_a_recipe() -> None:
    recipe = th.Recipe(
        {"blk.0.attn_q.weight": "Q4_K"}, {"blk.0.attn_q.weight": 9}, 99, 0.1, "nats", drafts={2: 9}
    )
    patterns = [line.split("=") for line in recipe.text.split("\n")]
    kinds = {
        name: next((kind for pattern, kind in patterns if re.search(pattern, name)), None)
        for name in (
            "blk.0.attn_q.weight",
            "blk.2.attn_q.weight",
            "blk.2.nextn.eh_proj.weight",
            "blk.22.x.weight",
        )
    }
    assert list(kinds.values()) == ["q4_k", "q8_0", "q8_0", None]


@pytest.mark.slow  # needs the extra `gguf`
def test_a_recipe_counts_and_names_draft_heads(tmp_path: Path) -> None:
    source = Path(shutil.copytree(gpt2_path(), tmp_path / "dense"))
    options = {"calibration": "default", "calibration_tokens": 256, "formats": ("q8_0", "q4_0")}
    before = th.plan_recipe(source, max_bytes=1_300_000, **options)
    tensors = load_file(source / "model.safetensors")
    tensors |= {"mtp.fc.weight": torch.ones(64, 32), "mtp.norm.weight": torch.ones(64)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    after = th.plan_recipe(source, max_bytes=1_300_000, **options)
    block = th.load(gpt2_path()).config.num_hidden_layers
    assert after.drafts == {block: 64 * 34 + 4 * 64}
    assert any("draft head" in note for note in after.notes)
    assert before.drafts == {}
    assert after.num_bytes <= 1_300_000
