"""Healing, refitting and adapters on integer cores, with and without a network beside them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from healing_pairs import TRAINING, Examples, sharpened, train_cores_alone
from hf_models import gpt2
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet.healing import refine, trained_scales
from tensornet.healing.heal import compressed_layers, output_distance
from tensornet.nn.storage import Storage
from tensornet.topologies import residual
from tensornet_hf.peft import lora_config, merge_adapters
from tensornet_hf.trainer import heal

RESIDUAL = Storage(number_format="bf16", core_formats={"base": "int2"})  # type: ignore[arg-type]


@cache
def _pair(form: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = sharpened(gpt2())
    student = copy.deepcopy(teacher)
    plan = tn.plan(student, tn.CompressionConfig(formats=("int2",), objective="weight"))
    if form == "residual":
        for layer in plan:
            topology = residual(out_features=layer.shape[0], in_features=layer.shape[1], rank=2)
            plan = plan.replace_layer(layer.name, topology, RESIDUAL)
    tn.apply_plan(student, plan)
    return teacher, student


def pair(form: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher, student = _pair(form)
    return teacher, copy.deepcopy(student)


def integers(model: nn.Module) -> dict[str, Tensor]:
    found = {name: x.clone() for name, x in model.named_buffers() if x.dtype == torch.uint8}
    assert found
    return found


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: x.dtype for name, x in model.state_dict().items()}


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module) -> float:
    batch = {"input_ids": Examples().ids}
    return float(output_distance(student(**batch), teacher(**batch), batch))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "residual"])
def test_trainer_trains_scales_and_floats_and_keeps_integers(form: str, tmp_path: Path) -> None:
    teacher, student = pair(form)
    before, codes, kinds = divergence(student, teacher), integers(student), dtypes(student)
    old = {name: x.clone() for name, x in student.state_dict().items()}
    assert heal(student, teacher, Examples(), steps=20, output_dir=str(tmp_path), **TRAINING) > 0
    assert divergence(student.eval(), teacher) < 0.9 * before
    assert dtypes(student) == kinds
    assert not any(name.endswith(".scales") for name, _ in student.named_parameters())
    assert all(torch.equal(x, codes[name]) for name, x in integers(student).items())
    moved = {name for name, x in student.state_dict().items() if not torch.equal(x, old[name])}
    trained = {name for name in old if "core_" in name and name not in codes}
    assert moved == trained
    student.save_pretrained(tmp_path / "healed")
    again = th.load(tmp_path / "healed").eval()
    assert divergence(again, teacher) == pytest.approx(divergence(student, teacher), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("through", ["trainer", "library"])
def test_gains_and_biases_heal_integers_whose_scales_have_eight_bits(through: str, tmp_path: Path) -> None:
    teacher, _ = pair("dense")
    student = copy.deepcopy(teacher)
    tn.compress(
        student, tn.CompressionConfig(formats=("int2:g32:float8",), objective="weight"), progress=False
    )
    old = {name: x.clone() for name, x in student.state_dict().items()}
    before = divergence(student, teacher)
    if through == "trainer":
        heal(student, teacher, Examples(), steps=20, output_dir=str(tmp_path), **TRAINING)
    else:
        tn.heal(student, teacher, Examples().ids.split(8), steps=20, lr=1e-2)
    assert divergence(student.eval(), teacher) < 0.9 * before
    moved = {name for name, x in student.state_dict().items() if not torch.equal(x, old[name])}
    assert moved == {name for name, x in student.named_parameters() if x.dim() == 1}
    assert {name: x.dtype for name, x in old.items()} == dtypes(student)
    with pytest.raises(TargetError, match="parameters='vectors'"):
        tn.heal(student, teacher, Examples().ids.split(8), steps=1, parameters="cores")


def test_vectors_of_a_dense_model_are_not_healed() -> None:
    teacher, _ = pair("dense")
    with pytest.raises(TargetError, match="no compressed layer"):
        tn.heal(copy.deepcopy(teacher), teacher, Examples().ids.split(8), steps=1, parameters="vectors")


@pytest.mark.slow
def test_trainer_resumes_with_trained_scales(tmp_path: Path) -> None:
    teacher, whole = pair("residual")
    options = TRAINING | {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    heal(whole, teacher, Examples(), steps=6, output_dir=str(tmp_path / "whole"), **options)
    halves = [pair("residual")[1] for _ in range(2)]
    for student, steps in zip(halves, (3, 6), strict=True):
        folder = str(tmp_path / "halves")
        heal(student, teacher, Examples(), steps=steps, output_dir=folder, resume=True, **options)
    for (name, a), (_, b) in zip(whole.state_dict().items(), halves[1].state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_trained_scales_within_one_another_stay_the_same_parameters() -> None:
    _, student = pair("dense")
    with trained_scales(student):
        outer = dict(student.named_parameters())
        with trained_scales(student):
            assert all(p is outer[name] for name, p in student.named_parameters())
        assert all(p is outer[name] for name, p in student.named_parameters())
        train_cores_alone(student)
        assert {name for name, p in student.named_parameters() if p.requires_grad} == {
            name for name in outer if name.endswith(".scales")
        }
    assert not any(name.endswith(".scales") for name, _ in student.named_parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of it
@pytest.mark.parametrize("form", ["dense", "residual"])
def test_adapters_beside_integers_train_save_and_merge(form: str, tmp_path: Path) -> None:
    teacher, student = pair(form)
    before, codes = divergence(student, teacher), integers(student)
    adapted = get_peft_model(student, lora_config(student, r=4))
    options: dict[str, Any] = {"steps": 20, "output_dir": str(tmp_path), "parameters": "trainable"}
    heal(adapted, teacher, Examples(), **options, **TRAINING)
    adapted.eval()
    after = divergence(adapted, teacher)
    assert after < 0.9 * before
    for now, then in zip(integers(adapted).values(), codes.values(), strict=True):
        assert torch.equal(now, then)
    if form == "residual":  # the network beside the integers takes the adapters in, and they stay as they are
        merged = merge_adapters(adapted)
        assert divergence(merged, teacher) == pytest.approx(after, rel=0.02)
        for name, layer in compressed_layers(merged).items():
            assert torch.equal(layer.core_base.codes, codes[f"{name}.core_base.codes"])
    else:
        with pytest.warns(UserWarning, match="Merging into integer cores rounds them again"):
            merge_adapters(adapted)


@pytest.mark.parametrize("form", ["dense", "residual"])
def test_refitting_rounds_integers_again(form: str) -> None:
    teacher, student = pair(form)
    kinds = dtypes(student)
    batches = [{"input_ids": part} for part in torch.randint(1, 100, (64, 12)).split(8)]
    report = refine(student, teacher, batches)
    assert report.kept
    assert report.distances[1] < 0.95 * report.distances[0]
    assert dtypes(student) == kinds
