"""Contract in slices, so that intermediate results keep a limit.

If a summed index of size `n` is fixed, a contraction falls into `n` smaller ones, whose results add up to the
result. Products that do not have the index are computed in each of them, so slicing takes time. Indices are
chosen greedily: each time that index of a too large product with which all slices together need the fewest
multiply-adds. Any limit can be kept that the result itself keeps, if no more than `MOST_SLICES` slices are
needed for it.

Reference:
    Gray and Kourtis 2021, "Hyper-optimized tensor network contraction", section on slicing.
"""

import itertools
import random
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tensornet._util import transforms_active
from tensornet.contraction.plan import ContractionPlan, lower_path, run
from tensornet.contraction.search import SECONDS, Labels, Optimizer, Problem, Tree, bits, find_path, refine
from tensornet.errors import MemoryLimitError

#: Most slices of a contraction: more would take minutes for their overhead alone.
MOST_SLICES = 2**16


class SlicedPlan(NamedTuple):
    """Contraction in slices.

    Args:
        plan: contraction of one slice, in which the sliced indices have size 1.
        operands: labels of each operand.
        sliced: size of each sliced index.
        largest: number of elements of the largest product of a slice.
        multiply_adds: multiply-adds of all slices.
    """

    plan: ContractionPlan
    operands: tuple[Labels, ...]
    sliced: Mapping[str, int]
    largest: int
    multiply_adds: int


def plan_slices(
    operands: Sequence[Labels],
    output: Labels,
    size_of: Mapping[str, int],
    most: int,
    *,
    optimize: Optimizer = "auto",
) -> SlicedPlan:
    """Plan `einsum(operands -> output)` in slices whose products have at most `most` elements.

    Args:
        operands: labels of each operand.
        output: labels of the result; only other labels are sliced.
        size_of: size of each label.
        most: largest number of elements of a product, the result included.
        optimize: what finds the contraction order; see `find_path`.

    Raises:
        MemoryLimitError: the result has more elements, or more than `MOST_SLICES` slices are needed; the
            message says how many elements to allow.
    """
    problem = Problem.of(operands, output, size_of)
    tree = Tree.of_path(problem, find_path(operands, output, size_of, optimize))
    tree, chosen = slice_tree(tree, most)
    sliced = {problem.labels[k]: size_of[problem.labels[k]] for k in bits(chosen)}
    plan = lower_path(operands, output, {**size_of, **dict.fromkeys(sliced, 1)}, tree.path())
    total = tree.cost * problem.volumes[chosen]
    return SlicedPlan(plan, tuple(map(tuple, operands)), sliced, tree.width, total)


def slice_tree(tree: Tree, most: int) -> tuple[Tree, int]:
    """Choose indices to slice until no product has more than `most` elements.

    Returns:
        The tree of a slice, and the set of the sliced indices.

    Raises:
        MemoryLimitError: see `plan_slices`.
    """
    volumes, output, chosen = tree.problem.volumes, tree.problem.output, 0
    while tree.width > most:
        large = 0
        for node in tree.children:
            if volumes[tree.indices[node]] > most:
                large |= tree.indices[node]
        trials = {k: tree.without(1 << k) for k in bits(large & ~output)}
        if not trials:
            raise MemoryLimitError(
                f"No slices of the contraction keep all results at {most:,} elements: {tree.width:,} is the "
                "least, the size of the result itself. Allow as many."
            )
        best = min(trials, key=lambda k: (trials[k].cost * volumes[1 << k], k))
        if volumes[chosen | 1 << best] > MOST_SLICES:
            raise MemoryLimitError(
                f"More than {MOST_SLICES:,} slices are needed to keep all results of the contraction at "
                f"{most:,} elements. Allow {tree.width:,} elements, for {volumes[chosen]:,} slices."
            )
        tree, chosen = trials[best], chosen | 1 << best
    refined = tree.without(0)
    refine(refined, random.Random(0), deadline=time.thread_time() + SECONDS)
    return (refined if refined.width <= most else tree), chosen


def run_slices(sliced: SlicedPlan, tensors: Sequence[Tensor]) -> Tensor:
    """Add up the results of all slices.

    If autograd records, products are computed again in the backward pass, so that they keep the limit there.

    Args:
        sliced: the plan.
        tensors: the operands, with a dimension for each label.
    """
    recording = torch.is_grad_enabled() and any(x.requires_grad for x in tensors) and not transforms_active()
    total: Tensor | None = None
    for values in itertools.product(*map(range, sliced.sliced.values())):
        at = dict(zip(sliced.sliced, values, strict=True))
        parts = []
        for labels, x in zip(sliced.operands, tensors, strict=True):
            for dim in (k for k, label in enumerate(labels) if label in at):
                x = x.narrow(dim, at[labels[dim]], 1)
            parts.append(x)
        part = (
            checkpoint(run, sliced.plan, parts, use_reentrant=False) if recording else run(sliced.plan, parts)
        )
        total = part if total is None else total + part
    assert total is not None
    return total
