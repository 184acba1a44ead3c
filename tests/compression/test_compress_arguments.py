"""What callers may get wrong with compress, and the states they may call it in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compression.test_compress import HALF, Model
from hf_models import gpt2
from torch import nn

import tensornet as tn
from tensornet.errors import BudgetError, TargetError
from tensornet.nn.extension import ProvidedData


def test_a_model_that_is_a_layer_itself() -> None:
    with pytest.raises(TargetError, match="ModuleList"):
        tn.compress(nn.Linear(8, 8), HALF, progress=False)
    with pytest.raises(TargetError, match=r"call to_linear\(\)"):
        tn.decompress(tn.nn.MPOLinear.from_linear(nn.Linear(8, 8), max_bond=2))


def test_embeddings_that_shorten_their_rows_stay() -> None:
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=0.1), nn.Linear(8, 8))
    report = tn.compress(
        model, tn.CompressionConfig(target_modules="all", param_ratio=0.5, method="svd"), progress=False
    )
    assert [layer.name for layer in report.layers] == ["1"]
    with pytest.raises(TargetError, match=r"Nothing to compress.*max_norm"):
        tn.compress(nn.Sequential(model[0]), HALF, progress=False)
    with pytest.raises(TargetError, match="max_norm"):
        tn.nn.MPOEmbedding.from_embedding(model[0])


def test_compressing_twice_says_so() -> None:
    model = Model()
    plan = tn.plan(model, HALF)
    tn.compress(model, HALF, progress=False)
    with pytest.raises(TargetError, match=r"compressed already.*blocks\.0\.up"):
        tn.compress(model, HALF, progress=False)
    with pytest.raises(TargetError, match=r"'up'.*compressed already"):
        tn.compress(
            model, tn.CompressionConfig(target_modules="up", topology_options={"max_bond": 2}), progress=False
        )
    with pytest.raises(TargetError, match=r"blocks\.0\.up.*already"):
        tn.apply_plan(model, plan)


def test_frozen_layers_are_frozen_after_decompressing() -> None:
    model = Model()
    model.blocks[0].up.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tn.compress(model, HALF, progress=False)
    tn.decompress(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_what_is_made_under_inference_mode_can_be_trained() -> None:
    model = gpt2()
    ids = torch.randint(3, 100, (2, 8))
    with torch.inference_mode():
        tn.compress(model, tn.CompressionConfig(param_ratio=0.5), calibration=[ids], progress=False)
    assert not any(p.is_inference() for p in model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.inference_mode():
        tn.decompress(model)
    assert not any(p.is_inference() for p in model.parameters())


def test_arguments_of_other_types() -> None:
    model, ids = gpt2(), torch.randint(3, 100, (2, 8))
    config, stats = tn.CompressionConfig(param_ratio=0.5), tn.calibrate(model, [ids])
    planned = tn.plan(model, config, stats)
    calls: dict[str, Callable[[], object]] = {
        "model must be a Module, got str": lambda: tn.compress("gpt2", config),  # type: ignore[arg-type]
        "model must be a Module, got OrderedDict": lambda: tn.calibrate(model.state_dict(), [ids]),  # type: ignore[arg-type]
        "config must be a CompressionConfig, got dict": lambda: tn.compress(model, config.to_dict()),  # type: ignore[arg-type]
        "config must be a CompressionConfig, got float": lambda: tn.plan(model, 0.5, stats),  # type: ignore[arg-type]
        "stats must be a CalibrationStats, got list": lambda: tn.plan(model, config, [ids]),  # type: ignore[arg-type]
        "stats must be a CalibrationStats, got str": lambda: tn.apply_plan(model, planned, "stats"),  # type: ignore[arg-type]
        "plan must be a CompressionPlan, got str": lambda: tn.apply_plan(model, "plan.json", stats),  # type: ignore[arg-type]
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=message):
            call()


def test_nothing_that_says_how_far_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    batches = [(torch.randn(16, 64), torch.randint(10, (16,)))]
    with pytest.raises(BudgetError, match="budget"):
        tn.compress(model, tn.CompressionConfig(), calibration=batches, progress=False)
    assert type(model[0]) is nn.Linear


def test_a_plan_is_applied_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    batches = [(torch.randn(16, 64), torch.randint(10, (16,)))]
    stats = tn.calibrate(model, batches, source="noise")
    plan = tn.plan(model, tn.CompressionConfig(param_ratio=0.5), stats).replace_layer("2", None)
    report = tn.compress(model, plan, calibration=ProvidedData(batches, "noise"), progress=False)
    assert report.plan == plan.with_errors({layer.name: layer.error for layer in report.plan})
    assert report.measured is not None
    assert "noise" in str(report.measured)
    assert type(model[2]) is nn.Linear
