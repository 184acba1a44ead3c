"""Contraction orders against all orders, against opt_einsum and cotengra, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import opt_einsum
import pytest
import torch
from labelled_networks import all_paths, cost, einsum, grid, random_network, tensors_of, width

import tensornet as tn
from tensornet.contraction import search
from tensornet.contraction.plan import TOKEN, plan_contraction, run
from tensornet.contraction.search import Problem, Tree, find_path
from tensornet.errors import ContractionError, MissingDependencyError

FAMILIES: dict[str, dict[str, Any]] = {
    "low_rank": {},
    "mpo": {"sites": 5},
    "block_tt": {},
    "tensor_ring": {},
    "tucker": {},
}


def symbols(network: Any) -> tuple[list[frozenset[str]], frozenset[str], dict[str, int]]:
    operands, output, sizes = network
    symbol = {label: opt_einsum.get_symbol(k) for k, label in enumerate(sizes)}
    sets = [frozenset(symbol[x] for x in labels) for labels in (*operands, output)]
    return sets[:-1], sets[-1], {symbol[x]: size for x, size in sizes.items()}


def layer_networks() -> list[Any]:
    """Networks that layers plan: cores with an input of some tokens, and cores alone."""
    found = []
    for family, options in FAMILIES.items():
        dense = torch.nn.Linear(36, 48)
        layer = tn.nn.TensorNetworkLinear.from_linear(dense, topology=family, param_ratio=0.5, **options)
        topology = layer.topology
        cores = [core.labels for core in topology.cores]
        legs = (*topology.out_labels, *topology.in_labels)
        found.append((cores, legs, topology.size_of))
        for tokens in (1, 256):
            operands = [(TOKEN, *topology.in_labels), *cores]
            found.append((operands, (TOKEN, *topology.out_labels), {**topology.size_of, TOKEN: tokens}))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_few_operands_get_the_best_of_all_orders(seed: int) -> None:
    network = random_network(2 + seed % 4, seed)
    path = find_path(*network)
    assert cost(network, path) == min(cost(network, other) for other in all_paths(len(network[0])))


@pytest.mark.parametrize("seed", range(4))
def test_cost_and_width_of_a_tree_are_those_of_its_path(seed: int) -> None:
    network = random_network(12, seed)
    path = find_path(*network, "greedy")
    tree = Tree.of_path(Problem.of(*network), path)
    assert (tree.cost, tree.width) == (cost(network, path), width(network, path))
    assert cost(network, tree.path()) == tree.cost
    search.refine(tree, random.Random(0))
    assert (tree.cost, tree.width) == (cost(network, tree.path()), width(network, tree.path()))
    assert tree.cost <= cost(network, path)


@pytest.mark.parametrize("network", [grid(3, 3, 2), grid(3, 3, 4), *(random_network(9, k) for k in range(4))])
def test_the_search_of_many_finds_the_best_order_of_few(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = cost(network, find_path(*network))
    monkeypatch.setattr(search, "EXACT", 1)
    assert cost(network, find_path(*network)) == best


@pytest.mark.parametrize("network", layer_networks())
def test_orders_of_layers_change_only_where_another_one_is_better(network: Any) -> None:
    path, before = find_path(*network), find_path(*network, "greedy")
    if len(network[0]) > 1:
        before = [tuple(sorted(step)) for step in opt_einsum.paths.auto(*symbols(network))]
    assert path == before or cost(network, path) < cost(network, before)


@pytest.mark.parametrize("network", [grid(4, 4, 3), random_network(14, 0, extra=6)])
def test_orders_are_the_same_every_time_and_no_worse_than_opt_einsum(network: Any) -> None:
    state = random.getstate()
    path = find_path(*network)
    find_path(*network, "random-greedy")
    assert random.getstate() == state
    random.seed(1)
    assert find_path(*network) == path
    assert cost(network, path) <= cost(network, find_path(*network, "auto-hq"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("optimize", ["auto", "greedy", opt_einsum.RandomGreedy(max_repeats=2)])
@pytest.mark.parametrize("seed", range(2))
def test_contraction_of_many_operands_is_the_einsum(optimize: Any, dtype: torch.dtype, seed: int) -> None:
    network = random_network(11, seed)
    if not isinstance(optimize, str):
        optimize = type(optimize)(max_repeats=2)  # opt_einsum's object serves one network only
    tensors = tensors_of(network, dtype)
    result = run(plan_contraction(*network, optimize=optimize), tensors)
    np.testing.assert_allclose(result.reshape([network[2][x] for x in network[1]]), einsum(network, tensors))


def test_networks_take_optimizers_names_and_paths() -> None:
    network = tn.decompose(torch.randn(12, 18), "tucker", max_bond=3).network
    calls: list[Any] = []

    def sweep(inputs: Any, output: Any, sizes: Any, memory_limit: Any) -> list[tuple[int, int]]:
        calls.append(inputs)
        return [(0, 1)] * (len(inputs) - 1)

    x, dense = torch.randn(5, 18), network.to_matrix()
    given: list[Any] = ["dp", opt_einsum.DynamicProgramming(), sweep, [(0, 1)] * (len(network.cores) - 1)]
    for optimize in given:
        torch.testing.assert_close(network.to_matrix(optimize=optimize), dense)
    for optimize in given[:3]:
        torch.testing.assert_close(network.apply(x, optimize=optimize), network.apply(x))
    assert [len(inputs) for inputs in calls] == [len(network.cores), len(network.cores) + 1]
    total = tn.TensorNetwork(
        topology := tn.topologies.residual(out_features=6, in_features=4, rank=2),
        [torch.randn(shape) for shape in topology.core_shapes.values()],
    )
    torch.testing.assert_close(total.to_matrix(optimize="greedy"), total.to_matrix())
    torch.testing.assert_close(total.apply(x[:, :4], optimize="greedy"), total.apply(x[:, :4]))


def test_an_unknown_optimizer_is_refused_with_the_alternatives() -> None:
    network = tn.decompose(torch.randn(4, 4), "low_rank", max_bond=2).network
    with pytest.raises(ContractionError, match=r"'fastest'.*'cotengra'.*'auto-hq'"):
        network.to_matrix(optimize="fastest")


@pytest.mark.parametrize(
    "path",
    [
        [],
        [(0, 1)],
        [(0, 1), (0, 2)],
        [(0, 0), (0, 1)],
        [(0, 1), (-1, 0)],
        [(0, 1, 2)],
        [(0, 1), (0, 1), (0, 1)],
        7,
        ["ab", (0, 1)],
        None,
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_invalid_path_is_refused(path: Any, wrapped: bool) -> None:
    optimize: Callable[..., Any] | Any = (lambda *_: path) if wrapped else path
    with pytest.raises(ContractionError, match="2 pairs"):
        find_path([("a", "b"), ("b", "c"), ("c", "d")], ("a", "d"), dict.fromkeys("abcd", 2), optimize)


def test_cotengra_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensornet._util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="paths"):
        find_path(*grid(2, 2, 2), "cotengra")


@pytest.mark.slow
@pytest.mark.parametrize("network", [grid(4, 4, 3), random_network(30, 1, extra=12, largest=4)])
def test_cotengra_by_name_and_as_an_object(network: Any) -> None:
    cotengra = pytest.importorskip("cotengra")
    optimizer = cotengra.HyperOptimizer(methods=["greedy"], max_repeats=16, parallel=False)
    theirs, state = find_path(*network, optimizer), random.getstate()
    ours, refined = find_path(*network), find_path(*network, "cotengra")
    assert random.getstate() == state
    tree = cotengra.ContractionTree.from_path(*symbols(network), path=theirs)
    assert tree.contraction_cost() == cost(network, theirs)
    assert cost(network, refined) <= 1.02 * cost(network, theirs)
    assert cost(network, ours) <= 1.02 * cost(network, theirs)
