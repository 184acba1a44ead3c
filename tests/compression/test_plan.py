"""Plans as objects: printed, edited, kept on disk, carried out, refused."""

from __future__ import annotations

import copy
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import gpt2
from torch import nn

import tensornet as tn
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression import apply
from tensornet.errors import FormatError, NonFiniteError, TargetError, TopologyError
from tensornet.quantization import NumberFormat
from tensornet.topologies import topology_family, topology_names

NAME = "transformer.h.0.mlp.c_fc"


@cache
def _prepared() -> tuple[nn.Module, CalibrationStats, tn.CompressionPlan]:
    model = gpt2().eval()
    stats = tn.calibrate(model, [torch.randint(1, 100, (4, 12))], source="random words")
    return model, stats, tn.plan(model, tn.CompressionConfig(param_ratio=0.6), stats)


def prepared() -> tuple[nn.Module, CalibrationStats, tn.CompressionPlan]:
    model, stats, plan = _prepared()
    return copy.deepcopy(model), stats, plan


def test_a_plan_changes_nothing() -> None:
    model, stats, _ = prepared()
    before = copy.deepcopy(model.state_dict())
    tn.plan(model, tn.CompressionConfig(param_ratio=0.5), stats)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loaded_plan_gives_the_same_model(tmp_path: Path) -> None:
    model, stats, plan = prepared()
    twin = copy.deepcopy(model)
    plan.save(tmp_path / "plan.json")
    tn.apply_plan(model, plan, stats)
    tn.apply_plan(twin, tn.CompressionPlan.load(tmp_path / "plan.json"), stats)
    for (name, a), (_, b) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", topology_names())
def test_editing_to_any_family(family: str, tmp_path: Path) -> None:
    """Also where cores were kept in a form that only chains have; the error is unknown, and printed so."""
    model, stats, plan = prepared()
    assert plan[NAME].storage.pivoted
    edited = plan.replace_layer(NAME, topology_family(family).build(*plan[NAME].shape, max_bond=3))
    edited.save(tmp_path / "plan.json")
    assert tn.CompressionPlan.load(tmp_path / "plan.json") == edited
    (line,) = [line for line in str(edited).splitlines() if line.startswith(NAME)]
    sizes = r" +[0-9.]+( +[0-9,]+ -> [0-9,]+){2}"
    assert re.fullmatch(rf"{NAME} +{family}( [0-9x]+)?{sizes} +\? +\?", line)
    error = tn.apply_plan(model, edited, stats)[NAME]
    whole = any(len(cores) == 1 for cores, _ in edited[NAME].topology.parts)  # a core that is the matrix
    assert 0 < error < 2 or (error == 0 and whole)
    assert sum(x.numel() for x in model.get_submodule(NAME).stored.values()) == edited[NAME].params_after


def test_edits_that_do_not_fit() -> None:
    _, _, plan = prepared()
    with pytest.raises(TopologyError, match=r"\(96, 24\).*\(10, 10\)"):
        plan.replace_layer(NAME, topology_family("mpo").build(10, 10))
    with pytest.raises(TopologyError, match="got 'mpo'"):
        plan.replace_layer(NAME, "mpo")  # type: ignore[arg-type]


def test_leaving_a_layer_dense() -> None:
    model, stats, plan = prepared()
    edited = plan.replace_layer(NAME, None)
    assert (edited[NAME].error, edited[NAME].baseline_error) == (0, 0)
    assert edited[NAME].loss_increase == 0
    assert edited.predicted_loss_increase < plan.predicted_loss_increase  # type: ignore[operator]
    weight = model.get_submodule(NAME).weight
    tn.apply_plan(model, edited, stats)
    assert model.get_submodule(NAME).weight is weight


def test_a_calibrated_plan_needs_its_statistics_again() -> None:
    model, _, plan = prepared()
    with pytest.raises(TargetError, match="same calibration"):
        tn.apply_plan(model, plan)


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_formats_that_fit_no_layer(method: str) -> None:
    """A format with super-blocks of 256 weights fits one layer of two, or none."""
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 8))
    batches = [torch.randn(8, 256)]
    name = NumberFormat.parse("int6:g16:s8").name
    config = tn.CompressionConfig(formats=("float", name), method=method)  # type: ignore[arg-type]
    plan = tn.compress(model, config, calibration=batches, progress=False).plan
    assert plan.unfit == {name: ("1",)}
    assert f"{name} not planned" in str(plan)
    assert tn.CompressionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    narrow = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(FormatError, match="multiple of 256"):
        tn.compress(narrow, config, calibration=[torch.randn(8, 64)], progress=False)
    assert type(narrow[0]) is nn.Linear


def test_a_plan_without_a_choice_says_that_networks_may_lose_less() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    batches = [(torch.randn(64, 64), torch.randint(32, (64,)))]
    survey = tn.survey(model, batches, tn.CompressionConfig(bits_per_weight=4))
    least = 2.26
    advice = "effort='thorough'"
    assert advice in str(survey.plan(bits_per_weight=least))
    assert advice not in str(survey.plan(bits_per_weight=3))
    thorough = tn.survey(model, batches, tn.CompressionConfig(bits_per_weight=4, effort="thorough"))
    assert advice not in str(thorough.plan(bits_per_weight=least))
    exported = tn.survey(model, batches, tn.CompressionConfig(bits_per_weight=8, formats="mlx"))
    assert {x.storage.number_format.bits for x in exported.plan(bits_per_weight=3)} == {2}
    assert advice not in str(exported.plan(bits_per_weight=3))


def test_a_plan_for_another_model() -> None:
    _, stats, plan = prepared()
    with pytest.raises(TargetError, match="does not have"):
        tn.apply_plan(nn.Sequential(nn.Linear(3, 4)), plan, stats)
    wide = nn.ModuleDict({"layer": nn.Linear(5, 7)})
    narrow = nn.ModuleDict({"layer": nn.Linear(5, 6)})
    made = tn.plan(wide, tn.CompressionConfig(topology_options={"max_bond": 2}, method="svd"))
    with pytest.raises(TargetError, match=r"\(7, 5\).*\(6, 5\)"):
        tn.apply_plan(narrow, made)


@pytest.mark.parametrize("method", ["svd", "auto"])
@pytest.mark.parametrize("family", ["tucker", "kronecker", "block_tt", "low_rank"])
def test_a_plan_whose_family_was_edited(family: str, method: str) -> None:
    model, stats, _ = prepared()
    config = tn.CompressionConfig(
        param_ratio=0.6, topology="mpo", topology_options={"sites": 3}, method=method
    )
    data = tn.plan(model, config, stats).to_dict()
    layer = next(x for x in data["layers"] if x["topology"] is not None)
    layer["topology"]["family"] = family
    before = copy.deepcopy(model.state_dict())
    message = rf"'{layer['name']}': '{family}' does not make the planned cores .*replace_layer"
    with pytest.raises(TopologyError, match=message):
        tn.apply_plan(model, tn.CompressionPlan.from_dict(data), stats)
    assert before.keys() == model.state_dict().keys()


def test_nothing_is_replaced_when_a_layer_fails() -> None:
    model, stats, plan = prepared()
    with torch.no_grad():
        model.get_submodule("transformer.h.1.mlp.c_proj").weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        tn.apply_plan(model, plan, stats)
    assert not any(isinstance(module, tn.nn.TensorNetworkLinear) for module in model.modules())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(version=99),
        lambda data: data.pop("layers"),
        lambda data: data["layers"][0].pop("shape"),
        lambda data: data["layers"][0].update(topology={"family": "mpo"}),
        lambda data: data["layers"][0].update(storage={"pivoted": "yes"}),
        lambda data: data["layers"][0].update(storage={"holographic": True}),
        lambda data: data["layers"].append(data["layers"][0]),
        lambda data: data["layers"].clear(),
        lambda data: data.update(objective="beauty"),
        lambda data: data["layers"][0].update(shape=[3, 4]),
        lambda data: data["layers"][0].update(dtype="uint8"),
        lambda data: data.update(dense_loss="low"),
        *(
            lambda data, value=value: data.update(dense_loss=value)
            for value in (math.nan, math.inf, 10**30, 10**400)
        ),
        *(
            lambda data, key=key, value=value: data["layers"][0].update({key: value})
            for key in ("error", "baseline_error", "loss_increase")
            for value in (math.nan, math.inf, -1, 10**30, 10**400)
        ),
        lambda data: data.update(unseen="abc"),
        lambda data: data.update(unrouted=[[1]]),
        lambda data: data.update(unfit={"int4": "abc"}),
        lambda data: data.update(unfit={"int4": [1]}),
        lambda data: data["layers"][0].update(sample=[10**30]),
        lambda data: data["layers"][0].update(curve=[[1, math.nan]]),
        lambda data: data.update(of_tokens="yes"),
        lambda data: data.update(calibration=5),
        lambda data: data.update(unseen=5),
        lambda data: data.update(unrouted=5),
        lambda data: data.update(unfit=["int4"]),
        lambda data: data["layers"][0].update(error="abc"),
        lambda data: data["layers"][0].update(loss_increase="abc"),
        lambda data: data["layers"][0].update(loss_increase=[1.0]),
        lambda data: data["layers"][0].update(baseline_error="a"),
        lambda data: data["layers"][0].update(sample=["a"]),
        lambda data: data["layers"][0].update(curve=[[1, "a"]]),
        lambda data: data["layers"][0].update(curve=[["a", 1.0]]),
        lambda data: data["layers"][0].update(bound_by=7),
        lambda data: data["layers"][0].update(name=7),
        lambda data: data["layers"][0].update(target="foo"),
        lambda data: data["layers"][0].update(target=["gguf"]),
        lambda data: data["layers"][1].update(shape=["a", "b"], topology=None),
    ],
)
def test_a_damaged_plan(change: Any) -> None:
    _, _, plan = prepared()
    data = json.loads(json.dumps(plan.to_dict()))
    change(data)
    with pytest.raises(FormatError, match="compression plan"):
        tn.CompressionPlan.from_dict(data)


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(FormatError, match="Cannot read"):
        tn.CompressionPlan.load(path)
    path.write_text("[]")
    with pytest.raises(FormatError, match=r"Not a.* plan"):
        tn.CompressionPlan.load(path)


def test_interrupted_while_layers_are_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].eval()
    before = [*model]
    plan = tn.plan(model, tn.CompressionConfig(param_ratio=0.5, method="svd"))
    original = apply.set_submodule

    def interrupted(model: nn.Module, name: str, module: nn.Module) -> None:
        if name == "2":
            raise KeyboardInterrupt
        original(model, name, module)

    monkeypatch.setattr(apply, "set_submodule", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tn.apply_plan(model, plan)
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert [layer.training for layer in model] == [True, False, True]
