"""Cores of experts in number formats: stored, counted, moved, described, trained, unpacked."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from hf_models import gpt2
from mixture_models import mixture
from torch import Tensor

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import CalibrationWarning, FormatError, TargetError
from tensornet.healing import trained_scales
from tensornet.nn import build_module, module_spec
from tensornet.nn.storage import Storage
from tensornet_hf.inspect import inspect_folder
from tensornet_hf.quantizer import prepare_for_saving
from tensornet_moe.rounding import BankExtension, round_banks

IDS = torch.tensor([[5, 7, 9, 11, 13, 6]])
FORMATS = ["float", "bf16", "int8", "int6:g32", "int4", "int3:g32", "int2:g32:float8"]
INTEGERS = FORMATS[2:]


def bank(**options: object) -> tm.SharedCoreExperts:
    torch.manual_seed(0)
    return tm.SharedCoreExperts.from_dense(torch.randn(24, 32), num_experts=3, noise=0.2, **options)  # type: ignore[arg-type]


def unequal() -> tm.SharedCoreExperts:
    torch.manual_seed(0)
    topologies = [tn.topologies.mpo(out_dims=(2, 6, 2), in_dims=(2, 8, 2), max_bond=k) for k in (2, 4, 3)]
    return tm.SharedCoreExperts.from_dense(torch.randn(24, 32), num_experts=3, topology=topologies, noise=0.2)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def integers(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.named_buffers() if x.dtype == torch.uint8}


@pytest.mark.parametrize("make", [bank, unequal], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_is_described(name: str, make: object) -> None:
    made = make()  # type: ignore[operator]
    dense = made.expert_matrices().detach()
    added = made.quantize(name)
    gap = float((made.expert_matrices().detach() - dense).norm() / dense.norm())
    assert added == pytest.approx(gap, abs=1e-6)
    assert made.num_bytes == sum(x.nbytes for x in made.state_dict().values())
    spec = json.loads(json.dumps(module_spec(made), sort_keys=True))
    twin = build_module(spec, device="meta", dtype=torch.float32)
    shapes = {k: (x.shape, x.dtype) for k, x in made.state_dict().items()}
    assert {k: (x.shape, x.dtype) for k, x in twin.state_dict().items()} == shapes
    twin.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(twin.expert_matrices(), made.expert_matrices())
    torch.testing.assert_close(made.expert_matrices([2, 0]), made.expert_matrices()[[2, 0]])
    assert torch.equal(copy.deepcopy(made).expert_matrices(), made.expert_matrices())
    torch.save(made, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).expert_matrices(), made.expert_matrices())


@pytest.mark.parametrize("name", ["int4", "bf16"])
def test_dtypes_stay_when_the_model_changes_its_own(name: str) -> None:
    made = bank()
    made.quantize(name)
    before = {k: x.dtype for k, x in made.state_dict().items()}
    values = {k: x.clone() for k, x in made.state_dict().items()}
    half = copy.deepcopy(made).half()
    assert {k: x.dtype for k, x in half.state_dict().items()} == before
    assert all(torch.equal(x, values[k]) for k, x in half.state_dict().items())
    assert half.dtype == half.expert_matrices().dtype == torch.float16
    assert made.to("meta").expert_matrices().is_meta


def test_one_core_in_integers_and_back() -> None:
    made = bank(share="center")
    made.quantize(Storage(core_formats={"1": "int4"}))  # type: ignore[arg-type]
    assert {name for name, _ in made.named_parameters()} == {"core_0", "core_2"}
    assert list(made.shared_parameters()) == []
    rounded = made.expert_matrices().detach()
    made.expert_matrices().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.parameters())
    assert made.quantize("float") == pytest.approx(0, abs=1e-6)
    assert {name for name, _ in made.named_parameters()} == {"core_0", "core_1", "core_2"}
    torch.testing.assert_close(made.expert_matrices(), rounded)


@pytest.mark.parametrize("name", INTEGERS[:-1])
def test_scales_train_and_integers_stay(name: str) -> None:
    made = bank()
    made.quantize(name)
    codes, rounded, kinds = (
        integers(made),
        made.expert_matrices(),
        {k: x.dtype for k, x in made.state_dict().items()},
    )
    with trained_scales(made):
        assert list(made.shared_parameters()) == ["1"]
        assert torch.equal(made.expert_matrices(), rounded)
        optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
        made.expert_matrices().square().sum().backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in made.parameters() if p.grad is not None)
        optimizer.step()
    assert not torch.equal(made.expert_matrices(), rounded)
    assert {k: x.dtype for k, x in made.state_dict().items()} == kinds
    assert all(torch.equal(x, codes[k]) for k, x in integers(made).items())


def test_bad_formats() -> None:
    made = bank()
    before = {k: x.clone() for k, x in made.state_dict().items()}
    with pytest.raises(FormatError, match="'int9'"):
        made.quantize("int9")
    with pytest.raises(FormatError, match="cores 7"):
        made.quantize(Storage(core_formats={"7": "int4"}))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="number formats only"):
        made.quantize(Storage(pivoted=True))
    assert all(torch.equal(x, before[k]) for k, x in made.state_dict().items())


def test_a_mixture_in_integers_saves_loads_and_trains(tmp_path: Path) -> None:
    model = gpt2().eval()
    th.upcycle(model, experts=3, router="switch")
    dense = logits(model)
    for module in model.modules():
        if isinstance(module, tm.SharedCoreExperts):
            module.quantize("int8")
    prepare_for_saving(model)
    expected = logits(model)
    assert 0 < float((expected - dense).abs().max()) < 0.3 * float(dense.abs().max())
    model.save_pretrained(tmp_path)
    seen = inspect_folder(tmp_path)
    assert seen["dtypes"]["uint8"] > 0
    assert all(layer["form"] == "int8 shared_core_moe" for layer in seen["layers"])
    again = th.load(tmp_path)
    torch.testing.assert_close(logits(again.eval()), expected)
    with trained_scales(again):
        again.train()(input_ids=IDS, labels=IDS).loss.backward()
        scales = [p for name, p in again.named_parameters() if name.endswith(".scales")]
        assert scales
        assert all(p.grad is not None for p in scales)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stacks_of_stock_experts_in_integers(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    dense = logits(model)
    config = tn.CompressionConfig(formats=("int8",), target_modules="*experts*")
    report = tn.compress(model, config, progress=False)
    assert report.plan.bits_per_weight < 11
    expected = logits(model)
    # The median, since rounding may move single tokens to another expert.
    assert 0 < float((expected - dense).abs().median()) < 0.1 * float(dense.abs().max())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(th.load(tmp_path).eval()), expected)
    stock = tn.decompress(model)
    torch.testing.assert_close(logits(stock), expected, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(x, tn.nn.module.NetworkModule) for x in stock.modules())


# --- formats chosen under a budget -----------------------------------------------------------------

MENU = [tn.quantization.NumberFormat.parse(name) for name in ("float", "int8", "int4", "int2")]


@pytest.mark.parametrize("bits", [5.7, 8.0, 12.0, 40.0])
def test_chosen_formats_keep_the_budget_and_beat_one_format(bits: float) -> None:
    banks = {"equal": bank(sites=3), "unequal": unequal()}
    numbers = sum(part.num_params for part in banks.values())
    fitting = []
    for name in ("int8", "int4"):
        twins = copy.deepcopy(banks)
        cost = sum(part.quantize(name) ** 2 for part in twins.values())
        if sum(part.num_bytes for part in twins.values()) <= bits * numbers / 8:
            fitting.append(cost)
    dense = {name: part.expert_matrices().detach() for name, part in banks.items()}
    stored = {f"{name}.{key}" for name, part in banks.items() for key in part.stored}
    named = round_banks(banks, MENU, bits_per_weight=bits)
    assert sum(part.num_bytes for part in banks.values()) <= bits * numbers / 8
    errors = [part.expert_matrices().detach() - dense[name] for name, part in banks.items()]
    cost = sum(float(e.norm() / w.norm()) ** 2 for e, w in zip(errors, dense.values(), strict=True))
    assert cost <= 1.05 * min(fitting, default=cost)  # errors of several cores add up only nearly
    assert named.keys() <= stored
    assert bool(named) == (bits < 40)
    assert named.keys() == stored or bits > 6
    assert set(named.values()) <= {"int8", "int4"}  # cores of networks have at least four bits


def test_a_budget_that_no_format_keeps_gets_the_smallest() -> None:
    banks = {"bank": bank()}
    stored = {f"bank.{key}" for key in banks["bank"].stored}
    named = round_banks(banks, MENU, bits_per_weight=3.0)
    assert named == dict.fromkeys(stored, "int4")


@pytest.mark.parametrize("share", ["center", "none", "base"])
@pytest.mark.parametrize("formats", [("int3",), ("int4",), ("nl4:g32:s6",)])
def test_formats_that_a_bank_cannot_have_are_left_out(share: str, formats: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layer = tm.mixture(d_model=32, d_ff=48, share=share, experts=2)  # type: ignore[arg-type]
    banks = banks_of(layer)
    named = round_banks(banks, [tn.quantization.NumberFormat.parse(name) for name in formats])
    possible = {"int3": share != "center", "int4": True, "nl4:g32:s6": False}
    assert set(named.values()) == {name for name in formats if possible.get(name)}
    assert bool(named) == any(part.storage != Storage() for part in banks.values())


def test_compress_reaches_banks(tmp_path: Path) -> None:
    model = gpt2().eval()
    th.upcycle(model, share="center", experts=3, pool="all", top_k=1)
    dense, numbers = logits(model), sum(m.num_params for m in banks_of(model).values())
    config = tn.CompressionConfig(bits_per_weight=6.0, formats=("int8", "int4:g32"))
    report = tn.compress(model, config, calibration=[{"input_ids": IDS, "labels": IDS}], progress=False)
    assert {x.partition(".core_")[0] for x in report.rounded} == set(banks_of(model))
    assert report.coverage.covered > report.plan.params_before + numbers - 1
    assert "SharedCoreExperts" not in str(report.coverage)
    assert sum(m.num_bytes for m in banks_of(model).values()) <= 6 * numbers / 8
    expected = logits(model)
    assert 0 < float((expected - dense).abs().max()) < 0.5 * float(dense.abs().max())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(th.load(tmp_path).eval()), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_of_rounding_experts_is_not_taken_for_predicted() -> None:
    model, batches = gpt2().eval(), [{"input_ids": IDS, "labels": IDS}]
    th.upcycle(model, share="none", experts=3, top_k=1)
    config = tn.CompressionConfig(formats=("int4",), effort="thorough")
    layers_alone, unmeasured = copy.deepcopy(model), copy.deepcopy(model)
    stats = tn.calibrate(model, batches, config=config)
    survey = tn.survey(model, batches, config)
    report = tn.compress(model, config, calibration=batches, survey=survey, progress=False)
    of_layers = tn.compress(
        layers_alone, report.plan, calibration=batches, survey=survey, progress=False
    ).measured
    assert report.measured is not None
    assert report.measured_layers is not None
    assert of_layers is not None
    assert report.measured_layers.mean == pytest.approx(of_layers.mean, rel=1e-4)
    assert report.measured.mean != report.measured_layers.mean
    with pytest.warns(CalibrationWarning, match="leaves out"):
        tn.compress(unmeasured, config, calibration=stats, progress=False)


def test_a_bare_mixture_is_told_how_to_round_itself() -> None:
    moe = tm.mixture(d_model=16, d_ff=32, experts=3, top_k=1, share="center")
    with pytest.raises(TargetError, match=r"experts\.gate.*quantize"):
        tn.compress(moe, tn.CompressionConfig(bits_per_weight=4.25), progress=False)


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({"formats": ("int8",)}, {"c_fc", "c_proj"}),
        ({"formats": ("int8",), "exclude_modules": "*.experts.c_fc*"}, {"c_proj"}),
        ({"formats": ("int8",), "target_modules": "c_attn"}, set()),
        ({"param_ratio": 0.5}, set()),
        ({"formats": "compressed-tensors"}, set()),
    ],
)
def test_which_banks_are_reached(options: dict[str, object], reached: set[str]) -> None:
    model = gpt2()
    th.upcycle(model, share="base", experts=2, top_k=1)
    method = "nearest" if "formats" in options else "svd"
    config = tn.CompressionConfig(method=method, **options)  # type: ignore[arg-type]
    found = BankExtension().round_others(model, config)
    assert {name.split(".experts.")[1].partition(".")[0] for name in found} == reached
    if reached:
        assert BankExtension().round_others(model, config) == {}  # integers stay as they are


def banks_of(model: torch.nn.Module) -> dict[str, tm.SharedCoreExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, tm.SharedCoreExperts)}
