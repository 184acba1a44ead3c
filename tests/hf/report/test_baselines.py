"""Plain methods at the bytes of a plan, as configurations of the same pipeline."""

import copy

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.compression.sensitivity import forecast_weighting
from tensornet.nn.targets import all_targets
from tensornet.quantization import round_weight
from tensornet_hf.report import GPTQ, NEAREST, SVD, baseline_configs, svd_itemsize

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
    baseline = tn.plan(model, baseline_configs(plan, stats)[method], stats)
    changed = copy.deepcopy(model)
    tn.apply_plan(changed, baseline, stats)
    size = baseline.params_after * svd_itemsize(plan) if method == SVD else baseline.bytes_after
    assert 0.7 * plan.bytes_after < size <= 1.01 * plan.bytes_after
    loss = 0.0
    for target in all_targets(model):
        weighting = forecast_weighting(target, stats)
        assert weighting is not None
        loss += weighting.cost(target.matrix.double() - dense(changed, target.name))
    exact = 1e-3 if method == SVD else 0.3
    assert baseline.predicted_loss_increase == pytest.approx(loss, rel=exact)


def test_nearest_is_torch_rounding_and_svd_the_best_of_its_rank(made: Made) -> None:
    model, plan, stats = made
    rounded, truncated = copy.deepcopy(model), copy.deepcopy(model)
    configs = baseline_configs(plan, stats)
    tn.apply_plan(rounded, tn.plan(model, configs[NEAREST], stats), stats)
    weight = model[0].weight.detach()
    assert configs[NEAREST].formats is not None
    expected = round_weight(weight, configs[NEAREST].formats[0], rounding="nearest", refits=0).dequantize()
    torch.testing.assert_close(dense(rounded, "0"), expected.double(), rtol=1e-6, atol=1e-6)
    tn.apply_plan(truncated, tn.plan(model, configs[SVD], stats), stats)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = max(truncated[0].topology.bond_dims.values())
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    torch.testing.assert_close(dense(truncated, "0"), best, rtol=1e-3, atol=1e-4)


def test_gptq_costs_less_than_nearest_and_more_than_two_sided(made: Made) -> None:
    model, plan, stats = made
    configs = baseline_configs(plan, stats)
    losses = [tn.plan(model, configs[x], stats).predicted_loss_increase for x in (NEAREST, GPTQ)]
    assert losses[0] > losses[1] > plan.predicted_loss_increase  # type: ignore[operator]


def test_without_gradients_nothing_is_predicted() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    plan = tn.plan(model, tn.CompressionConfig(param_ratio=0.5))
    configs = baseline_configs(plan, None)
    assert list(configs) == [NEAREST, SVD]
    svd = tn.plan(model, configs[SVD])
    assert svd.predicted_loss_increase is None
    assert svd.bytes_after <= plan.bytes_after  # in the dtype of the model
