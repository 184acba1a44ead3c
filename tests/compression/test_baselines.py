"""Plain methods at the bytes of a plan, as configurations of the same pipeline."""

import copy

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.compression.baselines import (
    GPTQ,
    NEAREST,
    SVD,
    baseline_configs,
    baseline_losses,
    run_baseline,
)
from tensornet.compression.sensitivity import forecast_weighting
from tensornet.errors import TargetError
from tensornet.nn.targets import all_targets
from tensornet.quantization import round_weight

Made = tuple[nn.Sequential, tn.CompressionPlan, tn.CalibrationStats]


@pytest.fixture(scope="module")
def made() -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    config = tn.CompressionConfig(bits_per_weight=4.25)
    batches = [torch.randn(64, 64) @ torch.randn(64, 64) / 8 for _ in range(4)]
    stats = tn.calibrate(model, batches, config=config)
    return model, tn.plan(model, config, stats), stats


def dense(model: nn.Module, name: str) -> torch.Tensor:
    layer = model.get_submodule(name)
    made = layer.to_matrix() if isinstance(layer, tn.nn.TensorNetworkLinear) else layer.weight
    return made.detach().double()  # type: ignore[operator]


@pytest.mark.parametrize("method", [NEAREST, GPTQ, SVD])
def test_predicts_what_it_makes_at_the_bytes_of_the_plan(made: Made, method: str) -> None:
    model, plan, stats = made
    found = run_baseline(model, plan, method, stats)
    changed = copy.deepcopy(model)
    assert run_baseline(changed, plan, method, stats, apply=True) == found
    assert 0.7 * plan.bytes_after < found.num_bytes <= 1.01 * plan.bytes_after
    loss = 0.0
    for target in all_targets(model):
        weighting = forecast_weighting(target, stats, plan.damping)
        assert weighting is not None
        loss += weighting.cost(target.matrix.double() - dense(changed, target.name))
    assert found.predicted_loss_increase == pytest.approx(loss, rel=0.3)


def test_nearest_is_torch_rounding_and_svd_the_best_of_its_rank(made: Made) -> None:
    model, plan, stats = made
    rounded, truncated = copy.deepcopy(model), copy.deepcopy(model)
    scheme = run_baseline(rounded, plan, NEAREST, stats, apply=True).scheme
    weight = model[0].weight.detach()
    expected = round_weight(weight, scheme, rounding="nearest", refits=0).dequantize()
    torch.testing.assert_close(dense(rounded, "0"), expected.double(), rtol=1e-6, atol=1e-6)
    run_baseline(truncated, plan, SVD, stats, apply=True)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = max(truncated[0].topology.bond_dims.values())
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    torch.testing.assert_close(dense(truncated, "0"), best, rtol=1e-3, atol=1e-4)


def test_gptq_costs_less_than_nearest_and_more_than_two_sided(made: Made) -> None:
    model, plan, stats = made
    losses = [run_baseline(model, plan, x, stats).predicted_loss_increase for x in (NEAREST, GPTQ)]
    assert losses[0] > losses[1] > plan.predicted_loss_increase  # type: ignore[operator]


def test_losses_by_layer_agree_with_those_of_the_matrices(made: Made) -> None:
    model, plan, stats = made
    found = baseline_losses(model, plan, stats)
    assert set(found.nearest) == set(found.svd) == {layer.name for layer in plan}
    int4 = plan
    for layer in plan:
        int4 = int4.replace_layer(layer.name, None, "int4")
    total = run_baseline(model, int4, NEAREST, stats).predicted_loss_increase
    assert sum(baseline_losses(model, int4, stats).nearest.values()) == pytest.approx(total, rel=1e-4)
    for curve in (found.nearest_curve, found.svd_curve):
        sizes, losses = zip(*sorted(curve), strict=True)
        assert list(losses) == sorted(losses, reverse=True)
        assert sizes[0] < plan.bytes_after < sizes[-1]


def test_without_gradients_nothing_is_predicted() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    plan = tn.plan(model, tn.CompressionConfig(param_ratio=0.5))
    assert list(baseline_configs(plan, None)) == [NEAREST, SVD]
    assert run_baseline(model, plan, SVD).predicted_loss_increase is None
    assert not baseline_losses(model, plan, None).svd
    assert run_baseline(model, plan, SVD).num_bytes <= plan.bytes_after  # in the dtype of the model
    with pytest.raises(TargetError, match="GPTQ"):
        run_baseline(model, plan, GPTQ)
    with pytest.raises(TargetError, match="matches no layer"):
        run_baseline(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), plan, SVD)
