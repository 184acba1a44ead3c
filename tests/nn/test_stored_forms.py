"""What is promised and foreseen holds of what is stored: after fitting to prices, and after rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.compression.candidates import family_candidates, round_trip
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting, weighted_svd
from tensornet.nn.encoding import Storage
from tensornet.topologies import LowRankFamily, topology_names
from tensornet.topologies.ladder import interpolated

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(96, 48, generator=GENERATOR), torch.randint(0, 20, (96,), generator=GENERATOR)


def model() -> nn.Sequential:
    """Weights whose singular values fall, so that every error is within reach."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 20))
    with torch.no_grad():
        for layer in (made[0], made[2]):
            U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(U @ torch.diag(S * torch.arange(1, len(S) + 1) ** -0.8) @ Vh)
    return made


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("objective", ["weight", "activation", "curvature"])
@pytest.mark.parametrize("family", topology_names())
def test_an_error_that_is_promised_is_kept(family: str, objective: str, int8: bool) -> None:
    for rel_error in (0.6, 0.4, 0.3, 0.1, 0.03):
        made, dense = model(), model()
        config = tn.CompressionConfig(rel_error=rel_error, topology=family, int8=int8, objective=objective)  # type: ignore[arg-type]
        report = tn.compress(made, config, calibration=[(X, Y)], progress=False)
        for layer in report.layers:
            old, new = (x.get_submodule(layer.name) for x in (dense, made))
            matrix = new.weight if isinstance(new, nn.Linear) else new.to_matrix()
            error = float((matrix - old.weight).detach().norm() / old.weight.detach().norm())
            assert error <= rel_error * (1 + 1e-6), layer
            assert layer.error <= rel_error, layer


def test_next_to_an_exact_form_nothing_is_free() -> None:
    """Half way between an error and none, a geometric mean would be none."""
    middle = interpolated([1, 2, 3, 4], [1, 2, 4], [1.0, 0.5, 0.0])
    assert middle == pytest.approx([1.0, 0.5, 0.25, 0.0], abs=1e-12)
    assert interpolated([1, 2, 3], [1, 3], [1.0, 0.25])[1] == pytest.approx(0.5)
    assert interpolated([1, 2], [1, 2], [0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize("pivoted", [False, True])
def test_rounding_is_in_the_price(pivoted: bool) -> None:
    matrix = model()[0].weight.detach()
    moments = (x.T @ x / len(x) for x in (torch.randn(200, 64), torch.randn(200, 48)))
    prices, storage = Sensitivity(*[Weighting(*moments)] * 2), Storage(pivoted=pivoted, int8=True)
    priced, plain = (
        family_candidates(matrix, prices, s, LowRankFamily()) for s in (storage, Storage(pivoted=pivoted))
    )
    svd = weighted_svd(matrix, prices.choice)
    for index in range(0, len(priced.params) - 1, 5):
        topology, _ = priced.make(index)
        assert topology is not None
        rank = max(topology.bond_dims.values())
        network = LowRankFamily().whitened_network(svd, rank, matrix)
        gap = matrix - round_trip(network, storage, matrix.dtype).to_matrix()
        assert float(priced.costs[index]) == pytest.approx(prices.choice.cost(gap.double()), rel=0.3)
        if index < len(plain.params) - 1:
            assert priced.costs[index] > plain.costs[index]
    assert float(priced.costs[-1]) == 0.0  # dense is not rounded


def test_eight_bits_alone_are_not_free() -> None:
    """A budget of next to no loss leaves layers dense where rounding alone costs more."""
    made = copy.deepcopy(model())
    stats = tn.calibrate(made, [(X, Y)])
    plan = tn.plan(made, tn.CompressionConfig(loss_increase=1e-9, int8=True), stats)
    assert [layer.topology for layer in plan] == [None, None]
