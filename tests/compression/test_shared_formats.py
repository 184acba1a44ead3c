"""Shared cores in number formats: predicted as they come out, rounded once, and shared in files."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from stacked_experts import Experts, gaussian
from torch import Tensor, nn

import tensornet as tn
from tensornet.compression import CompressionPlan, prepare
from tensornet.compression.report import model_size
from tensornet.compression.sensitivity import Sensitivity
from tensornet.compression.shared_formats import encodings, form_curves
from tensornet.compression.shared_forms import SHARED_FORMS
from tensornet.compression.shared_rounding import fit_stored, pooled
from tensornet.errors import BudgetError, TopologyError
from tensornet.healing.shared_layers import find_shared_layers
from tensornet.healing.trained import compressed_layers
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.encoding import Storage
from tensornet.nn.linear import linear_from_stored
from tensornet.quantization import NumberFormat
from tensornet.quantization.factors import round_beside

E, OUT, IN = 4, 72, 64
FORMATS = tuple(NumberFormat.parse(x) for x in ("float", "int8", "int4:g32:float8", "int2:g32:float8"))
PLANTED = {
    "inputs": gaussian(E, OUT, 10) @ gaussian(10, IN, seed=1) / 3 + 0.2 * gaussian(E, OUT, IN, seed=2),
    "outputs": gaussian(OUT, 10) @ gaussian(E, 10, IN, seed=1) / 3 + 0.2 * gaussian(E, OUT, IN, seed=2),
    "base": gaussian(OUT, IN, seed=3)
    + 0.3 * gaussian(E, OUT, 3) @ gaussian(E, 3, IN, seed=1)
    + 0.05 * gaussian(E, OUT, IN, seed=2),
}


def moment(size: int, seed: int) -> Tensor:
    root = gaussian(size, 2 * size, seed=seed).double() * torch.logspace(0, -1, size).double()[:, None]
    found = root @ root.T / size
    return found + 0.1 * found.diagonal().mean() * torch.eye(size)


@cache
def seen() -> list[Sensitivity]:
    """Sensitivities of the experts, whose moments differ."""
    found = []
    for e in range(E):
        rows, columns = moment(OUT, 10 + e), moment(IN, 20 + e)
        flat = (rows + rows.diagonal().mean() * torch.eye(OUT)) / 2
        found.append(Sensitivity(Weighting(rows, columns), Weighting(flat, columns)))
    return found


# --- predictions and rounding --------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED_FORMS)
def test_predicted_losses_and_bytes_are_those_of_the_fits(name: str) -> None:
    matrices, weightings = list(PLANTED[name]), [x.choice for x in seen()]
    curves = form_curves(name, matrices, seen(), FORMATS)
    assert [x.storage for x in curves[1:]] == encodings(name, FORMATS)[1:]
    assert curves[0].storage == Storage()
    for curve in curves[1:]:
        for rank in (2, 6, 16):
            topology = SHARED_FORMS[name].build(OUT, IN, rank)
            stored = fit_stored(name, matrices, weightings, rank, curve.storage)
            layers = [
                linear_from_stored(topology, x, source="part", storage=curve.storage, like=matrices[0])
                for x in stored
            ]
            tensors = {id(x): x for layer in layers for x in layer.stored.values()}.values()
            assert sum(x.nbytes for x in tensors) == curve.num_bytes[rank - 1]
            errors = [w - layer.to_matrix().detach() for w, layer in zip(matrices, layers, strict=True)]
            for predicted, kind in ((curve.costs, "choice"), (curve.forecasts, "forecast")):
                made = [getattr(x, kind).cost(e.double()) for x, e in zip(seen(), errors, strict=True)]
                # Refitted factors make up for a part of the rounding error, which predictions leave out.
                assert 0.9 < float(predicted[:, rank - 1].sum()) / sum(made) < 1.8, (curve.storage, rank)


@pytest.mark.parametrize("name", SHARED_FORMS)
def test_errors_of_a_shared_core_count_for_every_expert_of_a_token(name: str) -> None:
    found = []
    for factor in (1.0, 2.0, 3.0):
        curves = form_curves(name, list(PLANTED[name]), seen(), FORMATS, per_token=factor)
        found.append(curves[-1].costs[:, 3].sum())
    assert found[1] > found[0]
    assert float(found[2] - found[1]) == pytest.approx(float(found[1] - found[0]), rel=0.1)


@pytest.mark.parametrize("name", SHARED_FORMS)
def test_only_the_tensors_of_the_shared_core_are_common(name: str) -> None:
    core = SHARED_FORMS[name].core
    storage = Storage(number_format="int4", core_formats={core: "int8"})  # type: ignore[arg-type]
    first, *others = fit_stored(name, list(PLANTED[name]), [Weighting()] * E, 5, storage)
    for stored in others:
        assert {part for part in stored if stored[part] is first[part]} == {f"core_{core}", f"scale_{core}"}


@pytest.mark.parametrize("name", SHARED_FORMS)
def test_eight_bits_hardly_change_the_fit(name: str) -> None:
    matrices, weightings = list(PLANTED[name]), [x.choice for x in seen()]
    topology, made = SHARED_FORMS[name].build(OUT, IN, 8), []
    for storage in (Storage(), Storage(number_format=NumberFormat.parse("int8:g32"))):
        stored = fit_stored(name, matrices, weightings, 8, storage)
        layers = [
            linear_from_stored(topology, x, source="part", storage=storage, like=matrices[0]) for x in stored
        ]
        made.append(torch.stack([layer.to_matrix().detach() for layer in layers]))
    assert float((made[0] - made[1]).norm() / made[0].norm()) < 0.02


def test_pooled_moments_are_exact_where_matrices_agree() -> None:
    weighting = seen()[0].choice
    error = gaussian(OUT, IN).double()
    assert pooled([weighting] * 3, (OUT, IN)).cost(error) == pytest.approx(3 * weighting.cost(error))
    for one in (Weighting(weighting.rows, None), Weighting(None, weighting.columns)):
        assert pooled([one] * 3, (OUT, IN)).cost(error) == pytest.approx(3 * one.cost(error))
    many = [x.choice for x in seen()]
    white = torch.stack([gaussian(OUT, IN, seed=k).double() for k in range(200)])  # equal on average: traces
    costs = [sum(x.cost(e) for e in white) for x in (*many, pooled(many, (OUT, IN)))]
    assert costs[-1] == pytest.approx(sum(costs[:-1]), rel=0.02)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_factor_is_fitted_to_what_rounding_left(side: str) -> None:
    a, b = gaussian(OUT, 6).double(), gaussian(6, IN, seed=1).double()
    rough = [a, b + 0.1 * gaussian(6, IN, seed=2)] if side == "left" else [a + 0.1 * gaussian(OUT, 6), b]
    weighting = seen()[0].choice
    for number_format in (None, NumberFormat.parse("int8")):
        made = round_beside(a @ b, *rough, side, number_format, weighting)  # type: ignore[arg-type]
        value = made if isinstance(made, Tensor) else made.dequantize(torch.float64)
        fitted = value @ rough[1] if side == "left" else rough[0] @ value
        assert weighting.cost(a @ b - fitted) < weighting.cost(a @ b - rough[0] @ rough[1])


def test_encodings_are_among_the_allowed_formats() -> None:
    for names in (("int4",), ("int8", "int4"), ("float", "int8"), ("float", "int8", "int6", "int3", "bf16")):
        allowed = [NumberFormat.parse(x) for x in names]
        for form in SHARED_FORMS:
            for storage in encodings(form, allowed):
                assert {storage.number_format, *dict(storage.core_formats).values()} <= {*allowed}
    assert encodings("inputs", [NumberFormat.parse("int3")]) == []  # factors need four bits


# --- plans ---------------------------------------------------------------------------------------


class Model(nn.Module):
    """Stacks of experts side by side, and a linear layer that shares nothing."""

    def __init__(self, *stacks: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{k}": Experts(weights) for k, weights in enumerate(stacks)})
        self.head = nn.Linear(OUT, 9)

    def forward(self, x: Tensor) -> Tensor:
        routed = x.reshape(E, -1, IN)
        hidden = sum(block(routed) for block in self.blocks.values())
        return self.head(torch.tanh(hidden / 8).reshape(len(x), OUT))


@cache
def calibrated() -> tuple[Model, tn.CalibrationStats, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(PLANTED["inputs"], gaussian(E, OUT, IN, seed=8), PLANTED["base"]).eval()
        batches = [(torch.randn(256, IN), torch.randint(9, (256,))) for _ in range(4)]
        return model, tn.calibrate(model, batches), batches


def config(**options: object) -> tn.CompressionConfig:
    chosen = {
        "target_modules": ("*block*", "head"),
        "share_experts": True,
        "formats": ("int8", "int4"),
        **options,
    }
    return tn.CompressionConfig(**chosen)  # type: ignore[arg-type]


@cache
def made(bits: float = 4.5) -> tuple[Model, tn.CompressionReport]:
    model, stats, _ = calibrated()
    small = copy.deepcopy(model)
    return small, tn.compress(small, config(bits_per_weight=bits), calibration=stats, progress=False)


def rise(plan: CompressionPlan) -> float:
    assert plan.predicted_loss_increase is not None
    return plan.predicted_loss_increase


@pytest.mark.parametrize("bits", [8.0, 6.0, 4.5, 3.0])
def test_integers_among_the_shared_forms_lower_the_loss(bits: float) -> None:
    model, stats, _ = calibrated()
    prepared = prepare(model, config(formats=("float", "int8", "int4"), bits_per_weight=bits), stats)
    floating = tuple(
        replace(stack, curves=tuple(x for x in stack.curves if not x.storage.quantized))
        for stack in prepared.stacks
    )
    found = []
    for stacks in (prepared.stacks, floating, ()):
        try:
            found.append(rise(replace(prepared, stacks=stacks).plan()))
        except BudgetError:  # separate integers are not so small
            found.append(float("inf"))
    assert found[0] < min(found[1:])
    plan = prepared.plan()
    assert plan.bits_per_weight <= bits
    assert any(layer.shared_core and layer.storage.quantized for layer in plan)


def test_own_format_only_where_it_is_allowed() -> None:
    model, stats, _ = calibrated()
    prepared = prepare(model, config(bits_per_weight=4.5), stats)
    kinds = {x.storage.quantized for stack in prepared.stacks for x in stack.curves}
    assert kinds == {True}
    assert all(layer.storage.quantized for layer in prepared.plan())


def test_one_format_for_all_layers_shares_by_bytes() -> None:
    model, stats, _ = calibrated()
    options = {"formats": ("int4",), "objective": "activation", "topology": "low_rank"}
    alone = tn.plan(model, config(share_experts=False, **options), stats)
    plan = tn.plan(model, config(**options), stats)
    assert plan.bytes_after <= alone.bytes_after
    assert any(layer.shared_core for layer in plan)
    assert {layer.storage.number_format.name for layer in plan} == {"int4"}


def test_the_model_has_the_bytes_of_the_plan_and_its_files() -> None:
    model, report = made()
    assert any(x.shared_core and x.storage.quantized for x in report.plan)
    saved = model_size(calibrated()[0])[1] - model_size(model)[1]
    assert saved == report.plan.bytes_before - report.plan.bytes_after
    for layer in report.layers:
        if report.plan[layer.name].shared_core:
            stored = model.get_submodule(layer.name)
            assert isinstance(stored, tn.nn.TensorNetworkLinear)
            before = calibrated()[0].get_parameter(f"{layer.name.rsplit('.', 2)[0]}.w")
            matrix = before[int(layer.name.rsplit(".", 2)[1])]
            gap = float((stored.to_matrix() - matrix).detach().norm() / matrix.detach().norm())
            assert layer.error == pytest.approx(gap, rel=1e-4)


def test_files_hold_a_shared_integer_core_once(tmp_path: Path) -> None:
    model, report = made()
    x = calibrated()[2][0][0]
    tn.save_model(model, tmp_path / "small.safetensors")
    again = tn.load_model(copy.deepcopy(calibrated()[0]), tmp_path / "small.safetensors")
    assert torch.equal(again(x), model(x))
    assert model_size(again) == model_size(model)
    stacks = [find_shared_layers(compressed_layers(each)) for each in (model, again)]  # type: ignore[arg-type]
    assert stacks[0] == stacks[1] != []
    assert any(stack.storage.quantized for stack in stacks[1])
    report.plan.save(tmp_path / "plan.json")
    twin = copy.deepcopy(calibrated()[0])
    errors = tn.apply_plan(twin, CompressionPlan.load(tmp_path / "plan.json"), calibrated()[1])
    assert errors == {layer.name: layer.error for layer in report.layers}
    state = twin.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_decompressed_experts_compute_what_the_integers_did() -> None:
    model, _ = made()
    dense, x = copy.deepcopy(model), calibrated()[2][0][0]
    tn.decompress(dense)
    assert isinstance(dense.blocks["block0"], Experts)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-4)


def test_moves_and_copies_keep_a_shared_core_one() -> None:
    model = copy.deepcopy(made()[0]).to(torch.bfloat16)
    stacks = find_shared_layers(compressed_layers(model))  # type: ignore[arg-type]
    assert stacks == find_shared_layers(compressed_layers(made()[0]))  # type: ignore[arg-type]


def test_healing_trains_the_scales_of_a_shared_core_once() -> None:
    model = copy.deepcopy(made()[0])
    dense, _, batches = calibrated()
    stack = next(x for x in find_shared_layers(compressed_layers(model)) if x.storage.quantized)  # type: ignore[arg-type]
    first, second = (model.get_submodule(name) for name in stack.names[:2])
    core = SHARED_FORMS[stack.form].core
    before = getattr(first, f"core_{core}").clone(), getattr(first, f"scale_{core}").clone()
    report = tn.heal(model, dense, batches, steps=30, lr=1e-2)
    assert sum(report.losses[-5:]) < sum(report.losses[:5])
    assert getattr(first, f"scale_{core}") is getattr(second, f"scale_{core}")
    assert torch.equal(getattr(first, f"core_{core}"), before[0])
    assert not torch.equal(getattr(first, f"scale_{core}"), before[1])


def test_refining_fits_a_stack_of_integers_again() -> None:
    model, (dense, stats, batches) = copy.deepcopy(made()[0]), calibrated()
    names = next(x for x in find_shared_layers(compressed_layers(model)) if x.storage.quantized).names  # type: ignore[arg-type]
    before = {name: model.get_submodule(name).to_matrix() for name in names}  # type: ignore[operator]
    shared = find_shared_layers(compressed_layers(model))  # type: ignore[arg-type]
    report = tn.healing.refine(model, dense, batches, stats)
    assert {*names} <= {*report.after}
    assert find_shared_layers(compressed_layers(model)) == shared  # type: ignore[arg-type]
    if report.kept:
        assert not any(torch.equal(model.get_submodule(x).to_matrix(), before[x]) for x in names)  # type: ignore[operator]


# --- edits and bad input -------------------------------------------------------------------------


def test_a_layer_that_leaves_takes_its_count_of_the_core_along() -> None:
    model, stats, _ = calibrated()
    plan = made()[1].plan
    owner = next(x for x in plan if x.shared_with == x.name and x.storage.quantized)
    edited = plan.replace_layer(owner.name, None, "int8")
    assert sum(x.shared_with == edited[x.name].shared_with for x in plan if x.shared_core) < len(plan)
    small = copy.deepcopy(model)
    tn.apply_plan(small, edited, stats)
    saved = model_size(model)[1] - model_size(small)[1]
    assert saved == edited.bytes_before - edited.bytes_after


def test_members_stored_in_other_ways_are_refused() -> None:
    model, stats, _ = calibrated()
    plan = made()[1].plan
    owner = next(x for x in plan if x.shared_with == x.name and x.storage.quantized)
    layers = tuple(
        replace(x, storage=Storage()) if x.shared_with == owner.name and x.name != owner.name else x
        for x in plan
    )
    with pytest.raises(TopologyError, match=r"not planned alike.*plan again"):
        tn.apply_plan(copy.deepcopy(model), replace(plan, layers=layers), stats)


def test_pivoted_cores_are_not_shared() -> None:
    storage = Storage(pivoted=True)
    model, stats, _ = calibrated()
    plan = made()[1].plan
    layers = tuple(replace(x, storage=storage) if x.shared_core else x for x in plan)
    with pytest.raises(TopologyError, match=r"layers that share a core have number formats alone"):
        tn.apply_plan(copy.deepcopy(model), replace(plan, layers=layers), stats)
