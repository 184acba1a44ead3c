"""A rebuilt matrix that is used slice by slice, so that it is never written to memory.

Rebuilding a large matrix for one product writes it to memory, permutes it there and reads it again, which can
take longer than the arithmetic. If the cores before and after a place in the network are contracted apart,

    L: (out1 * in1, r),    R: (r, in2 * out2),    W[o] = L[o] R: (in1 * in2, out2)  for each o in out1,

then every `W[o]` comes out of the product as the weight of its own block of outputs, without a permutation.
One small buffer serves all of them. For many tokens one product with all outputs is faster than one for each
block: then the slices are gathered, from the buffer and in long runs, into a matrix that is given up after
the call. Results are written in place, so this is for passes without gradients.

Reference: Gray, Kourtis 2021, "Hyper-optimized tensor network contraction" (slicing of an index).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tensornet.checks import check_input
from tensornet.contraction.cost import (
    copy_seconds,
    dense_seconds,
    fresh_seconds,
    plan_seconds,
    product_seconds,
)
from tensornet.contraction.machine import Machine
from tensornet.contraction.pairwise import ContractionPlan, Copy, Product, is_slow, run
from tensornet.contraction.scratch import LIMIT, borrow
from tensornet.network import plan_cores
from tensornet.topologies.leg_dims import divisors
from tensornet.topology import Topology

#: A slice has at most so many elements, which stay near a core; more only where one block has more. Smaller
#: slices would be nearer, but threads then wait for each other more often.
_BUFFER = 2**20

#: Reading the input once more for every block of outputs costs so many plain copies of it.
_INPUT_COPIES = 1.0


@dataclass(frozen=True)
class SlicedPlan:
    """A split of an operator into two groups of cores, and what is done with its slices.

    Args:
        cut: cores before it belong to L, the others to R.
        left: contraction of the first to `(out1 * in1, r)`.
        right: contraction of the others to `(r, in2 * out2)`.
        outer: size of out1.
        inner: size of out2.
        width: how many blocks `W[o]` are made at once.
        in_features: of the operator.
        rank: r, the size of all bonds between the groups together.
        gather: whether slices are gathered to a matrix before the input is multiplied.
    """

    cut: int
    left: ContractionPlan
    right: ContractionPlan
    outer: int
    inner: int
    width: int
    in_features: int
    rank: int
    gather: bool

    @property
    def buffer(self) -> int:
        """Elements of one slice."""
        return self.width * self.in_features * self.inner

    @property
    def gathered(self) -> int:
        """Elements of the matrix that slices are gathered to; 0 if they are not."""
        return self.outer * self.inner * self.in_features if self.gather else 0

    def multiply_adds(self, tokens: int) -> int:
        """Multiply-add operations for that many tokens."""
        matrix = self.outer * self.inner * self.in_features
        return self.left.multiply_adds(1) + self.right.multiply_adds(1) + matrix * (self.rank + tokens)

    @property
    def moved(self) -> int:
        """Elements copied by permutations."""
        return self.left.moved(1) + self.right.moved(1) + self.gathered

    @property
    def largest_intermediate(self) -> int:
        """Elements of the largest tensor that is made."""
        plans = (self.left, self.right)
        sides = [max(math.prod(plan.output_shape), plan.largest_intermediate(1)) for plan in plans]
        return max(self.buffer, self.gathered, *sides)

    def seconds(self, tokens: int, machine: Machine, itemsize: int = 4) -> float:
        """Predicted time of one pass."""
        parts, rows = self.outer // self.width, self.width * (self.left.output_shape[0] // self.outer)
        build = Product(1, rows, self.rank, self.right.output_shape[1], None)
        total = plan_seconds(self.left, 1, machine, itemsize) + plan_seconds(self.right, 1, machine, itemsize)
        total += parts * product_seconds(build, 1, machine, itemsize, fresh=False)
        if self.gather:
            out_features = self.outer * self.inner
            copied = copy_seconds(Copy(self.gathered, self.inner, False), 1, machine, itemsize, fresh=False)
            total += copied + (parts - 1) * machine.copy_overhead
            if self.gathered * itemsize > LIMIT:
                total += fresh_seconds(self.gathered * itemsize, machine)
            return total + dense_seconds(
                out_features, self.in_features, tokens, machine, itemsize, from_memory=False
            )
        use = Product(self.width, 1, self.in_features, self.inner, "rows")
        total += parts * product_seconds(use, tokens, machine, itemsize, fresh=False)
        place = Copy(self.width * self.inner, self.inner, True)
        total += parts * copy_seconds(place, tokens, machine, itemsize, fresh=False)
        again = tokens * self.in_features * self.outer
        total += fresh_seconds(tokens * self.outer * self.inner * itemsize, machine)
        return total + again * machine.copy_element * _INPUT_COPIES * itemsize / 4


@lru_cache(maxsize=4096)
def plan_slices(topology: Topology) -> tuple[SlicedPlan, ...]:
    """Every split whose slices are weights as they come; none for a padded operator.

    Args:
        topology: the operator.
    """
    if topology.padded_shape != topology.shape:
        return ()
    splits = (_split(topology, cut) for cut in range(1, len(topology.cores)))
    plans = [plan for plan in splits if plan is not None]
    return (*plans, *(replace(plan, gather=True) for plan in plans))


def run_in_slices(
    sliced: SlicedPlan, cores: Sequence[Tensor], x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Apply the operator to `x: (..., in_features)` without recording gradients.

    Args:
        sliced: one of `plan_slices`.
        cores: in the order of the topology.
        x: the input, in the dtype of the cores.
        bias: shape `(out_features,)`.

    Returns:
        Output `(..., out_features)`.

    Raises:
        ShapeError: the last dimension of `x` is another.
    """
    check_input(x, sliced.in_features)
    if is_slow(x):
        wide = None if bias is None else bias.float()
        return run_in_slices(sliced, [core.float() for core in cores], x.float(), wide).to(x.dtype)
    flat = x if x.ndim == 2 else x.reshape(-1, sliced.in_features)
    parts, shape = sliced.outer // sliced.width, sliced.right.output_shape
    left = run(sliced.left, cores[: sliced.cut]).reshape(parts, -1, sliced.rank)
    last = sliced.gathered or sliced.width * flat.shape[0] * sliced.inner
    sizes = (sliced.buffer, math.prod(shape), last)
    with borrow(sum(sizes), left) as memory:
        buffer, factor, rest = memory.split(sizes)
        right = run(sliced.right, cores[sliced.cut :], out=factor)
        slices = _slices(sliced, left, right, buffer)
        multiply = _gathered if sliced.gather else _each
        y = multiply(sliced, slices, flat, bias, rest)
    return y.view(*x.shape[:-1], sliced.outer * sliced.inner)


def _slices(sliced: SlicedPlan, left: Tensor, right: Tensor, buffer: Tensor) -> Iterator[Tensor]:
    """One slice `(width, in, inner)` after the other, all in the same memory.

    Each thread makes whole blocks, those that it multiplies by next: a plain product would split them among
    threads, whose caches would have to hand them to each other.
    """
    threads = torch.get_num_threads()
    shares = threads if sliced.width % threads == 0 else 1
    left, factor = left.view(len(left), shares, -1, sliced.rank), right.expand(shares, -1, -1)
    product = buffer.view(shares, left.shape[2], -1)
    weights = buffer.view(sliced.width, sliced.in_features, sliced.inner)
    for rows in left.unbind(0):
        torch.bmm(rows, factor, out=product)
        yield weights


def _each(
    sliced: SlicedPlan, slices: Iterator[Tensor], x: Tensor, bias: Tensor | None, buffer: Tensor
) -> Tensor:
    """Multiply by every slice `(width, in, inner)` as it comes."""
    width, parts = sliced.width, sliced.outer // sliced.width
    y = x.new_empty(x.shape[0], sliced.outer, sliced.inner)
    # One batched product for all blocks of a slice: threads then share blocks instead of every product. That
    # takes a result without gaps; its copy into place costs less than products one by one.
    inputs, outputs = x.expand(width, -1, -1), buffer.view(width, x.shape[0], sliced.inner)
    places = y.view(x.shape[0], parts, width, sliced.inner).permute(1, 2, 0, 3).unbind(0)
    biases = None if bias is None else bias.view(parts, width, 1, sliced.inner).unbind(0)
    for part, weights in enumerate(slices):
        torch.bmm(inputs, weights, out=outputs)
        if biases is None:
            places[part].copy_(outputs)
        else:
            torch.add(outputs, biases[part], out=places[part])
    return y


def _gathered(
    sliced: SlicedPlan, slices: Iterator[Tensor], x: Tensor, bias: Tensor | None, matrix: Tensor
) -> Tensor:
    """Multiply by all slices `(width, in, inner)` at once, gathered in `matrix`."""
    width, parts = sliced.width, sliced.outer // sliced.width
    places = matrix.view(sliced.in_features, parts, width, sliced.inner).permute(1, 2, 0, 3).unbind(0)
    for place, weights in zip(places, slices, strict=True):
        place.copy_(weights)
    whole = matrix.view(sliced.in_features, -1)
    return torch.mm(x, whole) if bias is None else torch.addmm(bias, x, whole)


def _split(topology: Topology, cut: int) -> SlicedPlan | None:
    """The plan for one cut; None if slices would have to be permuted, or would be the whole or slivers."""
    groups = [[core.labels for core in part] for part in (topology.cores[:cut], topology.cores[cut:])]
    first, second = ({label for labels in group for label in labels} for group in groups)
    outs = [tuple(x for x in topology.out_labels if x in side) for side in (first, second)]
    ins = [tuple(x for x in topology.in_labels if x in side) for side in (first, second)]
    if (*outs[0], *outs[1]) != topology.out_labels or (*ins[0], *ins[1]) != topology.in_labels:
        return None
    size = topology.size_of
    outer, inner = (math.prod(size[x] for x in labels) for labels in outs)
    rows, in_features = math.prod(size[x] for x in ins[0]), topology.in_features
    if outer == 1 or inner < 8:
        return None
    shared = tuple(sorted(first & second))
    rank = math.prod(size[x] for x in shared)
    wide = [w for w in divisors(outer) if w == 1 or w * in_features * inner <= _BUFFER]
    # An even number of blocks, so that two threads share them evenly.
    width = next((w for w in reversed(wide) if w % 2 == 0), wide[-1])
    left = plan_cores(topology, groups[0], (*outs[0], *ins[0], *shared))
    right = plan_cores(topology, groups[1], (*shared, *ins[1], *outs[1]))
    return SlicedPlan(
        cut=cut,
        left=replace(left, output_shape=(outer * rows, rank)),
        right=replace(right, output_shape=(rank, in_features // rows * inner)),
        outer=outer,
        inner=inner,
        width=width,
        in_features=in_features,
        rank=rank,
        gather=False,
    )
