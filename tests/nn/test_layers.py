"""Layers of every topology against the stock layer they stand for, gradients of every core included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.errors import ShapeError, TargetError
from tensornet.network import random_cores
from tensornet.testing import laws, reference
from tensornet.topologies import topology_family

FAMILIES = ("block_tt", "kronecker", "low_rank", "mpo", "tensor_ring", "tucker")
families = pytest.mark.parametrize("family", FAMILIES)
STRATEGIES = ("factorized", "reconstruct", "auto")


def linear(out_features: int = 23, in_features: int = 18, dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(in_features, out_features, dtype=dtype)


def compressed(family: str, layer: nn.Linear, **options: object) -> tn.nn.TensorNetworkLinear:
    return tn.nn.TensorNetworkLinear.from_linear(layer, topology=family, max_bond=3, **options)


@families
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_every_core(family: str, strategy: str) -> None:
    layer = compressed(family, linear(), strategy=strategy)
    x = torch.randn(7, 18, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(7, 23, dtype=torch.float64)
    layer(x).backward(pull)
    expected = reference.network_gradients(layer.topology, layer.cores, pull.T @ x.detach())
    for core, gradient in zip(layer.cores, expected, strict=True):
        np.testing.assert_allclose(reference.to_numpy(core.grad), gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, pull @ layer.to_matrix())
    torch.testing.assert_close(layer.bias.grad, pull.sum(0))
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


@families
def test_autocast_gives_low_precision_and_gradients(family: str) -> None:
    layer = compressed(family, linear(dtype=torch.float32))
    x = torch.randn(6, 18)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert reference.relative_error(layer(x), y) < 0.03
    y.float().sum().backward()
    assert all(core.grad is not None and core.grad.dtype == torch.float32 for core in layer.cores)


@families
def test_state_goes_into_an_empty_twin(family: str) -> None:
    layer = compressed(family, linear())
    twin = tn.nn.build_module(tn.nn.module_spec(layer), dtype=torch.float64)
    assert type(twin) is type(layer)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, 18, dtype=torch.float64)
    torch.testing.assert_close(twin(x), layer(x))
    assert set(layer.state_dict()) == {"bias", *(f"core_{name}" for name in layer.topology.core_names)}


@families
def test_new_layers_keep_the_variance_of_activations(family: str) -> None:
    topology = topology_family(family).build(64, 64, max_bond=3)
    x = torch.randn(200, 64)
    layers = [tn.nn.TensorNetworkLinear(topology, bias=False) for _ in range(40)]
    variances = [float(layer(x).detach().var()) for layer in layers]
    assert 0.6 < sum(variances) / len(variances) < 1.6


def test_mpo_linear_takes_a_topology_or_dims() -> None:
    by_dims = tn.nn.MPOLinear(18, 23, out_dims=(4, 6), in_dims=(6, 3), max_bond=3)
    by_topology = tn.nn.MPOLinear(18, 23, topology=by_dims.topology)
    assert by_topology.topology == by_dims.topology
    with pytest.raises(ShapeError, match=r"\(23, 18\)"):
        tn.nn.MPOLinear(23, 18, topology=by_dims.topology)


def test_other_layers_are_refused() -> None:
    with pytest.raises(TargetError, match="got Embedding"):
        tn.nn.TensorNetworkLinear.from_linear(nn.Embedding(3, 4))
    with pytest.raises(TargetError, match="got Linear"):
        tn.nn.MPOEmbedding.from_embedding(nn.Linear(3, 4))


# --- embeddings ----------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_rows_are_those_of_the_table(family: str, shape: tuple[int, ...]) -> None:
    table = nn.Embedding(53, 10, dtype=torch.float64)
    layer = tn.nn.MPOEmbedding.from_embedding(table, topology=family, max_bond=3)
    indices = torch.randint(53, shape)
    rows = layer(indices)
    assert rows.shape == (*shape, 10)
    torch.testing.assert_close(rows, layer.to_matrix()[indices])
    torch.testing.assert_close(rows, layer.to_embedding()(indices))


@families
def test_gradients_of_an_embedding(family: str) -> None:
    topology = topology_family(family).build(53, 10, max_bond=3)
    layer = tn.nn.MPOEmbedding(topology, dtype=torch.float64)
    layer.set_cores(random_cores(topology, dtype=torch.float64))
    indices = torch.tensor([3, 52, 3, 0])
    pull = torch.randn(4, 10, dtype=torch.float64)
    layer(indices).backward(pull)
    dense = torch.zeros(53, 10, dtype=torch.float64).index_add(0, indices, pull)
    expected = reference.network_gradients(topology, layer.cores, dense)
    for core, gradient in zip(layer.cores, expected, strict=True):
        np.testing.assert_allclose(reference.to_numpy(core.grad), gradient, rtol=1e-9, atol=1e-9)


def test_every_row_of_a_padded_table() -> None:
    table = nn.Embedding(53, 10, padding_idx=2)
    layer = tn.nn.MPOEmbedding.from_embedding(table)
    rows: Tensor = layer(torch.arange(53))
    assert reference.relative_error(table.weight, rows) < laws.tolerance(torch.float32)
    assert layer.padding_idx == layer.to_embedding().padding_idx == 2
