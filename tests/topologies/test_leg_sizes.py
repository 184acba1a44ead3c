"""Leg-whitened coordinates keep every cost and make fitting short; leg sizes are chosen by predicted loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.als import fit_network, legs_of
from tensornet.linalg.weighted_svd import Weighting
from tensornet.topologies import topology_family
from tensornet.topologies.mpo import unbalanced_dims
from tensornet.topology import Topology

FAMILIES = [
    ("mpo", {"sites": 2}),
    ("mpo", {"sites": 3}),
    ("low_rank", {}),
    ("tensor_ring", {}),
    ("tucker", {}),
]


def moment(size: int, seed: int, spread: float = 2.0) -> Tensor:
    """A moment whose directions differ by many orders of magnitude, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    return (mixing * torch.logspace(-spread, spread, size).double()) @ mixing.T


def built(family: str, shape: tuple[int, int], bond: int, **options: int) -> Topology:
    return topology_family(family).build(*shape, max_bond=bond, **options)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shape", [(12, 16), (11, 13)])
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_costs_stay_the_same(
    family: str, options: dict[str, int], shape: tuple[int, int], diagonal: bool
) -> None:
    matrix = torch.randn(shape)
    weighting = Weighting(moment(shape[0], 1), moment(shape[1], 2))
    if diagonal:
        assert weighting.rows is not None
        weighting = Weighting(weighting.rows.diagonal(), None)
    topology = built(family, shape, 3, **options)
    network = topology_family(family).decompose_to(matrix, topology).network
    legs = legs_of(topology, weighting)
    assert legs.roots
    target, turned, white = legs.whitened(matrix, network, weighting)
    assert (white.rows is not None and white.rows.ndim == 1) == diagonal
    cost = weighting.cost(matrix - network.to_matrix())
    assert white.cost(target - turned.to_matrix()) == pytest.approx(cost, rel=1e-3, abs=1e-8)
    back = legs.undone(turned, topology)
    torch.testing.assert_close(back.to_matrix(), network.to_matrix(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sites", [2, 3])
def test_fitting_goes_further_in_whitened_coordinates(sites: int) -> None:
    matrix = torch.randn(24, 36)
    weighting = Weighting(moment(24, 1), moment(36, 2))
    topology = built("mpo", (24, 36), 9, sites=sites)
    start = legs_of(topology, weighting).decompose(topology_family("mpo")._network_of, matrix, topology)
    raw = fit_network(matrix, start, weighting, sweeps=3, steps=6)
    made = topology_family("mpo").fit(matrix, topology, weighting)
    assert weighting.cost(matrix - made.network.to_matrix()) < 0.9 * raw.cost < 0.9 * raw.start


def test_no_leg_of_size_one() -> None:
    for sites in (2, 3, 4):
        found = list(unbalanced_dims(72, 144, sites))
        assert found
        for outs, ins in found:
            assert len(outs) == len(ins) == sites
            assert min(*outs, *ins) > 1
            topology_family("mpo").build(72, 144, out_dims=outs, in_dims=ins)
    assert not list(unbalanced_dims(35, 55, 2))  # 5 and 7 are no small legs
    assert not list(unbalanced_dims(72, 144, 1))


def test_the_cheapest_legs_are_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    weighting = Weighting(moment(24, 1, spread=0.5), moment(36, 2, spread=0.5))
    balanced = ((4, 6), (6, 6))
    for dims in (balanced, *unbalanced_dims(24, 36, 2)):
        topology = topology_family("mpo").build(24, 36, out_dims=dims[0], in_dims=dims[1], max_bond=8)
        cores = [torch.randn(shape, generator=generator) for shape in topology.core_shapes.values()]
        matrix = tn.TensorNetwork(topology, cores).to_matrix()
        found = topology_family("mpo").search_legs(matrix, weighting, lambda x: x.num_params, sites=2)
        assert found == {"out_dims": dims[0], "in_dims": dims[1]}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(72, 48), nn.Linear(48, 72)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(input_ids)))


def test_the_planner_chooses_legs_and_loses_little_where_none_are_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights without structure; on trained ones its legs are better (docs/quality.md)."""
    torch.manual_seed(0)
    model = Two()
    inputs = torch.randn(256, 72) @ torch.randn(72, 72)
    stats = tn.calibrate(model, [inputs], loss_fn=lambda m, batch: (m(**batch) * 0.1).square().sum(-1))
    config = tn.CompressionConfig(param_ratio=0.6, topology="mpo", topology_options={"sites": 2})
    plans = {"auto": tn.plan(model, config, stats)}
    with monkeypatch.context() as patch:  # factors of similar size
        patch.setattr(type(topology_family("mpo")), "search_legs", lambda self, *_, **options: options)
        plans["balanced"] = tn.plan(model, config, stats)
    gaps = {}
    for dims, plan in plans.items():
        small = copy.deepcopy(model)
        tn.apply_plan(small, plan, stats)
        gaps[dims] = float((small(inputs) - model(inputs)).detach().norm())
    # Over the random weights of 24 seeds, the ratio has mean 1.01 and standard deviation 0.03.
    assert gaps["auto"] < 1.15 * gaps["balanced"]
    chosen, balanced = (
        [layer.topology.out_dims for layer in plan if layer.topology] for plan in plans.values()
    )
    assert chosen
    assert chosen != balanced
    assert all(min(dims) > 1 for dims in chosen)
    tn.apply_plan(model, plans["auto"], stats)
    assert model.first.topology.out_dims in chosen


def test_large_powers_are_split_at_once() -> None:
    assert tn.topologies.balanced_factors(2**62, 62) == (2,) * 62
    assert tn.topologies.balanced_factors(3 * 2**20, 11) == (3, *(4,) * 10)
