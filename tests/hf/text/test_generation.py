"""Compressed models generate the same tokens, however one goes about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import ARCHITECTURES, GENERATING, Architecture
from transformers import PreTrainedModel

import tensornet_hf as th

each = pytest.mark.parametrize("architecture", GENERATING, ids=lambda a: a.name)


def generate(model: PreTrainedModel, architecture: Architecture, **options: object) -> list[list[int]]:
    inputs = architecture.inputs()
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    fixed = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    return model.generate(**asked, **fixed, **options).tolist()


@pytest.mark.slow
@each
def test_with_and_without_cache_and_after_loading(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.compressed.to(
        torch.float64
    )  # ties of float32 rounding would say nothing of the cache
    expected = generate(model, architecture)
    assert generate(model, architecture, use_cache=False) == expected
    assert generate(architecture.dense.to(torch.float64), architecture) == expected
    model.save_pretrained(tmp_path)
    assert generate(th.load(tmp_path), architecture) == expected


def test_beams_and_sampling() -> None:
    architecture = ARCHITECTURES["gpt2"]
    model, dense = architecture.compressed.double(), architecture.dense.double()
    assert generate(model, architecture, num_beams=3) == generate(dense, architecture, num_beams=3)
    drawn = []
    for each_model in (model, dense):
        torch.manual_seed(0)
        inputs = architecture.inputs()["input_ids"]
        drawn.append(each_model.generate(inputs, do_sample=True, max_new_tokens=8).tolist())
    assert drawn[0] == drawn[1]


def test_static_cache() -> None:
    architecture = ARCHITECTURES["llama"]
    model = architecture.compressed.double()
    static = generate(model, architecture, cache_implementation="static", disable_compile=True)
    assert static == generate(model, architecture)
