"""Stacks of experts share a core where that predicts less loss at the same bytes, and only there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from stacked_experts import Experts, gaussian
from torch import Tensor, nn

import tensornet as tn
from tensornet.compression import CompressionPlan, shared_rounding
from tensornet.compression.report import model_size
from tensornet.compression.shared_forms import SHARED_FORMS, fit_form
from tensornet.errors import BudgetError, TargetError, TopologyError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork

E, OUT, IN = 5, 12, 10
NAMES = [f"experts.{e}.w" for e in range(E)]


class Model(nn.Module):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.experts = Experts(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


def common_inputs(rank: int = 4) -> Tensor:
    """Experts that read the same few directions of their inputs."""
    return gaussian(E, OUT, rank) @ gaussian(rank, IN, seed=1) + 0.02 * gaussian(E, OUT, IN, seed=2)


def common_outputs(rank: int = 4) -> Tensor:
    return gaussian(OUT, rank, seed=1) @ gaussian(E, rank, IN) + 0.02 * gaussian(E, OUT, IN, seed=2)


def common_base() -> Tensor:
    low = 0.5 * gaussian(E, OUT, 1) @ gaussian(E, 1, IN, seed=1)
    return gaussian(OUT, IN, seed=3) + low + 0.02 * gaussian(E, OUT, IN, seed=2)


def nothing_common() -> Tensor:
    # Of higher rank than fits: separate networks have errors, which sharing must not look better than.
    return gaussian(E, OUT, 2) @ gaussian(E, 2, IN, seed=1) + 0.3 * gaussian(E, OUT, IN, seed=2)


def config(ratio: float = 0.55, **options: object) -> tn.CompressionConfig:
    chosen = {"param_ratio": ratio, "objective": "weight", "share_experts": True, "topology": "low_rank"}
    return tn.CompressionConfig(**{**chosen, **options})  # type: ignore[arg-type]


def moments(count: int, size: int, seed: int) -> Tensor:
    root = gaussian(count, size, 3 * size, seed=seed).double()
    return root @ root.mT / size


# --- fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED_FORMS)
def test_a_planted_form_is_found_exactly_under_any_moments(name: str) -> None:
    made = {
        "inputs": gaussian(E, OUT, 3).double() @ gaussian(3, IN, seed=1).double(),
        "outputs": gaussian(OUT, 3, seed=1).double() @ gaussian(E, 3, IN).double(),
        "base": gaussian(OUT, IN, seed=3).double().expand(E, OUT, IN),
    }[name]
    sides = zip(moments(E, OUT, 4), moments(E, IN, 5), strict=True)
    networks = fit_form(name, list(made), [Weighting(*pair) for pair in sides], 3)
    for want, network in zip(made, networks, strict=True):
        assert torch.allclose(network.to_matrix(), want, atol=1e-8)
    place = networks[0].topology.core_names.index(SHARED_FORMS[name].core)
    assert len({id(network.cores[place]) for network in networks}) == 1


@pytest.mark.parametrize("name", ["inputs", "outputs"])
def test_private_factors_are_optimal_under_their_own_moments(name: str) -> None:
    matrices = list(gaussian(E, OUT, IN).double())
    weightings = [Weighting(*pair) for pair in zip(moments(E, OUT, 4), moments(E, IN, 5), strict=True)]
    for matrix, weighting, network in zip(
        matrices, weightings, fit_form(name, matrices, weightings, 3), strict=True
    ):
        place = 0 if name == "inputs" else 1
        private = network.cores[place].clone().requires_grad_()
        cores = [private if k == place else core for k, core in enumerate(network.cores)]
        error = matrix - cores[0].reshape(OUT, 3) @ cores[1].reshape(3, IN)
        assert weighting.rows is not None
        assert weighting.columns is not None
        loss = 0.5 * torch.trace(weighting.rows @ error @ weighting.columns @ error.T)
        (gradient,) = torch.autograd.grad(loss, private)
        assert float(gradient.norm()) < 1e-8 * float(loss.detach())


def test_diagonal_moments_weigh_as_their_matrices() -> None:
    matrices = list(gaussian(E, OUT, IN).double())
    rows, columns = gaussian(E, OUT).double().square() + 0.1, gaussian(E, IN).double().square() + 0.1
    flat = [Weighting(*pair) for pair in zip(rows, columns, strict=True)]
    full = [Weighting(torch.diag(x.rows), torch.diag(x.columns)) for x in flat]  # type: ignore[arg-type]
    for name in SHARED_FORMS:
        for one, other in zip(
            fit_form(name, matrices, flat, 3), fit_form(name, matrices, full, 3), strict=True
        ):
            assert torch.allclose(one.to_matrix(), other.to_matrix(), atol=1e-8)


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "core"),
    [(common_inputs(), "1"), (common_outputs(), "0"), (common_base(), "base"), (nothing_common(), "")],
    ids=["inputs", "outputs", "base", "nothing"],
)
def test_the_plan_chooses_the_form_of_the_stack(weights: Tensor, core: str) -> None:
    model = Model(weights)
    alone = tn.plan(model, config(share_experts=False))
    made = tn.plan(model, config())
    assert {layer.shared_core for layer in made} == {core}
    assert made.bytes_after <= alone.bytes_after
    errors = [
        sum((x.error or 0) ** 2 * float(weights[k].norm()) ** 2 for k, x in enumerate(p))
        for p in (alone, made)
    ]
    assert errors[1] < 0.5 * errors[0] if core else errors[1] == errors[0]


def test_a_stack_is_fitted_when_the_plan_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[str] = []

    def counted(name: str, *arguments: Any) -> list[TensorNetwork]:
        fits.append(name)
        return fit_form(name, *arguments)

    monkeypatch.setattr(shared_rounding, "fit_form", counted)
    model, twin = Model(common_inputs()), Model(common_inputs())
    report = tn.compress(model, config(), progress=False)
    assert fits == ["inputs"]
    report.plan.save(tmp_path / "plan.json")
    errors = tn.apply_plan(twin, CompressionPlan.load(tmp_path / "plan.json"))
    assert fits == ["inputs", "inputs"]
    assert errors == {layer.name: layer.error for layer in report.layers}
    state = twin.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_shared_core_is_one_parameter_that_counts_once() -> None:
    model = Model(common_inputs())
    report = tn.compress(model, config(), progress=False)
    layers = [model.get_submodule(name) for name in NAMES]
    assert len({id(layer.core_1) for layer in layers}) == 1
    assert len({id(layer.core_0) for layer in layers}) == E
    assert report.plan.params_after == sum(x.params_after for x in report.layers) == model_size(model)[0]
    assert report.plan.bytes_after == model_size(model)[1]
    assert report.param_ratio <= 0.55
    x = gaussian(E, 7, IN, seed=9)
    want = torch.einsum("eti,eoi->eto", x, common_inputs())
    assert float((model(x).detach() - want).norm() / want.norm()) < 0.1
    tn.decompress(model)
    assert isinstance(model.experts, Experts)


@pytest.mark.parametrize("weights", [common_inputs(), common_outputs(), common_base()], ids=SHARED_FORMS)
def test_decompressed_experts_keep_their_own_matrices(weights: Tensor) -> None:
    model, x = Model(weights), gaussian(E, 7, IN, seed=9)
    tn.compress(model, config(), progress=False)
    want = model(x).detach()
    tn.decompress(model)
    assert isinstance(model.experts, Experts)
    torch.testing.assert_close(model(x).detach(), want, rtol=1e-4, atol=1e-4)


def test_calibrated_moments_decide() -> None:
    model = Model(gaussian(E, OUT, IN))
    narrow = gaussian(4, IN, seed=6)  # all experts read four directions; the weights have nothing in common
    batches = [gaussian(E, 50, 4, seed=k) @ narrow + 1e-3 * gaussian(E, 50, IN, seed=k) for k in range(4)]
    stats = tn.calibrate(model, batches)
    made = tn.plan(model, config(0.7, objective="activation"), stats)
    assert {layer.shared_core for layer in made} == {"1"}
    assert {layer.shared_core for layer in tn.plan(model, config())} == {""}
    small = copy.deepcopy(model)
    tn.apply_plan(small, made, stats)
    want, found = model(batches[0]).detach(), small(batches[0]).detach()
    assert float((found - want).norm() / want.norm()) < 0.01


# --- files and edits -----------------------------------------------------------------------------


def test_a_saved_plan_is_carried_out_alike(tmp_path: Path) -> None:
    model = Model(common_base())
    made = tn.plan(model, config())
    made.save(tmp_path / "plan.json")
    again = CompressionPlan.load(tmp_path / "plan.json")
    assert again.bytes_after == made.bytes_after
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    assert tn.apply_plan(first, made) == tn.apply_plan(second, again)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_an_edited_layer_leaves_the_stack() -> None:
    model = Model(common_inputs())
    made = tn.plan(model, config())
    edited = made.replace_layer(NAMES[0], None)
    assert edited[NAMES[0]].shared_core == ""
    assert {edited[name].shared_with for name in NAMES[1:]} == {NAMES[1]}
    assert edited.params_after == made.params_after - made[NAMES[0]].params_after + OUT * IN + (
        made[NAMES[1]].shape[1] * max(made[NAMES[1]].topology.bond_dims.values())  # type: ignore[union-attr]
    )
    tn.apply_plan(model, edited)
    assert model_size(model)[0] == edited.params_after


# --- bad input -----------------------------------------------------------------------------------


def test_refuses_a_part_of_a_stack() -> None:
    model = Model(common_inputs())
    made = tn.plan(model, config())
    part = CompressionPlan(made.layers[1:], objective=made.objective)
    with pytest.raises(TopologyError, match=r"'experts.1.w' shares core '1' with 'experts.0.w'.*plan again"):
        tn.apply_plan(model, part)
    assert isinstance(model.experts, Experts)


@pytest.mark.parametrize("options", [{"max_bond": 4}, {"rel_error": 0.1}], ids=str)
def test_refuses_options_that_sharing_does_not_keep(options: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match=next(iter(options))):
        tn.CompressionConfig(param_ratio=0.5, share_experts=True, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share_experts must be True or False"):
        tn.CompressionConfig(share_experts="yes")  # type: ignore[arg-type]


def test_a_model_without_stacks_is_refused() -> None:
    with pytest.raises(TargetError, match=r"no stack of experts among the 1 targeted layers.*leave out"):
        tn.plan(nn.Sequential(nn.Linear(16, 16)), config())
