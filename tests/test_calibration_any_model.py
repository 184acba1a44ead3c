"""Calibration of models the library does not recognise: in-place changes, odd routing, layouts and losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn

X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4


def same(a: tn.CalibrationStats, b: tn.CalibrationStats) -> None:
    assert a.loss == pytest.approx(b.loss)
    for side in ("rows", "columns"):
        assert getattr(a, side).keys() == getattr(b, side).keys()
        for name, moment in getattr(a, side).items():
            torch.testing.assert_close(moment, getattr(b, side)[name])


class Changing(nn.Module):
    """Two layers read one tensor that is changed in place in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.first(x)
        x.mul_(3).add_(1)
        return y + self.second(x)


def test_a_tensor_that_changed_in_place_is_another_input() -> None:
    stats = tn.calibrate(Changing(), [(X, Y)])
    torch.testing.assert_close(stats.columns["first"], X.T @ X / 32)
    torch.testing.assert_close(stats.columns["second"], (3 * X + 1).T @ (3 * X + 1) / 32)


@pytest.mark.parametrize("behind", [nn.ReLU, nn.SiLU])
def test_in_place_operations_behind_any_layer(behind: type[nn.ReLU]) -> None:
    def model(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 6),
            behind(inplace=inplace),
            nn.Linear(6, 6),
            behind(inplace=inplace),
            nn.Linear(6, 4),
        )

    same(tn.calibrate(model(True), [(X, Y)]), tn.calibrate(model(False), [(X, Y)]))


class Routed(nn.Module):
    """Experts that all read one tensor, where only those that a batch asks for run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        return sum(self.experts[number](x) for number in used)  # type: ignore[return-value]


def test_experts_that_some_batches_do_not_reach() -> None:
    model, used = Routed(), ([0, 1], [1], [0, 1], [1, 0])
    parts = X.split(8)
    batches = [
        {"x": x, "used": experts, "labels": y} for x, experts, y in zip(parts, used, Y.split(8), strict=True)
    ]
    stats = tn.calibrate(model, batches)
    without = torch.cat([parts[0], *parts[2:]])
    torch.testing.assert_close(stats.columns["experts.0"], without.T @ without / 24)
    torch.testing.assert_close(stats.columns["experts.1"], X.T @ X / 32)
    assert "experts.2" not in stats.columns
    config = tn.CompressionConfig(param_ratio=0.9)
    made = tn.plan(model, config, stats)  # the expert that never ran is priced as its siblings are
    assert {layer.name for layer in made} == {"experts.0", "experts.1", "experts.2"}
    together = tn.calibrate(model, batches[2:])
    assert together.columns["experts.0"] is together.columns["experts.1"]


def test_a_layer_that_reads_one_tensor_twice_counts_it_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.other(x) + self.layer(x)

    stats = tn.calibrate(Twice(), [(X, Y)])
    for name in ("layer", "other"):
        torch.testing.assert_close(stats.columns[name], X.T @ X / 32)


@pytest.mark.parametrize("objective", ["weight", "activation", "curvature"])
@pytest.mark.parametrize("tiny", [1, 2])
def test_a_tiny_layer_stays_dense_and_the_others_keep_the_ratio(tiny: int, objective: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 48), nn.Linear(48, tiny), nn.Linear(tiny, tiny), nn.Linear(tiny, 48), nn.Linear(48, 48)
    )
    config = tn.CompressionConfig(target_modules="all", param_ratio=0.5, objective=objective)
    report = tn.compress(model, config, calibration=[(X, torch.arange(32) % 48)], progress=False)
    assert report.plan["2"].topology is None
    assert report.plan["4"].topology is not None
    assert report.plan.params_after <= 0.5 * report.plan.params_before


@pytest.mark.parametrize("objective", ["weight", "activation"])
def test_a_ratio_that_no_form_reaches_is_refused(objective: str) -> None:
    model = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 2), nn.Linear(2, 4))
    config = tn.CompressionConfig(target_modules="all", param_ratio=0.5, objective=objective)
    with pytest.raises(tn.BudgetError, match=r"Layer '\d'"):
        tn.compress(model, config, calibration=[(X, Y)], progress=False)
