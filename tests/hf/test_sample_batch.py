"""Every architecture, or each model inside it, runs on the batch that is made from its configuration."""

from __future__ import annotations

import pytest
import torch
from hf_architectures import PAGE_ARCHITECTURES
from transformers import PreTrainedModel

import tensornet_hf  # noqa: F401 (registers its extension)
from tensornet.nn.extension import sample_batch

#: Vision towers that take patches of their own layout, and the reason why Llama 4 fails without us as well.
NO_BATCH = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")
FAILS_ON_TEXT = {"Llama 4": AttributeError}
FEW = ("GPT-2", "T5", "Whisper", "Speech2Text", "CLIP", "SigLIP 2", "LLaVA", "Wav2Vec2", "SAM")


@pytest.mark.parametrize("name", FEW)
def test_a_batch_reaches_every_model_inside(name: str) -> None:
    model = PAGE_ARCHITECTURES[name].dense.eval()
    parts = {id(part): part for part in model.modules() if isinstance(part, PreTrainedModel)}
    reached: set[int] = set()
    for part in parts.values():
        part.register_forward_pre_hook(lambda part, args: reached.add(id(part)))
    for key, part in parts.items():
        batch = sample_batch(part)
        if key in reached or (batch is None and name in NO_BATCH):
            continue
        assert batch is not None, type(part)
        try:
            with torch.no_grad():
                part(**batch)
        except FAILS_ON_TEXT.get(name, ()):
            continue


def test_other_models_have_no_batch() -> None:
    assert sample_batch(torch.nn.Linear(2, 2)) is None
