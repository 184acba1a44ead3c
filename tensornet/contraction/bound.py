"""A contraction bound to the cores it is run with, for calls that take microseconds.

`pairwise.run` looks up, permutes and reshapes every operand in every call, which for one token takes
longer than the arithmetic. Where the input takes in one core after the other, most of that can be done once.
Nothing is copied and kept: a bound core is a view, or is arranged in every call where a view would not do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller

import torch
from torch import Tensor

from tensornet.contraction.pairwise import ContractionPlan, is_slow

#: Maps `x: (tokens, in)` and a bias or None to the output `(tokens, out)`, as `run` does.
Sweep = Callable[[Tensor, Tensor | None], Tensor]

Operation = Callable[[Tensor], Tensor]


def is_sweep(plan: ContractionPlan) -> bool:
    """Whether every step multiplies what has become of operand 0, always on the left, by another operand."""
    return bool(plan.steps) and len(_order(plan)) == len(plan.steps)


def bind_sweep(plan: ContractionPlan, cores: Sequence[Tensor]) -> Sweep | None:
    """Bind a plan whose operand 0 is the input; None if it is no sweep, or is computed in another dtype.

    Args:
        plan: one of `OperatorPlan.applies`.
        cores: the other operands; what is bound are views of them.
    """
    if not is_sweep(plan) or any(map(is_slow, cores)):
        return None
    operations: list[Operation] = []
    given = plan.operand_shapes[0]
    _arrange(operations, None, None if given is not None and len(given) == 2 else given)
    for step, position in zip(plan.steps, _order(plan), strict=True):
        _arrange(operations, step.left_permutation, step.left_shape)
        core, given = cores[position - 1].detach(), plan.operand_shapes[position]
        core = core if given is None else core.reshape(given)
        core = core if step.right_permutation is None else core.permute(step.right_permutation)
        view = _view(core, step.right_shape)
        if step is plan.steps[-1] and plan.adds_bias and step.result_shape is None and view is not None:
            reshaped = all(step.left_permutation is None for step in plan.steps)
            return _linear(operations, view, reshaped=reshaped)
        batched = step.product.batch > 1 or step.product.tokens_in == "batch"
        product = torch.bmm if batched else torch.mm
        if view is not None:
            operations.append(partial(product, mat2=view))
        else:
            operations.append(partial(_product_of_arranged, product, core, step.right_shape))
        _arrange(operations, None, step.result_shape)
    _arrange(operations, plan.output_permutation, plan.output_shape)
    return _chain(operations)


def _chain(operations: Sequence[Operation]) -> Sweep:
    """Operations one after the other, and a bias."""

    def sweep(x: Tensor, bias: Tensor | None) -> Tensor:
        for operation in operations:
            x = operation(x)
        return x if bias is None else x + bias.to(x.dtype)

    return sweep


def _linear(operations: Sequence[Operation], matrix: Tensor, *, reshaped: bool) -> Sweep:
    """Operations one after the other, and a last product that adds the bias.

    `reshaped` tells that the operations between products only change shapes.
    """
    mm, addmm = torch.mm, torch.addmm  # local to the closures: a microsecond is what this is about
    middle = operations[len(operations) // 2] if len(operations) in (1, 3) else None
    if reshaped and isinstance(middle, partial) and middle.func is mm:
        # The commonest forms spelled out: two products, the input and the result in between reshaped or not.
        first = middle.keywords["mat2"]
        rows, columns = first.shape[0], matrix.shape[0]

        def low_rank(x: Tensor, bias: Tensor | None) -> Tensor:
            return mm(mm(x, first), matrix) if bias is None else addmm(bias, mm(x, first), matrix)

        def two_products(x: Tensor, bias: Tensor | None) -> Tensor:
            y = mm(x.reshape(-1, rows), first).reshape(-1, columns)
            return mm(y, matrix) if bias is None else addmm(bias, y, matrix)

        return low_rank if len(operations) == 1 else two_products

    def sweep(x: Tensor, bias: Tensor | None) -> Tensor:
        for operation in operations:
            x = operation(x)
        return mm(x, matrix) if bias is None else addmm(bias, x, matrix)

    return sweep


def _order(plan: ContractionPlan) -> list[int]:
    """Operands in the order in which operand 0 takes them in, up to the first step that is another."""
    operands, order = list(range(len(plan.steps) + 1)), []
    for step in plan.steps:
        if operands[step.left] != 0:
            break
        order.append(operands[step.right])
        operands = [x for i, x in enumerate(operands) if i not in (step.left, step.right)] + [0]
    return order


def _arrange(
    operations: list[Operation], permutation: tuple[int, ...] | None, shape: tuple[int, ...] | None
) -> None:
    if permutation is not None:
        operations.append(methodcaller("permute", *permutation))
    if shape is not None:
        operations.append(methodcaller("reshape", *shape))


def _view(tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor | None:
    """The tensor in another shape if that takes no copy."""
    if shape is None:
        return tensor
    try:
        return tensor.view(shape)
    except RuntimeError:  # strides that no view of this shape has
        return None


def _product_of_arranged(
    product: Callable[[Tensor, Tensor], Tensor], core: Tensor, shape: tuple[int, ...] | None, x: Tensor
) -> Tensor:
    return product(x, core if shape is None else core.reshape(shape))
