"""Separate networks and shared cores in one budget: never a higher predicted loss than either alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from stacked_experts import Experts, gaussian
from torch import Tensor, nn

import tensornet as tn
from tensornet.compression import CompressionPlan, joint_choice, prepare
from tensornet.compression.choose import Allocation
from tensornet.compression.joint_choice import SEPARATE, SHARED, choose_kinds, totals
from tensornet.compression.planner import PreparedPlan
from tensornet.compression.report import model_size
from tensornet.compression.shared_forms import SHARED_FORMS, fit_form, form_curve
from tensornet.errors import BudgetError
from tensornet.linalg.weighted_svd import Weighting

E, OUT, IN = 4, 14, 12
TARGETS = ("*block*", "head")


def common_inputs(seed: int, rank: int = 3) -> Tensor:
    made = gaussian(E, OUT, rank, seed=seed) @ gaussian(rank, IN, seed=seed + 1)
    return made / rank**0.5 + 0.1 * gaussian(E, OUT, IN, seed=seed + 2)


def common_base(seed: int) -> Tensor:
    return gaussian(OUT, IN, seed=seed) + 0.3 * gaussian(E, OUT, 1, seed=seed + 1) @ gaussian(E, 1, IN)


def nothing_common(seed: int) -> Tensor:
    return gaussian(E, OUT, IN, seed=seed)


class Model(nn.Module):
    """Stacks of experts side by side, and a linear layer that shares nothing."""

    def __init__(self, *stacks: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{k}": Experts(weights) for k, weights in enumerate(stacks)})
        self.head = nn.Linear(OUT, 9)

    def forward(self, x: Tensor) -> Tensor:
        routed = x.reshape(E, -1, IN)  # as many tokens for each expert
        hidden = sum(block(routed) for block in self.blocks.values())
        return self.head(torch.tanh(hidden).reshape(len(x), OUT))


@cache
def mixed(seed: int = 0) -> tuple[Model, tn.CalibrationStats]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model(common_inputs(seed), nothing_common(seed + 20), common_base(seed + 40)).eval()
        batches = [(torch.randn(64, IN), torch.randint(9, (64,))) for _ in range(4)]
        return model, tn.calibrate(model, batches)


def config(**budget: object) -> tn.CompressionConfig:
    return tn.CompressionConfig(target_modules=TARGETS, share_experts=True, **budget)  # type: ignore[arg-type]


@cache
def prepared(seed: int, formats: tuple[str, ...] | None = None) -> PreparedPlan:
    """Candidates of `mixed`, of networks alone or in number formats as well."""
    model, stats = mixed(seed)
    return prepare(model, config(param_ratio=0.5, formats=formats), stats)


def rise(plan: CompressionPlan) -> float:
    assert plan.predicted_loss_increase is not None
    return plan.predicted_loss_increase


def of_kind(made: PreparedPlan, kind: str, budget: dict[str, float]) -> float:
    """Predicted loss where all stacks have candidates of one kind; infinite where none fits."""
    caps = replace(made.config, **{"param_ratio": None, **budget})  # type: ignore[arg-type]
    given = Allocation(made.targets, made.candidates, caps, forecast=made.forecast, rest=made.rest)
    try:
        chosen, _ = choose_kinds(given, made.stacks, [kind])
    except BudgetError:
        return math.inf
    return totals(chosen, given)[1]


def separate(made: PreparedPlan, budget: dict[str, float]) -> float:
    """Predicted loss of the plan without sharing; infinite where none fits."""
    try:
        return rise(replace(made, stacks=()).plan(**budget))
    except BudgetError:
        return math.inf


# --- the law -------------------------------------------------------------------------------------

FORMATS = ("float", "int8", "int4:g32:float8")
RATIOS = [(None, {"param_ratio": ratio}) for ratio in (0.9, 0.7, 0.55, 0.4, 0.3, 0.2)]
BYTES = [(FORMATS, {"bits_per_weight": bits}) for bits in (24.0, 14.0, 9.0, 6.0, 4.6)]
BOTH = [(FORMATS, {"param_ratio": 0.7, "bits_per_weight": 8.0}), (FORMATS, {"byte_ratio": 0.4})]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("formats", "budget"), [*RATIOS, *BYTES, *BOTH], ids=str)
def test_the_joint_plan_never_predicts_more_than_either_kind_alone(
    formats: tuple[str, ...] | None, budget: dict[str, float], seed: int
) -> None:
    candidates = prepared(seed, formats)
    made = candidates.plan(**budget)
    bounds = [separate(candidates, budget), of_kind(candidates, SHARED, budget)]
    assert min(bounds) < math.inf
    assert rise(made) <= min(bounds) * (1 + 1e-6)
    sizes = {"param_ratio": made.params_after / made.params_before, "bits_per_weight": made.bits_per_weight}
    assert all(sizes[name] <= value for name, value in budget.items() if name in sizes)


def test_a_stack_that_shares_leaves_room_for_the_others() -> None:
    candidates, budget = prepared(0), {"param_ratio": 0.55}
    made = candidates.plan(**budget)
    kinds = {layer.name.split(".")[1]: layer.shared_core for layer in made if "block" in layer.name}
    assert kinds == {"block0": "1", "block1": "", "block2": "base"}
    bounds = [of_kind(candidates, kind, budget) for kind in (SEPARATE, SHARED)]
    assert rise(made) < 0.9 * min(bounds)
    alone = replace(candidates, stacks=()).plan(**budget)
    room = [sum(x.params_after for x in plan if "block1" in x.name) for plan in (alone, made)]
    assert room[1] > room[0]


def test_sharing_reaches_sizes_that_separate_networks_do_not() -> None:
    with pytest.raises(BudgetError, match="smallest candidates"):
        replace(prepared(0), stacks=()).plan(param_ratio=0.2)
    made = prepared(0).plan(param_ratio=0.2)
    assert made.params_after <= 0.2 * made.params_before


def test_all_stacks_shared_is_tried_whatever_the_walk_over_both_kinds_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unlucky(*arguments: Any) -> Any:
        if len(arguments[-1]) == 2:
            raise BudgetError("the walk found nothing")
        return choose_kinds(*arguments)

    monkeypatch.setattr(joint_choice, "choose_kinds", unlucky)
    made = prepared(0).plan(param_ratio=0.2)  # separate networks do not fit
    assert rise(made) == pytest.approx(of_kind(prepared(0), SHARED, {"param_ratio": 0.2}))


def test_a_budget_of_the_loss_buys_a_smaller_model() -> None:
    made, alone = (x.plan(loss_increase=0.05) for x in (prepared(0), replace(prepared(0), stacks=())))
    assert rise(made) <= 0.05
    assert made.params_after < 0.95 * alone.params_after
    less = prepared(0).plan(param_ratio=(made.params_after - 10) / made.params_before)
    assert rise(less) > 0.05  # no smaller one keeps the loss


# --- what is predicted is what is made -----------------------------------------------------------


@pytest.mark.parametrize("budget", [{"param_ratio": 0.55}, {"bits_per_weight": 9.0}], ids=str)
def test_the_model_has_the_sizes_and_errors_of_the_plan(budget: dict[str, object]) -> None:
    model, stats = mixed()
    small = copy.deepcopy(model)
    report = tn.compress(small, config(**budget), calibration=stats, progress=False)
    saved = model_size(model)[1] - model_size(small)[1]
    assert saved == report.plan.bytes_before - report.plan.bytes_after
    planned = {layer.name: layer.error for layer in report.plan}
    for layer in report.layers:
        if layer.name != "head" and report.plan[layer.name].storage.plain:
            assert layer.error == pytest.approx(planned[layer.name], rel=1e-3, abs=1e-6)


def moment(size: int, seed: int) -> Tensor:
    root = gaussian(size, 3 * size, seed=seed).double()
    return root @ root.T / size


WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "inputs": common_inputs,
    "base": common_base,
    "nothing": nothing_common,
}


@pytest.mark.parametrize("planted", WEIGHTS)
@pytest.mark.parametrize("name", SHARED_FORMS)
def test_losses_of_all_ranks_are_those_of_the_fits(name: str, planted: str) -> None:
    matrices = list(WEIGHTS[planted](3))
    choices = [Weighting(moment(OUT, 10 + e), moment(IN, 20 + e)) for e in range(E)]
    forecasts = [Weighting(moment(OUT, 30 + e), x.columns) for e, x in enumerate(choices)]
    curve = form_curve(name, matrices, choices, forecasts)
    assert len(curve.numbers) > 2
    for index, numbers in enumerate(curve.numbers.tolist()):
        networks = fit_form(name, matrices, choices, index + 1)
        errors = [w.double() - network.to_matrix() for w, network in zip(matrices, networks, strict=True)]
        place = networks[0].topology.core_names.index(SHARED_FORMS[name].core)
        once = networks[0].cores[place].numel()
        assert numbers == once + sum(x.num_params - once for x in networks)
        costs = torch.tensor([x.cost(e) for x, e in zip(choices, errors, strict=True)])
        assert torch.allclose(curve.costs[:, index], costs.double(), rtol=1e-5, atol=1e-8)
        predicted = torch.tensor([x.cost(e) for x, e in zip(forecasts, errors, strict=True)])
        assert torch.allclose(curve.forecasts[:, index], predicted.double(), rtol=1e-5, atol=1e-8)
        relative = torch.stack([e.norm() / w.norm() for e, w in zip(errors, matrices, strict=True)])
        assert torch.allclose(curve.errors[:, index], relative, rtol=1e-5, atol=1e-8)


# --- bad input -----------------------------------------------------------------------------------


def test_formats_without_calibration_are_refused() -> None:
    model, _ = mixed()
    with pytest.raises(BudgetError, match=r"share_experts weighs shared cores.*calibration=batches"):
        tn.plan(model, config(bits_per_weight=8.25))
