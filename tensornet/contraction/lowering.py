"""Lower a contraction path to permutations, reshapes and matrix products, with few copies.

A path determines which operands are contracted. It does not determine which of the two comes first, nor the
order of the indices of each product. These choices determine how much is copied, which for small bonds takes
longer than the arithmetic. A beam search keeps the few choices with the smallest predicted time.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from tensornet.contraction.cost import CPU, Copy, Machine, Product, copy_seconds, product_seconds

# --- a lowered contraction as data, and its execution ---------------------------------------------

#: The label of the token index, the only one whose size may change between calls.
TOKENS = "tokens"


@dataclass(frozen=True)
class Arrangement:
    """Permutation and reshape of a tensor; the token index has size -1 in shapes.

    Args:
        permutation: the new order of the dimensions; None if the order is unchanged.
        view: one dimension for each index, before the permutation.
        shape: the final shape.
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
        arrange_right: to `(batch, inner, columns)`, in the same way.
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
        stored_shapes: full shapes of the operands without the token index.
        steps: pairwise products in order.
        output: brings the last result into the requested order and shape, size-1 indices restored.
        adds_bias: whether the last product is `(tokens, inner) @ (inner, columns)` and is the output without
            a permutation, so that it can add a bias at no cost.
        output_copy: the copy of the output, if its permutation is not a view.
        path: the contraction order, as `opt_einsum` writes it.
        matrices: if the plan only multiplies operand 0 by one matrix after the other, the position of each
            matrix and its shape `(out, in)` for `torch.nn.functional.linear`. For example, low rank is `y =
            (x B^T) A^T` with the stored cores.
        terms: for a sum, the positions of the operands of each term, and its plan. `steps` then contains the
            steps of all terms, for the cost model only.
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

    def seconds(self, tokens: int, machine: Machine, itemsize: int = 4) -> float:
        """Predict the time for a token count; operands without the token index are read from memory.

        Args:
            tokens: token count.
            machine: the machine.
            itemsize: bytes of an element.
        """
        read = sum(math.prod(shape) for shape in self.stored_shapes) * itemsize / machine.bandwidth
        products = sum(product_seconds(step.product, tokens, machine, itemsize) for step in self.steps)
        return read + products + sum(copy_seconds(copy, tokens, machine, itemsize) for copy in self.copies)

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
        plan: plan from `plan_contraction`.
        operands: tensors with the planned shapes, in the planned order.
        bias: added to the output, shape `(columns of the output,)`. It takes no time if the last product can
            add it.

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
        # Operands are removed from the list before they are copied, so that their memory can be reused: new
        # pages from the system would take longer than the copy.
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
    """Join the plans of the terms of a sum, whose outputs have the same shape.

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
    """Return True for float16 on the CPU, where products in float32 are 10 to 50 times faster."""
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu"


def _arrange(x: Tensor, to: Arrangement) -> Tensor:
    if to.permutation is not None:
        x = x.reshape(to.view).permute(to.permutation)
    return x.reshape(to.shape)


# --- lowering a path ------------------------------------------------------------------------------

Labels = tuple[str, ...]

#: Number of partial lowerings that are kept after each step.
_BEAM = 4


def lower_path(
    operands: Sequence[Labels],
    output: Labels,
    size_of: Mapping[str, int],
    path: Sequence[tuple[int, int]],
) -> ContractionPlan:
    """Lower a pairwise path to a plan that is fast for `size_of[TOKENS]` tokens.

    Args:
        operands: labels of each operand.
        output: labels of the result.
        size_of: size of each label.
        path: pairs of positions in the working list, as `opt_einsum` counts them.
    """
    squeezed = tuple(_squeeze(labels, size_of) for labels in operands)
    kept, tokens = _squeeze(output, size_of), size_of.get(TOKENS, 1)

    # The beam: predicted time of the steps so far, remaining operands, steps.
    beam: list[tuple[float, tuple[Labels, ...], tuple[PairStep, ...]]] = [(0.0, squeezed, ())]
    for first, second in path:
        extended = []
        for seconds, work, steps in beam:
            rest = [labels for i, labels in enumerate(work) if i not in (first, second)]
            wanted = {*kept, *(x for labels in rest for x in labels)}
            for step, result in _ways(work, first, second, wanted, kept, size_of):
                own = product_seconds(step.product, tokens, CPU)
                own += sum(copy_seconds(copy, tokens, CPU) for copy in step.copies)
                extended.append((seconds + own, (*rest, result), (*steps, step)))
        cheapest: dict[tuple[Labels, ...], tuple[float, tuple[Labels, ...], tuple[PairStep, ...]]] = {}
        for partial in sorted(extended, key=lambda x: x[0]):
            cheapest.setdefault(partial[1], partial)
        beam = list(cheapest.values())[:_BEAM]

    # The best plan is the fastest one including the copy of its output.
    def whole(partial: tuple[float, tuple[Labels, ...], tuple[PairStep, ...]]) -> float:
        (result,) = partial[1]
        return partial[0] + (
            0.0 if result == kept else copy_seconds(_written(result, kept, size_of), tokens, CPU)
        )

    _, (result,), steps = min(beam, key=whole)
    in_order = result == kept
    return ContractionPlan(
        stored_shapes=tuple(_shape(labels, size_of) for labels in squeezed if TOKENS not in labels),
        steps=steps,
        output=_arrangement(result, kept, _shape(output, size_of), size_of),
        adds_bias=in_order and bool(steps) and steps[-1].product.is_linear,
        output_copy=None if in_order else _written(result, kept, size_of),
        path=tuple(path),
        matrices=_matrices(steps) if in_order else (),
    )


def _matrices(steps: Sequence[PairStep]) -> tuple[tuple[int, tuple[int, int]], ...]:
    """List the right operands if all steps are plain matrix products, else nothing; see `ContractionPlan`."""
    operands, found = list(range(len(steps) + 1)), []
    for step in steps:
        product = step.product
        moved, weight = step.arrange_left.permutation, step.arrange_right
        # If both indices are summed, the operand is also transposed, but not a matrix `(columns, inner)`.
        shape = (product.columns, product.inner)
        if not product.is_linear or operands[step.left] != 0 or moved is not None:
            return ()
        if weight.permutation != (1, 0) or weight.view != shape:
            return ()
        found.append((operands[step.right], shape))
        operands = [x for i, x in enumerate(operands) if i not in (step.left, step.right)] + [0]
    return tuple(found)


def _ways(
    operands: tuple[Labels, ...],
    first: int,
    second: int,
    wanted: set[str],
    output: Labels,
    size_of: Mapping[str, int],
) -> Iterator[tuple[PairStep, Labels]]:
    """List the ways to multiply two operands (order of operands, orders of indices) with their results.

    Args:
        operands: labels of each operand in the working list.
        first, second: positions of the two operands.
        wanted: labels of the other operands or the output; all other labels are summed.
        output: labels of the result of the whole path.
        size_of: size of each label.
    """
    pairs = [(first, second), (second, first)]
    if TOKENS in operands[first] or TOKENS in operands[second]:
        # The operand with tokens is on the left, so that tokens stay first and the result is contiguous.
        pairs = [(a, b) for a, b in pairs if TOKENS in operands[a]]
    shared = set(operands[first]) & set(operands[second])
    for a, b in pairs:
        left, right = operands[a], operands[b]
        batch = tuple(x for x in left if x in shared and x in wanted)
        summed = [tuple(x for x in labels if x in shared and x not in wanted) for labels in (left, right)]
        for rows in _orders(tuple(x for x in left if x not in shared), output):
            for columns in _orders(tuple(x for x in right if x not in shared), output):
                for inner in dict.fromkeys(summed):
                    groups = {"batch": batch, "rows": rows, "inner": inner, "columns": columns}
                    sizes = {name: _size(group, size_of) for name, group in groups.items()}
                    tokens_in = next((name for name, group in groups.items() if TOKENS in group), None)
                    copies = [
                        _copy(left, (batch, rows, inner), size_of),
                        _copy(right, (batch, inner, columns), size_of),
                    ]
                    step = PairStep(
                        left=a,
                        right=b,
                        arrange_left=_grouped(left, (batch, rows, inner), size_of),
                        arrange_right=_grouped(right, (batch, inner, columns), size_of),
                        product=Product(**sizes, tokens_in=tokens_in),
                        copies=tuple(copy for copy in copies if copy is not None),
                    )
                    yield step, (*batch, *rows, *columns)


def _orders(labels: Labels, output: Labels) -> list[Labels]:
    """List the index orders to try: the current order, and the order of the output."""
    by_output = tuple(sorted(labels, key=lambda x: output.index(x) if x in output else len(output)))
    return list(dict.fromkeys((labels, by_output)))


def _copy(labels: Labels, groups: Sequence[Labels], size_of: Mapping[str, int]) -> Copy | None:
    """Describe the copy that groups `labels`; None if every group is already contiguous.

    A matrix product can read transposed operands without a copy, unless the innermost index is a batch index.
    """
    filled = [group for group in groups if group]
    starts = [labels.index(group[0]) for group in filled]
    whole = all(
        labels[start : start + len(group)] == group for start, group in zip(starts, filled, strict=True)
    )
    if whole and not (groups[0] and labels and labels[-1] in groups[0]):
        return None
    return _written(labels, tuple(x for group in groups for x in group), size_of)


def _written(labels: Labels, target: Labels, size_of: Mapping[str, int]) -> Copy:
    run = 1
    for a, b in zip(reversed(labels), reversed(target), strict=True):
        if a != b or a == TOKENS:
            break
        run *= size_of[a]
    return Copy(_size(labels, size_of), run, TOKENS in labels)


def _squeeze(labels: Sequence[str], size_of: Mapping[str, int]) -> Labels:
    return tuple(x for x in labels if x == TOKENS or size_of[x] > 1)


def _size(labels: Sequence[str], size_of: Mapping[str, int]) -> int:
    """Multiply the sizes of all labels except the token index."""
    return math.prod(size_of[x] for x in labels if x != TOKENS)


def _shape(labels: Sequence[str], size_of: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(-1 if x == TOKENS else size_of[x] for x in labels)


def _arrangement(
    labels: Labels, target: Labels, shape: tuple[int, ...], size_of: Mapping[str, int]
) -> Arrangement:
    permutation = None if labels == target else tuple(labels.index(x) for x in target)
    return Arrangement(permutation, _shape(labels, size_of), shape)


def _grouped(labels: Labels, groups: Sequence[Labels], size_of: Mapping[str, int]) -> Arrangement:
    """Arrange a tensor with one dimension for each group, without an empty batch."""
    kept = groups if groups[0] else groups[1:]
    shape = tuple(-1 if TOKENS in group else _size(group, size_of) for group in kept)
    return _arrangement(labels, tuple(x for group in groups for x in group), shape, size_of)
