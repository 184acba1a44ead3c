"""Healing through Trainer: closer to the dense model, cores only, resumed from its checkpoints."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import gpt2
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.heal import compressed_layers, output_distance, trainable_cores
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.heal import TextWindows, heal

OPTIONS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}


class Examples(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(1, 100, (32, 12), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


@cache
def _pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = gpt2().eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "wte" not in name:
                parameter.mul_(3)
    student = copy.deepcopy(teacher)
    config = tn.CompressionConfig(param_ratio=0.5, objective="weight", topology="low_rank", pivoted=True)
    tn.compress(student, config, progress=False)
    return teacher, student


def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher, student = _pair()
    return teacher, copy.deepcopy(student)


@torch.no_grad()
def divergence(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    batch = {"input_ids": Examples().ids}
    return float(output_distance(student(**batch), teacher(**batch), batch))


def test_trainer_heals(tmp_path: Path) -> None:
    teacher, student = pair()
    before = divergence(student, teacher)
    cores = set(trainable_cores(compressed_layers(student)))
    old = {name: p.detach().clone() for name, p in student.named_parameters()}
    heal(student, teacher, Examples(), steps=30, layer_steps=5, output_dir=str(tmp_path), **OPTIONS)
    student.eval()
    assert divergence(student, teacher) < 0.8 * before
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, old[name]) == (name not in cores), name
    assert student.transformer.wte.weight.requires_grad


def test_trainer_resumes(tmp_path: Path) -> None:
    teacher, whole = pair()
    halves = copy.deepcopy(whole)
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    heal(whole, teacher, Examples(), steps=6, output_dir=str(tmp_path / "whole"), **options)
    heal(halves, teacher, Examples(), steps=3, output_dir=str(tmp_path / "halves"), **options)
    _, fresh = pair()
    heal(fresh, teacher, Examples(), steps=6, output_dir=str(tmp_path / "halves"), resume=True, **options)
    for (name, a), (_, b) in zip(whole.named_parameters(), fresh.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_windows_of_a_text() -> None:
    windows = TextWindows(gpt2_path(), calibration_text()[:20_000], length=64)
    assert len(windows) > 10
    assert windows[0]["input_ids"].shape == (64,)


def test_command_line_heals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(calibration_text()[:30_000])
    common = ["compress", str(gpt2_path()), "--param-ratio", "0.4", "--calibration", str(text)]
    made = []
    for steps in ("0", "30"):
        folder = tmp_path / f"healed-{steps}"
        assert run([*common[:2], str(folder), *common[2:], "--heal", steps]) == 0
        made.append(th.load(folder).eval())
    dense = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    batch = {"input_ids": TextWindows(gpt2_path(), heldout_text()[:20_000], length=128).windows[:16]}
    with torch.no_grad():
        gaps = [float(output_distance(model(**batch), dense(**batch), batch)) for model in made]
    assert gaps[1] < 0.9 * gaps[0]
    capfd.readouterr()


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "give one"), (["--calibration", "text.txt", "--int8"], "leave one of them out")],
)
def test_command_line_says_what_does_not_go_with_healing(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["compress", str(gpt2_path()), "out", "--param-ratio", "0.5", "--heal", "3", *options]) != 0
    assert message in " ".join(capfd.readouterr().err.split())


def test_a_model_without_cores(tmp_path: Path) -> None:
    teacher, _ = pair()
    with pytest.raises(tn.TargetError, match="Nothing to heal"):
        heal(copy.deepcopy(teacher), teacher, Examples(), steps=1, output_dir=str(tmp_path), **OPTIONS)
