"""A compressed model is an ordinary object of its class: it is copied, pickled and freed like any other."""

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
from transformers import GPT2LMHeadModel

import tensornet as tn
import tensornet_hf as th

GPT2 = ARCHITECTURES["gpt2"]


@pytest.mark.slow
def test_importing_the_plugin_leaves_the_classes_of_transformers_alone() -> None:
    code = """
import transformers
from transformers.quantizers import HfQuantizer
classes = [transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.GenerationMixin,
           transformers.Trainer, transformers.GPT2LMHeadModel, HfQuantizer]
before = [dict(vars(x)) for x in classes]
import tensornet_hf
assert before == [dict(vars(x)) for x in classes]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=1200)


def test_pickles_and_copies_are_compressed_models(tmp_path: Path) -> None:
    model = GPT2.compressed
    assert type(model) is GPT2LMHeadModel
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(buffer, weights_only=False),
    )
    for number, made in enumerate(copies):
        made.save_pretrained(tmp_path / str(number))
        assert made.training == model.training
        torch.testing.assert_close(logits(th.load(tmp_path / str(number)), GPT2), logits(model, GPT2))


def test_nothing_keeps_a_model_alive() -> None:
    model = GPT2.compressed
    alive = weakref.ref(model)
    del model
    assert alive() is None


def test_another_model_of_the_class_is_not_touched(tmp_path: Path) -> None:
    dense, model = GPT2.dense, GPT2.dense
    tn.compress(model, tn.CompressionConfig(target_modules="wte", max_bond=4), progress=False)
    assert dense.resize_token_embeddings(60).num_embeddings == 60
    assert th.decompress(model).resize_token_embeddings(7).num_embeddings == 7  # a dense table again
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
