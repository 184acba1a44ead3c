"""Under `torch.set_default_device` models stay on the device that they are on."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hf_models import gpt2
from torch import nn

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.healing import refine
from tensornet.topologies import Budget, topology_family, topology_names

X, Y = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """On the meta device, so that a number that is made there by mistake cannot be used."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    "options",
    [{}, {"topology": "mpo", "topology_options": {"sites": 3}}, {"topology": "tucker"}],
    ids=str,
)
def test_compression(options: dict[str, object]) -> None:
    config = tn.CompressionConfig(param_ratio=0.5, **options)  # type: ignore[arg-type]
    one, other = classifier(), classifier()
    tn.compress(one, config, calibration=[(X, Y)], progress=False)
    with torch.device("meta"):
        tn.compress(other, config, calibration=[(X, Y)], progress=False)
    torch.testing.assert_close(other(X), one(X))


def test_what_comes_after() -> None:
    teacher, model = classifier(), classifier()
    tn.compress(model, tn.CompressionConfig(param_ratio=0.5), calibration=[(X, Y)], progress=False)
    before = (model(X) - teacher(X)).square().sum().item()
    with torch.device("meta"):
        refine(model, teacher, [(X, Y)])
        tn.heal(model, teacher, [(X, Y)], steps=20, lr=1e-2)
        tn.nn.prepare_for_inference(copy.deepcopy(model))(X)
    assert (model(X) - teacher(X)).square().sum().item() < before
    with torch.device("meta"):
        tn.decompress(model)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", sorted({*topology_names()} - {"dense", "residual"}))
def test_families(family: str, elsewhere: None) -> None:
    matrix = X[:24]
    made = topology_family(family).decompose(matrix, Budget(param_ratio=0.6))
    error = torch.linalg.matrix_norm(made.network.to_matrix() - matrix) / torch.linalg.matrix_norm(matrix)
    assert float(error) <= made.error + 1e-5


@pytest.mark.parametrize("granularity", ["core", "element"])
def test_mixtures(granularity: str) -> None:
    model = gpt2()
    with torch.device("meta"):
        th.upcycle(model, experts=4)
        mask = tm.GradientMask(model, p=0.5, granularity=granularity)  # type: ignore[arg-type]
    assert not any(parameter.is_meta for parameter in model.parameters())
    ids = torch.arange(3, 15).reshape(2, 6)
    model(ids, labels=ids).loss.backward()
    with torch.device("meta"):
        mask.apply()
