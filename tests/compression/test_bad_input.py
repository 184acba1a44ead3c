"""What is no matrix, no size and no budget, handed to every entry of the core: one clear error for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tensornet as tn
from tensornet.errors import BudgetError, ShapeError, TopologyError
from tensornet.topologies import (
    Budget,
    CoreSpec,
    block_tt,
    kronecker,
    low_rank,
    mpo,
    tensor_ring,
    topology_family,
    topology_names,
    tucker,
)

DIMS = {"out_dims": (3, 8), "in_dims": (4, 5)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bond": 0}, r"max_bond.*got 0"),
        ({"max_bond": 2.5}, r"max_bond.*got 2\.5"),
        ({"out_features": 0}, r"out_features.*got 0"),
        ({"out_dims": 24}, r"out_dims.*got 24"),
        ({"in_dims": (4, 0)}, r"in_dims.*got 0"),
    ],
)
@pytest.mark.parametrize("build", [mpo, tucker, tensor_ring, kronecker, block_tt])
def test_sizes_that_are_none_are_refused(
    build: Callable[..., tn.Topology], options: dict[str, object], message: str
) -> None:
    with pytest.raises(TopologyError, match=message):
        build(**{**DIMS, **options})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mpo(**DIMS, bond_dims=4), r"bond_dims.*sequence"),
        (lambda: mpo(**DIMS, bond_dims=(2, 2)), r"bond_dims \(2, 2\).*1 entries"),
        (lambda: tucker(**DIMS, ranks=(0, 1, 1, 1)), "entry of ranks"),
        (lambda: kronecker(**DIMS, terms=0), "entry of terms"),
        (lambda: low_rank(out_features=4, in_features=3, rank=0), "rank"),
        (
            lambda: topology_family("mpo").build(8, 6, sites=0),
            r"sites.*got 0",
        ),
        (lambda: chain([0]), r"bond_dims.*got 0"),
        (lambda: topology_family(["mpo"]), r"\['mpo'\].*block_tt"),
        (lambda: tn.TensorNetwork("mpo", []), "a Topology, got 'mpo'"),
        (
            lambda: topology_family("mpo").decompose_to(torch.ones(4, 3), "mpo"),
            "a Topology, got 'mpo'",
        ),
    ],
)
def test_topologies_that_are_none_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        build()


def chain(bonds: object) -> Any:
    return topology_family("mpo").decompose(torch.randn(4, 6), Budget(), sites=2, bond_dims=bonds)


MATRIX_TAKERS: dict[str, Callable[[Tensor], object]] = {
    "MPO.from_matrix": tn.MPO.from_matrix,
    "truncated_svd": tn.truncated_svd,
    **{
        f"Topology {name!r}": lambda matrix, name=name: topology_family(name).decompose(matrix, Budget())
        for name in topology_names()
    },
}


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((4, 6)), "as a torch.Tensor, .*got ndarray"),
        (torch.ones(4, 6, dtype=torch.int64), r"floating or complex numbers .*got torch\.int64; cast it"),
        (torch.ones(4), r"with at least one element, got shape \(4,\)"),
        (torch.ones(0, 6), r"with at least one element, got shape \(0, 6\)"),
        (torch.ones(4, 6, device="meta"), "on the meta device; load it first"),
        (torch.ones(4, 6).to_sparse(), r"in dense layout, got torch\.sparse_coo; use \.to_dense"),
    ],
    ids=["numpy", "integers", "vector", "empty", "meta", "sparse"],
)
@pytest.mark.parametrize("name", MATRIX_TAKERS)
def test_what_is_no_matrix_is_refused_by_name(name: str, matrix: Tensor, message: str) -> None:
    if isinstance(matrix, np.ndarray) and name == "MPO.from_matrix":
        return  # takes arrays of NumPy
    with pytest.raises(ShapeError, match=f"{name} needs .*{message}"):
        MATRIX_TAKERS[name](matrix)
    if name.startswith("Topology"):
        family = topology_family(name.split("'")[1])
        with pytest.raises(ShapeError, match=f"{name} needs .*{message}"):
            family.decompose_to(matrix, family.build(4, 6))


def test_what_is_no_stack_is_refused() -> None:
    with pytest.raises(ShapeError, match="got list"):
        tn.MPO.from_matrices([torch.ones(3, 4)])  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [{"rel_error": "0.1"}, {"param_ratio": "half"}, {"rel_error": True}])
def test_budgets_are_numbers(budget: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match="must be a number"):
        Budget(**budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", topology_names())
def test_what_is_no_budget_is_refused(name: str) -> None:
    with pytest.raises(BudgetError, match=r"Expected a Budget"):
        topology_family(name).decompose(torch.ones(4, 6), 0.5)  # type: ignore[arg-type]


def test_bonds_of_a_decomposition_that_no_leg_can_use_are_clipped_and_said() -> None:
    with pytest.warns(UserWarning, match=r"clipped to \(4,\)"):
        made = chain([99])
    assert made.network.topology.bond_dims["b1"] == 4


@pytest.mark.parametrize("name", topology_names())
def test_topologies_hold_plain_integers(name: str) -> None:
    """Sizes computed with NumPy: a layer of such a topology could not be saved."""
    eight = np.int64(8)
    topology = topology_family(name).build(eight, eight, max_bond=np.int64(2))  # type: ignore[arg-type]
    assert tn.Topology.from_dict(json.loads(json.dumps(topology.to_dict()))) == topology


def test_sizes_of_a_topology_are_integers() -> None:
    core = CoreSpec("a", ("o", "i"))
    with pytest.raises(TopologyError, match=r"label 'o'.*2\.5"):
        tn.Topology("mine", (core,), (("o", 2.5), ("i", 3)), ("o",), ("i",), 2, 3)  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match=r"in_features.*3\.0"):
        tn.Topology("mine", (core,), (("o", 2), ("i", 3)), ("o",), ("i",), 2, 3.0)  # type: ignore[arg-type]


def test_cores_and_inputs_of_other_kinds_are_refused() -> None:
    topology = low_rank(out_features=4, in_features=3, rank=1)
    with pytest.raises(ShapeError, match="got ndarray"):
        tn.TensorNetwork(topology, [np.ones((1, 4, 1, 1)), np.ones((1, 1, 3, 1))])  # type: ignore[list-item]
    network = tn.TensorNetwork(topology, [torch.ones(1, 4, 1, 1), torch.ones(1, 1, 3, 1)])
    with pytest.raises(ValueError, match=r"tokens.*-3"):
        network.flops(-3)
    for x, got in ((torch.tensor(3.0), "a number without dimensions"), (np.ones(3), "ndarray")):
        with pytest.raises(ShapeError, match=f"in_features=3.*, got {got}"):
            network.apply(x)  # type: ignore[arg-type]
