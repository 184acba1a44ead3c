"""Lower a contraction path to permutations, reshapes and matrix products, with few copies.

A path says which operands meet; it leaves open which of the two comes first and in which order the indices of
each product are written. Those choices decide how much is copied, which for small bonds costs more than the
arithmetic. A beam search over them keeps the cheapest few by the cost model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tensornet.contraction.cost import copy_seconds, product_seconds
from tensornet.contraction.machine import CPU
from tensornet.contraction.steps import TOKENS, Arrangement, ContractionPlan, Copy, PairStep, Product

Labels = tuple[str, ...]

#: Partial lowerings kept after each step.
_BEAM = 4


@dataclass(frozen=True)
class _Partial:
    """Lowering of the first steps of a path: predicted time so far, and the remaining operands."""

    seconds: float
    operands: tuple[Labels, ...]
    steps: tuple[PairStep, ...]


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
    kept = _squeeze(output, size_of)
    tokens = size_of.get(TOKENS, 1)
    beam = [_Partial(0.0, squeezed, ())]
    for k, (left, right) in enumerate(path):
        extended = [
            _extend(partial, left, right, choice, size_of, tokens)
            for partial in beam
            for choice in _choices(partial.operands, path, k, kept)
        ]
        cheapest: dict[tuple[Labels, ...], _Partial] = {}
        for partial in sorted(extended, key=lambda x: x.seconds):
            cheapest.setdefault(partial.operands, partial)
        beam = list(cheapest.values())[:_BEAM]
    best = min(beam, key=lambda x: x.seconds + _output_seconds(x, kept, size_of, tokens))
    result = best.operands[0]
    arranged = _arrangement(result, kept, _shape(output, size_of), size_of)
    return ContractionPlan(
        stored_shapes=tuple(_shape(labels, size_of) for labels in squeezed if TOKENS not in labels),
        steps=best.steps,
        output=arranged,
        adds_bias=result == kept and bool(best.steps) and _is_linear(best.steps[-1].product),
        output_copy=_output_copy(result, kept, size_of),
        path=tuple(path),
        matrices=_matrices(best.steps) if result == kept else (),
    )


def _matrices(steps: Sequence[PairStep]) -> tuple[tuple[int, tuple[int, int]], ...]:
    """List the right operands of a path of plain matrix products, else nothing; see `ContractionPlan`."""
    operands, found = list(range(len(steps) + 1)), []
    for step in steps:
        product = step.product
        plain = (product.batch, product.rows, product.tokens_in) == (1, 1, "rows")
        moved, weight = step.arrange_left.permutation, step.arrange_right
        # Two indices that are both summed are transposed as well, but are no matrix `(columns, inner)`.
        shape = (product.columns, product.inner)
        if not plain or operands[step.left] != 0 or moved is not None:
            return ()
        if weight.permutation != (1, 0) or weight.view != shape:
            return ()
        found.append((operands[step.right], shape))
        operands = [x for i, x in enumerate(operands) if i not in (step.left, step.right)] + [0]
    return tuple(found)


def _is_linear(product: Product) -> bool:
    return product.tokens_in == "rows" and product.rows == 1 and product.batch == 1


@dataclass(frozen=True)
class _Choice:
    """Operand order and index order of one pairwise step."""

    left: int
    right: int
    batch: Labels
    left_free: Labels
    summed: Labels
    right_free: Labels


def _choices(
    operands: tuple[Labels, ...], path: Sequence[tuple[int, int]], k: int, output: Labels
) -> Iterator[_Choice]:
    first, second = path[k]
    rest = [labels for i, labels in enumerate(operands) if i not in (first, second)]
    wanted = {*output, *(x for labels in rest for x in labels)}
    pairs = [(first, second), (second, first)]
    if TOKENS in operands[first] or TOKENS in operands[second]:
        # The token operand goes left: its result then keeps tokens first and stays contiguous.
        pairs = [(a, b) for a, b in pairs if TOKENS in operands[a]]
    shared = set(operands[first]) & set(operands[second])
    for left, right in pairs:
        batch = tuple(x for x in operands[left] if x in shared and x in wanted)
        left_free = tuple(x for x in operands[left] if x not in shared)
        right_free = tuple(x for x in operands[right] if x not in shared)
        summed = {tuple(x for x in operands[i] if x in shared and x not in wanted) for i in (left, right)}
        for a in _orders(left_free, output):
            for b in _orders(right_free, output):
                for c in summed:
                    yield _Choice(left, right, batch, a, c, b)


def _orders(labels: Labels, output: Labels) -> list[Labels]:
    """List the index orders to try: the present order, and the order of the output."""
    by_output = tuple(sorted(labels, key=lambda x: output.index(x) if x in output else len(output)))
    return list(dict.fromkeys((labels, by_output)))


def _extend(
    partial: _Partial, first: int, second: int, choice: _Choice, size_of: Mapping[str, int], tokens: int
) -> _Partial:
    step, result = _lower(partial.operands, choice, size_of)
    rest = tuple(labels for i, labels in enumerate(partial.operands) if i not in (first, second))
    seconds = product_seconds(step.product, tokens, CPU)
    seconds += sum(copy_seconds(copy, tokens, CPU) for copy in step.copies)
    return _Partial(partial.seconds + seconds, (*rest, result), (*partial.steps, step))


def _lower(
    operands: tuple[Labels, ...], choice: _Choice, size_of: Mapping[str, int]
) -> tuple[PairStep, Labels]:
    left, right = operands[choice.left], operands[choice.right]
    left_groups = (choice.batch, choice.left_free, choice.summed)
    right_groups = (choice.batch, choice.summed, choice.right_free)
    result = (*choice.batch, *choice.left_free, *choice.right_free)
    copies = (_copy(left, left_groups, size_of), _copy(right, right_groups, size_of))
    step = PairStep(
        left=choice.left,
        right=choice.right,
        arrange_left=_grouped(left, left_groups, size_of),
        arrange_right=_grouped(right, right_groups, size_of),
        product=Product(
            batch=_size(choice.batch, size_of),
            rows=_size(choice.left_free, size_of),
            inner=_size(choice.summed, size_of),
            columns=_size(choice.right_free, size_of),
            tokens_in=_tokens_in(choice),
        ),
        copies=tuple(copy for copy in copies if copy is not None),
    )
    return step, result


def _tokens_in(choice: _Choice) -> str | None:
    groups = {
        "batch": choice.batch,
        "rows": choice.left_free,
        "inner": choice.summed,
        "columns": choice.right_free,
    }
    return next((name for name, group in groups.items() if TOKENS in group), None)


def _copy(labels: Labels, groups: Sequence[Labels], size_of: Mapping[str, int]) -> Copy | None:
    """Describe the copy that groups `labels`, None if every group is contiguous already.

    A matrix product reads a transposed operand as it is, but not one whose innermost index counts batches.
    """
    filled = [group for group in groups if group]
    whole = all(_contains(labels, group) for group in filled)
    if whole and not (groups[0] and labels and labels[-1] in groups[0]):
        return None
    return _written(labels, tuple(x for group in groups for x in group), size_of)


def _contains(labels: Labels, group: Labels) -> bool:
    start = labels.index(group[0])
    return labels[start : start + len(group)] == group


def _written(labels: Labels, target: Labels, size_of: Mapping[str, int]) -> Copy:
    run = 1
    for a, b in zip(reversed(labels), reversed(target), strict=True):
        if a != b or a == TOKENS:
            break
        run *= size_of[a]
    return Copy(_size(labels, size_of), run, TOKENS in labels)


def _output_copy(result: Labels, output: Labels, size_of: Mapping[str, int]) -> Copy | None:
    return None if result == output else _written(result, output, size_of)


def _output_seconds(partial: _Partial, output: Labels, size_of: Mapping[str, int], tokens: int) -> float:
    copy = _output_copy(partial.operands[0], output, size_of)
    return 0.0 if copy is None else copy_seconds(copy, tokens, CPU)


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
