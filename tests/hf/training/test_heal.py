"""Healing through Trainer: closer to the dense model, cores only, resumed from its checkpoints."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from healing_pairs import TRAINING, Examples, pair, train_cores_alone
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet.healing.heal import compressed_layers, output_distance, trainable_cores
from tensornet_hf import compress as conversion
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.peft import lora_config
from tensornet_hf.text import calibration_data, load_tokenizer, token_ids
from tensornet_hf.trainer import HealingTrainer, heal


@torch.no_grad()
def divergence(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    batch = {"input_ids": Examples().ids}
    return float(output_distance(student(**batch), teacher(**batch), batch))


@pytest.mark.slow
def test_trainer_heals(tmp_path: Path) -> None:
    teacher, student = pair()
    before = divergence(student, teacher)
    cores = set(trainable_cores(compressed_layers(student)))
    old = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher = copy.deepcopy(teacher).train()
    teacher.transformer.wpe.requires_grad_(False)
    heal(student, teacher, Examples(), steps=30, output_dir=str(tmp_path), **TRAINING)
    assert teacher.training
    frozen = [name for name, parameter in teacher.named_parameters() if not parameter.requires_grad]
    assert frozen == ["transformer.wpe.weight"]
    student.eval()
    teacher.eval()
    assert divergence(student, teacher) < 0.8 * before
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, old[name]) == (name not in cores), name
    assert student.transformer.wte.weight.requires_grad


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


@pytest.mark.slow
def test_trainer_resumes(tmp_path: Path) -> None:
    teacher, whole = pair()
    halves = copy.deepcopy(whole)
    options = TRAINING | {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    heal(whole, teacher, Examples(), steps=6, output_dir=str(tmp_path / "whole"), **options)
    heal(halves, teacher, Examples(), steps=3, output_dir=str(tmp_path / "halves"), **options)
    _, fresh = pair()
    heal(fresh, teacher, Examples(), steps=6, output_dir=str(tmp_path / "halves"), resume=True, **options)
    for (name, a), (_, b) in zip(whole.named_parameters(), fresh.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of it
def test_trainer_heals_with_adapters(tmp_path: Path) -> None:
    teacher, student = pair()
    before = divergence(student, teacher)
    adapted = get_peft_model(student, lora_config(student, r=4))
    old = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    options: dict[str, Any] = {"steps": 30, "output_dir": str(tmp_path), "parameters": "trainable"}
    heal(adapted, teacher, Examples(), **options, **TRAINING)
    adapted.eval()
    assert divergence(adapted, teacher) < 0.9 * before
    assert all(torch.equal(p, old[name]) for name, p in adapted.named_parameters() if "lora" not in name)
    with pytest.raises(TargetError, match="no parameter requires gradients"):
        heal(teacher.requires_grad_(False), teacher, Examples(), **options, **TRAINING)
    teacher.requires_grad_(True)


def test_trainer_refuses_what_would_teach_nothing(tmp_path: Path) -> None:
    _, student = pair()
    options = {"steps": 2, "output_dir": str(tmp_path), **TRAINING}
    with pytest.raises(TargetError, match=r"copy\.deepcopy\(model\)"):
        heal(student, student, Examples(), **options)


@pytest.mark.slow
def test_command_line_refits_and_heals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(calibration_text()[:80_000])
    common = ["compress", str(gpt2_path()), "--param-ratio", "0.4", "--calibration", str(text)]
    common += ["--calibration-tokens", "8192"]
    made = []
    for number, extra in enumerate(([], ["--refine"], ["--heal", "30"], ["--refine", "--heal", "30"])):
        folder = tmp_path / f"healed-{number}"
        assert run([*common[:2], str(folder), *common[2:], *extra]) == 0
        made.append(th.load(folder).eval())
    said = capfd.readouterr().err
    assert len(re.findall(r"layers refitted: distance .* on text held out of it", said)) == 2
    assert len(re.findall(r"healed for 30 steps, 30 of them now", said)) == 2
    assert said.count("are of the model before that") == 3
    dense = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    ids = token_ids(load_tokenizer(gpt2_path()), heldout_text()[:20_000])
    batch = {"input_ids": ids[: 16 * 128].reshape(16, 128)}
    with torch.no_grad():
        gaps = [float(output_distance(model(**batch), dense(**batch), batch)) for model in made]
    assert gaps[1] < 0.97 * gaps[0]
    assert gaps[2] < 0.9 * gaps[0]
    assert gaps[3] < gaps[2]


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
        stats = tn.CalibrationStats({}, {}, seen, None, "")
        conversion._correct(model, model, gpt2_path(), text, stats, options, None, refine_tokens=8 * each)
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
    (left,) = [path.name for path in tmp_path.iterdir() if path.name != "text.txt"]
    assert re.fullmatch(r"\.out\.heal-[0-9a-f]{16}\.safetensors", left)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heal", "3"], "--heal trains on the text of --calibration; give one"),
        (["--refine"], "--refine fits layers on the text of --calibration; give one"),
        (["--refine", "--calibration", "text.txt", "--workers", "1"], "--refine"),
    ],
)
def test_command_line_says_what_does_not_go_with_correcting(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["compress", str(gpt2_path()), "out", "--param-ratio", "0.5", *options]) != 0
    assert message in " ".join(capfd.readouterr().err.split())


def test_a_model_without_cores(tmp_path: Path) -> None:
    teacher, _ = pair()
    with pytest.raises(TargetError, match="Nothing to heal"):
        heal(copy.deepcopy(teacher), teacher, Examples(), steps=1, output_dir=str(tmp_path), **TRAINING)
