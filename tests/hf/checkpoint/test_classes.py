"""Classes of transformers stay as they are: a compressed model has a subclass of its own."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hf_models import ARCHITECTURES, logits
from torch import nn
from transformers import GPT2LMHeadModel

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError

GPT2 = ARCHITECTURES["gpt2"]


def test_importing_the_plugin_changes_no_class_of_transformers() -> None:
    code = """
import transformers
from transformers.quantizers import HfQuantizer
classes = [transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.GenerationMixin,
           transformers.Trainer, transformers.GPT2LMHeadModel, HfQuantizer]
before = [dict(vars(x)) for x in classes]
import tensornet_hf, tensornet_hf.training.heal
assert before == [dict(vars(x)) for x in classes]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_a_compressed_model_has_a_class_of_the_same_name() -> None:
    model = GPT2.compressed
    assert isinstance(model, GPT2LMHeadModel)
    assert type(model) is not GPT2LMHeadModel
    assert type(model) is type(GPT2.compressed)
    for name in ("__name__", "__qualname__", "__module__", "config_class"):
        assert getattr(type(model), name) == getattr(GPT2LMHeadModel, name)
    th.decompress(model)
    assert type(model) is GPT2LMHeadModel


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_and_copies_are_compressed_models(protocol: int, tmp_path: Path) -> None:
    model = GPT2.compressed
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (
        pickle.loads(pickle.dumps(model, protocol)),
        copy.deepcopy(model),
        torch.load(buffer, weights_only=False),
    )
    for number, made in enumerate(copies):
        assert type(made) is type(model)
        assert made.training == model.training
        made.save_pretrained(tmp_path / str(number))
        assert "import tensornet_hf" in (tmp_path / str(number) / "README.md").read_text()
        torch.testing.assert_close(logits(th.load(tmp_path / str(number)), GPT2), logits(model, GPT2))


def test_a_pickle_brings_the_plugin_with_it(tmp_path: Path) -> None:
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(GPT2.compressed))
    code = f"""
import pickle, sys
model = pickle.loads(open({str(tmp_path / "model.pickle")!r}, "rb").read())
model.save_pretrained({str(tmp_path / "saved")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
    torch.testing.assert_close(logits(th.load(tmp_path / "saved"), GPT2), logits(GPT2.compressed, GPT2))


def test_a_class_derived_once_more_stays() -> None:
    """As `fully_shard` derives one."""
    model = GPT2.compressed
    derived = type("FSDPGPT2LMHeadModel", (type(model),), {})
    model.__class__ = derived
    th.decompress(model)
    assert type(model) is derived
    assert model.resize_token_embeddings(7).num_embeddings == 7  # a dense table again


def test_the_class_keeps_no_model_alive() -> None:
    model = GPT2.compressed
    alive = weakref.ref(model)
    del model
    assert alive() is None


def test_a_dense_model_beside_a_compressed_one_is_not_touched(tmp_path: Path) -> None:
    dense, model = GPT2.dense, GPT2.dense
    tn.compress(model, tn.CompressionConfig(target_modules="wte", max_bond=4), progress=False)
    with pytest.raises(TargetError, match="made of cores, which have no room"):
        model.resize_token_embeddings(60)
    assert isinstance(dense.resize_token_embeddings(60), nn.Embedding)
    dense.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
