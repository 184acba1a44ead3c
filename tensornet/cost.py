"""How long a planned contraction takes on a machine.

A matrix product takes the longer of its arithmetic, at a rate that falls for small sizes, and of reading and
writing its operands. A permuting copy costs by the element and by the contiguous run. Each operation has
a fixed overhead. Counting floating-point operations alone would be wrong by more than an order of magnitude
for few tokens, where copies and overheads decide.
"""

from tensornet.machine import Machine
from tensornet.plans import ContractionPlan, Copy, Product


def product_seconds(product: Product, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predicted time of one (batched) matrix product."""
    batch, rows, inner, columns = product.at(tokens)
    efficiency = machine.efficiency(rows, inner, columns)
    peak = machine.half_peak if itemsize == 2 else machine.peak * 4 / itemsize
    compute = batch * rows * inner * columns / (peak * efficiency)
    traffic = itemsize * batch * (rows * inner + inner * columns + rows * columns) / machine.bandwidth
    return machine.overhead + (batch - 1) * machine.batch_overhead + max(compute, traffic)


def copy_seconds(copy: Copy, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predicted time of one permuting copy."""
    elements = copy.elements * (tokens if copy.per_token else 1)
    scale = max(itemsize, 2) / 4
    each = machine.copy_element * scale
    each += machine.copy_run / copy.run if copy.run > 1 else machine.copy_strided * scale
    return machine.copy_overhead + elements * each


def plan_seconds(plan: ContractionPlan, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predicted time of a contraction for that many tokens."""
    products = sum(product_seconds(step.product, tokens, machine, itemsize) for step in plan.steps)
    return products + sum(copy_seconds(copy, tokens, machine, itemsize) for copy in plan.copies)


def dense_seconds(
    out_features: int, in_features: int, tokens: int, machine: Machine, itemsize: int = 4
) -> float:
    """Predicted time of `nn.Linear`."""
    product = Product(1, 1, in_features, out_features, "rows")
    return product_seconds(product, tokens, machine, itemsize)
