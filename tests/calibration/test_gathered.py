"""Padding does not count where experts read tokens that a router has picked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_architectures import PAGE_ARCHITECTURES
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration.stats import CalibrationStats
from tensornet_hf.streamed_calibration import calibrate_checkpoint

LINEAR = tn.CompressionConfig(max_bond=1)


def batches(decoder: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same text without padding and with it."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (2, 6), generator=draw)
    bare = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    more = torch.zeros(2, 4, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([ids, more], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), more], 1),
        "labels": torch.cat([ids, more - 100], 1) if decoder else ids,
    }
    return bare, padded


def assert_same(found: CalibrationStats, expected: CalibrationStats) -> None:
    assert found.columns.keys() == expected.columns.keys()
    for name, moment in expected.columns.items():
        torch.testing.assert_close(found.columns[name], moment, rtol=1e-4, atol=1e-6, msg=name)
    for name, moment in expected.rows.items():
        torch.testing.assert_close(found.rows[name], moment, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["DBRX", "JetMoE", "Switch Transformers", "NLLB-MoE", "Mixtral"])
@pytest.mark.filterwarnings("ignore:Left dense")
def test_padding_does_not_count(name: str) -> None:
    model = PAGE_ARCHITECTURES[name].dense
    bare, padded = batches(not model.config.is_encoder_decoder)
    assert_same(tn.calibrate(model, [padded], config=LINEAR), tn.calibrate(model, [bare], config=LINEAR))


def test_streaming_agrees(tmp_path: Path) -> None:
    model = PAGE_ARCHITECTURES["DBRX"].dense
    model.save_pretrained(tmp_path / "dense")
    bare, padded = batches(decoder=True)
    found = calibrate_checkpoint(tmp_path / "dense", [padded], tmp_path / "stats", config=LINEAR)
    assert_same(found, tn.calibrate(model, [bare], config=LINEAR))


class Sorted(nn.Module):
    """Two experts; the first reads all tokens in another order, the second padding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in "ab"
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 4)
        first, second = (
            m["down"](m["up"](r).tanh()) for m, r in zip(self.experts, (rows.flip(0), rows[2:3]), strict=True)
        )
        return (first.flip(0) + second.sum() * 0).reshape(x.shape)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Sorted(), nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def test_order_and_experts_that_got_nothing_but_padding() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": x, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    model = Model()
    stats = tn.calibrate(model, [batch], config=LINEAR)
    tokens = x[mask == 1]
    torch.testing.assert_close(stats.columns["block.experts.0.up"], tokens.T @ tokens / 3)
    inner = model.block.experts[0]["up"](tokens).tanh().detach()
    torch.testing.assert_close(stats.columns["block.experts.0.down"], inner.T @ inner / 3)
    assert not {"block.experts.1.up", "block.experts.1.down"} & stats.columns.keys()
    plan = tn.plan(model, tn.CompressionConfig(param_ratio=0.9), stats)  # priced as its relative is
    assert {layer.name for layer in plan} >= {"block.experts.1.up", "block.experts.1.down"}
