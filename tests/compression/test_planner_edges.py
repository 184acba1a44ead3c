"""Where a plan has to watch out: layers of zero loss, families with few forms, foreign statistics."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from compression.test_planner import MLP, gpt2_stats, tokens
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import tensornet as tn
from tensornet.compression.allocate import lower_hull
from tensornet.compression.candidates import network_candidates
from tensornet.compression.config import CompressionConfig
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.errors import TargetError
from tensornet.nn.storage import Storage
from tensornet.nn.targets import find_targets
from tensornet.topologies import topology_family, topology_names


class Silent(nn.Module):
    """One layer without influence on the loss, one that reads nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.unheard, self.unfed = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.heard(x) + 0 * self.unheard(x) + self.unfed(0 * x)


def silent_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@pytest.mark.parametrize("method", ["auto", "gptq"])
@pytest.mark.parametrize("topology", ["auto", "mpo"])
def test_layers_whose_predicted_losses_are_zero(method: str, topology: str) -> None:
    """They are not thrown away: they stay dense, or their weights decide."""
    model, batch = Silent(), {"x": torch.randn(40, 6), "y": torch.randint(9, (40,))}
    stats = tn.calibrate(model, [batch], loss_fn=silent_losses)
    config = CompressionConfig(
        param_ratio=0.95, topology_options={"rel_error": 0.9}, method=method, topology=topology
    )  # type: ignore[arg-type]
    plan = tn.plan(model, config, stats)
    expected = {layer.name: layer.error for layer in plan if layer.topology is not None}
    if method == "auto":
        assert {"unheard", "unfed"}.isdisjoint(expected)
    else:
        assert "unfed" in expected
    for name, error in tn.apply_plan(model, plan, stats).items():
        assert error <= 0.9
        if method == "gptq":  # a fit to the curvature may increase the relative error
            assert error <= expected[name] + 1e-6


@pytest.mark.parametrize("method", ["auto", "gptq"])
@pytest.mark.parametrize("topology", sorted({*topology_names()} - {"dense", "residual"}))
def test_every_family_spends_what_it_may(topology: str, method: str) -> None:
    """Every family has networks of about the size of the budget, and the plan uses them where they pay."""
    model, stats = gpt2_stats()
    config = CompressionConfig(
        target_modules="h.0.mlp.c_fc", param_ratio=0.7, topology=topology, method=method
    )
    (layer,) = tn.plan(model, config, stats)
    assert layer.topology is not None
    assert layer.topology.family == topology
    least, most = 0.3 * layer.params_before, 0.7 * layer.params_before
    if method == "gptq":
        assert least < layer.params_after <= most
        return
    (target,) = [x for x in find_targets(model, config) if not x.skip]
    seen = layer_sensitivity(target, "curvature", stats)
    assert seen is not None
    found = network_candidates(target.matrix, seen, Storage(pivoted=True), topology_family(topology), config)
    assert least < max(x.params for x in found if x.params <= most)
    # A plan chooses only vertices of the lower hull of cost over size. If the error of rings hardly decreases
    # with their size, the largest ring that fits is not one of these vertices.
    hull = [found[k] for k in lower_hull([x.params for x in found], [x.cost for x in found])]
    assert layer.params_after == max(x.params for x in hull if x.params <= most)


@pytest.mark.parametrize(
    ("topology", "budget"), [("mpo", {"param_ratio": 1.0}), ("auto", {"max_bytes": 10**9})]
)
def test_a_budget_with_room_for_all_leaves_all_dense(topology: str, budget: dict[str, Any]) -> None:
    """And not in forms as exact, but larger."""
    model, stats = gpt2_stats()
    plan = tn.plan(model, CompressionConfig(target_modules=MLP, topology=topology, **budget), stats)
    assert all(layer.topology is None for layer in plan)


def test_statistics_of_another_model() -> None:
    _, stats = gpt2_stats()
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=101, n_positions=64))
    with pytest.raises(TargetError, match="another model"):
        tn.plan(other, CompressionConfig(param_ratio=0.8), stats)
    model, _ = gpt2_stats()
    plan = tn.plan(model, CompressionConfig(param_ratio=0.8), stats)
    with pytest.raises(TargetError, match="statistics of gradients"):
        tn.apply_plan(copy.deepcopy(model), plan, tn.calibrate(model, list(tokens()), gradients=False))


def test_a_plan_of_another_model() -> None:
    """Layers have equal names and shapes, but other weights or another dtype."""
    model, stats = gpt2_stats()
    torch.manual_seed(7)
    other = GPT2LMHeadModel(model.config)
    config = CompressionConfig(target_modules=MLP, param_ratio=0.6)
    blind = replace(config, method="svd")
    for plan, known in ((tn.plan(model, config, stats), stats), (tn.plan(model, blind), None)):
        plan = tn.CompressionPlan.from_dict(plan.to_dict())
        with pytest.raises(TargetError, match="another model"):
            tn.apply_plan(other, plan, known)
        with pytest.raises(TargetError, match="float32"):
            tn.apply_plan(copy.deepcopy(model).bfloat16(), plan, known)
        tn.apply_plan(copy.deepcopy(model), plan, known)


def test_the_error_of_a_layer_in_16_bits_includes_the_rounding_of_cores() -> None:
    model = nn.Sequential(nn.Linear(32, 24)).bfloat16()
    exact = model[0].weight.detach().double()
    plan = tn.plan(
        model, CompressionConfig(topology="low_rank", topology_options={"max_bond": 4}, method="svd")
    )
    plan = plan.replace_layer("0", tn.topologies.low_rank(out_features=24, in_features=32, rank=24))
    error = tn.apply_plan(model, plan)["0"]
    true = float((model[0].to_matrix().detach().double() - exact).norm() / exact.norm())
    assert 1e-4 < true <= error * (1 + 1e-6)


def test_a_plan_with_the_statistics_of_another_model() -> None:
    model, stats = gpt2_stats()
    torch.manual_seed(7)
    other = GPT2LMHeadModel(model.config)
    config = CompressionConfig(target_modules=MLP, param_ratio=0.6)
    plan = tn.plan(other, config, tn.calibrate(other, list(tokens()), config=config))
    with pytest.raises(TargetError, match="another model"):
        tn.apply_plan(copy.deepcopy(other), plan, stats)
    assert stats.source == plan.calibration
    with pytest.raises(TargetError, match="another model"):
        tn.compress(other, plan, calibration=stats, progress=False)
    assert type(other.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"


def test_moments_that_rounding_made_singular() -> None:
    """Accumulated in 16 bits they have negative eigenvalues; errors of zero loss are still certified."""
    model = nn.Sequential(nn.Linear(12, 8, bias=False))
    rows = torch.eye(8)
    rows[0, 0] = -1.0
    stats = tn.CalibrationStats({"0": rows}, {"0": torch.eye(12)}, tokens=9, loss=1.0)
    weight = model[0].weight.detach().clone()
    planned = tn.plan(model, CompressionConfig(param_ratio=0.95, topology_options={"max_bond": 7}), stats)
    assert planned.layers[0].topology is not None
    errors = tn.apply_plan(model, planned, stats)
    real = float((model[0].to_matrix().detach() - weight).norm() / weight.norm())  # type: ignore[operator]
    assert real > 0.1  # the row without a predicted loss is not there
    assert errors["0"] == pytest.approx(real, rel=1e-5)
    assert planned.layers[0].error == pytest.approx(real, rel=1e-5)
