"""Plain methods at the bytes of a plan: right sizes, right predictions, and the model left alone."""

import copy

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.compression.baselines import (
    GPTQ,
    NEAREST,
    SVD,
    apply_baseline,
    baseline_losses,
    baseline_methods,
    predict_baseline,
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


@pytest.mark.parametrize("method", [NEAREST, GPTQ, SVD])
def test_predicts_what_it_writes_and_takes_the_bytes_of_the_plan(made: Made, method: str) -> None:
    model, plan, stats = made
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = predict_baseline(model, plan, method, stats)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = copy.deepcopy(model)
    assert apply_baseline(changed, plan, method, stats) == found
    assert 0.7 * plan.bytes_after < found.num_bytes <= 1.01 * plan.bytes_after
    loss = 0.0
    for target, new in zip(all_targets(model), all_targets(changed), strict=True):
        weighting = forecast_weighting(target, stats, plan.damping)
        assert weighting is not None
        loss += weighting.cost(target.matrix.double() - new.matrix.double())
    assert found.predicted_loss_increase == pytest.approx(loss, rel=1e-4)


def test_nearest_is_torch_rounding_and_svd_the_best_of_its_rank(made: Made) -> None:
    model, plan, stats = made
    rounded, truncated = copy.deepcopy(model), copy.deepcopy(model)
    made_by = apply_baseline(rounded, plan, NEAREST, stats)
    form, uniform = made_by.form, plan
    for layer in plan:
        uniform = uniform.replace_layer(layer.name, None, form)
    assert (made_by.num_bytes, made_by.num_params) == (uniform.bytes_after, uniform.params_after)
    expected = round_weight(model[0].weight.detach(), form, rounding="nearest", refits=0).dequantize()
    assert torch.equal(rounded[0].weight, expected)
    apply_baseline(truncated, plan, SVD, stats)
    u, s, v = torch.linalg.svd(model[0].weight.detach().double(), full_matrices=False)
    rank = int(torch.linalg.matrix_rank(truncated[0].weight, rtol=1e-4))
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    assert torch.linalg.norm(truncated[0].weight.double() - best) < 0.01 * torch.linalg.norm(best)


def test_losses_by_layer_agree_with_those_of_the_matrices(made: Made) -> None:
    model, plan, stats = made
    found = baseline_losses(model, plan, stats)
    assert set(found.nearest) == set(found.svd) == {layer.name for layer in plan}
    int4 = plan
    for layer in plan:
        int4 = int4.replace_layer(layer.name, None, "int4")
    ours = baseline_losses(model, int4, stats)
    total = predict_baseline(model, int4, NEAREST, stats).predicted_loss_increase
    assert sum(ours.nearest.values()) == pytest.approx(total, rel=1e-4)
    for curve in (found.nearest_curve, found.svd_curve):
        sizes, losses = zip(*sorted(curve), strict=True)
        assert list(losses) == sorted(losses, reverse=True)
        assert sizes[0] < plan.bytes_after < sizes[-1]


def test_without_gradients_nothing_is_predicted() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    plan = tn.plan(model, tn.CompressionConfig(param_ratio=0.5))
    assert baseline_methods(None) == (NEAREST, SVD)
    assert predict_baseline(model, plan, SVD).predicted_loss_increase is None
    assert not baseline_losses(model, plan, None).svd
    assert predict_baseline(model, plan, SVD).num_bytes <= plan.bytes_after  # in the dtype of the model
    with pytest.raises(TargetError, match="'GPTQ' needs calibration statistics"):
        predict_baseline(model, plan, GPTQ)
    with pytest.raises(TargetError, match="names a layer '0' that this model does not have as dense"):
        predict_baseline(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), plan, SVD)
