"""A contraction bound to the cores it is run with, for calls that take microseconds.

`tensornet.plans.run` looks up, permutes and reshapes every operand in every call, which for one token takes
longer than the arithmetic. Where the input takes in one core after the other, most of that can be done once.
Nothing is copied and kept: a bound core is a view, or is arranged in every call where a view would not do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller

import torch
from torch import Tensor

from tensornet.plans import ContractionPlan

#: Maps `x: (tokens, in)` and a bias or None to the output `(tokens, out)`, as `run` does.
Sweep = Callable[[Tensor, Tensor | None], Tensor]


def is_sweep(plan: ContractionPlan) -> bool:
    """Whether every step multiplies what has become of operand 0, always on the left, by another operand."""
    return bool(plan.steps) and len(_order(plan)) == len(plan.steps)


def bind_sweep(plan: ContractionPlan, cores: Sequence[Tensor]) -> Sweep | None:
    """Bind a plan whose operand 0 is the input; None if it is no sweep.

    Args:
        plan: one of `OperatorPlan.applies`.
        cores: the other operands; what is bound are views of them.
    """
    if not is_sweep(plan):
        return None
    operations: list[Callable[[Tensor], Tensor]] = []
    _arrange(operations, None, plan.operand_shapes[0])
    last = None
    for step, position in zip(plan.steps, _order(plan), strict=True):
        _arrange(operations, step.left_permutation, step.left_shape)
        core, given = cores[position - 1].detach(), plan.operand_shapes[position]
        core = core if given is None else core.reshape(given)
        core = core if step.right_permutation is None else core.permute(step.right_permutation)
        batched = step.product.batch > 1 or step.product.tokens_in == "batch"
        view = _view(core, step.right_shape)
        if step is plan.steps[-1] and plan.adds_bias and step.result_shape is None and view is not None:
            last = view
            break
        product = torch.bmm if batched else torch.mm
        if view is not None:
            operations.append(partial(product, mat2=view))
        else:
            operations.append(partial(_product_of_arranged, product, core, step.right_shape))
        _arrange(operations, None, step.result_shape)
    if last is None:
        _arrange(operations, plan.output_permutation, plan.output_shape)
    return _chain(tuple(operations), last)


def _chain(operations: tuple[Callable[[Tensor], Tensor], ...], last: Tensor | None) -> Sweep:
    """Operations one after the other, then a last product that can add a bias."""
    mm, addmm = torch.mm, torch.addmm  # local to the closure: a microsecond is what this is about

    def sweep(x: Tensor, bias: Tensor | None) -> Tensor:
        for operation in operations:
            x = operation(x)
        if last is None:
            return x if bias is None else x + bias.to(x.dtype)
        return mm(x, last) if bias is None else addmm(bias, x, last)

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
    operations: list[Callable[[Tensor], Tensor]],
    permutation: tuple[int, ...] | None,
    shape: tuple[int, ...] | None,
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
