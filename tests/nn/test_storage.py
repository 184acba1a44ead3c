"""Pivoted cores: sizes, errors, gradients, files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tensornet as tn
import tensornet.nn.storage
from tensornet.errors import TopologyError
from tensornet.nn.linear import linear_from_network
from tensornet.nn.storage import PLAIN, PackedCore, Storage, decode, encode, gauge_of
from tensornet.quantization import NumberFormat
from tensornet.topologies import Budget, topology_family
from tensornet.topology import Topology

PIVOTED, BOTH = Storage(pivoted=True), Storage(pivoted=True, number_format="int8:g32")
FORMS = [PIVOTED, BOTH]
CHAINS = [("low_rank", {}), ("mpo", {"sites": 2}), ("mpo", {"sites": 3})]


def network(family: str, options: dict[str, int], shape: tuple[int, int] = (12, 20)) -> tn.TensorNetwork:
    return topology_family(family).decompose(torch.randn(shape), Budget(max_bond=6), **options).network


def parts(core: Tensor | PackedCore) -> dict[str, Tensor]:
    return {"": core} if isinstance(core, Tensor) else core.tensors


@pytest.mark.parametrize(("family", "options"), CHAINS)
def test_a_fixed_gauge_is_the_same_operator_in_fewer_numbers(family: str, options: dict[str, int]) -> None:
    made = network(family, options)
    kept = encode(made.topology, PIVOTED, made.cores)
    cores = decode(kept.values())
    torch.testing.assert_close(tn.TensorNetwork(made.topology, cores).to_matrix(), made.to_matrix())
    floats = sum(x.numel() for core in kept.values() for x in parts(core).values() if x.is_floating_point())
    bonds = [b for b in made.topology.bond_dims.values() if b > 1]
    assert floats == made.num_params - sum(bond**2 for bond in bonds)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_any_low_rank_matrix_is_pivoted_without_loss(rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    matrix[: rows // 2] = 0  # rows without content must not be chosen as pivots
    topology = tn.topologies.low_rank(out_features=rows, in_features=columns, rank=rank)
    made = topology_family("low_rank").decompose_to(matrix, topology).network
    cores = decode((encode(topology, PIVOTED, made.cores)).values())
    torch.testing.assert_close(
        tn.TensorNetwork(topology, cores).to_matrix(), made.to_matrix(), atol=1e-9, rtol=1e-7
    )


GAUGED = [("tucker", {}), ("tensor_ring", {"sites": 3}), ("kronecker", {}), ("block_tt", {"sites": 3})]


@pytest.mark.parametrize("storage", [PIVOTED, BOTH])
@pytest.mark.parametrize(("family", "options"), GAUGED)
def test_any_network_has_a_gauge_that_can_be_fixed(
    family: str, options: dict[str, int], storage: Storage
) -> None:
    made = topology_family(family).decompose(torch.randn(16, 20), Budget(max_bond=5), **options).network
    kept = encode(made.topology, storage, made.cores)
    again = tn.TensorNetwork(made.topology, decode(kept.values())).to_matrix()
    if not storage.quantized:
        torch.testing.assert_close(again, made.to_matrix(), atol=1e-4, rtol=1e-4)
        assert PIVOTED.num_params(made.topology) <= made.num_params
    layer = linear_from_network(made, bias=None, source="linear", storage=storage)
    torch.testing.assert_close(layer.to_matrix(), again)
    spec = tn.nn.module_spec(layer)
    assert spec is not None
    assert tn.nn.build_module(spec, device="meta").num_params == storage.num_params(made.topology)


def test_only_a_gauge_that_saves_numbers_is_fixed() -> None:
    ring = topology_family("tensor_ring").build(64, 64, sites=3, max_bond=2)
    assert gauge_of(ring) == {}
    assert Storage(pivoted=True).for_topology(ring) == PLAIN
    whole = topology_family("tucker").build(12, 20)
    assert PIVOTED.num_params(whole) == whole.num_params


def test_a_family_that_is_not_registered_has_no_known_gauge() -> None:
    strange = Topology.from_dict({**topology_family("mpo").build(4, 4).to_dict(), "family": "strange"})
    with pytest.raises(TopologyError, match="'strange'"):
        tn.nn.TensorNetworkLinear(strange, storage=PIVOTED)


def test_a_core_with_fewer_rows_than_its_bond_is_left_as_it_is() -> None:
    topology: Topology = tn.topologies.mpo(out_dims=(4, 2, 4), in_dims=(4, 2, 4), bond_dims=(2, 16))
    assert gauge_of(topology) == {"0": "b1"}
    cores = [torch.randn(shape) for shape in topology.core_shapes.values()]
    again = decode((encode(topology, PIVOTED, cores)).values())
    expected = tn.TensorNetwork(topology, cores).to_matrix()
    torch.testing.assert_close(tn.TensorNetwork(topology, again).to_matrix(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["int8", "int5:g32", "int4:g32:float16", "nl4:g32:s6", "int2:g16:s4:min", "iq3_s"]
)
def test_values_of_large_matrices_are_computed_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = topology_family("dense").decompose(torch.randn(21, 256), Budget()).network
    (core,) = encode(made.topology, Storage(number_format=NumberFormat.parse(name)), made.cores).values()
    assert isinstance(core, PackedCore)
    rows = torch.randint(21, (30,))
    with torch.no_grad():
        whole, some = core.matrix(torch.float32), core.matrix(torch.float32, rows)
        monkeypatch.setattr(tensornet.nn.storage, "_ROWS", 4)
        torch.testing.assert_close(core.matrix(torch.float32), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(core.matrix(torch.float32, rows), some, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[rows], some, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", [PLAIN, PIVOTED])
def test_gradients_reach_every_stored_tensor(storage: Storage) -> None:
    layer = linear_from_network(network("mpo", {"sites": 3}), bias=None, source="linear", storage=storage)
    x, y = torch.randn(5, 20), torch.randn(5, 12)
    layer.train()
    (layer(x) - y).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.is_floating_point():
            assert parameter.grad is not None, name
            index = tuple(size // 2 for size in parameter.shape)
            with torch.no_grad():
                values = []
                for step in (1e-2, -1e-2):
                    parameter[index] += step
                    values.append(float((layer(x) - y).square().sum()))
                    parameter[index] -= step
            assert float(parameter.grad[index]) == pytest.approx(
                (values[0] - values[1]) / 2e-2, rel=0.02, abs=0.02
            )
