"""Spending one budget over all layers: against brute force, and against the loss that comes out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from hf_models import gpt2
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration import sampled_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression import survey_from_stats
from tensornet.compression.allocate import (
    CostCurve,
    frontier,
    spend_cost,
    spend_size,
    total_cost,
    total_size,
)
from tensornet.compression.config import CompressionConfig
from tensornet.damping import FORECAST_ROW_DAMPING
from tensornet.linalg.weighted_svd import damped

MLP = "*.mlp.*"


@st.composite
def curves(draw: st.DrawFn) -> list[CostCurve]:
    """One to four layers with up to five forms each; larger forms never cost more."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        sizes = sorted(draw(st.lists(st.integers(1, 40), min_size=count, max_size=count, unique=True)))
        costs = sorted(draw(st.lists(st.integers(0, 100), min_size=count, max_size=count)), reverse=True)
        found.append(CostCurve(torch.tensor(sizes).double(), torch.tensor(costs).double()))
    return found


def every_choice(layers: list[CostCurve]) -> list[list[int]]:
    return [list(choice) for choice in itertools.product(*(range(len(c.sizes)) for c in layers))]


@given(curves(), st.integers(1, 160))
def test_a_size_is_never_exceeded_and_nearly_as_well_spent_as_possible(
    layers: list[CostCurve], budget: int
) -> None:
    least = sum(float(c.sizes[0]) for c in layers)
    if least > budget:
        with pytest.raises(tn.errors.BudgetError, match="raise the budget"):
            spend_size(layers, budget)
        return
    chosen = spend_size(layers, budget)
    assert total_size(layers, chosen) <= budget
    best = min(total_cost(layers, x) for x in every_choice(layers) if total_size(layers, x) <= budget)
    # Only forms on the lower hull are found by a multiplier: the gap is at most one step of one layer.
    step = max(float(c.costs.max() - c.costs.min()) for c in layers)
    assert total_cost(layers, chosen) <= best + step
    larger = spend_size(layers, budget + 10)
    assert total_size(layers, larger) <= budget + 10


@given(curves(), st.integers(0, 300))
def test_a_cost_is_never_exceeded(layers: list[CostCurve], allowed: int) -> None:
    least = sum(float(c.costs.min()) for c in layers)
    if least > allowed:
        with pytest.raises(tn.errors.BudgetError, match="already cost"):
            spend_cost(layers, allowed)
        return
    assert total_cost(layers, spend_cost(layers, allowed)) <= allowed


@given(curves())
def test_the_frontier_falls(layers: list[CostCurve]) -> None:
    points = frontier(layers)
    sizes, costs = [p[0] for p in points], [p[1] for p in points]
    assert sizes == sorted(sizes, reverse=True)
    assert costs == sorted(costs)
    for size, cost in points:  # no choice of that size is cheaper
        assert cost <= min(
            total_cost(layers, x) for x in every_choice(layers) if total_size(layers, x) <= size
        )


@cache
def gpt2_stats() -> tuple[nn.Module, CalibrationStats]:
    model = gpt2().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # random models predict nothing; larger weights make their opinions strong
    return model, tn.calibrate(model, list(tokens()), loss_fn=sampled_losses)


def tokens() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 100, (96, 16), generator=generator).split(16)


def test_one_budget_for_all_layers() -> None:
    model, stats = gpt2_stats()
    plan = tn.plan(model, CompressionConfig(param_ratio=0.7), stats)
    assert plan.params_after <= 0.7 * plan.params_before
    assert plan.params_after >= 0.69 * plan.params_before
    shares = {layer.params_after / layer.params_before for layer in plan}
    assert len(shares) > 3  # not the same share everywhere
    assert plan.objective == "curvature"
    assert plan.calibration == "calibration data"


def test_global_costs_less_than_uniform() -> None:
    model, stats = gpt2_stats()
    best = tn.plan(model, CompressionConfig(param_ratio=0.7), stats)
    uniform = [
        tn.plan(model, CompressionConfig(target_modules=layer.name, param_ratio=0.7), stats) for layer in best
    ]
    total = sum(plan.predicted_loss_increase or 0 for plan in uniform)
    assert best.predicted_loss_increase is not None
    assert best.predicted_loss_increase < total


def test_the_plan_predicts_what_carrying_it_out_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The predicted rise is `1/2 tr(R E C E^T)` of the errors that are made, with the coherence of rows."""
    model, stats = gpt2_stats()
    # Undamped moments count errors as they are.
    monkeypatch.setattr("tensornet.compression.sensitivity.MOMENT_DAMPING", 1e-6)
    config = CompressionConfig(target_modules=MLP, param_ratio=0.7)
    plan = tn.plan(model, config, stats)
    twin = gpt2()
    twin.load_state_dict(model.state_dict())
    dense = {layer.name: model.get_submodule(layer.name).weight.detach().T for layer in plan}
    tn.apply_plan(twin, plan, stats)
    for layer in plan:
        if layer.topology is None:
            continue
        made = twin.get_submodule(layer.name)
        error = (dense[layer.name] - made.to_matrix().detach()).double()
        rows = damped(stats.rows[layer.name], FORECAST_ROW_DAMPING) / (1 + FORECAST_ROW_DAMPING)
        columns = stats.columns[layer.name].double()
        cost = 0.5 * stats.coherence[layer.name] * float(torch.trace(rows @ error @ columns @ error.T))
        assert layer.loss_increase == pytest.approx(cost, rel=0.02, abs=1e-6)
        assert layer.params_after == sum(tensor.numel() for tensor in made.stored.values())


def test_a_rise_of_the_loss_is_a_budget() -> None:
    model, stats = gpt2_stats()
    rises, found = (0.001, 0.01, 0.1), {}
    for topology in ("auto", "low_rank"):
        config = CompressionConfig(topology=topology, loss_increase=rises[0])
        assert (config.formats is None) == (topology == "low_rank")
        survey = survey_from_stats(model, config, stats)
        plans = [survey.plan(loss_increase=rise) for rise in rises]
        sizes = [plan.bytes_after for plan in plans]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 3
        for plan, rise in zip(plans, rises, strict=True):
            assert plan.predicted_kl == plan.predicted_loss_increase <= rise  # type: ignore[operator]
        found[topology] = sizes
    # Number formats need far fewer bytes for the same loss than networks of the model's dtype.
    assert all(few < many / 2 for few, many in zip(found["auto"], found["low_rank"], strict=True))


def test_the_curve_runs_through_every_budget() -> None:
    model, stats = gpt2_stats()
    curve = tn.plan(model, CompressionConfig(param_ratio=0.7), stats).curve()
    assert len(curve) > 10
    assert curve == sorted(curve, reverse=True)
    for ratio in (0.8, 0.5):
        plan = tn.plan(model, CompressionConfig(param_ratio=ratio), stats)
        below = max(cost for size, cost in curve if size >= plan.bytes_after)
        above = min(cost for size, cost in curve if size <= plan.bytes_after)
        # Chosen by the cost with little damping, which ranks near ties otherwise than the forecast does.
        assert below <= plan.predicted_loss_increase + 1e-9 <= 1.02 * above + 2e-9  # type: ignore[operator]


def test_one_preparation_serves_all_budgets() -> None:
    model, stats = gpt2_stats()
    prepared = survey_from_stats(model, CompressionConfig(param_ratio=0.7), stats)
    assert prepared.plan() == tn.plan(model, CompressionConfig(param_ratio=0.7), stats)
    for budget in ({"param_ratio": 0.5}, {"loss_increase": 0.01}):
        config = CompressionConfig(topology="low_rank", **budget)  # type: ignore[arg-type]
        assert prepared.plan(**budget) == tn.plan(model, config, stats)
    with pytest.raises(tn.errors.BudgetError, match=r"planned alone.*tensornet\.plan"):
        survey_from_stats(model, CompressionConfig(param_ratio=0.7, method="svd"))


def test_what_forms_depend_on_is_no_budget() -> None:
    model, stats = gpt2_stats()
    with pytest.raises(tn.errors.BudgetError, match="got max_bond"):
        survey_from_stats(model, CompressionConfig(param_ratio=0.7), stats).plan(max_bond=3)
    inputs = survey_from_stats(model, CompressionConfig(param_ratio=0.7), replace(stats, loss=None))
    with pytest.raises(tn.errors.BudgetError, match=r"max_bytes.*predicted losses"):
        inputs.plan(max_bytes=60_000)


def test_caps_on_single_layers_hold_in_a_global_plan() -> None:
    model, stats = gpt2_stats()
    plan = tn.plan(model, CompressionConfig(param_ratio=0.8, topology_options={"max_bond": 9}), stats)
    assert all(layer.topology is not None for layer in plan)
    assert max(max(x.topology.bond_dims.values()) for x in plan if x.topology) <= 9
    exact = tn.plan(model, CompressionConfig(param_ratio=0.9, topology_options={"rel_error": 0.5}), stats)
    assert all(layer.error <= 0.5 for layer in exact)
    with pytest.raises(tn.errors.BudgetError, match=r"max_bond=1.*rel_error"):
        tn.plan(model, CompressionConfig(topology_options={"max_bond": 1, "rel_error": 0.01}), stats)


def test_errors_of_outputs_are_spent_layer_by_layer() -> None:
    model, stats = gpt2_stats()
    plan = tn.plan(model, CompressionConfig(param_ratio=0.6, method="gptq"), stats)
    assert plan.predicted_loss_increase is None
    for layer in plan:
        assert layer.topology is not None
        assert layer.params_after == layer.topology.num_params
        rank = max(layer.topology.bond_dims.values())
        assert rank == int(0.6 * layer.params_before // sum(layer.shape))


def test_tied_embedding_and_head_are_one_layer_with_both_losses() -> None:
    model = gpt2().eval()
    stats = tn.calibrate(model, list(tokens())[:2])
    plan = tn.plan(model, CompressionConfig(target_modules="wte", param_ratio=0.6), stats)
    assert len(plan) == 1
    tn.apply_plan(model, plan, stats)
    assert model.transformer.wte.core_0 is model.lm_head.core_0
    ids = tokens()[0]
    rows = model.transformer.wte(ids)
    torch.testing.assert_close(rows, model.lm_head.to_matrix()[ids])


@pytest.mark.parametrize("method", ["gptq", "auto"])
def test_tokens_that_were_not_read_are_not_given_up(method: Literal["gptq", "auto"]) -> None:
    """The rank suffices for both halves of a table, of which calibration looks up only the first."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    table = 0.01 * torch.randn(400, 16, generator=generator)
    table[:200] += torch.randn(200, 4, generator=generator) @ basis[:4]
    table[200:] += torch.randn(200, 4, generator=generator) @ basis[4:8]
    model = nn.Sequential(nn.Embedding.from_pretrained(table.clone(), freeze=False), nn.Linear(16, 5))
    batches = [(torch.randint(200, (64,)), torch.randint(5, (64,))) for _ in range(20)]
    config = CompressionConfig(target_modules=("0",), topology="low_rank", param_ratio=0.6, method=method)
    report = tn.compress(model, config, calibration=batches, progress=False)
    topology = report.plan.layers[0].topology
    assert topology is not None
    assert max(topology.bond_dims.values()) >= 8
    with torch.no_grad():
        error = model[0](torch.arange(400)) - table
    # Only noise is lost. If unread rows had no weight, the ranks left over would fit the noise of read rows.
    assert error[:200].norm() < 0.1 * table[:200].norm()
    assert error[200:].norm() < 0.1 * table[200:].norm()
