"""Contraction in slices: the same result, within the limit, also for gradients; and what no slices reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labelled_networks import cost, einsum, grid, random_network, tensors_of, width

import tensornet as tn
from tensornet.contraction.plan import TOKEN
from tensornet.contraction.search import find_path
from tensornet.contraction.slicing import MOST_SLICES, plan_slices, run_slices
from tensornet.errors import MemoryLimitError


@given(
    st.integers(2, 12),
    st.integers(0, 10_000),
    st.floats(0, 1),
    st.sampled_from([torch.float64, torch.complex128]),
)
def test_slices_add_up_to_the_einsum(count: int, seed: int, share: float, dtype: torch.dtype) -> None:
    network = random_network(count, seed)
    _, output, sizes = network
    result = int(np.prod([sizes[x] for x in output]))
    most = result + int(share * width(network, find_path(*network)))
    torch.manual_seed(seed)
    tensors = tensors_of(network, dtype)
    sliced = plan_slices(*network, most)  # any limit above the size of the result can be reached
    assert sliced.largest <= most
    assert not sliced.sliced.keys() & set(output)
    found = run_slices(sliced, tensors).reshape([sizes[x] for x in output])
    np.testing.assert_allclose(found, einsum(network, tensors), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("network", [grid(4, 4, 3), random_network(14, 0, extra=6, largest=4)])
def test_limits_below_the_width_are_kept(network: Any) -> None:
    path = find_path(*network)
    whole, least = width(network, path), int(np.prod([network[2][x] for x in network[1]]))
    same = plan_slices(*network, whole)
    assert not same.sliced
    assert same.multiply_adds == cost(network, path)
    last = same.multiply_adds
    for most in (whole // 2, whole // 8):
        if most < least:
            continue
        sliced = plan_slices(*network, most)
        assert sliced.sliced
        assert sliced.largest <= most
        assert sliced.multiply_adds >= last  # slices are paid for in time
        tensors = tensors_of(network)
        shape = [network[2][x] for x in network[1]]
        np.testing.assert_allclose(run_slices(sliced, tensors).reshape(shape), einsum(network, tensors))


FAMILIES: dict[str, dict[str, Any]] = {"mpo": {"sites": 3}, "tensor_ring": {}, "tucker": {}, "low_rank": {}}


@pytest.mark.parametrize("family", [*FAMILIES, "residual"])
def test_networks_are_contracted_within_a_limit(family: str) -> None:
    torch.manual_seed(0)
    if family == "residual":
        topology = tn.topologies.residual(out_features=30, in_features=36, rank=3)
    else:
        dense = torch.randn(30, 36)
        topology = tn.decompose(dense, family, max_bond=5, **FAMILIES[family]).network.topology
    cores = [torch.randn(x, dtype=torch.float64) for x in topology.core_shapes.values()]
    network, x = tn.TensorNetwork(topology, cores), torch.randn(2, 3, 36, dtype=torch.float64)
    most = 8 * topology.padded_shape[0] * topology.padded_shape[1]
    torch.testing.assert_close(network.to_matrix(max_bytes=most), network.to_matrix())
    torch.testing.assert_close(network.apply(x, max_bytes=most), network.apply(x))
    assert network.apply(x[:0], max_bytes=most).shape == (0, 3, 30)


def test_a_limit_divides_the_application_of_a_ring() -> None:
    """The bond that closes a ring stays open through its whole contraction."""
    topology = tn.topologies.tensor_ring(out_dims=(4, 4, 4), in_dims=(4, 4, 4), max_bond=8)
    cores = [torch.randn(x, dtype=torch.float64) for x in topology.core_shapes.values()]
    network, x = tn.TensorNetwork(topology, cores), torch.randn(10, 64, dtype=torch.float64)
    operands = [(TOKEN, *topology.in_labels), *(core.labels for core in topology.cores)]
    sizes = {**topology.size_of, TOKEN: 10}
    most = 10 * 64 * 8
    sliced = plan_slices(operands, (TOKEN, *topology.out_labels), sizes, most)
    assert sliced.sliced
    torch.testing.assert_close(network.apply(x, max_bytes=8 * most), network.apply(x))


def test_gradients_go_through_slices() -> None:
    network = grid(3, 3, 3)
    tensors = [x.requires_grad_() for x in tensors_of(network)]
    sliced = plan_slices(*network, 9)
    assert sliced.sliced
    whole = plan_slices(*network, 10**6)
    for vectors in (torch.autograd.grad(run_slices(sliced, tensors), tensors),):
        for found, expected in zip(
            vectors, torch.autograd.grad(run_slices(whole, tensors), tensors), strict=True
        ):
            torch.testing.assert_close(found, expected)
    found = torch.func.grad(lambda x: run_slices(sliced, [x, *tensors[1:]]).sum())(tensors[0].detach())
    torch.testing.assert_close(found, torch.autograd.grad(run_slices(whole, tensors), tensors[0])[0])


def test_what_no_slices_reach() -> None:
    network = tn.decompose(torch.randn(16, 16), "mpo", sites=2).network
    with pytest.raises(MemoryLimitError, match=r"at 100 elements: 256 is the least"):
        network.to_matrix(max_bytes=400)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="max_bytes"):
            network.to_matrix(max_bytes=wrong)  # type: ignore[arg-type]


def test_a_limit_that_needs_too_many_slices_names_one_that_does_not() -> None:
    network = grid(6, 6, 8)
    with pytest.raises(MemoryLimitError, match=r"More than 65,536 slices .* at 8 elements\. Allow") as error:
        plan_slices(*network, 8)
    enough = int(str(error.value).split("Allow ")[1].split(" elements")[0].replace(",", ""))
    sliced = plan_slices(*network, enough)
    assert 1 < np.prod(list(sliced.sliced.values())) <= MOST_SLICES
