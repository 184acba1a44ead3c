"""Healing through Trainer: closer to the dense model, cores only, resumed from its checkpoints."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from healing_pairs import TRAINING, Examples, pair, sharpened, train_cores_alone
from hf_models import gpt2
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet.healing import refine, trained_scales
from tensornet.healing.heal import compressed_layers, output_distance, trainable_cores
from tensornet.nn.storage import Storage
from tensornet.topologies import residual
from tensornet_hf import compress as conversion
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.peft import lora_config, merge_adapters
from tensornet_hf.text import calibration_data, load_tokenizer, token_ids
from tensornet_hf.trainer import HealingTrainer, heal

RESIDUAL = Storage(number_format="bf16", core_formats={"base": "int2"})  # type: ignore[arg-type]


@cache
def _integers(form: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = sharpened(gpt2())
    student = copy.deepcopy(teacher)
    plan = tn.plan(student, tn.CompressionConfig(formats=("int2",), method="nearest"))
    if form == "residual":
        for layer in plan:
            topology = residual(out_features=layer.shape[0], in_features=layer.shape[1], rank=2)
            plan = plan.replace_layer(layer.name, topology, RESIDUAL)
    tn.apply_plan(student, plan)
    return teacher, student


def pair_of(form: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A dense model and a student with float cores, integers, or integers with a network beside them."""
    teacher, student = pair() if form == "float" else _integers(form)
    return teacher, copy.deepcopy(student)


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.named_buffers() if x.dtype == torch.uint8}


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module) -> float:
    batch = {"input_ids": Examples().ids}
    return float(output_distance(student(**batch), teacher(**batch), batch))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float", "dense", "residual"])
def test_trainer_trains_cores_and_scales_and_nothing_else(form: str, tmp_path: Path) -> None:
    teacher, student = pair_of(form)
    before, codes = divergence(student, teacher), codes_of(student)
    old = {name: x.clone() for name, x in student.state_dict().items()}
    teacher = copy.deepcopy(teacher).train()
    teacher.transformer.wpe.requires_grad_(False)
    assert heal(student, teacher, Examples(), steps=30, output_dir=str(tmp_path), **TRAINING) > 0
    assert teacher.training
    frozen = [name for name, parameter in teacher.named_parameters() if not parameter.requires_grad]
    assert frozen == ["transformer.wpe.weight"]
    after = divergence(student.eval(), teacher.eval())
    assert after < 0.9 * before
    state = student.state_dict()
    assert {name: x.dtype for name, x in state.items()} == {name: x.dtype for name, x in old.items()}
    assert not any(name.endswith(".scales") for name, _ in student.named_parameters())
    assert student.transformer.wte.weight.requires_grad
    moved = {name for name, x in state.items() if not torch.equal(x, old[name])}
    pivots = {name for name, x in old.items() if x.dtype == torch.int32}
    assert moved == {name for name in old if "core_" in name} - codes.keys() - pivots
    student.save_pretrained(tmp_path / "healed")
    assert divergence(th.load(tmp_path / "healed").eval(), teacher) == pytest.approx(after, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float", "residual"])
def test_trainer_resumes(form: str, tmp_path: Path) -> None:
    teacher, whole = pair_of(form)
    options = TRAINING | {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    heal(whole, teacher, Examples(), steps=6, output_dir=str(tmp_path / "whole"), **options)
    for steps in (3, 6):
        student, folder = pair_of(form)[1], str(tmp_path / "halves")
        heal(student, teacher, Examples(), steps=steps, output_dir=folder, resume=True, **options)
    for (name, a), (_, b) in zip(whole.state_dict().items(), student.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of it
@pytest.mark.parametrize("form", ["float", "dense", "residual"])
def test_trainer_heals_with_adapters_that_merge(form: str, tmp_path: Path) -> None:
    teacher, student = pair_of(form)
    before, codes = divergence(student, teacher), codes_of(student)
    adapted = get_peft_model(student, lora_config(student, r=4))
    old = {name: x.clone() for name, x in adapted.state_dict().items()}
    options: dict[str, Any] = {"steps": 30, "output_dir": str(tmp_path), "parameters": "trainable"}
    heal(adapted, teacher, Examples(), **options, **TRAINING)
    after = divergence(adapted.eval(), teacher)
    assert after < 0.9 * before
    assert all(torch.equal(x, old[name]) for name, x in adapted.state_dict().items() if "lora" not in name)
    if form == "dense":
        with pytest.warns(UserWarning, match="integer cores"):
            merge_adapters(adapted)
    else:  # the network takes the adapters in, and integers beside it stay as they are
        merged = merge_adapters(adapted)
        assert divergence(merged, teacher) == pytest.approx(after, rel=0.02)
        assert all(torch.equal(x, codes[name]) for name, x in codes_of(merged).items())


@pytest.mark.slow
@pytest.mark.parametrize("through", ["trainer", "library"])
def test_gains_and_biases_heal_integers_whose_scales_have_eight_bits(through: str, tmp_path: Path) -> None:
    teacher, _ = pair_of("dense")
    student = copy.deepcopy(teacher)
    config = tn.CompressionConfig(formats=("int2:g32:float8",), method="nearest")
    tn.compress(student, config, progress=False)
    old = {name: x.clone() for name, x in student.state_dict().items()}
    before = divergence(student, teacher)
    if through == "trainer":
        heal(student, teacher, Examples(), steps=20, output_dir=str(tmp_path), **TRAINING)
    else:
        tn.heal(student, teacher, Examples().ids.split(8), steps=20, lr=1e-2)
    assert divergence(student.eval(), teacher) < 0.9 * before
    moved = {name for name, x in student.state_dict().items() if not torch.equal(x, old[name])}
    assert moved == {name for name, x in student.named_parameters() if x.dim() == 1}


def test_trained_scales_within_one_another_stay_the_same_parameters() -> None:
    _, student = pair_of("dense")
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


@pytest.mark.parametrize("form", ["dense", "residual"])
def test_refitting_rounds_integers_again(form: str) -> None:
    teacher, student = pair_of(form)
    kinds = {name: x.dtype for name, x in student.state_dict().items()}
    batches = [{"input_ids": part} for part in torch.randint(1, 100, (64, 12)).split(8)]
    report = refine(student, teacher, batches)
    assert report.kept
    assert report.distances[1] < 0.95 * report.distances[0]
    assert {name: x.dtype for name, x in student.state_dict().items()} == kinds


def test_learning_rates_follow_the_size_of_cores(tmp_path: Path) -> None:
    teacher, student = pair()
    train_cores_alone(student)
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.01, weight_decay=0.1, report_to=[])
    trainer = HealingTrainer(model=student, teacher=teacher, relative=True, args=args)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    cores = trainable_cores(compressed_layers(student))
    assert len(rates) == len(cores)
    for name, core in cores.items():
        size = float(core.detach().square().mean().sqrt())
        assert rates[id(core)] == pytest.approx(0.01 * size), name


def test_trainer_refuses_what_would_teach_nothing(tmp_path: Path) -> None:
    _, student = pair()
    options = {"steps": 2, "output_dir": str(tmp_path), **TRAINING}
    with pytest.raises(TargetError, match=r"copy\.deepcopy\(model\)"):
        heal(student, student, Examples(), **options)
    frozen = copy.deepcopy(student).requires_grad_(False)
    with pytest.raises(TargetError, match="requires gradients"):
        heal(frozen, student, Examples(), parameters="trainable", **options)


@pytest.mark.slow
def test_command_line_refits_and_heals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(calibration_text()[:80_000])
    common = ["compress", str(gpt2_path()), "--param-ratio", "0.4", "--calibration", str(text)]
    common += ["--calibration-tokens", "8192"]
    # The default method corrects errors of earlier layers itself, and leaves nothing to refit.
    baseline = ["--method", "gptq"]
    made = []
    for number, extra in enumerate(
        (
            [],
            ["--heal", "30"],
            baseline,
            [*baseline, "--refine"],
            [*baseline, "--refine", "--heal", "30"],
        )
    ):
        folder = tmp_path / f"healed-{number}"
        assert run([*common[:2], str(folder), *common[2:], *extra]) == 0
        made.append(th.load(folder).eval())
    said = capfd.readouterr().err
    assert len(re.findall(r"layers refitted: distance .* on text that was not fitted", said)) == 2
    assert len(re.findall(r"healed for 30 steps, 30 of them in this run", said)) == 2
    assert said.count("are those before refitting or healing") == 3
    dense = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    ids = token_ids(load_tokenizer(gpt2_path()), heldout_text()[:20_000])
    batch = {"input_ids": ids[: 16 * 128].reshape(16, 128)}
    with torch.no_grad():
        gaps = [float(output_distance(model(**batch), dense(**batch), batch)) for model in made]
    assert (
        gaps[1] <= gaps[0]
    )  # errors of earlier layers were corrected already, so nothing may be left to refit
    assert gaps[1] < 0.9 * gaps[0]
    assert gaps[3] < 0.97 * gaps[2]
    assert gaps[4] < gaps[3]


def test_refitting_prefers_text_that_calibration_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = AutoModelForCausalLM.from_pretrained(gpt2_path()), calibration_text()[:80_000]
    data = calibration_data(model, gpt2_path(), text)
    given: list[list[Any]] = []

    def refine(model: Any, teacher: Any, batches: list[Any], *_: Any, **__: Any) -> SimpleNamespace:
        given.append(batches)
        return SimpleNamespace(distances=(1.0, 1.0), after={}, left=(), kept=True)

    monkeypatch.setattr(conversion, "refine", refine)
    options = th.CompressOptions(refine=True, calibration="text.txt")
    each = data.tokens // len(data.batches)
    for seen in (0, 4 * each, data.tokens):
        conversion._correct(
            model, model, gpt2_path(), text, None, seen, options, None, refine_tokens=8 * each
        )
    for batches, first in zip(given, (0, 4, 0), strict=True):  # all of it seen: better than none
        assert len(batches) == 8
        assert torch.equal(batches[0], data.batches[first])
        assert torch.equal(batches[-1], data.batches[-1])


@pytest.mark.slow
def test_command_line_goes_on_after_a_kill(tmp_path: Path) -> None:
    """The same command again ends with the model that an undisturbed run makes, and leaves nothing else."""
    (tmp_path / "text.txt").write_text(calibration_text()[:12_000])
    how = ("--param-ratio", "0.4", "--target", "h.1.mlp.c_fc", "--calibration", "text.txt", "--heal", "54")
    command = ["compress", str(gpt2_path()), "out", *how]
    killed = start(*command, cwd=tmp_path, stop_at=52)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", ".out.partial"}
    assert (tmp_path / ".out.partial" / "healing.safetensors").exists()
    again = start(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "4 steps"
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "out"}
    whole = start(*command[:2], "whole", *how, cwd=tmp_path)
    assert whole.stdout.splitlines()[-1] == "54 steps"
    healed = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole")]
    for name, tensor in healed[0].items():
        torch.testing.assert_close(tensor, healed[1][name], msg=name)


#: Runs the program, says how many steps it made, and dies at one of them if asked to.
PROGRAM = """
import os, signal, sys
from tensornet_hf.cli.main import run
module = sys.modules["tensornet.healing.heal"]
before, made = module.output_distance, []
def step(*arguments, **options):
    if len(made) == {stop_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(1)
    return before(*arguments, **options)
module.output_distance = step
status = run(sys.argv[1:])
print(len(made), "steps")
sys.exit(status)
"""


def start(*command: str, cwd: Path, stop_at: int = -1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(stop_at=stop_at), *command],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_model_without_cores(tmp_path: Path) -> None:
    teacher, _ = pair()
    with pytest.raises(TargetError, match="Nothing to heal"):
        heal(copy.deepcopy(teacher), teacher, Examples(), steps=1, output_dir=str(tmp_path), **TRAINING)
    with pytest.raises(TargetError, match="no compressed layer"):
        tn.heal(copy.deepcopy(teacher), teacher, Examples().ids.split(8), steps=1, parameters="vectors")
