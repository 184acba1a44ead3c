"""Lowered contraction as data, and its execution.

Every step is a permutation, a reshape and one (batched) matrix product, so running a plan works under
`torch.compile(fullgraph=True)`, `torch.export`, autocast and `torch.func`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

#: The label of the token index, the only one whose size may change between calls.
TOKENS = "tokens"


@dataclass(frozen=True)
class Copy:
    """Permutation that is copied before its operand enters a matrix product.

    Args:
        elements: elements moved, for each token if `per_token`.
        run: elements that stay together; 1 if the innermost index changes.
        per_token: whether the operand carries the token index.
    """

    elements: int
    run: int
    per_token: bool


@dataclass(frozen=True)
class Product:
    """Sizes of a batched matrix product `(batch, rows, inner) @ (batch, inner, columns)`.

    Args:
        batch, rows, inner, columns: sizes; the group that carries the token index counts without it.
        tokens_in: `"batch"`, `"rows"`, `"inner"`, `"columns"`, or None if no operand carries tokens.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    tokens_in: str | None

    def at(self, tokens: int) -> tuple[int, int, int, int]:
        """Return `(batch, rows, inner, columns)` for a token count."""
        return (
            self.batch * (tokens if self.tokens_in == "batch" else 1),
            self.rows * (tokens if self.tokens_in == "rows" else 1),
            self.inner * (tokens if self.tokens_in == "inner" else 1),
            self.columns * (tokens if self.tokens_in == "columns" else 1),
        )


@dataclass(frozen=True)
class Arrangement:
    """Permutation and reshape of a tensor; shapes hold -1 for the token index.

    Args:
        permutation: the new order of the dimensions; None if the order is unchanged.
        view: one dimension for each index, before the permutation.
        shape: the shape in the end.
    """

    permutation: tuple[int, ...] | None
    view: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PairStep:
    """Pairwise product that replaces operands `left` and `right` of the working list by the result.

    Args:
        left, right: positions in the working list; the result is appended to what remains.
        arrange_left: to `(batch, rows, inner)`, without a batch dimension if the batch is empty.
        arrange_right: to `(batch, inner, columns)`, likewise.
        product: sizes of the matrix product, for the cost model.
        copies: copies before the product, for the cost model.
    """

    left: int
    right: int
    arrange_left: Arrangement
    arrange_right: Arrangement
    product: Product
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class ContractionPlan:
    """Lowered contraction: pairwise products in order, and the arrangement of the output.

    Args:
        stored_shapes: full shapes of the operands that carry no token index.
        steps: pairwise products in order.
        output: brings the last result into the requested order and shape, size-1 indices restored.
        adds_bias: whether the last product is `(tokens, inner) @ (inner, columns)` and gives the output as it
            is, so that it can add a bias at no cost.
        output_copy: what writing the output out costs, if its permutation is not a view.
        path: the contraction order, as `opt_einsum` writes it.
        matrices: operands that multiply operand 0 one after the other as plain matrices, if nothing else
            happens: position, and shape `(out, in)` in which `torch.nn.functional.linear` takes it. A low
            rank is of this form, `y = (x B^T) A^T` with the cores as they are stored.
        terms: of a sum: the positions of the operands of each term, and its plan. `steps` then holds those of
            all terms, for the cost model alone.
    """

    stored_shapes: tuple[tuple[int, ...], ...]
    steps: tuple[PairStep, ...]
    output: Arrangement
    adds_bias: bool
    output_copy: Copy | None
    path: tuple[tuple[int, int], ...]
    matrices: tuple[tuple[int, tuple[int, int]], ...] = ()
    terms: "tuple[tuple[tuple[int, ...], ContractionPlan], ...]" = ()

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Copies of all steps, and that of the output."""
        if self.terms:
            return tuple(copy for _, plan in self.terms for copy in plan.copies)
        inner = tuple(copy for step in self.steps for copy in step.copies)
        return inner if self.output_copy is None else (*inner, self.output_copy)

    def multiply_adds(self, tokens: int) -> int:
        """Count the multiply-adds for a token count."""
        total = 0
        for step in self.steps:
            batch, rows, inner, columns = step.product.at(tokens)
            total += batch * rows * inner * columns
        return total

    def moved(self, tokens: int) -> int:
        """Count the elements that permutations copy for a token count."""
        return sum(copy.elements * (tokens if copy.per_token else 1) for copy in self.copies)

    def largest_intermediate(self, tokens: int) -> int:
        """Count the elements of the largest result of a step."""
        sizes = [0]
        for step in self.steps:
            batch, rows, _, columns = step.product.at(tokens)
            sizes.append(batch * rows * columns)
        return max(sizes)


def run(plan: ContractionPlan, operands: Sequence[Tensor], *, bias: Tensor | None = None) -> Tensor:
    """Execute a contraction plan.

    Args:
        plan: from `plan_contraction`.
        operands: tensors of the shapes and in the order they were planned with.
        bias: added to the output, shape of its last dimensions flattened: `(columns of the output,)`.
            Free where the last product can add it.

    Returns:
        The output, shape `plan.output.shape`.
    """
    if is_slow(operands[0]):
        wide = run(plan, [x.float() for x in operands], bias=None if bias is None else bias.float())
        return wide.to(torch.float16)
    if plan.terms:
        parts = [([operands[k] for k in positions], term) for positions, term in plan.terms]
        total = run(parts[0][1], parts[0][0], bias=bias)
        for given, term in parts[1:]:
            total = total + run(term, given)
        return total
    if plan.matrices:
        x = operands[0].reshape(-1, plan.matrices[0][1][1])
        final = len(plan.matrices) - 1
        for k, (position, shape) in enumerate(plan.matrices):
            x = linear(x, operands[position].reshape(shape), bias if k == final else None)
        return x.reshape(plan.output.shape)
    work, last = list(operands), len(plan.steps) - 1
    fused = bias if plan.adds_bias else None
    for k, step in enumerate(plan.steps):
        # An operand leaves the list before it is copied: nothing is kept longer than it is needed, and
        # the allocator need not ask the system for fresh pages, which costs more than the copy.
        first, second = max(step.left, step.right), min(step.left, step.right)
        popped = work.pop(first), work.pop(second)
        left, right = popped if step.left == first else popped[::-1]
        del popped
        left, right = _arrange(left, step.arrange_left), _arrange(right, step.arrange_right)
        work.append(torch.addmm(fused, left, right) if k == last and fused is not None else left @ right)
        del left, right
    output = _arrange(work.pop(), plan.output)
    if bias is None or fused is not None:
        return output
    return output + bias.reshape(plan.output.shape[1:]).to(output.dtype)


def plan_sum(terms: Sequence[tuple[tuple[int, ...], ContractionPlan]]) -> ContractionPlan:
    """Join the plans of the terms of a sum, whose outputs have one shape.

    Args:
        terms: the positions of the operands of each term in the working list of the sum, and its plan.
    """
    if len(terms) == 1:
        return terms[0][1]
    plans = [plan for _, plan in terms]
    return ContractionPlan(
        stored_shapes=tuple(shape for plan in plans for shape in plan.stored_shapes),
        steps=tuple(step for plan in plans for step in plan.steps),
        output=plans[0].output,
        adds_bias=False,
        output_copy=None,
        path=(),
        terms=tuple(terms),
    )


def is_slow(tensor: Tensor) -> bool:
    """Return True for float16 on the CPU, whose products are 10 to 50 times faster in float32."""
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu"


def _arrange(x: Tensor, to: Arrangement) -> Tensor:
    if to.permutation is not None:
        x = x.reshape(to.view).permute(to.permutation)
    return x.reshape(to.shape)
