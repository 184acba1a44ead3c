"""Plan a contraction once, run it as pairwise matrix products.

`opt_einsum` finds the order; each step is then lowered to permute, reshape and one (batched) matmul.
Calling opt_einsum inside `forward` would break `torch.compile(fullgraph=True)` and autocast; the lowered
steps do not. Indices of size 1 are removed before planning, so a low-rank layer is exactly two matmuls.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import opt_einsum
import torch
from torch import Tensor

from tensornet.errors import TopologyError

#: The label of the token index, the only one whose size may change between calls.
TOKENS = "tokens"


@dataclass(frozen=True)
class PairStep:
    """One pairwise product: operands `left` and `right` of the working list are replaced by the result.

    Shapes hold -1 where the token index takes part, so one step serves every batch size.
    """

    left: int
    right: int
    left_permutation: tuple[int, ...]
    right_permutation: tuple[int, ...]
    left_shape: tuple[int, ...]  # (batch, free, summed)
    right_shape: tuple[int, ...]  # (batch, summed, free)
    result_shape: tuple[int, ...]


@dataclass(frozen=True)
class ContractionPlan:
    """A lowered contraction. `multiply_adds` and `moved` are linear in the number of tokens.

    Args:
        operand_shapes: shape of each operand with size-1 indices removed.
        steps: pairwise products in order.
        output_permutation: brings the last result into the requested order.
        output_shape: shape of the output, size-1 indices restored.
        multiply_adds: multiply-add operations at the planned token count.
        moved: elements copied by permutations that are not views, at the planned token count.
    """

    operand_shapes: tuple[tuple[int, ...], ...]
    steps: tuple[PairStep, ...]
    output_permutation: tuple[int, ...]
    output_shape: tuple[int, ...]
    multiply_adds: int
    moved: int


def plan_contraction(
    operands: Sequence[tuple[str, ...]],
    output: tuple[str, ...],
    size_of: Mapping[str, int],
    *,
    optimize: str | Sequence[tuple[int, ...]] = "auto",
) -> ContractionPlan:
    """Plan `einsum(operands -> output)`.

    Args:
        operands: labels of each operand.
        output: labels of the result; every other label is summed.
        size_of: size of each label; `TOKENS` holds the expected number of tokens.
        optimize: a strategy name of `opt_einsum.contract_path`, or an explicit pairwise path.

    Returns:
        A plan for `run`.
    """
    squeezed = [tuple(x for x in labels if x == TOKENS or size_of[x] > 1) for labels in operands]
    kept_output = tuple(x for x in output if x == TOKENS or size_of[x] > 1)
    path = _find_path(squeezed, kept_output, size_of, optimize)
    steps, current, multiply_adds, moved = [], list(squeezed), 0, 0
    for left, right in path:
        rest = [labels for k, labels in enumerate(current) if k not in (left, right)]
        wanted = {*kept_output, *(x for labels in rest for x in labels)}
        step, result, cost, copied = _lower(left, right, current[left], current[right], wanted, size_of)
        steps.append(step)
        current = [*rest, result]
        multiply_adds += cost
        moved += copied
    permutation = tuple(current[0].index(x) for x in kept_output)
    if permutation != tuple(range(len(permutation))):
        moved += math.prod(size_of[x] for x in kept_output)
    return ContractionPlan(
        operand_shapes=tuple(_shape(labels, size_of) for labels in squeezed),
        steps=tuple(steps),
        output_permutation=permutation,
        output_shape=_shape(output, size_of),
        multiply_adds=multiply_adds,
        moved=moved,
    )


def run(plan: ContractionPlan, operands: Sequence[Tensor]) -> Tensor:
    """Execute a plan. Operands have the shapes and order they were planned with."""
    work = [x.reshape(shape) for x, shape in zip(operands, plan.operand_shapes, strict=True)]
    for step in plan.steps:
        left = work[step.left].permute(step.left_permutation).reshape(step.left_shape)
        right = work[step.right].permute(step.right_permutation).reshape(step.right_shape)
        result = torch.matmul(left, right).reshape(step.result_shape)
        work = [x for k, x in enumerate(work) if k not in (step.left, step.right)]
        work.append(result)
    return work[0].permute(plan.output_permutation).reshape(plan.output_shape)


def _find_path(
    operands: Sequence[tuple[str, ...]],
    output: tuple[str, ...],
    size_of: Mapping[str, int],
    optimize: str | Sequence[tuple[int, ...]],
) -> list[tuple[int, int]]:
    if len(operands) == 1:
        return []
    symbol: dict[str, str] = {}
    for labels in (*operands, output):
        for label in labels:
            symbol.setdefault(label, opt_einsum.get_symbol(len(symbol)))
    terms = ["".join(symbol[x] for x in labels) for labels in operands]
    equation = ",".join(terms) + "->" + "".join(symbol[x] for x in output)
    shapes = [tuple(size_of[x] for x in labels) for labels in operands]
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimize)
    if any(len(step) != 2 for step in path):
        raise TopologyError(f"A contraction path must be pairwise, got {path}; use another `optimize`.")
    return [(min(step), max(step)) for step in path]


def _lower(
    left: int,
    right: int,
    left_labels: tuple[str, ...],
    right_labels: tuple[str, ...],
    wanted: set[str],
    size_of: Mapping[str, int],
) -> tuple[PairStep, tuple[str, ...], int, int]:
    if TOKENS in right_labels and TOKENS not in left_labels:
        # The token operand goes left: its result then keeps tokens first and stays contiguous.
        left, right, left_labels, right_labels = right, left, right_labels, left_labels
    shared = set(left_labels) & set(right_labels)
    batch = tuple(x for x in left_labels if x in shared and x in wanted)
    summed = tuple(x for x in left_labels if x in shared and x not in wanted)
    left_free = tuple(x for x in left_labels if x not in shared)
    right_free = tuple(x for x in right_labels if x not in shared)
    left_order = (*batch, *left_free, *summed)
    right_order = (*batch, *summed, *right_free)
    result = (*batch, *left_free, *right_free)
    step = PairStep(
        left=left,
        right=right,
        left_permutation=tuple(left_labels.index(x) for x in left_order),
        right_permutation=tuple(right_labels.index(x) for x in right_order),
        left_shape=_grouped(size_of, batch, left_free, summed),
        right_shape=_grouped(size_of, batch, summed, right_free),
        result_shape=_shape(result, size_of),
    )
    cost = math.prod(size_of[x] for x in (*batch, *left_free, *summed, *right_free))
    moved = _copied(left_labels, (batch, left_free, summed), size_of)
    moved += _copied(right_labels, (batch, summed, right_free), size_of)
    return step, result, cost, moved


def _copied(labels: tuple[str, ...], groups: Sequence[tuple[str, ...]], size_of: Mapping[str, int]) -> int:
    """Elements copied to bring `labels` into `groups`: none where each group stays contiguous.

    Two plain groups in either order are a transposed view, which matmul reads without a copy.
    """
    filled = [group for group in groups if group]
    orders = [[x for group in filled for x in group]]
    if len(filled) > 1:
        orders.append([x for group in (*filled[:-2], filled[-1], filled[-2]) for x in group])
    return 0 if list(labels) in orders else math.prod(size_of[x] for x in labels)


def _shape(labels: Sequence[str], size_of: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(-1 if x == TOKENS else size_of[x] for x in labels)


def _grouped(size_of: Mapping[str, int], *groups: tuple[str, ...]) -> tuple[int, ...]:
    """One dimension for each group; an empty batch group is dropped so that plain matmul is used."""
    dims = [-1 if TOKENS in group else math.prod(size_of[x] for x in group) for group in groups]
    return tuple(dims if groups[0] else dims[1:])
