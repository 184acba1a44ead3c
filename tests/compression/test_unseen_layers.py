"""Layers that calibration never ran: planned with their mixture, or left dense; both are named."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from folder_runs import compress_files
from hf_architectures import PAGE_ARCHITECTURES
from torch import Tensor, nn

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import CalibrationWarning
from tensornet.nn.extension import ProvidedData

HALF = tn.CompressionConfig(param_ratio=0.5)
BATCH = {"x": torch.randn(9, 8), "labels": torch.arange(9) % 3}


class Towers(nn.Module):
    """Sees images only where it is given some."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.text, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        seen = 0 if image is None else self.vision(image)
        return self.head(self.text(x).tanh() + seen)


def towers() -> Towers:
    torch.manual_seed(0)
    return Towers()


def test_they_stay_dense_and_one_warning_names_them() -> None:
    model = towers()
    stats = tn.calibrate(model, [BATCH])
    with pytest.warns(CalibrationWarning) as caught:
        report = tn.compress(model, HALF, calibration=stats, progress=False)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("Left dense, because they never ran during calibration: vision.0, vision.2.")
    assert [type(layer) for layer in model.vision] == [nn.Linear, nn.GELU, nn.Linear]
    assert report.plan.unseen == ("vision.0", "vision.2")
    assert {layer.name for layer in report.layers} == {"text", "head"}
    assert report.param_ratio <= 0.5
    assert report.coverage.unknown["Linear (never ran in calibration)"] == 2 * 64
    assert report.coverage.excluded == {}
    assert tn.CompressionPlan.from_dict(report.plan.to_dict()) == report.plan


def test_they_count_in_budgets_of_the_whole_model() -> None:
    model = Towers(64)
    stats = tn.calibrate(model, [{"x": torch.randn(9, 64), "labels": torch.randint(3, (9,))}])
    size = sum(p.numel() * 4 for p in model.parameters())
    with pytest.warns(CalibrationWarning, match="Left dense"):
        report = tn.compress(
            model, tn.CompressionConfig(max_bytes=int(0.8 * size)), calibration=stats, progress=False
        )
    assert report.model_bytes_after <= 0.8 * size


class Experts(nn.Module):
    """Experts by name, as NLLB-MoE keeps them, in numbered layers; one gets some tokens, one none."""

    def __init__(self) -> None:
        super().__init__()
        names = ("expert_0", "expert_1", "expert_2")
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.ModuleDict({"w_1": nn.Linear(8, 8)}) for name in names}) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["expert_0"]["w_1"](x).tanh()
            x = torch.cat([x[:4] + layer["expert_2"]["w_1"](x[:4]).tanh(), x[4:]])
        return self.head(x)


def test_experts_without_tokens_are_planned_with_the_moments_of_their_mixture() -> None:
    torch.manual_seed(0)
    model = Experts()
    stats = tn.calibrate(model, [BATCH])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = tn.plan(model, HALF, stats)
    assert plan.unseen == ()
    assert plan.unrouted == ("layers.0.expert_1.w_1", "layers.1.expert_1.w_1")
    assert "the other experts of their layer: layers.0.expert_1.w_1, layers.1.expert_1.w_1" in str(plan)
    assert tn.CompressionPlan.from_dict(plan.to_dict()) == plan
    unseen, seen = plan["layers.0.expert_1.w_1"], plan["layers.0.expert_0.w_1"]
    assert unseen.topology is not None
    assert unseen.loss_increase is not None
    assert seen.loss_increase is not None
    assert 0 < unseen.loss_increase < 0.5 * seen.loss_increase  # few tokens are expected in other text, too


@pytest.mark.slow
def test_text_alone_calibrates_the_text_model_of_a_multimodal_one(tmp_path: Path) -> None:
    architecture = PAGE_ARCHITECTURES["Gemma 3"]
    ids = torch.randint(3, 80, (4, 20), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(architecture.dense)
    data = ProvidedData([{"input_ids": ids, "labels": ids}], "random tokens")
    with pytest.warns(CalibrationWarning, match=r"never ran.*model\.vision_tower\."):
        report = tn.compress(model, HALF, calibration=data, progress=False)
    assert not any("vision" in layer.name for layer in report.layers)
    architecture.dense.save_pretrained(tmp_path / "dense")
    with pytest.warns(CalibrationWarning, match="Left dense"):
        streamed = compress_files(tmp_path / "dense", tmp_path / "made", HALF, calibration=data)
    assert streamed.coverage == report.coverage
    batch = architecture.batch()
    # A folder with several stacks is walked as one block: layers are fitted on the inputs of the dense model.
    with torch.no_grad():
        made = [x(**batch).logits for x in (architecture.dense, th.load(tmp_path / "made"), model)]
    assert 0 < float((made[1] - made[0]).norm()) < 1.3 * float((made[2] - made[0]).norm())
