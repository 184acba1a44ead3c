"""Predicted time of a planned contraction on a machine.

Cores and weights come from memory once. A matrix product takes its arithmetic, at a rate that falls for small
sizes; a permuting copy costs by the element and by the contiguous run; each operation has a fixed overhead.
Counting floating-point operations alone would be wrong by more than an order of magnitude for few tokens,
where memory, copies and overheads decide.
"""

import math

from tensornet.contraction.machine import Machine
from tensornet.contraction.steps import ContractionPlan, Copy, Product

#: Larger operands than this, in bytes, are not all in the cache of one core.
_FAR = 2**20


def product_seconds(product: Product, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predict the time of one (batched) matrix product whose operands are in a cache."""
    batch, rows, inner, columns = product.at(tokens)
    peak = machine.half_peak if itemsize == 2 else machine.peak * 4 / itemsize
    return machine.overhead + batch * rows * inner * columns / (
        peak * machine.efficiency(rows, inner, columns)
    )


def copy_seconds(copy: Copy, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predict the time of one permuting copy."""
    elements = copy.elements * (tokens if copy.per_token else 1)
    each = machine.copy_element + machine.copy_run / copy.run
    if elements * itemsize > _FAR:
        each += machine.copy_far
    return machine.overhead + elements * each * max(itemsize, 2) / 4


def plan_seconds(plan: ContractionPlan, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predict the time of a contraction for a token count, with operands without tokens read from memory."""
    read = sum(math.prod(shape) for shape in plan.stored_shapes) * itemsize / machine.bandwidth
    products = sum(product_seconds(step.product, tokens, machine, itemsize) for step in plan.steps)
    return read + products + sum(copy_seconds(copy, tokens, machine, itemsize) for copy in plan.copies)


def dense_seconds(
    out_features: int,
    in_features: int,
    tokens: int,
    machine: Machine,
    itemsize: int = 4,
    *,
    from_memory: bool = True,
) -> float:
    """Predict the time of `nn.Linear`; a weight that was just rebuilt is read from a cache."""
    product = Product(1, 1, in_features, out_features, "rows")
    read = out_features * in_features * itemsize / machine.bandwidth if from_memory else 0.0
    return read + product_seconds(product, tokens, machine, itemsize)
