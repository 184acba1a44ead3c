"""Mistakes with devices give one clear error, also those that a CPU alone can show."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.errors import ShapeError, TargetError

META = torch.zeros(8, 6, device="meta")


def compressed() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8))
    config = tn.CompressionConfig(topology_options={"max_bond": 2}, target_modules="all", method="svd")
    tn.compress(model, config, progress=False)
    return model.eval()


@pytest.mark.parametrize("family", tn.topologies.topology_names())
def test_a_matrix_without_numbers_is_not_decomposed(family: str) -> None:
    with pytest.raises(ShapeError, match="meta device"):
        tn.decompose(META, family, max_bond=2)


def test_a_model_without_numbers_is_neither_compressed_nor_calibrated() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    with pytest.raises(TargetError, match=r"'1'.*meta device"):
        tn.compress(
            model,
            tn.CompressionConfig(topology_options={"max_bond": 2}, target_modules="all"),
            progress=False,
        )
    assert type(model[0]) is nn.Linear, "left as it was"
    with pytest.raises(TargetError, match=r"'1'.*meta device"):
        tn.calibrate(model, [torch.randn(4, 8)])


@pytest.mark.parametrize("strategy", ["auto", "factorized", "reconstruct"])
def test_an_input_elsewhere_is_refused_as_by_stock_layers(strategy: str) -> None:
    model, x = compressed(), torch.zeros(3, 8, device="meta")
    tn.nn.set_strategy(model, strategy)  # type: ignore[arg-type]
    with torch.no_grad():
        model(torch.zeros(3, 8))  # a pass is remembered
    for recording in (True, False):
        with torch.set_grad_enabled(recording), pytest.raises(RuntimeError, match="device cpu"):
            model(x)


@pytest.mark.parametrize("parameters", ["cores", "trainable"])
def test_a_teacher_elsewhere_is_refused(parameters: str) -> None:
    student, teacher = compressed(), nn.Sequential(nn.Linear(8, 8)).to("meta")
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(TargetError, match=r"cpu.*teacher.*meta"):
        tn.heal(student, teacher, [torch.randn(4, 8)], steps=2, parameters=parameters)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
