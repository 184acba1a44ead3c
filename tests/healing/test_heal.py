"""Healing: the compressed model comes closer to the dense one, only cores move, and it can be resumed."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from healing_pairs import CONFIG, batches, divergence, pair
from hf_models import llama, t5_relu
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration.losses import losses_against
from tensornet.errors import NonFiniteError, TargetError
from tensornet.healing.heal import (
    VECTOR_RATE,
    compressed_layers,
    output_distance,
    trainable_cores,
)


def test_end_to_end_healing_brings_the_models_together() -> None:
    teacher, student = pair()
    before = divergence(student, teacher)
    report = tn.heal(student, teacher, batches(), steps=40, lr=3e-3)
    assert divergence(student, teacher) < 0.7 * before
    assert report.steps == len(report.losses) == 40


def test_steps_do_not_depend_on_which_core_holds_the_size() -> None:
    """The same operator with its size moved from one core to another heals the same way."""
    teacher, _ = pair()
    one = copy.deepcopy(teacher)
    tn.compress(one, CONFIG, progress=False)
    other = copy.deepcopy(one)
    for layer in compressed_layers(other).values():
        first, *middle, last = layer.cores
        layer.set_cores([16 * first.detach(), *middle, last.detach() / 16])
    start = {name: layer.to_matrix().detach() for name, layer in compressed_layers(one).items()}
    for student in (one, other):
        tn.heal(student, teacher, batches(), steps=1, lr=1e-2)
    for (name, a), b in zip(compressed_layers(one).items(), compressed_layers(other).values(), strict=True):
        step, moved = (x.to_matrix().detach() - start[name] for x in (a, b))
        assert float(step.norm()) > 1e-3 * float(start[name].norm()), name
        # Not closer: the signs of tiny gradients differ.
        assert float((moved - step).norm()) < 0.05 * float(step.norm()), name


def test_gains_and_biases_move_at_a_rate_of_their_own() -> None:
    """The first step of AdamW is the learning rate, up to its epsilon, for every entry with a gradient."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8)).double()
    student = copy.deepcopy(teacher)
    tn.compress(student, tn.CompressionConfig(topology_options={"max_bond": 4}, method="svd"), progress=False)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    tn.heal(student, teacher, [torch.randn(64, 16).double()], steps=1, lr=1e-3, parameters="vectors")
    for name, now in student.named_parameters():
        size = float(before[name].square().mean().sqrt())
        rate = 1e-3 * size if now.dim() > 1 else VECTOR_RATE * 1e-3 * max(size, 1e-2)
        moved = float((now.detach() - before[name]).abs().max())
        assert moved == pytest.approx(rate, rel=1e-3), name


def test_only_cores_move() -> None:
    teacher, student = pair()
    cores = set(trainable_cores(compressed_layers(student)))
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    dense = copy.deepcopy(teacher.state_dict())
    report = tn.heal(student, teacher, batches(), steps=3)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in cores), name
        assert parameter.grad is None
    assert all(torch.equal(value, dense[name]) for name, value in teacher.state_dict().items())
    assert report.trained == sum(before[name].numel() for name in cores)


def test_flags_are_put_back() -> None:
    teacher, student = pair()
    student.train()
    student.transformer.wpe.weight.requires_grad_(False)
    tn.heal(student, teacher, batches(), steps=1)
    assert student.training
    assert not student.transformer.wpe.weight.requires_grad
    assert student.transformer.wte.weight.requires_grad


def test_time_is_what_the_clock_says() -> None:
    teacher, student = pair()
    ticks = itertools.count()
    report = tn.heal(
        student, teacher, batches(), steps=100, max_seconds=7.5, clock=lambda: float(next(ticks))
    )
    assert report.steps == 7  # one look at the clock before each step
    assert report.seconds == 9


def test_no_pass_keeps_keys_and_values() -> None:
    """They would be copied in every layer and read by nobody; afterwards the model does as before."""
    teacher, student = pair()
    batch, kept = batches()[0], []

    def distance(new: Any, old: Any, batch: dict[str, Tensor]) -> Tensor:
        kept.extend(x.past_key_values for x in (new, old))
        return output_distance(new, old, batch)

    assert student(batch).past_key_values is not None
    tn.heal(student, teacher, [batch], steps=1, distance=distance)
    assert kept == [None, None]
    assert student(batch).past_key_values is not None


def test_padding_has_no_distance() -> None:
    teacher, student = pair()
    ids = batches()[0][:1]
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = (torch.arange(24) < 12).long()[None]
    short, long = {"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}
    with torch.no_grad():
        distances = [float(output_distance(student(**b), teacher(**b), b)) for b in (short, long)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)


def test_encoder_decoder() -> None:
    teacher, student = pair(t5_relu)
    batch = {"input_ids": batches()[0], "labels": batches()[1][:, :5].contiguous()}
    report = tn.heal(student, teacher, [batch], steps=10, lr=3e-3)
    assert report.losses[-1] < report.losses[0]


def test_the_distance_of_encoders_is_what_calibration_measures() -> None:
    teacher, student = pair(llama)
    batch = {"input_ids": batches()[0], "attention_mask": torch.ones_like(batches()[0])}
    batch["attention_mask"][:, -3:] = 0
    with torch.no_grad():
        outputs = [x.model(**batch) for x in (student, teacher)]
        told = output_distance(*outputs, batch)
        judged = losses_against(teacher.model)(student.model, batch)
    torch.testing.assert_close(told, judged.mean())


def test_nothing_to_heal() -> None:
    teacher, _ = pair()
    with pytest.raises(TargetError, match="trainable cores"):
        tn.heal(copy.deepcopy(teacher), teacher, batches(), steps=1)
    eight = copy.deepcopy(teacher)
    tn.compress(
        eight, tn.CompressionConfig(bits_per_weight=9, method="nearest", formats=("int8:g32:float8",))
    )
    with pytest.raises(TargetError, match="parameters='vectors'"):
        tn.heal(eight, teacher, batches(), steps=1, parameters="cores")
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    with pytest.raises(TargetError, match="requires gradients"):
        tn.heal(frozen, teacher, batches(), steps=1, parameters="trainable")


def test_no_data() -> None:
    teacher, student = pair()
    with pytest.raises(TargetError, match="out of batches"):
        tn.heal(student, teacher, [], steps=1)
    with pytest.raises(TargetError, match="out of batches"):
        tn.heal(student, teacher, iter(batches(2)), steps=3)


def test_a_distance_that_is_not_finite() -> None:
    teacher, student = pair()
    with pytest.raises(NonFiniteError, match="smaller lr"):
        tn.heal(student, teacher, batches(), steps=1, distance=lambda s, t, b: s.logits.sum() * torch.inf)
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"steps": 2.5},
        {"save_every": 0},
        {"parameters": "all"},
        {"lr": -1e-3},
        {"temperature": 0.0},
        {"max_seconds": 0},
    ],
)
def test_options_out_of_range(options: dict[str, object]) -> None:
    teacher, student = pair()
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        tn.heal(student, teacher, batches(), **{"steps": 1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [None, 5, "text", torch.ones(2, 3), {"input_ids": torch.ones(2, 3)}])
def test_data_that_is_no_collection_of_batches(data: object) -> None:
    teacher, student = pair()
    with pytest.raises(TargetError, match="iterable"):
        tn.heal(student, teacher, data, steps=1)  # type: ignore[arg-type]


def test_a_teacher_that_learns_nothing_itself() -> None:
    """compress works in place, so the model is easily taken for its own teacher: no step would change it."""
    _, student = pair()
    with pytest.raises(TargetError, match=r"copy\.deepcopy\(model\)"):
        tn.heal(student, student, batches(), steps=1)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_gradients_that_the_caller_switched_off(outside: type) -> None:
    teacher, student = pair()
    _, again = pair()
    expected = tn.heal(student, teacher, batches(), steps=2)
    with outside():
        report = tn.heal(again, teacher, batches(), steps=2)
        assert not torch.is_grad_enabled()
    assert report.losses == pytest.approx(expected.losses)


@pytest.mark.parametrize("size", [0.2, 30.0])
def test_gradients_are_clipped_to_norm_one(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = [], torch.optim.AdamW.step

    def norm(gradients: list[Tensor]) -> float:
        return float(nn.utils.get_total_norm(gradients))

    def looked_at(self: torch.optim.AdamW) -> None:
        seen.append(norm([p.grad for group in self.param_groups for p in group["params"]]))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", looked_at)
    teacher = nn.Sequential(nn.Linear(16, 16))
    student = copy.deepcopy(teacher)
    tn.compress(student, CONFIG, progress=False)
    cores = list(trainable_cores(compressed_layers(student)).values())

    def distance(new: Tensor, old: Tensor, batch: object) -> Tensor:
        loss = (new - old).square().sum()
        return loss * (size / norm(torch.autograd.grad(loss, cores, retain_graph=True)))

    tn.heal(student, teacher, [torch.randn(8, 16)], steps=2, distance=distance)
    assert seen == pytest.approx([min(size, 1.0)] * 2, rel=1e-4)
