"""Compressed models generate the same tokens, however one goes about it."""

from __future__ import annotations

import pytest
import torch
from hf_models import ARCHITECTURES, Architecture
from transformers import PreTrainedModel


def generate(model: PreTrainedModel, architecture: Architecture, **options: object) -> list[list[int]]:
    inputs = architecture.inputs()
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    fixed = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    return model.generate(**asked, **fixed, **options).tolist()


@pytest.mark.parametrize("name", ["gpt2", "t5_gated", "llama"])
def test_with_and_without_cache_by_beams_and_sampling(name: str) -> None:
    architecture = ARCHITECTURES[name]
    # In float32 ties of rounding would say nothing of the cache.
    model, dense = architecture.compressed.double(), architecture.dense.double()
    expected = generate(dense, architecture)
    assert generate(model, architecture) == generate(model, architecture, use_cache=False) == expected
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
