"""Stacks of operators that share cores: build the matrices of all experts in one contraction.

These are pure functions; the module that stores the cores is in `experts.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from tensornet.contraction.plan import TOKEN, ContractionPlan, find_path, plan_contraction, run
from tensornet.errors import TopologyError
from tensornet.topology import Topology

#: Label of the expert index; when a plan is used again, only the size of this label may differ.
EXPERT = TOKEN

#: Largest number of cores for which all contraction orders are tried; a heuristic is used for more.
_EXHAUSTIVE_CORES = 7

#: Largest size of a merged group of cores, relative to the size of a matrix. Permuting the axes of so small a
#: tensor takes almost no time.
_SMALL = 1 / 8


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
class MergedCores:
    """Cores that are merged into one tensor before the rest is contracted.

    Args:
        cores: names of the cores.
        merge: contraction of these cores; None for a single core.
        shape: shape of the result; if a core is private, the first size is -1, for the experts.
    """

    cores: tuple[str, ...]
    merge: ContractionPlan | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StackPlan:
    """Planned contraction that builds the matrices of all experts at once.

    Small neighbouring cores, such as several private cores on one side of a shared center, are merged first.
    In the merged tensor, all out-legs are adjacent, and all in-legs are adjacent. So the copy that brings the
    rows and columns of the matrices into order moves long runs of memory. Otherwise this copy would add a
    tenth to the time of the arithmetic.

    Args:
        topology: topology of the matrix of one expert.
        shared: names of the cores that all experts share.
        groups: groups of cores that are merged first.
        contraction: contraction of the groups to the matrices.
    """

    topology: Topology
    shared: tuple[str, ...]
    groups: tuple[MergedCores, ...]
    contraction: ContractionPlan

    def multiply_adds(self, num_experts: int) -> int:
        """Count the multiply-adds of building the matrices of `num_experts` experts."""
        merging = sum(g.merge.multiply_adds(num_experts) for g in self.groups if g.merge is not None)
        return merging + self.contraction.multiply_adds(num_experts)


@lru_cache(maxsize=1024)
def plan_stack(topology: Topology, shared: tuple[str, ...], num_experts: int) -> StackPlan:
    """Plan the contraction that builds the matrices of `num_experts` experts.

    The plan is valid for other numbers of experts, too. In a chain whose shared center has bonds `l` and `r`,
    one expert costs about `(l + r) * out_features * in_features` multiply-adds.
    """
    legs = (*topology.out_labels, *topology.in_labels)
    sizes = {**topology.size_of, EXPERT: num_experts}
    cores = {
        core.name: core.labels if core.name in shared else (EXPERT, *core.labels) for core in topology.cores
    }
    output = legs if len(shared) == len(cores) else (EXPERT, *legs)
    optimize = "optimal" if len(cores) <= _EXHAUSTIVE_CORES else "auto"
    path = find_path(list(cores.values()), output, sizes, optimize)
    fused: dict[str, str] = {}
    groups, operands = [], []
    for names in _mergeable(cores, output, sizes, path):
        merged = cores[names[0]]
        if len(names) > 1:
            merged = _labels_left(names, cores, output)
            others = {x for name, labels in cores.items() if name not in names for x in labels}
            own = set(merged) - others
            fused |= _fuse(own, topology.out_labels) | _fuse(own, topology.in_labels)
        labels = tuple(dict.fromkeys(fused.get(x, x) for x in merged))
        for label in set(labels) - sizes.keys():
            sizes[label] = math.prod(sizes[x] for x in merged if fused.get(x) == label)
        merge = None
        if len(names) > 1:
            merge = plan_contraction([cores[name] for name in names], merged, sizes, optimize=optimize)
        groups.append(MergedCores(names, merge, tuple(-1 if x == EXPERT else sizes[x] for x in labels)))
        operands.append(labels)
    wanted = tuple(dict.fromkeys(fused.get(x, x) for x in output))
    return StackPlan(
        topology, shared, tuple(groups), plan_contraction(operands, wanted, sizes, optimize=optimize)
    )


def build_matrices(plan: StackPlan, cores: Mapping[str, Tensor], num_experts: int) -> Tensor:
    """Build dense matrices, shape `(num_experts, out_features, in_features)`, differentiably.

    Args:
        plan: the planned stack.
        cores: cores by name; a shared core has its own shape, a private core `(num_experts, *shape)`.
        num_experts: number of experts, at least 1.
    """
    topology = plan.topology
    rows, columns = topology.padded_shape
    operands = [
        cores[group.cores[0]]
        if group.merge is None
        else run(group.merge, [cores[name] for name in group.cores]).reshape(group.shape)
        for group in plan.groups
    ]
    dense = run(plan.contraction, operands)
    if len(plan.shared) == len(topology.cores):
        # For one expert, avoid `expand`: its backward pass would sum over the experts, which makes a copy.
        dense = dense.unsqueeze(0) if num_experts == 1 else dense.expand(num_experts, *dense.shape)
    dense = dense.reshape(num_experts, rows, columns)
    if topology.padded_shape != topology.shape:
        dense = dense[:, : topology.out_features, : topology.in_features]
    return dense


def _mergeable(
    cores: Mapping[str, tuple[str, ...]],
    output: tuple[str, ...],
    sizes: Mapping[str, int],
    path: Sequence[tuple[int, int]],
) -> list[tuple[str, ...]]:
    """Find the largest groups of cores that the contraction path merges into small tensors."""
    limit = _SMALL * math.prod(sizes[x] for x in output if x != EXPERT)
    # Pairs of the cores in an intermediate tensor, and True if that tensor is small.
    work: list[tuple[tuple[str, ...], bool]] = [((name,), True) for name in cores]
    groups: list[tuple[str, ...]] = []
    for a, b in path:
        (left, left_small), (right, right_small) = work[a], work[b]
        names = (*left, *right)
        size = math.prod(sizes[x] for x in _labels_left(names, cores, output) if x != EXPERT)
        small = left_small and right_small and size <= limit
        if not small:
            groups += [group for group, ready in ((left, left_small), (right, right_small)) if ready]
        work = [x for k, x in enumerate(work) if k not in (a, b)] + [(names, small)]
    (names, small) = work[0]
    return [*groups, names] if small else groups


def _labels_left(
    names: Sequence[str], cores: Mapping[str, tuple[str, ...]], output: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the labels of a merged group in order: the expert index, legs as in the output, bonds."""
    inside = {x for name in names for x in cores[name]}
    outside = {x for name, labels in cores.items() if name not in names for x in labels}
    legs = tuple(x for x in output if x in inside)
    return (*legs, *sorted(x for x in inside & outside if x not in output))


def _fuse(own: set[str], legs: tuple[str, ...]) -> dict[str, str]:
    """Map the legs in `own` to fused labels, one label for each run of adjacent legs."""
    runs: list[list[str]] = []
    for k, label in enumerate(legs):
        if label in own and k > 0 and legs[k - 1] in own:
            runs[-1].append(label)
        elif label in own:
            runs.append([label])
    return {label: "+".join(labels) for labels in runs for label in labels}
