"""One plan over number formats, ranks and networks: bytes are kept, and one format never costs less."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from compression.test_planner import curves
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import tensornet as tn
from tensornet.calibration import sampled_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression import Survey, survey_from_stats
from tensornet.compression.allocate import (
    Cap,
    CostCurve,
    choose_within,
    spend_size,
    total_cost,
    total_size,
    uniform,
)
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import LayerPlan, scheme_name
from tensornet.compression.report import model_size
from tensornet.nn.storage import Storage
from tensornet.quantization import NumberFormat

FORMATS = ("float", "int8", "int4", "int3", "int2")
SIZES = st.floats(2.3, 34.0)


@cache
def _calibrated() -> tuple[nn.Module, CalibrationStats, Survey]:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=64, n_head=2, n_positions=32, vocab_size=80, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # random models predict nothing; larger weights make their opinions strong
    stats = tn.calibrate(model, list(tokens(1)), loss_fn=sampled_losses)
    return (
        model,
        stats,
        survey_from_stats(model, CompressionConfig(bits_per_weight=4.25, formats=FORMATS), stats),
    )


def calibrated() -> tuple[nn.Module, CalibrationStats, Survey]:
    model, stats, prepared = _calibrated()
    return copy.deepcopy(model), stats, prepared


def tokens(seed: int) -> Tensor:
    return torch.randint(1, 80, (3, 8, 32), generator=torch.Generator().manual_seed(seed))


def cost(prepared: Survey, plan: tn.CompressionPlan) -> float:
    """Cost that decides, which is not the predicted loss."""
    return sum(
        next(
            x.cost for x in surveyed.candidates if (x.topology, x.storage) == (layer.topology, layer.storage)
        )
        for surveyed, layer in zip(prepared.layers, plan, strict=True)
    )


# --- allocation -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(curves())
def test_more_bytes_never_cost_more(layers: list[CostCurve]) -> None:
    least, most = (int(sum(float(x) for x in ends)) for ends in zip(*map(ends_of, layers), strict=True))
    before = float("inf")
    for budget in range(least, most + 1):
        chosen = spend_size(layers, budget)
        assert total_size(layers, chosen) <= budget
        assert total_cost(layers, chosen) <= before + 1e-9
        before = total_cost(layers, chosen)


def ends_of(curve: CostCurve) -> tuple[float, float]:
    return float(curve.sizes.min()), float(curve.sizes.max())


@given(curves(), st.data())
def test_several_caps_are_all_kept(layers: list[CostCurve], data: st.DataObject) -> None:
    count = st.integers(1, 40)
    others = [
        CostCurve(torch.tensor([data.draw(count) for _ in curve.sizes]).double(), curve.costs)
        for curve in layers
    ]
    caps = [
        Cap(name, made, data.draw(st.integers(1, 160)))
        for name, made in (("max_bytes", layers), ("param_ratio", others))
    ]
    try:
        chosen, name = choose_within(caps)
    except tn.errors.BudgetError:
        return
    assert all(total_size(cap.curves, chosen) <= cap.allowed * (1 + 1e-12) for cap in caps)
    assert name == max(caps, key=lambda cap: cap.use(chosen)).name


def test_a_choice_that_no_limit_alone_finds() -> None:
    """Each limit alone chooses the candidate that exceeds the other one."""
    costs = torch.tensor([10.0, 0.0, 0.0, 2.0]).double()
    first, second = torch.tensor([[1.0, 9.0, 1.0, 5.0], [1.0, 1.0, 9.0, 5.0]]).double()
    caps = [
        Cap("max_bytes", [CostCurve(first, costs)], 5.0),
        Cap("param_ratio", [CostCurve(second, costs)], 5.0),
    ]
    assert choose_within(caps)[0] == [3]


def test_caps_that_contradict_each_other() -> None:
    sizes, costs = torch.tensor([1.0, 9.0]).double(), torch.tensor([5.0, 0.0]).double()
    caps = [
        Cap("max_bytes", [CostCurve(sizes, costs)], 2.0),
        Cap("param_ratio", [CostCurve(sizes.flip(0), costs)], 2.0),
    ]
    with pytest.raises(tn.errors.BudgetError, match="max_bytes and param_ratio"):
        choose_within(caps)


# --- plans ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SIZES, SIZES)
def test_plans_keep_to_their_bytes_and_never_cost_more_than_one_format(a: float, b: float) -> None:
    _, _, prepared = calibrated()
    low, high = (prepared.plan(bits_per_weight=bits) for bits in sorted((a, b)))
    assert low.bits_per_weight <= min(a, b)
    assert high.bits_per_weight <= max(a, b)
    assert cost(prepared, high) <= cost(prepared, low) + 1e-12
    assert prepared.plan(bits_per_weight=min(a, b)) == low
    for name in FORMATS:
        same = [x.candidates[uniform(x.candidates)[name]] for x in prepared.layers]
        if sum(x.num_bytes for x in same) <= low.params_before * min(a, b) / 8:
            assert cost(prepared, low) <= sum(x.cost for x in same) + 1e-12


def test_bytes_of_the_plan_are_those_of_the_model() -> None:
    model, stats, prepared = calibrated()
    for bits in (8.25, 4.25, 2.6):
        made, plan = copy.deepcopy(model), prepared.plan(bits_per_weight=bits)
        tn.apply_plan(made, plan, stats)
        before, after = model_size(model)[1], model_size(made)[1]
        assert before - after == plan.bytes_before - plan.bytes_after
        assert any(layer.storage.own_dtypes for layer in plan)


@pytest.mark.slow
def test_the_whole_model_counts_embeddings_and_everything_else() -> None:
    model, stats, _ = calibrated()
    size = model_size(model)[1]
    for allowed, formats in ((int(0.3 * size), None), (90_000, FORMATS)):
        config = CompressionConfig(max_bytes=allowed, formats=formats)
        assert config.target_modules == "all"
        made = copy.deepcopy(model)
        plan = tn.plan(made, config, stats)
        assert {"transformer.wte", "transformer.wpe"} <= {layer.name for layer in plan}
        tn.apply_plan(made, plan, stats)
        assert 0.8 * allowed <= model_size(made)[1] <= allowed
        assert made.lm_head.weight is made.transformer.wte.weight or made.lm_head.stored  # type: ignore[union-attr]


def test_the_smallest_model_within_a_loss() -> None:
    _, _, prepared = calibrated()
    rises = [prepared.plan(bits_per_weight=bits).predicted_loss_increase for bits in (6.0, 3.5)]
    assert rises[0] is not None
    assert rises[1] is not None
    plan = prepared.plan(loss_increase=rises[1])
    assert plan.predicted_loss_increase <= rises[1]  # type: ignore[operator]
    assert plan.bits_per_weight < 6.0
    with pytest.raises(tn.errors.BudgetError, match="contradict"):
        prepared.plan(loss_increase=rises[0] / 10, bits_per_weight=2.6)


def test_editing_the_storage_of_a_layer() -> None:
    model, stats, prepared = calibrated()
    name = "transformer.h.0.mlp.c_fc"
    plan = prepared.plan(bits_per_weight=4.25)
    edited = plan.replace_layer(name, None, "int8")
    assert (edited[name].bits_per_weight, edited[name].bound_by) == (8.25, "edited")
    assert edited.predicted_loss_increase is None
    rank = tn.topologies.low_rank(out_features=256, in_features=64, rank=4)
    edited = edited.replace_layer(name, rank, Storage(number_format=NumberFormat.parse("int4")))
    assert scheme_name(edited[name].topology, edited[name].storage) == "int4 low_rank 4"
    tn.apply_plan(model, edited, stats)
    assert model.get_submodule(name).storage == edited[name].storage
    assert plan.replace_layer(name, None)[name].bits_per_weight == 32
    with pytest.raises(tn.errors.FormatError, match="'int9'"):
        plan.replace_layer(name, None, "int9")


def test_without_calibration_data_layers_become_int8() -> None:
    model = calibrated()[0]
    with pytest.warns(tn.errors.CalibrationWarning, match="one number format"):
        report = tn.compress(model, CompressionConfig(bits_per_weight=9), progress=False)
    assert {layer.scheme for layer in report.layers} == {"int8 dense"}
    assert report.plan.objective == "weight"
    assert report.plan.bits_per_weight == 8.25
    assert report.to_dict()["bits_per_weight"] == 8.25
    assert "8.25 bits a weight" in str(report)
    assert report.byte_ratio < 0.5
    model = calibrated()[0]
    config = CompressionConfig(bits_per_weight=4.25, method="nearest")
    with pytest.raises(tn.errors.BudgetError, match=r"formats=\('int4',\)"):
        tn.compress(model, config, progress=False)
    report = tn.compress(model, replace(config, formats=("int4",)), progress=False)
    assert {layer.scheme for layer in report.layers} == {"int4 dense"}


def test_a_layer_that_no_gradient_reaches_stays_accurate() -> None:
    model, stats, prepared = calibrated()
    name = prepared.layers[0].name
    silent = replace(stats, rows={**stats.rows, name: torch.zeros_like(stats.rows[name])})
    plan = tn.plan(model, CompressionConfig(bits_per_weight=5, formats=FORMATS), silent)
    assert scheme_name(plan[name].topology, plan[name].storage) == "int8 dense"


def test_budgets_that_nothing_keeps() -> None:
    _, _, prepared = calibrated()
    int8 = tuple(
        replace(x, candidates=(x.candidates[uniform(x.candidates)["int8"]],)) for x in prepared.layers
    )
    with pytest.raises(tn.errors.BudgetError, match=r"bits_per_weight: .*smallest"):
        replace(prepared, layers=int8).plan(bits_per_weight=4)
    with pytest.raises(tn.errors.BudgetError, match="max_bytes=100"):
        prepared.plan(max_bytes=100)


@pytest.mark.parametrize(("number_format", "rank"), [("int4", 4), ("float", 32)])
def test_the_plain_svd_beside_integers_has_as_many_bytes(number_format: str, rank: int) -> None:
    topology = tn.topologies.dense(out_features=64, in_features=64)
    storage = Storage(number_format=NumberFormat.parse(number_format))
    layer = LayerPlan("0", (64, 64), topology, "max_bytes", None, None, storage).with_baseline([1.0] * 64)
    assert layer.bytes_after // (4 * (64 + 64)) == rank
    assert layer.baseline_error == pytest.approx((1 - rank / 64) ** 0.5)
