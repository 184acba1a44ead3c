"""Cross entropy a few tokens at a time, drawn labels, and whether a loss is that of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from hf_architectures import PAGE_ARCHITECTURES
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

import tensornet as tn
from tensornet import softmax_losses
from tensornet.calibration.losses import drawn_labels, label_losses, seeded_draws
from tensornet.nn.extension import ProvidedData

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
    data = ProvidedData([{"input_ids": torch.arange(5, 14)[None]}], "text")
    report = compress_files(tmp_path / "dense", tmp_path / "made", HALF, calibration=data)
    assert "perplexity" in str(report)


def test_labels_are_drawn_by_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_losses, "_BLOCK", 4 * 1000)
    torch.manual_seed(0)
    shares = torch.tensor([0.5, 0.0, 0.2, 0.3])
    logits = torch.stack([shares.log(), torch.full((4,), -1e9)]).expand(9000, 2, 4)[:, 0]
    drawn = drawn_labels(logits, torch.arange(1, 9000))
    assert drawn.shape == (8999,)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 8999, shares, atol=0.02, rtol=0)
    assert not bool((drawn == 1).any())


def test_draws_follow_the_global_seed_outside_of_a_calibration() -> None:
    logits, places = torch.zeros(64, 40), torch.arange(64)
    with seeded_draws():
        inside = [drawn_labels(logits, places) for _ in range(2)]
    outside = []
    for _ in range(2):
        torch.manual_seed(0)
        outside.append(drawn_labels(logits, places))
    assert not torch.equal(*inside)
    assert torch.equal(*outside)
