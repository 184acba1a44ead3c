"""Plan a contraction once, and run it as pairwise matrix products.

`search.py` finds the order of the contraction. "Lowering" converts this order to permutations, reshapes and
(batched) matrix products. These work with `torch.compile(fullgraph=True)` and autocast, unlike calls of
opt_einsum inside `forward`. Indices of size 1 are removed first, so a low-rank layer is exactly two matmuls.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from tensornet._util import check_input, transforms_active
from tensornet.contraction.cost import (
    CPU,
    Copy,
    Machine,
    MatmulShape,
    copy_seconds,
    dense_seconds,
    product_seconds,
)
from tensornet.contraction.search import Optimizer, find_path
from tensornet.topology import Topology

# --- a lowered contraction as data, and its execution ---------------------------------------------

#: Label of the token index, the only index whose size may change between calls.
TOKEN = "tokens"


@dataclass(frozen=True)
class Arrangement:
    """Permutation and reshape of a tensor. In shapes, -1 is the size of the token index.

    Args:
        permutation: new order of the dimensions; None if the order is unchanged.
        view: shape before the permutation, with one dimension for each index.
        shape: final shape.
    """

    permutation: tuple[int, ...] | None
    view: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PairStep:
    """One pairwise product. It removes two operands from a list of operands, and appends their product.

    Args:
        left, right: positions of the two operands in the list.
        arrange_left: arrangement of the left operand to `(batch, rows, inner)`, or to `(rows, inner)` if
            there are no batch indices.
        arrange_right: arrangement of the right operand to `(batch, inner, columns)` or `(inner, columns)`.
        product: sizes of the matrix product, for the cost model.
        copies: copies that the arrangements need, for the cost model.
    """

    left: int
    right: int
    arrange_left: Arrangement
    arrange_right: Arrangement
    product: MatmulShape
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class ContractionPlan:
    """Contraction as a sequence of pairwise products, followed by an arrangement of the output.

    Args:
        stored_shapes: shapes of the operands that do not have the token index.
        steps: pairwise products in order.
        output: rearrangement of the last result into the requested order and shape, with indices of size 1.
        adds_bias: whether the last product is `(tokens, inner) @ (inner, columns)` and needs no permutation,
            so that it can add a bias at no cost.
        output_copy: copy that the arrangement of the output needs, or None.
        path: contraction order in the notation of `opt_einsum`.
        matrices: position and shape `(out, in)` of each matrix, if the plan only multiplies operand 0 by one
            matrix after another; otherwise empty. `torch.nn.functional.linear` is then used with the stored
            cores, for example `y = (x B^T) A^T` for low rank.
        terms: for a sum of networks, the positions of each term's operands and the plan of the term. For a
            sum, `steps` has the steps of all terms, for the cost model only. Empty for a single network.
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
        """All copies that the steps and the output need."""
        if self.terms:
            return tuple(copy for _, plan in self.terms for copy in plan.copies)
        inner = tuple(copy for step in self.steps for copy in step.copies)
        return inner if self.output_copy is None else (*inner, self.output_copy)

    def seconds(self, tokens: int, machine: Machine, itemsize: int = 4) -> float:
        """Predict the time in seconds of the contraction.

        It includes reading the operands without the token index (cores and weights) from memory.

        Args:
            tokens: number of tokens.
            machine: the machine to predict for.
            itemsize: bytes of an element.
        """
        read = sum(math.prod(shape) for shape in self.stored_shapes) * itemsize / machine.bandwidth
        products = sum(product_seconds(step.product, tokens, machine, itemsize) for step in self.steps)
        return read + products + sum(copy_seconds(copy, tokens, machine, itemsize) for copy in self.copies)

    def multiply_adds(self, tokens: int) -> int:
        """Count the multiply-adds for the given number of tokens."""
        total = 0
        for step in self.steps:
            batch, rows, inner, columns = step.product.at(tokens)
            total += batch * rows * inner * columns
        return total

    def moved(self, tokens: int) -> int:
        """Count the elements that are copied to permute dimensions, for the given number of tokens."""
        return sum(copy.elements * (tokens if copy.per_token else 1) for copy in self.copies)

    def largest_intermediate(self, tokens: int) -> int:
        """Count the elements of the largest intermediate result, for the given number of tokens."""
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
        bias: vector that is added to each row of the output; this costs no time if `plan.adds_bias`.

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
        # Operands are removed from the list before they are copied, so that their memory is reused. Getting
        # new memory from the system would take longer than the copy.
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
    """Combine the plans of the terms of a sum; all outputs must have the same shape.

    Args:
        terms: for each term, the positions of its operands among the operands of the sum, and its plan.
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
    """Return True for float16 tensors on the CPU, whose products are 10 to 50 times faster in float32."""
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu"


def _arrange(x: Tensor, to: Arrangement) -> Tensor:
    if to.permutation is not None:
        x = x.reshape(to.view).permute(to.permutation)
    return x.reshape(to.shape)


# --- turning a path into a plan with few copies ---------------------------------------------------
#
# A path is a list of pairs of operands. It determines neither which operand of a pair is on the left, nor the
# index order of each product. These choices determine how much is copied. If bonds are small, copies take
# longer than the arithmetic. A beam search keeps the few choices with the smallest predicted time.

Labels = tuple[str, ...]

#: Number of partial plans that the beam search keeps after each step.
_BEAM = 4


def lower_path(
    operands: Sequence[Labels],
    output: Labels,
    size_of: Mapping[str, int],
    path: Sequence[tuple[int, int]],
) -> ContractionPlan:
    """Convert a contraction order to a plan that is fast for `size_of[TOKEN]` tokens.

    Args:
        operands: labels of each operand.
        output: labels of the result.
        size_of: size of each label.
        path: contraction order: pairs of positions in the list of remaining operands, as in `opt_einsum`.
    """
    squeezed = tuple(_squeeze(labels, size_of) for labels in operands)
    kept, tokens = _squeeze(output, size_of), size_of.get(TOKEN, 1)

    # An entry of the beam has the predicted seconds so far, the labels of the remaining operands, and the
    # steps so far.
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

    # Choose the fastest plan, including the copy of its output.
    def whole(partial: tuple[float, tuple[Labels, ...], tuple[PairStep, ...]]) -> float:
        (result,) = partial[1]
        return partial[0] + (
            0.0 if result == kept else copy_seconds(_written(result, kept, size_of), tokens, CPU)
        )

    _, (result,), steps = min(beam, key=whole)
    in_order = result == kept
    return ContractionPlan(
        stored_shapes=tuple(_shape(labels, size_of) for labels in squeezed if TOKEN not in labels),
        steps=steps,
        output=_arrangement(result, kept, _shape(output, size_of), size_of),
        adds_bias=in_order and bool(steps) and steps[-1].product.is_linear,
        output_copy=None if in_order else _written(result, kept, size_of),
        path=tuple(path),
        matrices=_matrices(steps) if in_order else (),
    )


def _matrices(steps: Sequence[PairStep]) -> tuple[tuple[int, tuple[int, int]], ...]:
    """Return the position and shape of the right-hand operand of each step (`ContractionPlan.matrices`).

    The result is empty unless every step multiplies operand 0, or the previous result, by a stored matrix
    without permuting it.
    """
    operands, found = list(range(len(steps) + 1)), []
    for step in steps:
        product = step.product
        moved, weight = step.arrange_left.permutation, step.arrange_right
        # `linear` needs a stored matrix `(columns, inner)`. Its permutation alone is not enough: an operand
        # whose two indices are both summed has the permutation of such a matrix, but not its shape.
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
    """Yield all ways to multiply two operands, each with the labels of the product.

    The ways differ in the order of the two operands and in the order of indices.

    Args:
        operands: labels of each remaining operand.
        first, second: positions of the two operands.
        wanted: labels that another operand or the output has; all others are summed.
        output: labels of the result of the whole contraction.
        size_of: size of each label.
    """
    pairs = [(first, second), (second, first)]
    if TOKEN in operands[first] or TOKEN in operands[second]:
        # Put the operand with the token index on the left, so that the token index stays first.
        pairs = [(a, b) for a, b in pairs if TOKEN in operands[a]]
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
                    tokens_in = next((name for name, group in groups.items() if TOKEN in group), None)
                    copies = [
                        _copy(left, (batch, rows, inner), size_of),
                        _copy(right, (batch, inner, columns), size_of),
                    ]
                    step = PairStep(
                        left=a,
                        right=b,
                        arrange_left=_grouped(left, (batch, rows, inner), size_of),
                        arrange_right=_grouped(right, (batch, inner, columns), size_of),
                        product=MatmulShape(**sizes, tokens_in=tokens_in),
                        copies=tuple(copy for copy in copies if copy is not None),
                    )
                    yield step, (*batch, *rows, *columns)


def _orders(labels: Labels, output: Labels) -> list[Labels]:
    by_output = tuple(sorted(labels, key=lambda x: output.index(x) if x in output else len(output)))
    return list(dict.fromkeys((labels, by_output)))


def _copy(labels: Labels, groups: Sequence[Labels], size_of: Mapping[str, int]) -> Copy | None:
    """Describe the copy that sorts the indices of an operand into groups, or return None if none is needed.

    A matrix product needs no copy of a transposed operand if the indices of each group are adjacent and the
    innermost index is not a batch index.
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
        if a != b or a == TOKEN:
            break
        run *= size_of[a]
    return Copy(_size(labels, size_of), run, TOKEN in labels)


def _squeeze(labels: Sequence[str], size_of: Mapping[str, int]) -> Labels:
    return tuple(x for x in labels if x == TOKEN or size_of[x] > 1)


def _size(labels: Sequence[str], size_of: Mapping[str, int]) -> int:
    """Multiply the sizes of all labels except the token index."""
    return math.prod(size_of[x] for x in labels if x != TOKEN)


def _shape(labels: Sequence[str], size_of: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(-1 if x == TOKEN else size_of[x] for x in labels)


def _arrangement(
    labels: Labels, target: Labels, shape: tuple[int, ...], size_of: Mapping[str, int]
) -> Arrangement:
    permutation = None if labels == target else tuple(labels.index(x) for x in target)
    return Arrangement(permutation, _shape(labels, size_of), shape)


def _grouped(labels: Labels, groups: Sequence[Labels], size_of: Mapping[str, int]) -> Arrangement:
    """Build an arrangement with one dimension for each group, but none for an empty batch (group 0)."""
    kept = groups if groups[0] else groups[1:]
    shape = tuple(-1 if TOKEN in group else _size(group, size_of) for group in kept)
    return _arrangement(labels, tuple(x for group in groups for x in group), shape, size_of)


# --- planning an einsum ---------------------------------------------------------------------------


def plan_contraction(
    operands: Sequence[tuple[str, ...]],
    output: tuple[str, ...],
    size_of: Mapping[str, int],
    *,
    optimize: Optimizer = "auto",
) -> ContractionPlan:
    """Plan `einsum(operands -> output)`.

    Args:
        operands: labels of each operand.
        output: labels of the result; every other label is summed.
        size_of: size of each label; the size of `TOKEN` is the expected number of tokens.
        optimize: what finds the contraction order; see `tensornet.contraction.search.find_path`.

    Returns:
        A plan for `run`.

    Raises: as `find_path`.
    """
    path = find_path(operands, output, size_of, optimize)
    return lower_path(operands, output, size_of, path)


# --- linear operators: apply the cores one by one, or rebuild the matrix first --------------------

#: Number of tokens that is assumed if the actual number is unknown, as in an exported program.
PLANNED_TOKENS = 256

#: Numbers of tokens for which contraction orders are optimized. Contracting the cores in order is tried too.
_PATH_TOKENS = (1, 16, 256, 4096)

#: A matrix is rebuilt in blocks of rows that fit into a cache. A block is about this fraction of the matrix,
#: and has at most this number of elements.
_BLOCK_PART, _BLOCK = 1 / 8, 2**18

#: Matrices with at most this number of elements are rebuilt in one block.
_SMALL = 2**16

#: The route (way to apply an operator) that rebuilds the matrix. All other routes are positions in
#: `OperatorPlan.applies`.
RECONSTRUCT = -1

#: Pairs `(largest number of tokens, route)` in ascending order; the last pair is for all larger numbers.
Bounds = tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class OperatorPlan:
    """Contraction plans of a linear operator, one plan for each route (way to apply the operator).

    Args:
        topology: topology of the operator.
        applies: plans for `x: (tokens, padded in) -> (tokens, padded out)` that do not build the whole
            matrix. The operands are `x` and the cores. Which plan is fastest depends on the number of tokens
            and on the machine.
        matrix: plan of the padded matrix; the operands are the cores.
        blocked: for each leading out-leg that is divided among blocks of rows, its label and its size within
            a block.
        rows: plan of one block of rows; the operands are the cores, sliced to the block.
        shape: shape `(out_features, in_features)` of the operator.
        padded_shape: shape of the matrix including padding.
        is_padded: whether the two shapes differ; stored because torch.compile before 2.13 cannot compare
            tuples for inequality.
    """

    topology: Topology
    applies: tuple[ContractionPlan, ...]
    matrix: ContractionPlan
    blocked: tuple[tuple[str, int], ...]
    rows: ContractionPlan
    shape: tuple[int, int]
    padded_shape: tuple[int, int]
    is_padded: bool

    def seconds(self, route: int, tokens: int, machine: Machine, itemsize: int = 4) -> float:
        """Predict the time in seconds of `route`, which is a position in `applies` or `RECONSTRUCT`."""
        if route != RECONSTRUCT:
            return self.applies[route].seconds(tokens, machine, itemsize)
        dense = dense_seconds(*self.shape, tokens, machine, itemsize, from_memory=False)
        return dense + self.matrix.seconds(1, machine, itemsize)

    def fastest(self, tokens: int, machine: Machine, itemsize: int = 4, *, rebuild: bool = True) -> int:
        """Find the route with the smallest predicted time; `rebuild=False` excludes `RECONSTRUCT`."""
        routes = [*range(len(self.applies)), *([RECONSTRUCT] if rebuild else [])]
        return min(routes, key=lambda route: self.seconds(route, tokens, machine, itemsize))


@lru_cache(maxsize=4096)
def plan_operator(topology: Topology) -> OperatorPlan:
    """Plan all routes (ways to apply a linear operator); the plan is cached by topology."""
    applies = _applies_sum(topology) if topology.terms else tuple(_applies(topology))
    matrix = plan_matrix(topology)
    blocked = _blocked_legs(topology, matrix)
    rows = matrix if not blocked else _plan_matrix(topology, dict(blocked))
    shape, padded = topology.shape, topology.padded_shape
    return OperatorPlan(topology, applies, matrix, blocked, rows, shape, padded, shape != padded)


def _applies(topology: Topology) -> Iterator[ContractionPlan]:
    """Plan the application of one network to an input, in several contraction orders."""
    cores = [core.labels for core in topology.cores]
    operands = [(TOKEN, *topology.in_labels), *cores]
    output = (TOKEN, *topology.out_labels)
    tried = [
        (tokens, find_path(operands, output, {**topology.size_of, TOKEN: tokens})) for tokens in _PATH_TOKENS
    ]
    tried += [(_PATH_TOKENS[1], path) for path in _sweeps(len(operands))]
    seen: set[tuple[tuple[int, int], ...]] = set()
    for tokens, path in tried:
        builds_matrix = all(0 not in step for step in path[:-1])  # the input is used in the last step only
        if tuple(path) not in seen and (len(cores) == 1 or not builds_matrix):
            seen.add(tuple(path))
            lowered = lower_path(operands, output, {**topology.size_of, TOKEN: tokens}, path)
            yield _with_shape(lowered, (-1, topology.padded_shape[0]))


def _applies_sum(topology: Topology) -> tuple[ContractionPlan, ...]:
    """Plan the application of a sum to an input; for each token count, use the fastest order of each term."""
    found: dict[tuple[int, ...], ContractionPlan] = {}
    terms = [(positions, list(_applies(part))) for positions, part in topology.parts]
    places = [(0, *(k + 1 for k in positions)) for positions, _ in terms]  # operand 0 is the input
    for tokens in _PATH_TOKENS:
        times = [[plan.seconds(tokens, CPU) for plan in plans] for _, plans in terms]
        routes = tuple(each.index(min(each)) for each in times)
        chosen = [plans[k] for (_, plans), k in zip(terms, routes, strict=True)]
        found.setdefault(routes, plan_sum(list(zip(places, chosen, strict=True))))
    return tuple(found.values())


def plan_apply(topology: Topology, tokens: int, optimize: Optimizer) -> ContractionPlan:
    """Plan the application of an operator to `tokens` inputs in the order that an optimizer finds."""
    terms = []
    for positions, part in topology.parts:
        operands = [(TOKEN, *part.in_labels), *(core.labels for core in part.cores)]
        sizes = {**part.size_of, TOKEN: tokens}
        plan = plan_contraction(operands, (TOKEN, *part.out_labels), sizes, optimize=optimize)
        shaped = _with_shape(plan, (-1, topology.padded_shape[0]))
        terms.append(((0, *(k + 1 for k in positions)), shaped))  # operand 0 is the input
    return plan_sum(terms)


def plan_matrix(topology: Topology, *, optimize: Optimizer = "auto") -> ContractionPlan:
    """Plan the contraction of the cores to the padded matrix.

    Args:
        topology: topology of the operator.
        optimize: what finds the contraction order; see `find_path`. `"auto"` also tries the order of the
            cores, and chooses by the predicted time; these plans are cached.

    Raises: as `find_path`.
    """
    if isinstance(optimize, str) and optimize == "auto":
        return _fastest_matrix(topology)
    return _plan_matrix(topology, {}, optimize)


@lru_cache(maxsize=4096)
def _fastest_matrix(topology: Topology) -> ContractionPlan:
    return _plan_matrix(topology, {})


def _plan_matrix(
    topology: Topology, widths: Mapping[str, int], optimize: Optimizer = "auto"
) -> ContractionPlan:
    """Plan the contraction to the padded matrix, or to a block of rows with the leg sizes `widths`."""
    if topology.terms:
        parts = [(places, _plan_matrix(part, widths, optimize)) for places, part in topology.parts]
        return plan_sum(parts)
    cores = [core.labels for core in topology.cores]
    output = (*topology.out_labels, *topology.in_labels)
    sizes = {**topology.size_of, **widths}
    paths = [find_path(cores, output, sizes, optimize)]
    if isinstance(optimize, str) and optimize == "auto":
        paths += _sweeps(len(cores))
    plans = [lower_path(cores, output, sizes, path) for path in dict.fromkeys(map(tuple, paths))]
    best = min(plans, key=lambda plan: plan.seconds(1, CPU))
    return _with_shape(best, (-1, topology.padded_shape[1]))


def _with_shape(plan: ContractionPlan, shape: tuple[int, ...]) -> ContractionPlan:
    return replace(plan, output=replace(plan.output, shape=shape))


def _blocked_legs(topology: Topology, matrix: ContractionPlan) -> tuple[tuple[str, int], ...]:
    """Choose the sizes of the leading out-legs within a block of rows; () if the matrix needs no copy."""
    if matrix.output_copy is None:
        return ()
    size, legs = math.prod(topology.padded_shape), []
    most = min(_BLOCK, int(size * _BLOCK_PART)) if size > _SMALL else size
    for label, count in zip(topology.out_labels, topology.out_dims, strict=True):
        if size <= most:
            break
        size //= count
        fitting = (w for w in range(min(count, most // size), 0, -1) if count % w == 0)
        legs.append((label, next(fitting, 1)))
    return tuple(legs)


def _sweeps(count: int) -> tuple[list[tuple[int, int]], ...]:
    """Build two paths that start at the first operand: one contracts the others in order, one in reverse."""
    if count == 1:
        return ([],)
    forward = [(0, 1), *((0, left - 1) for left in range(count - 1, 1, -1))]
    backward = [(0, count - 1), *((left - 2, left - 1) for left in range(count - 1, 1, -1))]
    return forward, backward


@lru_cache(maxsize=4096)
def fastest_routes(plan: OperatorPlan, machine: Machine, itemsize: int, *, rebuild: bool = True) -> Bounds:
    """Tabulate the fastest route for each range of token counts; the limits of ranges are accurate to 10 %.

    Args:
        plan: plan of the operator.
        machine: the machine to predict for.
        itemsize: bytes of an element.
        rebuild: whether rebuilding the matrix is allowed.
    """

    def fastest(tokens: int) -> int:
        return plan.fastest(tokens, machine, itemsize, rebuild=rebuild)

    bounds: list[tuple[float, int]] = []
    for low, high in itertools.pairwise(_GRID):
        before, after = fastest(low), fastest(high)
        while before != after and high > 1.1 * low and high > low + 1:
            middle = round(math.sqrt(low * high))
            low, high = (middle, high) if fastest(middle) == before else (low, middle)
        if before != after:
            bounds.append((high - 1, before))
    return (*bounds, (math.inf, fastest(_GRID[-1])))


#: Token counts that are tried; between neighbours, the fastest route is assumed to change at most once.
_GRID = tuple(4**k for k in range(9))


def choose(bounds: Bounds, tokens: int) -> int:
    """Look up the fastest route for the given number of tokens."""
    for largest, route in bounds[:-1]:
        if tokens <= largest:
            return route
    return bounds[-1][1]


def contract_to_matrix(plan: OperatorPlan, cores: Sequence[Tensor]) -> Tensor:
    """Contract the cores differentiably to the dense matrix of shape `(out_features, in_features)`.

    If autograd does not record the operations, the matrix is built in blocks of rows. Memory is then needed
    only for the matrix and one block.
    """
    dense = _in_blocks(plan, cores) if plan.blocked and _may_write(cores) else run(plan.matrix, cores)
    if plan.is_padded:
        dense = dense[: plan.shape[0], : plan.shape[1]]
    return dense


def _in_blocks(plan: OperatorPlan, cores: Sequence[Tensor]) -> Tensor:
    size_of = plan.topology.size_of
    starts = [range(0, size_of[label], width) for label, width in plan.blocked]
    dense: Tensor | None = None
    for block, indices in enumerate(itertools.product(*starts)):
        at = {x: slice(k, k + width) for (x, width), k in zip(plan.blocked, indices, strict=True)}
        parts = [
            core[tuple(at.get(x, slice(None)) for x in spec.labels)] if at.keys() & set(spec.labels) else core
            for core, spec in zip(cores, plan.topology.cores, strict=True)
        ]
        rows = run(plan.rows, parts)
        if dense is None:  # not allocated earlier: under autocast, only the result `rows` shows the dtype
            dense = rows.new_empty(math.prod(map(len, starts)), *rows.shape)
        dense[block] = rows
    assert dense is not None
    return dense.view(plan.padded_shape)


def _may_write(cores: Sequence[Tensor]) -> bool:
    """Return True if results may be written in place, because neither autograd nor tracing is active."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_active():
        return False
    recording = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
    # The level of forward-mode derivatives is private; public is only the context manager `dual_level`.
    return not recording and forward_ad._current_level < 0


def contract_with_input(
    plan: OperatorPlan,
    cores: Sequence[Tensor],
    x: Tensor,
    *,
    route: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply the operator core by core, without building its matrix.

    Args:
        plan: plan of the operator.
        cores: the cores, in the order of the topology.
        x: input, shape `(..., in_features)`.
        route: the route, a position in `plan.applies`.
        bias: bias, shape `(out_features,)`, or None.

    Returns:
        Output of shape `(..., out_features)`.

    Raises:
        ShapeError: the last dimension of `x` is not `in_features`.
    """
    (out_features, in_features), (padded_out, padded_in) = plan.shape, plan.padded_shape
    check_input(x, in_features)
    flat = x if x.ndim == 2 else x.reshape(-1, in_features)
    if padded_in != in_features:
        flat = torch.nn.functional.pad(flat, (0, padded_in - in_features))
    whole = padded_out == out_features
    y = run(plan.applies[route], [flat, *cores], bias=bias if whole else None)
    if not whole:
        y = y[:, :out_features]
        y = y if bias is None else y + bias.to(y.dtype)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], out_features)
