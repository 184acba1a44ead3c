"""Folders of sentence encoders, wrapped models, layers replaced by hand, models compressed in part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES, logits
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError

GPT2 = ARCHITECTURES["gpt2"]
CONFIG = tn.CompressionConfig(max_bond=4, topology="low_rank", objective="weight")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """As sentence-transformers writes it: the model, and modules in folders of their own."""
    folder = tmp_path / "encoder"
    GPT2.dense.save_pretrained(folder)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense", "unnamed"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'"{name}"')
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def test_modules_of_sentence_encoders_are_copied(encoder: Path, tmp_path: Path) -> None:
    made = th.save(th.load(encoder), tmp_path / "made", source=encoder)
    names = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.parent != made}
    assert names == {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert (made / "2_Dense" / "model.safetensors").read_bytes() == b"weights"
    for content in ("[1]", '[{"path": "../.."}]', "{"):
        (encoder / "modules.json").write_text(content)
        with pytest.raises(FormatError, match=r"does not list modules|outside the folder"):
            th.save(th.load(encoder), tmp_path / "other", source=encoder)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda x: torch.compile(x, backend="eager")])
def test_wrapped_models_are_saved_without_the_wrapper(wrap: Any, tmp_path: Path) -> None:
    model = GPT2.dense
    wrapped = nn.DataParallel(wrap(model))
    tn.compress(wrapped, CONFIG, progress=False)
    loaded = th.load(th.save(wrapped, tmp_path / "made"))
    assert torch.equal(logits(loaded, GPT2), logits(model, GPT2))


@pytest.mark.parametrize("value", [nn.Linear(3, 3), nn.DataParallel(nn.Linear(3, 3)), "folder"])
def test_what_is_no_model_of_transformers_is_not_saved(value: Any, tmp_path: Path) -> None:
    kind = "str" if isinstance(value, str) else "Linear"
    with pytest.raises(TypeError, match=kind):
        th.save(value, tmp_path / "made")


def replace_by_hand(model: PreTrainedModel) -> None:
    mlp = model.transformer.h[0].mlp
    mlp.c_fc = tn.nn.TensorNetworkLinear.from_linear(mlp.c_fc, topology="low_rank", max_bond=4)


def replace_the_tied_table(model: PreTrainedModel) -> None:
    table = model.transformer.wte
    model.transformer.wte = tn.nn.MPOEmbedding.from_embedding(table, max_bond=4)


def compress_part(name: str) -> Callable[[PreTrainedModel], object]:
    return lambda model: tn.compress(model.get_submodule(name), CONFIG, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        replace_by_hand,
        replace_the_tied_table,
        *map(compress_part, ("transformer", "transformer.h", "transformer.h.0.mlp")),
    ],
)
def test_layers_replaced_by_hand_or_in_a_part(
    change: Callable[[PreTrainedModel], object], tmp_path: Path
) -> None:
    model = GPT2.dense
    change(model)
    th.save(model, tmp_path / "made")
    for load in (AutoModelForCausalLM.from_pretrained, th.load):
        assert torch.equal(logits(load(tmp_path / "made").eval(), GPT2), logits(model.eval(), GPT2))


def test_a_part_is_compressed_after_the_model(tmp_path: Path) -> None:
    model = GPT2.dense
    tn.compress(model, dataclasses.replace(CONFIG, target_modules="*.mlp.*"), progress=False)
    tn.compress(model.transformer.h[0].attn, CONFIG, progress=False)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(th.load(tmp_path / "model"), GPT2), logits(model, GPT2))
