"""Refitting behind compressed layers: against least squares, and on a trained model's held-out text."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hf_models import qwen2
from pivoted_plans import pivoted
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
from tensornet.errors import TargetError
from tensornet.healing import refine
from tensornet.topologies.low_rank import LowRankFamily
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.text import load_tokenizer, token_ids


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.second(input=torch.tanh(self.first(input_ids)))


def windows(text: str, count: int) -> Tensor:
    return token_ids(load_tokenizer(gpt2_path()), text)[: count * 128].reshape(count, 128)


@cache
def _trained() -> tuple[PreTrainedModel, PreTrainedModel, tn.CalibrationStats, list[Tensor]]:
    """Dense, compressed, statistics of the first twelve batches, and all twenty."""
    dense = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    batches = list(windows(calibration_text(), 160).split(8))
    stats = tn.calibrate(dense, batches[:12])
    small = copy.deepcopy(dense)
    tn.compress(small, tn.CompressionConfig(param_ratio=0.4), calibration=stats, progress=False)
    return dense, small, stats, batches


@torch.no_grad()
def loss(model: PreTrainedModel) -> float:
    ids = windows(heldout_text(), 16)
    return float(model(input_ids=ids, labels=ids).loss)


def test_a_full_rank_layer_is_the_least_squares_solution() -> None:
    teacher = Chain().eval()
    model = copy.deepcopy(teacher)
    tn.compress(
        model,
        tn.CompressionConfig(
            target_modules="first", topology_options={"max_bond": 3}, method="svd", topology="low_rank"
        ),
        progress=False,
    )
    tn.compress(model, tn.CompressionConfig(target_modules="second", topology="low_rank"), progress=False)
    x = torch.randn(4000, 10)
    report = refine(model, teacher, [{"input_ids": x}], correction=1.0, anchor=0.5)
    assert report.kept
    with torch.no_grad():
        real, dense = torch.tanh(model.first(x)), torch.tanh(teacher.first(x))
        weight = teacher.second.weight
        # Least squares; that the dense inputs keep their outputs counts half as much.
        inputs, wanted = torch.cat([real, 0.5**0.5 * dense]), torch.cat([dense, 0.5**0.5 * dense]) @ weight.T
        solution = torch.linalg.lstsq(inputs, wanted).solution.T
    torch.testing.assert_close(model.second.to_matrix().detach(), solution, rtol=5e-3, atol=5e-4)
    error = float((real @ solution.T - dense @ weight.T).detach().square().sum())
    assert report.after["second"] == pytest.approx(
        error / float((dense @ weight.T).detach().square().sum()), rel=1e-3
    )
    assert report.after["second"] < report.before["second"]


@pytest.mark.slow
def test_held_out_text_gains() -> None:
    dense, small, stats, batches = _trained()
    model = copy.deepcopy(small)
    sizes = [p.shape for p in model.parameters()]
    report = refine(model, dense, batches, stats)
    assert [p.shape for p in model.parameters()] == sizes
    assert report.kept
    assert report.distances[1] < report.distances[0]
    before, after = loss(small) - loss(dense), loss(model) - loss(dense)
    assert after < 0.97 * before
    assert sum(report.after.values()) < sum(report.before.values())
    assert not report.left


@pytest.mark.slow
def test_what_does_not_help_is_taken_back() -> None:
    """One window cannot refit a model: others say so, and the old cores come back."""
    dense, small, _, batches = _trained()
    model = copy.deepcopy(small)
    report = refine(model, dense, [batches[0][:1], batches[13]], correction=1.0, anchor=0.0)
    assert report.distances[1] > report.distances[0]
    assert not report.kept
    for old, new in zip(small.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)


class Branches(Chain):
    """A layer that never runs, and one that reads another number of rows in the dense model."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.routed = nn.Linear(8, 8), nn.Linear(12, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(input_ids))
        rows = len(hidden) if isinstance(self.first, nn.Linear) else len(hidden) // 2
        output = self.second(hidden)
        output[:rows] += self.routed(hidden[:rows])
        return output


def test_layers_that_cannot_be_compared_stay_and_are_named() -> None:
    teacher = Branches().eval()
    model = copy.deepcopy(teacher)
    tn.compress(
        model,
        tn.CompressionConfig(topology_options={"max_bond": 3}, method="svd", topology="low_rank"),
        progress=False,
    )
    old = copy.deepcopy(model)
    report = refine(model, teacher, [{"input_ids": torch.randn(300, 10)} for _ in range(4)])
    assert report.left == {
        "unused": "it never ran on the data",
        "routed": "it got 300 tokens in the dense model, and 150 in the compressed one",
    }
    assert set(report.after) == {"first", "second"}
    for name in report.left:
        assert torch.equal(model.get_submodule(name).to_matrix(), old.get_submodule(name).to_matrix())


def test_moments_are_exact_under_autocast() -> None:
    """A step is made of the difference of two moments; in 16 bits it was noise that ruined attention."""
    teacher = Chain().eval()
    model = copy.deepcopy(teacher)
    tn.compress(
        model,
        tn.CompressionConfig(topology_options={"max_bond": 3}, method="svd", topology="low_rank"),
        progress=False,
    )
    x, weight = torch.randn(500, 10), teacher.first.weight.detach()
    gap, wanted = x @ (model.first.to_matrix().detach() - weight).T, x @ weight.T
    report = refine(model, teacher, [{"input_ids": x}], autocast=torch.bfloat16)
    assert report.before["first"] == pytest.approx(
        float(gap.square().sum() / wanted.square().sum()), rel=1e-5
    )


def test_nothing_to_refine() -> None:
    with pytest.raises(TargetError, match="compressed linear layers"):
        refine(Chain(), Chain(), [{"input_ids": torch.randn(3, 10)}])
    model = Chain()
    tn.compress(model, tn.CompressionConfig(topology="mpo"), progress=False)
    with pytest.raises(TargetError, match="one batch"):
        refine(model, Chain(), [])


@pytest.mark.parametrize("options", [{"correction": 1.1}, {"anchor": -1.0}, {"damping": float("nan")}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="correction"):
        refine(Chain(), Chain(), [{"input_ids": torch.randn(3, 10)}], **options)


def test_the_teacher_must_be_dense() -> None:
    model = Chain()
    tn.compress(model, tn.CompressionConfig(topology="mpo"), progress=False)
    with pytest.raises(TargetError, match=r"'first'.*teacher"):
        refine(model, copy.deepcopy(model), [{"input_ids": torch.randn(3, 10)}])


def small_pair() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A dense model with a tied head, the same with all layers compressed and frozen, and data."""
    teacher = qwen2().eval().requires_grad_(False)
    model = copy.deepcopy(teacher)
    config = tn.CompressionConfig(
        target_modules="all", topology_options={"max_bond": 6}, topology="low_rank", method="svd"
    )
    tn.apply_plan(model, pivoted(tn.plan(model, config)))
    return teacher, model, [torch.randint(3, 100, (4, 12)) for _ in range(4)]


def test_parameters_stay_the_same_objects() -> None:
    """So that ties hold, optimizers go on, and what was frozen is frozen."""
    teacher, model, data = small_pair()
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    values = copy.deepcopy(model.state_dict())
    with torch.inference_mode(), pytest.warns(UserWarning, match="share cores.*lm_head"):
        report = refine(model, teacher, data)
    assert report.kept
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
    assert not any(p.requires_grad or p.is_inference() for p in model.parameters())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, values[name])}
    assert len(moved) > 10
    assert not any("embed" in name or "lm_head" in name for name in moved)  # the head is the table as well
    assert report.left == {"lm_head": "it shares cores with model.embed_tokens"}


def test_an_interrupted_run_leaves_the_old_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, model, data = small_pair()
    values, calls = copy.deepcopy(model.state_dict()), []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decompose(*args)  # type: ignore[arg-type]

    decompose = LowRankFamily.fit
    monkeypatch.setattr(LowRankFamily, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="share cores"):
        refine(model, teacher, data)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("data", [None, 5, "text", torch.ones(2, 3), {"input_ids": torch.ones(2, 3)}])
def test_data_that_is_no_collection_of_batches(data: object) -> None:
    teacher, model, _ = small_pair()
    with pytest.raises(TargetError, match="iterable"):
        refine(model, teacher, data)  # type: ignore[arg-type]
