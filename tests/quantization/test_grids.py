"""Weights that lie on the grid of a number format are found and kept; all others are not taken for such."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization import NumberFormat, round_weight
from tensornet.quantization.grids import GRIDS, grid_name, grid_of, on_some_grid, recover
from tensornet.quantization.menus import MENUS, Menu
from tensornet.topologies.dense import round_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: As in files: a scale in float16 for 32 weights, of which the largest one gets the last code.
LAST = {"int4:g32:float16": (-8, 7), "int5:g32:float16": (-16, 15), "int8:g32:float16": (-127, 127)}


def as_in_files(name: str, rows: int = 16, columns: int = 256) -> torch.Tensor:
    low, high = LAST[name]
    groups = 0.02 * torch.randn(rows * columns // 32, 32)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scales = (largest / low if name != "int8:g32:float16" else largest.abs() / high).half().float()
    return ((groups / scales).round().clamp(low, high) * scales).reshape(rows, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", [*LAST, "int8:row", "int4:g128", "int3:float16", "int2:g16", "mxfp4", "nvfp4"]
)
def test_codes_and_scales_are_recovered_exactly(name: str, dtype: torch.dtype) -> None:
    """The values are the same in every bit, also if they were rounded to 16 bits after decoding."""
    number_format = NumberFormat.parse(name)
    if name in LAST:
        weight = as_in_files(name).to(dtype)
    else:
        weight = round_weight(0.02 * torch.randn(16, 256), number_format).dequantize(dtype)
    found = recover(weight, number_format)
    assert found is not None
    assert torch.equal(found.dequantize(dtype), weight)
    assert found.nbytes == number_format.nbytes(weight.shape)
    assert float(found.loss_increase) == 0
    best = grid_of(weight)
    assert best is not None
    assert best.nbytes(weight.shape) <= number_format.nbytes(weight.shape)


def test_grids_of_integers_and_levels_with_shared_steps() -> None:
    for name in ("int6:g16:s8", "nl4:g32:s6", "int3:g16:s6"):
        number_format = NumberFormat.parse(name)
        weight = round_weight(torch.randn(4, 512), number_format).dequantize()
        found = recover(weight, number_format)
        assert found is not None
        assert torch.equal(found.dequantize(), weight)


def test_a_scale_for_each_row_of_integers_that_do_not_use_all_codes() -> None:
    scales = (0.01 * torch.rand(8, 1) + 0.001).bfloat16().float()
    weight = (scales * torch.randint(-5, 6, (8, 192))).bfloat16()
    found = grid_of(weight)
    assert found is not None
    assert found.name in ("int4:row", "int4:row:float16")


def test_rows_that_end_within_a_group_zeros_and_stacks() -> None:
    number_format = NumberFormat.parse("int4:g32:float16")
    weight = round_weight(torch.randn(3, 5, 80), number_format).dequantize()
    weight[1] = 0
    found = recover(weight, number_format)
    assert found is not None
    assert found.loss_increase.shape == (3,)
    assert torch.equal(found.dequantize(), weight)


@given(
    st.integers(0, 2**31),
    st.sampled_from(["normal", "uniform", "heavy", "rotated"]),
    st.sampled_from(DTYPES),
    st.sampled_from([(2, 64), (9, 100), (40, 256)]),
)
def test_random_and_rotated_matrices_are_never_on_a_grid(
    seed: int, kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if kind == "uniform":
        weight = torch.rand(shape, generator=generator) - 0.5
    if kind == "heavy":
        weight = weight**3
    if kind == "rotated":
        weight = round_weight(weight, "int4:g32:float16").dequantize()
        weight = weight @ torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator))[0]
    assert grid_of(weight.to(dtype)) is None


def test_one_weight_off_the_grid_is_enough() -> None:
    number_format = NumberFormat.parse("int8:g32:float16")
    weight = as_in_files(number_format.name)
    assert recover(weight, number_format) is not None
    weight[5, 70] *= 1.0001
    assert recover(weight, number_format) is None


def test_what_cannot_be_recovered() -> None:
    weight = round_weight(torch.randn(4, 512), "int4:g32:s6:min").dequantize()
    assert recover(weight, NumberFormat.parse("int4:g32:s6:min")) is None  # minima
    assert recover(weight, NumberFormat.parse("iq3_s")) is None
    assert recover(weight, NumberFormat()) is None
    assert recover(weight + 0j, NumberFormat.parse("int4")) is None
    assert recover(torch.full((2, 64), torch.nan), NumberFormat.parse("int4")) is None
    assert not on_some_grid(torch.zeros(0, 64))


def test_names_of_grids_are_formats() -> None:
    for name in GRIDS:
        assert NumberFormat.parse(name).points.run == 1
    assert grid_name("int8:g32:float16") == "int8:g32:float16 (Q8_0)"
    assert grid_name("int8:row") == "int8:row"


def test_rounding_keeps_the_grid_but_baselines_round_as_published() -> None:
    number_format = NumberFormat.parse("int4:row")
    weight = (0.01 + torch.rand(24, 1)).bfloat16().float() * torch.randint(-5, 6, (24, 96))
    inputs, outputs = torch.randn(200, 96) @ torch.randn(96, 96), torch.randn(200, 24)
    weighting = Weighting(outputs.mT @ outputs, inputs.mT @ inputs)
    assert torch.equal(round_dense(weight, number_format, weighting).dequantize(), weight)
    assert not torch.equal(
        round_dense(weight, number_format, weighting, rounding="one_sided").dequantize(), weight
    )


def model_on_a_grid(dtype: torch.dtype) -> tuple[torch.nn.Sequential, list[torch.Tensor]]:
    """Two layers on the grid of Q4_0, and a head on none."""
    layers = [torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)]
    model = torch.nn.Sequential(*layers)
    for k in (0, 2):
        model[k].weight.data = as_in_files("int4:g32:float16", 64, 64)
    model = model.to(dtype)
    return model, [model[k].weight.detach().clone() for k in (0, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_a_grid_keeps_its_weights(dtype: torch.dtype) -> None:
    model, weights = model_on_a_grid(dtype)
    batches = [(torch.randn(64, 64, dtype=dtype), torch.randint(8, (64,))) for _ in range(2)]
    config = tn.CompressionConfig(bits_per_weight=5, target_modules="all")
    done = tn.compress(model, config, calibration=batches, progress=False)
    for layer, name, weight in zip((model[0], model[2]), "02", weights, strict=True):
        assert torch.equal(layer.to_matrix().to(dtype), weight)
        assert done.plan[name].keeps_grid
        assert done.plan[name].loss_increase == 0
    assert done.plan["3"].grid is None
    assert "0, 2: weights lie on int4:g32:float16 (Q4_0): kept without loss" in str(done)
    assert tn.CompressionPlan.from_dict(done.plan.to_dict()) == done.plan


def test_a_grid_that_the_budget_or_the_user_excludes() -> None:
    model, _ = model_on_a_grid(torch.float32)
    batches = [(torch.randn(64, 64), torch.randint(8, (64,)))]
    survey = tn.survey(model, batches, tn.CompressionConfig(bits_per_weight=4, target_modules="all"))
    plan = survey.plan(bits_per_weight=2.5)
    assert plan["0"].grid == "int4:g32:float16"
    assert not plan["0"].keeps_grid
    assert "but the budget" in str(plan)
    config = tn.CompressionConfig(bits_per_weight=5, formats=("int4",), target_modules="all")
    assert tn.survey(model, batches, config).plan()["0"].grid is None


def test_a_menu_adds_only_formats_of_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    menus = {"with": Menu(("float", "int8"), on_request=("int4:g32:float16",)), "without": Menu(("int8",))}
    monkeypatch.setattr(MENUS, "_items", menus)
    model, _ = model_on_a_grid(torch.float32)
    batches = [(torch.randn(64, 64), torch.randint(8, (64,)))]
    for name, grid in (("with", "int4:g32:float16"), ("without", None)):
        config = tn.CompressionConfig(bits_per_weight=9, formats=name, target_modules="all")
        assert tn.survey(model, batches, config).plan()["0"].grid == grid


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_matrices_that_gguf_has_quantized(kind: str, dtype: torch.dtype) -> None:
    """Against the quantizers of the package gguf: the same grid, and the same bytes when written again."""
    gguf = pytest.importorskip("gguf")
    blocks = pytest.importorskip("tensornet_hf.exporters.gguf_blocks")
    values = (0.02 * torch.randn(96, 512)).numpy()
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    weight = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]).copy())
    number_format = grid_of(weight.to(dtype))
    assert number_format is not None
    assert GRIDS[number_format.name] == kind
    found = recover(weight.to(dtype), number_format)
    assert found is not None
    points = found.codes.numpy().astype(np.float32) - number_format.points.center
    again = blocks.write_blocks(kind, points, found.scales.float().numpy())
    stored = torch.from_numpy(gguf.quants.dequantize(again, gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(stored.to(dtype), weight.to(dtype))
