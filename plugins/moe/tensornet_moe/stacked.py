"""Stacks of operators that share cores: build the matrices of all experts in one contraction.

These are pure functions; the module that stores the cores is in `experts.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from tensornet.contraction.plan import TOKEN, ContractionPlan, plan_contraction, run
from tensornet.errors import TopologyError
from tensornet.topology import Topology

#: Label of the expert index; when a plan is used again, only the size of this label may differ.
EXPERT = TOKEN


def _described(topology: Topology) -> str:
    return f"{topology.family!r} of shape {topology.shape} with legs {topology.out_dims} x {topology.in_dims}"


def enclosing_topology(topologies: Sequence[Topology]) -> Topology:
    """Return the topology with the largest size of each bond; the cores of all experts can be padded to it.

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
                f"The topologies of experts 0 and {k} differ in more than their bonds: {_described(first)} "
                f"and {_described(other)}. "
                "Experts of one stack need the same cores, labels, legs and shape."
            )
    sizes = tuple((label, max(topology.size_of[label] for topology in topologies)) for label in first.size_of)
    return replace(first, sizes=sizes)


@dataclass(frozen=True)
class StackPlan:
    """Planned contraction that builds the matrices of all experts at once.

    Args:
        topology: topology of the matrix of one expert.
        shared: names of the cores that all experts share.
        contraction: contraction of the cores, in the order of the topology, to the matrices.
    """

    topology: Topology
    shared: tuple[str, ...]
    contraction: ContractionPlan

    def multiply_adds(self, num_experts: int) -> int:
        """Count the multiply-adds of building the matrices of `num_experts` experts."""
        return self.contraction.multiply_adds(num_experts)


@lru_cache(maxsize=1024)
def plan_stack(topology: Topology, shared: tuple[str, ...], num_experts: int) -> StackPlan:
    """Plan the contraction that builds the matrices of `num_experts` experts.

    The plan is valid for other numbers of experts, too. In a chain whose shared center has bonds `l` and `r`,
    one expert costs about `(l + r) * out_features * in_features` multiply-adds.
    """
    cores = [core.labels if core.name in shared else (EXPERT, *core.labels) for core in topology.cores]
    legs = (*topology.out_labels, *topology.in_labels)
    output = legs if len(shared) == len(cores) else (EXPERT, *legs)
    sizes = {**topology.size_of, EXPERT: num_experts}
    return StackPlan(topology, shared, plan_contraction(cores, output, sizes))


def build_matrices(plan: StackPlan, cores: Mapping[str, Tensor], num_experts: int) -> Tensor:
    """Build dense matrices, shape `(num_experts, out_features, in_features)`, differentiably.

    Args:
        plan: the planned stack.
        cores: cores by name; a shared core has its own shape, a private core `(num_experts, *shape)`.
        num_experts: number of experts, at least 1.
    """
    topology = plan.topology
    rows, columns = topology.padded_shape
    dense = run(plan.contraction, [cores[name] for name in topology.core_names])
    if len(plan.shared) == len(topology.cores):
        # For one expert, avoid `expand`: its backward pass would sum over the experts, which makes a copy.
        dense = dense.unsqueeze(0) if num_experts == 1 else dense.expand(num_experts, *dense.shape)
    dense = dense.reshape(num_experts, rows, columns)
    if topology.padded_shape != topology.shape:
        dense = dense[:, : topology.out_features, : topology.in_features]
    return dense
