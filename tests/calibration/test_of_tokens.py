"""A perplexity is told only where the loss is the cross entropy of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_architectures import PAGE_ARCHITECTURES
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

import tensornet as tn
import tensornet_hf as th
from tensornet.calibration.losses import label_losses
from tensornet_hf.streamed_calibration import calibrate_checkpoint

HALF = tn.CompressionConfig(param_ratio=0.5)


class Letters(nn.Module):
    """A language model of plain PyTorch, with more positions than tokens."""

    def __init__(self, classes: int = 40) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(40, 8), nn.Embedding(64, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.tokens(x) + self.places.weight[: x.shape[1]]).tanh())


def text(labels: int = 40) -> dict[str, Tensor]:
    return {"x": torch.randint(0, 40, (4, 9)), "labels": torch.randint(0, labels, (4, 9))}


def tagger() -> nn.Module:
    """As many classes as BERT has types of segments, which is a table as well."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForTokenClassification(BertConfig(vocab_size=50, num_labels=2, **size))


def image() -> dict[str, Tensor]:
    return PAGE_ARCHITECTURES["ViT"].batch(labels=True)


@pytest.mark.parametrize(
    ("make", "batch", "expected"),
    [
        (Letters, text(), True),
        (lambda: Letters(7), text(7), False),
        (tagger, {"input_ids": torch.ones(2, 5).long(), "labels": torch.ones(2, 5).long()}, False),
        (lambda: PAGE_ARCHITECTURES["GPT-2"].dense, {"input_ids": torch.arange(5, 14)[None]}, True),
        (lambda: PAGE_ARCHITECTURES["T5"].dense, PAGE_ARCHITECTURES["T5"].batch(labels=True), True),
        (lambda: PAGE_ARCHITECTURES["Whisper"].dense, PAGE_ARCHITECTURES["Whisper"].batch(labels=True), True),
        (lambda: PAGE_ARCHITECTURES["Gemma 3"].dense, PAGE_ARCHITECTURES["Gemma 3"].batch(labels=True), True),
        (lambda: PAGE_ARCHITECTURES["ViT"].dense, image(), False),
    ],
)
def test_a_loss_of_tokens_is_recognised(make: Any, batch: dict[str, Tensor], expected: bool) -> None:
    torch.manual_seed(0)
    model = make()
    selection = tn.nn.targets.LayerSelection()
    stats = tn.calibrate(model, [batch], config=selection)
    assert stats.of_tokens is expected
    plan = tn.plan(model, HALF, stats)
    assert ("perplexity" in str(plan)) is expected
    assert (plan.predicted_perplexity is not None) is expected


def test_a_loss_of_ones_own_is_not_said_to_be_of_tokens() -> None:
    assert not tn.calibrate(Letters(), [text()], loss_fn=lambda m, b: m(b["x"]).square().mean(-1)).of_tokens
    assert tn.calibrate(Letters(), [text()], loss_fn=label_losses).of_tokens


def test_streaming_agrees(tmp_path: Path) -> None:
    PAGE_ARCHITECTURES["Llama"].dense.save_pretrained(tmp_path / "dense")
    batches = [{"input_ids": torch.arange(5, 14)[None]}]
    assert calibrate_checkpoint(tmp_path / "dense", batches, tmp_path / "stats", config=HALF).of_tokens
    report = th.compress_checkpoint(tmp_path / "dense", tmp_path / "made", HALF, stats=tmp_path / "stats")
    assert "perplexity" in str(report)
