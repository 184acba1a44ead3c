"""Stored numbers: elements, codes, scales and zero points are one each, however packed, tied ones once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.compression.report import model_size
from tensornet.nn import TensorNetworkLinear
from tensornet.nn.encoding import Storage

STORAGES = [
    Storage(),
    Storage(pivoted=True),
    Storage(number_format="bf16"),
    Storage(number_format="int8:row"),
    Storage(number_format="int4:g32:zero"),
    Storage(number_format="int3:g32:float8"),
    Storage(pivoted=True, number_format="int5:zero"),
]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_layers_plans_and_models_count_alike(storage: Storage) -> None:
    topology = tn.topologies.low_rank(out_features=30, in_features=70, rank=9)
    layer = TensorNetworkLinear(topology, storage=storage)
    numbers = storage.num_params(topology)
    assert layer.num_params == numbers + 30
    assert model_size(layer)[0] == numbers + 30
    twin = TensorNetworkLinear(topology, storage=storage)
    twin.share_cores(layer)
    assert model_size(nn.Sequential(layer, twin))[0] == numbers + 2 * 30
    layer.train_scales(codes=True)  # codes are floats of their own meanwhile
    assert layer.num_params == numbers + 30


@pytest.mark.parametrize("name", ["int4:g32:zero", "int3", "int8:row"])
def test_dense_integers_are_counted_by_the_code(name: str) -> None:
    model = nn.Sequential(nn.Linear(96, 20))
    config = tn.CompressionConfig(bits_per_weight=16, formats=(name,), objective="weight")
    report = tn.compress(model, config, progress=False)
    groups = {"int4:g32:zero": 2 * 3, "int3": 2, "int8:row": 1}[name]
    assert report.plan.params_after == 20 * (96 + groups)
    assert report.model_params_after == report.plan.params_after + 20
    assert f"{report.model_params_before:,} -> {report.model_params_after:,} parameters" in str(report)


def test_banks_of_experts_count_the_same() -> None:
    bank = tm.SharedCoreExperts.from_dense(torch.randn(32, 64), num_experts=4)
    before, size = bank.num_params, model_size(bank)[1]
    bank.quantize("int4:g32")
    scales = sum(x.numel() for name, x in bank.stored.items() if name.startswith("scale_"))
    assert bank.num_params == before + scales == model_size(bank)[0]
    assert model_size(bank)[1] == bank.num_bytes < size
