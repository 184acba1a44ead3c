"""Sums of networks: the residual form against the shipped laws, and descriptions of sums that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import tensornet as tn
from tensornet.als import fit_network
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression import survey_from_stats
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import random_cores
from tensornet.nn.embedding import embedding_from_network
from tensornet.nn.linear import TensorNetworkLinear, linear_from_network
from tensornet.nn.storage import Storage
from tensornet.nn.targets import all_targets
from tensornet.quantization import NumberFormat
from tensornet.testing import laws, strategies
from tensornet.topologies import Budget, CoreSpec, residual, topology_family

small = strategies.matrices(max_size=12)
SHAPE = (24, 64)
NETWORKS = ("low_rank", "mpo", "tucker")


class TestResidual(laws.FamilyLaws):
    family = topology_family("residual")
    matrices = small


def sum_with(name: str, rows: int, columns: int, bond: int) -> tn.Topology:
    """A dense matrix plus a network of any family, in the legs of that network, which may be padded."""
    network = topology_family(name).build(rows, columns, max_bond=bond)
    legs = (*network.out_labels, *network.in_labels)
    terms = (("dense", ("base",)), (network.family, network.core_names))
    return replace(network, family="mine", cores=(CoreSpec("base", legs), *network.cores), terms=terms)


@st.composite
def sums(draw: st.DrawFn) -> tn.TensorNetwork:
    rows, columns, bond = draw(st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(1, 4)))
    topology = draw(st.sampled_from([sum_with(name, rows, columns, bond) for name in NETWORKS]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return tn.TensorNetwork(topology, random_cores(topology, generator=generator, dtype=torch.float64))


class TestSums(laws.NetworkLaws):
    networks = sums()


def moments(rows: int = SHAPE[0], columns: int = SHAPE[1]) -> Weighting:
    generator = torch.Generator().manual_seed(1)
    sides = [
        torch.randn(2 * n, n, generator=generator) * torch.arange(1, n + 1) ** -0.7 for n in (rows, columns)
    ]
    return Weighting(*((x.T @ x / len(x)).double() for x in sides))


def weight() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def layer(storage: Storage, weighting: Weighting | None = None) -> TensorNetworkLinear:
    topology = topology_family("residual").build(*SHAPE, max_bond=4)
    made = topology_family("residual").decompose_to(weight(), topology).network
    return linear_from_network(made, bias=None, source="linear", storage=storage, weighting=weighting)


def loss(made: TensorNetworkLinear, weighting: Weighting) -> float:
    return weighting.cost(weight().double() - made.to_matrix().detach().double())


@pytest.mark.parametrize("name", NETWORKS)
def test_descriptions_of_sums_come_back(name: str) -> None:
    topology = sum_with(name, 6, 8, 2)
    assert tn.Topology.from_dict(json.loads(json.dumps(topology.to_dict(), sort_keys=True))) == topology


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ((("dense", ("base",)),), "two groups"),
        ((("low_rank", ("0", "1")), ("dense", ("base",))), "in this order"),
        ((("dense", ("base",)), ("low_rank", ("0",))), "two groups"),
        ((("dense", ("base",)), ("low_rank", ("0",)), ("dense", ("1",))), "every leg"),
    ],
)
def test_terms_that_do_not_fit_are_refused(terms: tuple[tuple[str, tuple[str, ...]], ...], said: str) -> None:
    topology = residual(out_features=4, in_features=6, rank=2)
    with pytest.raises(TopologyError, match=said):
        replace(topology, terms=terms)
    with pytest.raises(TopologyError):
        tn.Topology.from_dict({**topology.to_dict(), "terms": terms})


@pytest.mark.parametrize("terms", [3, [3], [["dense"]], [["dense", 3]], [[3, ["base"]]]])
def test_terms_of_another_type_are_refused(terms: object) -> None:
    data = {**residual(out_features=4, in_features=6, rank=2).to_dict(), "terms": terms}
    with pytest.raises(TopologyError, match="topology description"):
        tn.Topology.from_dict(data)


def test_bonds_belong_to_one_term() -> None:
    cores = (CoreSpec("a", ("o", "i", "b")), CoreSpec("c", ("o", "i", "b")))
    with pytest.raises(TopologyError, match="Bond 'b'"):
        tn.Topology(
            "mine",
            cores,
            (("o", 2), ("i", 2), ("b", 3)),
            ("o",),
            ("i",),
            2,
            2,
            (("x", ("a",)), ("x", ("c",))),
        )


def test_bad_options() -> None:
    family = topology_family("residual")
    with pytest.raises(TopologyError, match="options network"):
        family.build(4, 4, network="mpo")
    with pytest.raises(BudgetError, match=r"12 .*'residual' needs 24"):
        family.decompose(torch.randn(4, 4), Budget(param_ratio=0.75))


def test_least_squares_fit_every_core_of_a_sum() -> None:
    """Each step is linear in one core of one term; a wrong constant part would raise the error."""
    topology = sum_with("tucker", 9, 12, 2)
    generator = torch.Generator().manual_seed(0)
    start = tn.TensorNetwork(topology, random_cores(topology, generator=generator, dtype=torch.float64))
    target = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    network_alone = range(1, len(topology.cores))
    fit = fit_network(target, start, moments(9, 12), sweeps=3, only=network_alone)
    assert fit.cost < 0.9 * fit.start
    assert fit.cost == pytest.approx(moments(9, 12).cost(target - fit.network.to_matrix()), rel=1e-9)
    assert fit_network(target, start, moments(9, 12), sweeps=4, steps=200).cost < 1e-6 * fit.start


@pytest.mark.parametrize("base", ["int2", "int3", "int4"])
def test_a_low_rank_takes_a_part_of_the_rounding_error(base: str) -> None:
    weighting = moments()
    alone = topology_family("dense").decompose_to(weight(), topology_family("dense").build(*SHAPE)).network
    plain = linear_from_network(
        alone, bias=None, source="linear", storage=Storage(number_format=base), weighting=weighting
    )
    both = layer(Storage(number_format="int8", core_formats={"base": base}), weighting)
    assert loss(both, weighting) < 0.97 * loss(plain, weighting)


def test_a_floating_matrix_takes_what_rounding_the_network_leaves() -> None:
    made = layer(Storage(number_format="int4", core_formats={"base": "float"}), moments())
    torch.testing.assert_close(made.to_matrix(), weight(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["auto", "factorized", "reconstruct"])
def test_forward_and_gradients_do_not_depend_on_the_strategy(strategy: str) -> None:
    made = layer(Storage(number_format="bf16", core_formats={"base": "int4"}), moments()).eval()
    made.strategy = strategy  # type: ignore[assignment]
    x = torch.randn(5, SHAPE[1], requires_grad=True)
    expected = x @ made.to_matrix().T
    y = made(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    pull = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, pull)
    torch.testing.assert_close(got, pull @ made.to_matrix(), rtol=1e-4, atol=1e-4)


def test_rows_of_an_embedding() -> None:
    topology = residual(out_features=13, in_features=8, rank=2)
    table = torch.randn(13, 8)
    made = topology_family("residual").decompose_to(table, topology).network
    storage = Storage(number_format="int8", core_formats={"base": "int4"})
    lookup = embedding_from_network(made, storage=storage, weighting=moments(13, 8))
    torch.testing.assert_close(lookup(torch.arange(13)), lookup.to_matrix(), rtol=1e-5, atol=1e-5)


def test_an_added_rank_goes_into_the_network() -> None:
    topology = residual(out_features=12, in_features=8, rank=2)
    wider = topology_family("residual").with_rank(topology, 3)
    assert wider == residual(out_features=12, in_features=8, rank=5)


def test_encodings_pair_few_bits_with_the_smallest_accurate_format() -> None:
    family = topology_family("residual")

    def pairs(*names: str) -> list[tuple[str, str]]:
        found = family.encodings([NumberFormat.parse(x) for x in names])
        return [(cores.name, base["base"].name) for cores, base in found]

    assert pairs("float", "int8", "int5", "int4", "int2") == [("int8", "int4"), ("int8", "int2")]
    assert pairs("float", "bf16", "int3") == [("bf16", "int3")]
    assert pairs("int4") == []


def spiked(seed: int = 0) -> torch.Tensor:
    """A weight whose rounding error has few large directions under the moments: a network pays."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, 2, generator=generator) for n in (64, 128))
    return torch.randn(64, 128, generator=generator) * 0.2 + left @ right.T


def statistics() -> CalibrationStats:
    generator = torch.Generator().manual_seed(2)
    sides = []
    for n in (64, 128):
        few = torch.randn(n, 3, generator=generator)
        sides.append({"0": 20 * few @ few.T / n + torch.eye(n)})
    return CalibrationStats(*sides, tokens=100, loss=1.0, source="random numbers")


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(128, 64))
    made[0].weight.data.copy_(spiked())
    return made


def test_plans_choose_it_where_it_costs_less() -> None:
    """Never dearer than plain integers at the same bytes, and what is planned is what is made."""
    formats = ("int8", "int4", "int3", "int2")
    config = tn.CompressionConfig(bits_per_weight=4, topology="residual", formats=formats)
    both = survey_from_stats(model(), config, statistics())
    (surveyed,) = both.layers
    found = surveyed.candidates
    chosen = 0
    for bits in (2.4, 2.8, 3.2, 3.6, 4.0, 4.8, 6.0, 8.3):
        plan = both.plan(bits_per_weight=bits)
        assert plan.bits_per_weight <= bits
        (layer,) = plan
        assert layer.topology is not None
        cost = next(x.cost for x in found if (x.topology, x.storage) == (layer.topology, layer.storage))
        plain = [x for x in found if x.number_format and x.num_bytes <= bits / 8 * layer.params_before]
        assert cost <= min(x.cost for x in plain)
        if layer.topology.family != "residual":
            continue
        chosen += 1
        assert tn.CompressionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        made = model()
        tn.apply_plan(made, plan, statistics())
        sensitivity = layer_sensitivity(all_targets(model())[0], "curvature", statistics())
        assert sensitivity is not None
        rise = sensitivity.forecast.cost(spiked().double() - made[0].to_matrix().detach().double())
        assert 0.4 * layer.loss_increase < rise < 1.2 * layer.loss_increase
        assert sum(x.nbytes for x in made[0].stored.values()) == layer.bytes_after
        assert torch.equal(tn.decompress(made)[0].weight, made[0].weight)
    assert chosen
