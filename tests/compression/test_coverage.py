"""Reports say which share of a model's parameters was considered, and which modules hold the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folder_runs import compress_files
from sharded_folders import HALF, save
from torch import nn

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.coverage import measure_coverage
from tensornet.nn.targets import list_weights

CONFIG = tn.CompressionConfig(param_ratio=0.5, method="svd")


class Mixed(nn.Module):
    """Every class of parameter that a report tells apart, with a tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.inner = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12, bias=False))
        self.norm = nn.LayerNorm(12)
        self.depthwise = nn.Conv1d(12, 12, 3, groups=12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.table.weight


def test_every_parameter_is_counted_once() -> None:
    model = Mixed()
    coverage = tn.compress(model, CONFIG, progress=False).coverage
    assert coverage.total == sum(p.numel() for p in Mixed().parameters())
    assert coverage.covered == 2 * 12 * 24
    assert coverage.excluded == {"Embedding": 11 * 12}  # the head is tied to it
    assert coverage.unknown == {
        "Conv1d (groups too small for low rank)": 12 * 3 + 12,
        "LayerNorm": 24,
        "biases": 24,
    }


def test_the_configuration_and_missing_kinds_are_told_apart() -> None:
    config = tn.CompressionConfig(param_ratio=0.5, method="svd", target_modules=["inner.0"])
    coverage = tn.compress(Mixed(), config, progress=False).coverage
    assert coverage.excluded == {"Linear": 24 * 12, "Embedding": 11 * 12}
    assert coverage.covered == 24 * 12
    assert "excluded: Linear 288, Embedding 132; skipped: Conv1d (groups too" in str(coverage)


def test_layers_that_cannot_be_compressed_are_not_left_out_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.read = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.table = nn.Embedding(5, 8, max_norm=1.0)
            self.head = nn.Linear(8, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x) @ self.read.weight)

    reasons = {"read": "weight read outside"}
    monkeypatch.setattr("tensornet.nn.targets.dense_layers", lambda model: reasons)
    with pytest.warns(UserWarning, match="read"):
        coverage = tn.compress(Reader(), CONFIG, calibration=[torch.randn(4, 8)], progress=False).coverage
    assert coverage.excluded == {}
    assert coverage.unknown == {
        "Linear (weight read outside)": 64,
        "Linear (tied to Embedding)": 40,
        "biases": 8,
    }


def test_a_model_on_the_meta_device_is_counted() -> None:
    with torch.device("meta"):
        assert measure_coverage(list_weights(Mixed()), ["inner.0"]).covered == 24 * 12


def test_checkpoints_say_it_as_models_do(tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path / "source")
    config = tn.CompressionConfig(**HALF, method="svd")
    streamed = compress_files(folder, tmp_path / "made", config)
    loaded = th.load(folder)
    coverage = tn.compress(loaded, config, progress=False).coverage
    assert streamed.coverage == coverage
    assert str(coverage).removeprefix("covers ") in str(streamed)
    assert coverage.excluded.keys() == {"Embedding"}
    assert coverage.unknown.keys() == {"LayerNorm", "biases"}


@pytest.mark.slow
def test_experts_of_transformers_need_the_plugin() -> None:
    """Without `import tensornet_hf`, the report says what to import; with it, the experts are covered."""
    code = """
import tensornet as tn
{plugin}
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, head_dim=16)
heads = dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_experts=4)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads))
config = tn.CompressionConfig(formats=("int8",), method="nearest")
print(tn.compress(model, config, progress=False).coverage)
"""
    printed = [
        subprocess.run(
            [sys.executable, "-c", code.format(plugin=x)], check=True, capture_output=True, text=True
        )
        for x in ("", "import tensornet_hf")
    ]
    hint = "Qwen3MoeExperts (import tensornet_hf to compress it)"
    assert hint in printed[0].stdout
    assert "Qwen3MoeExperts" not in printed[1].stdout
