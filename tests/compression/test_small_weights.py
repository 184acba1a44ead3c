"""Small and large weights: number formats whose scales can store them are used, or a warning says so."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.compression.config import CompressionConfig
from tensornet.compression.report import CompressionReport

EIGHT_BIT_SCALES = "int4:g32:float8"


class UnitNorm(nn.Module):
    """Normalization without a constant: the model is the same at any scale of the layer before it."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()


def model(factor: float) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(64, 256), UnitNorm(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()
    with torch.no_grad():
        made[0].weight.mul_(factor)
        made[0].bias.mul_(factor)
    return made


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(64, 64, generator=draw), torch.randint(10, (64,), generator=draw)) for _ in range(4)]


def compressed(factor: float, **options: object) -> tuple[CompressionReport, float]:
    """Return the report and the true error of the layer of small weights."""
    small = model(factor)
    dense = copy.deepcopy(small)
    config = CompressionConfig(**{"bits_per_weight": 4.25, **options})  # type: ignore[arg-type]
    report = tn.compress(small, config, calibration=batches(), progress=False)
    weight = dense[0].weight.detach().double()
    kept = small[0].to_matrix().detach().double() if hasattr(small[0], "to_matrix") else weight
    return report, float(torch.linalg.norm(kept - weight) / torch.linalg.norm(weight))


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, 8, 11, 13, 16, 24, 40])
def test_small_weights_are_as_accurate_as_large_ones(k: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, error = compressed(2.0**-k)
    assert error <= 1.2 * compressed(1.0)[1]
    assert report.layers[0].error == pytest.approx(error, rel=1e-3)
    assert report.plan.bits_per_weight <= 4.25


def test_formats_that_underflow_are_not_planned_where_others_fit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, error = compressed(1e-5, formats=(EIGHT_BIT_SCALES, "int3"))
    assert report.layers[0].scheme == "int3 dense"
    assert error < 0.3


@pytest.mark.parametrize("method", ["auto", "nearest"])
def test_a_format_that_underflows_is_warned_of(method: str) -> None:
    message = (
        r"Weights of '0' became zero: the scales of 'int4:g32:float8' have 8 bits and underflow below "
        r"1\.5e-05\. Use bfloat16 scales, as in formats=\('int4',\)"
    )
    with pytest.warns(UserWarning, match=message):
        report, error = compressed(1e-5, formats=(EIGHT_BIT_SCALES,), method=method)
    assert error > 0.5
    assert report.plan["0"].error == pytest.approx(error, abs=0.05)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("int4:float16", 1e8),
        ("int4:g32:float8", 1e8),
        ("nvfp4", 1e5),
        ("iq3_s", 1e10),
        ("int6:g16:s8", 1e11),
        ("int4:g32:s6:min", 1e10),
    ],
)
def test_a_format_that_overflows_is_warned_of(name: str, scale: float) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 32, bias=False))
    with torch.no_grad():
        layers[0].weight.mul_(scale)
    weight = layers[0].weight.detach().double()
    config = CompressionConfig(target_modules="all", formats=(name,), method="nearest")
    with pytest.warns(UserWarning, match=rf"'0'.*'{name}'.*overflow"):
        tn.compress(layers, config, progress=False)
    error = torch.linalg.norm(layers[0].to_matrix().detach().double() - weight)
    assert error > 0.2 * torch.linalg.norm(weight)


@pytest.mark.parametrize("size", [1e-26, 1e24])
def test_weights_whose_squares_leave_the_range_of_float32(size: float) -> None:
    errors = []
    for factor in (1.0, size):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(64, 48))
        with torch.no_grad():
            weight = layer[0].weight.mul_(factor).clone()
        config = CompressionConfig(formats=("int4",), method="nearest", target_modules="all")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = tn.compress(layer, config, progress=False)
        gap = (layer[0].to_matrix().detach().double() - weight.double()) / factor
        errors.append(float(gap.norm() / (weight.double() / factor).norm()))
        assert report.layers[0].error == pytest.approx(errors[-1], rel=1e-3)
    assert errors[1] <= 1.1 * errors[0]


def test_an_unused_row_is_not_warned_of() -> None:
    small = model(1.0)
    with torch.no_grad():
        small[0].weight[5] *= 1e-7
    config = CompressionConfig(bits_per_weight=4.25, formats=(EIGHT_BIT_SCALES,), method="nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = tn.compress(small, config, progress=False)
    assert report.layers[0].scheme == "int4:g32:float8 dense"
