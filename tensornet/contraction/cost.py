"""How long a planned contraction takes on a machine.

Cores and weights come from memory once. A matrix product takes its arithmetic, at a rate that falls for small
sizes; a permuting copy costs by the element and by the contiguous run; large results cost fresh pages; each
operation has a fixed overhead. Counting floating-point operations alone would be wrong by more than an order
of magnitude for few tokens, where memory, copies and overheads decide.
"""

import math

from tensornet.contraction.machine import Machine
from tensornet.contraction.plan import ContractionPlan, Copy, Product

#: What is larger than this, in bytes, is not all in the cache of one core.
_FAR = 2**20

#: The allocator of the system (glibc) takes larger blocks than this, in bytes, from the kernel each time and
#: gives them back. Smaller ones above `_FAR` it gives back too, unless the process has had larger ones
#: before, which nobody can foresee: they count with a share.
_FRESH, _FRESH_SHARE = 2**25, 0.1


def product_seconds(
    product: Product, tokens: int, machine: Machine, itemsize: int = 4, *, fresh: bool = True
) -> float:
    """Predicted time of one (batched) matrix product whose operands are in a cache.

    `fresh=False` is for a result that goes where pages are at hand.
    """
    batch, rows, inner, columns = product.at(tokens)
    peak = machine.half_peak if itemsize == 2 else machine.peak * 4 / itemsize
    compute = batch * rows * inner * columns / (peak * machine.efficiency(rows, inner, columns))
    overhead = machine.overhead + (batch - 1) * machine.batch_overhead
    size = batch * rows * columns * itemsize
    memory = machine.far_byte * size if size > _FAR else 0.0
    return overhead + compute + memory + (fresh_seconds(size, machine) if fresh else 0.0)


def copy_seconds(
    copy: Copy, tokens: int, machine: Machine, itemsize: int = 4, *, fresh: bool = True
) -> float:
    """Predicted time of one permuting copy; `fresh=False` is for one that goes where pages are at hand."""
    elements = copy.elements * (tokens if copy.per_token else 1)
    scale, size = max(itemsize, 2) / 4, elements * itemsize
    each = machine.copy_element * scale
    each += machine.copy_run / copy.run if copy.run > 1 else machine.copy_strided * scale
    if size > _FAR:
        each += (machine.copy_far if copy.run > 1 else machine.copy_far_strided) * scale
    pages = fresh_seconds(size, machine) if fresh else 0.0
    return machine.copy_overhead + elements * each + pages


def plan_seconds(plan: ContractionPlan, tokens: int, machine: Machine, itemsize: int = 4) -> float:
    """Predicted time of a contraction for that many tokens, operands without tokens coming from memory."""
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
    """Predicted time of `nn.Linear`; a weight that was just rebuilt does not come from memory."""
    product = Product(1, 1, in_features, out_features, "rows")
    read = out_features * in_features * itemsize / machine.bandwidth if from_memory else 0.0
    return read + product_seconds(product, tokens, machine, itemsize)


def fresh_seconds(size: int, machine: Machine) -> float:
    """Predicted time that new memory for a result of so many bytes takes."""
    if size <= _FAR:
        return 0.0
    return size * machine.fresh_byte * (1.0 if size > _FRESH else _FRESH_SHARE)
