"""A stack of operators that share cores: which cores, which shapes, and the one contraction that builds all.

Pure functions; `experts.py` puts the tensors into a module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from tensornet.contraction import TOKENS, ContractionPlan, plan_contraction, run
from tensornet.errors import TopologyError
from tensornet.topology import Topology

#: The label that counts experts: the one label of a plan whose size may change from call to call.
EXPERTS = TOKENS

#: Up to this many cores the best contraction order is found by trying all; beyond, by a heuristic.
_EXHAUSTIVE_CORES = 7

SHARED_KEYWORDS = ("center", "ends", "none", "all")


def resolve_shared(topology: Topology, shared: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the shared cores, in the order of the topology.

    Args:
        topology: the operator of one expert.
        shared: `"center"` (the core with the most parameters), `"ends"` (first and last core), `"none"`,
            `"all"`, or a sequence of core names.

    Raises:
        TopologyError: an unknown keyword or core name.
    """
    names = topology.core_names
    if isinstance(shared, str):
        keywords: dict[str, tuple[str, ...]] = {
            "center": (topology.central_core,),
            "ends": (names[0], names[-1]),
            "none": (),
            "all": names,
        }
        if shared not in keywords:
            raise TopologyError(
                f"shared={shared!r} is not one of {', '.join(SHARED_KEYWORDS)}; to share cores by name pass "
                f"a sequence, for example shared=[{names[0]!r}]. The cores are {', '.join(names)}."
            )
        shared = keywords[shared]
    if unknown := [name for name in shared if name not in names]:
        raise TopologyError(f"No core is named {unknown}; the topology has {', '.join(names)}.")
    return tuple(name for name in names if name in shared)


def enclosing_topology(topologies: Sequence[Topology]) -> Topology:
    """The topology whose bonds are the largest of each: every expert fits into it by padding with zeros.

    Raises:
        TopologyError: the topologies differ in more than their bonds.
    """
    first = topologies[0]
    for k, other in enumerate(topologies):
        if (other.cores, other.out_labels, other.in_labels, other.shape, other.padded_shape) != (
            first.cores,
            first.out_labels,
            first.in_labels,
            first.shape,
            first.padded_shape,
        ) or (other.out_dims, other.in_dims) != (first.out_dims, first.in_dims):
            raise TopologyError(
                f"The topologies of experts 0 and {k} differ in more than their bonds: {first} and {other}. "
                "Experts of one stack need the same cores, labels, legs and shape."
            )
    sizes = tuple((label, max(topology.size_of[label] for topology in topologies)) for label in first.size_of)
    return replace(first, sizes=sizes)


@dataclass(frozen=True)
class StackPlan:
    """The contraction that builds the matrices of all experts at once.

    Args:
        topology: the operator of one expert.
        shared: names of the cores that all experts share.
        contraction: operands are the cores in order, private ones with a leading expert dimension.
    """

    topology: Topology
    shared: tuple[str, ...]
    contraction: ContractionPlan


@lru_cache(maxsize=1024)
def plan_stack(topology: Topology, shared: tuple[str, ...], num_experts: int) -> StackPlan:
    """Plan the rebuilding of `num_experts` matrices; the plan runs for any other number as well.

    The private cores on either side of a shared one are merged first, so that the shared core takes part in
    matrix products as large as they come: for a chain with central bonds `l` and `r` one expert costs about
    `(l + r) * out_features * in_features` multiply-adds.
    """
    operands = [core.labels if core.name in shared else (EXPERTS, *core.labels) for core in topology.cores]
    experts = () if len(shared) == len(operands) else (EXPERTS,)
    contraction = plan_contraction(
        operands,
        (*experts, *topology.out_labels, *topology.in_labels),
        {**topology.size_of, EXPERTS: num_experts},
        optimize="optimal" if len(operands) <= _EXHAUSTIVE_CORES else "auto",
    )
    return StackPlan(topology, shared, contraction)


def build_matrices(plan: StackPlan, cores: Mapping[str, Tensor], num_experts: int) -> Tensor:
    """Dense matrices, shape `(num_experts, out_features, in_features)`, differentiable.

    Args:
        plan: the planned stack.
        cores: by name; a shared core has its own shape, a private one `(num_experts, *shape)`.
        num_experts: number of experts, at least 1.
    """
    topology = plan.topology
    rows, columns = topology.padded_shape
    dense = run(plan.contraction, [cores[name] for name in topology.core_names])
    if len(plan.shared) == len(topology.cores):
        dense = dense.expand(num_experts, *dense.shape)
    dense = dense.reshape(num_experts, rows, columns)
    if topology.padded_shape != topology.shape:
        dense = dense[:, : topology.out_features, : topology.in_features]
    return dense
