"""Product of rows with the matrices of chains that share their middle core, slice by slice on CPUs.

A chain whose ends are merged is `W[(o p q), (i j k)] = sum_lr L[o, i, l] M[l, p, j, r] R[r, q, k]`: it is
built by two thin products, `T = L M` and then `T R`, and one copy that brings rows and columns into order.
This module is faster than the same operations recorded by autograd for three reasons. Both products work on a
slice of the middle that fits the second-level cache, in memory that is reused for every slice and every
expert. The copy moves whole runs of `k` as single words. The backward pass adds each expert's gradient to
that of the middle in place. Only the matrices are kept for the backward pass, and only if the rows need a
gradient; `T`, which is as large, is recomputed. With 8 experts of 768 x 3072 and 2,048 tokens on one core,
recomputing the matrices as well would make a step 5 % slower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from tensornet._util import transforms_active
from tensornet.topology import Topology
from tensornet_moe.experts import BUILT_ALONE, SharedCoreExperts
from tensornet_moe.grouped_linear import Groups

#: Bytes of a slice of `T`; this slice and that of the matrix should fit into the second-level cache.
_SLICE_BYTES = 2**20

#: Largest size of the merged ends, as a fraction of the elements of a matrix.
_SMALL_ENDS = 1 / 8


#: Rows, left ends, right ends and middle.
Operands = tuple[Tensor, Tensor, Tensor, Tensor]

#: Experts that have rows, and their numbers of rows.
Active = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class ChainLegs:
    """Sizes of a chain of three cores.

    Args:
        outs: out-legs `(o, p, q)` of left end, middle and right end.
        ins: in-legs `(i, j, k)`.
        bonds: `(l, r)` on both sides of the middle.
        middle: index of the middle core in the topology.
    """

    outs: tuple[int, int, int]
    ins: tuple[int, int, int]
    bonds: tuple[int, int]
    middle: int


def chain_legs(topology: Topology, shared: Sequence[str]) -> ChainLegs | None:
    """Return the sizes of a chain with one shared inner core; None for any other network.

    Args:
        topology: the operator of one expert.
        shared: names of the shared cores.

    Example:
        >>> topology = tn.topologies.mpo(out_dims=(4, 192, 4), in_dims=(4, 48, 4))
        >>> chain_legs(topology, ("1",))
        ChainLegs(outs=(4, 192, 4), ins=(4, 48, 4), bonds=(16, 16), middle=1)
        >>> chain_legs(topology, ("0", "2")) is None
        True
    """
    names, count = topology.core_names, len(topology.cores)
    if len(shared) != 1 or topology.terms or topology.padded_shape != topology.shape:
        return None
    middle = names.index(shared[0])
    bonds = [topology.cores[0].labels[0], *(core.labels[-1] for core in topology.cores)]
    legs = zip(topology.out_labels, topology.in_labels, strict=False)
    chain = [(bonds[n], out, into, bonds[n + 1]) for n, (out, into) in enumerate(legs) if n < count]
    if [core.labels for core in topology.cores] != chain or not 0 < middle < count - 1:
        return None
    size = topology.size_of
    if len(topology.out_labels) != count or size[bonds[0]] * size[bonds[-1]] != 1 or len(set(bonds)) <= count:
        return None
    outs, ins = ([size[x] for x in labels] for labels in (topology.out_labels, topology.in_labels))
    left, right = size[bonds[middle]], size[bonds[middle + 1]]
    (o, p, q), (i, j, k) = (
        (math.prod(dims[:middle]), dims[middle], math.prod(dims[middle + 1 :])) for dims in (outs, ins)
    )
    if max(o * i * left, right * q * k) > _SMALL_ENDS * math.prod(topology.shape):
        return None
    return ChainLegs((o, p, q), (i, j, k), (left, right), middle)


def takes_chain_rows(x: Tensor, cores: Tensor) -> bool:
    """Return True if the kernel supports these rows and cores.

    Args:
        x: the rows.
        cores: a tensor with the dtype in which the cores are contracted. They need one dtype on the CPU,
            outside of compilers and transforms.
    """
    if x.device.type != "cpu" or x.dtype != cores.dtype or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return not (torch.jit.is_tracing() or transforms_active() or forward_ad._current_level >= 0)


def use_chain_rows(model: nn.Module) -> int:
    """Make the banks of a model use this kernel if their topology is a chain with one shared inner core.

    This makes training of mixtures with large experts faster on CPUs. Nothing changes on other devices, in
    compiled code, and for dtypes other than float32 and float64.

    Returns:
        Number of banks whose kernel was set.

    Example:
        >>> topology = tn.topologies.mpo(out_dims=(4, 192, 4), in_dims=(4, 48, 4))
        >>> bank = tm.SharedCoreExperts(topology, 4)
        >>> use_chain_rows(bank), bank.kernel is chain_kernel
        (1, True)
    """
    found = 0
    for bank in model.modules():
        if isinstance(bank, SharedCoreExperts) and chain_legs(bank.topology, bank.shared) is not None:
            bank.kernel = chain_kernel
            found += 1
    return found


def chain_kernel(bank: SharedCoreExperts, x: Tensor, groups: Groups) -> Tensor | None:
    """Compute `y_r = W_e(r) x_r`; None if the kernel cannot be used. See `SharedCoreExperts.kernel`."""
    legs = chain_legs(bank.topology, bank.shared)
    if legs is None or bank.out_features * bank.in_features < BUILT_ALONE:
        return None
    if groups.active is None or groups.sizes is None or not takes_chain_rows(x, bank.compute_like):
        return None
    cores = list(bank.cores().values())
    ends, middle = merge_ends(cores, legs), cores[legs.middle]
    return chain_rows(x, ends, middle, (groups.active, [groups.sizes[e] for e in groups.active]))


def merge_ends(cores: Sequence[Tensor], legs: ChainLegs) -> tuple[Tensor, Tensor]:
    """Merge the private cores on each side of the middle, with gradient.

    Args:
        cores: cores in the order of the chain; all except the middle have shape `(E, left, out, in, right)`.
        legs: sizes of the chain.

    Returns:
        Left ends `(E, o, i, l)` and right ends `(E, r, q, k)`.
    """

    def merged(part: Sequence[Tensor]) -> Tensor:
        whole = part[0]
        for core in part[1:]:
            both = torch.einsum("eaoib,ebpjc->eaopijc", whole, core)
            whole = both.flatten(2, 3).flatten(3, 4)
        return whole

    left, right = merged(cores[: legs.middle]), merged(cores[legs.middle + 1 :])
    return left.squeeze(1), right.squeeze(-1)


def chain_rows(
    x: Tensor,
    ends: tuple[Tensor, Tensor],
    middle: Tensor,
    groups: tuple[Sequence[int], Sequence[int]],
) -> Tensor:
    """Compute `y_r = W_e(r) x_r` for rows sorted by expert, with first derivatives.

    Args:
        x: shape `(rows, i * j * k)`.
        ends: left ends `(E, o, i, l)` and right ends `(E, r, q, k)`.
        middle: the shared core, `(l, p, j, r)`.
        groups: the experts that have rows, and their numbers of rows.

    Returns:
        Shape `(rows, o * p * q)`.

    Example:
        >>> ends = torch.randn(2, 2, 3, 6), torch.randn(2, 4, 2, 2)
        >>> y = chain_rows(torch.randn(5, 3 * 4 * 2), ends, torch.randn(6, 5, 4, 4), ([1], [5]))
        >>> y.shape
        torch.Size([5, 20])
    """
    keep = torch.is_grad_enabled() and x.requires_grad
    return _ChainRows.apply(x, *ends, middle, (tuple(groups[0]), tuple(groups[1])), keep)


class _Slices:
    """Memory for one slice of `T` and of the matrix, reused for every slice and every expert."""

    def __init__(self, left: Tensor, middle: Tensor, right: Tensor) -> None:
        (_, o, i, _), (_, p, j, r), (_, _, q, k) = left.shape, middle.shape, right.shape
        self.count = _fewest_slices(p, o * i * j * r * middle.element_size())
        width = p // self.count
        self.shape, self.legs = (o * p * q, i * j * k), (o, self.count, width, q, i, j, k)
        self.half = middle.new_empty(o * i, width * j * r)
        self.whole = middle.new_empty(o * i * width * j, q * k)
        self.ordered = _words(self.whole.view(o, i, width, j, q, k))

    def of_matrix(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """View the part of a matrix that each slice fills, in the order of `ordered`."""
        return _words(matrix.view(self.legs)).permute(1, 0, 4, 2, 5, 3, 6).unbind(0)

    def of_middle(self, middle: Tensor) -> tuple[Tensor, ...]:
        """View the slices of the middle core, each `(l, width * j * r)`."""
        return middle.view(len(middle), self.count, -1).unbind(1)

    def build(self, left: Tensor, middle: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
        """Write one expert's matrix, shape `(o * p * q, i * j * k)`, into `matrix`."""
        left, right = left.flatten(0, 1), right.flatten(1)
        for piece, place in zip(self.of_middle(middle), self.of_matrix(matrix), strict=True):
            torch.mm(left, piece, out=self.half)
            torch.mm(self.half.view(-1, len(right)), right, out=self.whole)
            place.copy_(self.ordered)
        return matrix

    def add_gradients(
        self,
        cores: tuple[Tensor, Tensor, Tensor],
        gradients: tuple[Tensor, Tensor | None, Tensor],
        of_matrix: Tensor,
    ) -> None:
        """Add the gradients of left end, middle and right end, computed from the gradient of the matrix."""
        left, middle, right = cores[0].flatten(0, 1), cores[1], cores[2].flatten(1)
        of_left, of_middle, of_right = gradients
        of_left, of_right = of_left.view_as(left), of_right.view_as(right)
        of_half = torch.empty_like(self.half)
        of_pieces = [None] * self.count if of_middle is None else self.of_middle(of_middle)
        places = self.of_matrix(of_matrix)
        for piece, of_piece, place in zip(self.of_middle(middle), of_pieces, places, strict=True):
            self.ordered.copy_(place)
            torch.mm(left, piece, out=self.half)
            of_right.addmm_(self.half.view(-1, len(right)).T, self.whole)
            torch.mm(self.whole, right.T, out=of_half.view(-1, len(right)))
            of_left.addmm_(of_half, piece.T)
            if of_piece is not None:
                of_piece.addmm_(left.T, of_half)


def products(operands: Operands, groups: Active, *, keep: bool) -> list[Tensor]:
    """Compute `chain_rows` without autograd; return the result, followed by the matrices if they are kept.

    Args:
        operands: rows, left ends, right ends and middle, see `chain_rows`.
        groups: the experts that have rows, and their numbers of rows.
        keep: whether to keep the matrix of each expert.
    """
    x, (left, right, middle) = operands[0], (core.contiguous() for core in operands[1:])
    slices = _Slices(left, middle, right)
    matrices = [middle.new_empty(slices.shape) for _ in range(len(groups[0]) if keep else 1)]
    y = x.new_empty(len(x), slices.shape[0])
    experts, sizes = groups
    for n, (rows, of_rows) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        e = experts[n]
        matrix = slices.build(left[e], middle, right[e], matrices[n if keep else 0])
        torch.mm(rows, matrix.T, out=of_rows)
    return [y, *(matrices if keep else ())]


def gradients(
    grad: Tensor, operands: Operands, groups: Active, kept: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the operands of `products` without recording.

    Args:
        grad: gradient of the result, shape `(rows, o * p * q)`.
        operands: rows, left ends, right ends and middle.
        groups: the experts that have rows, and their numbers of rows.
        kept: their matrices; unused if the rows need no gradient.
        needed: which operands need a gradient.
    """
    grad, x, left, right, middle = (tensor.contiguous() for tensor in (grad, *operands))
    experts, sizes = groups
    of_x = torch.empty_like(x) if needed[0] else None
    if of_x is not None:
        for part, of_rows, matrix in zip(of_x.split(sizes), grad.split(sizes), kept, strict=True):
            torch.mm(of_rows, matrix, out=part)
    if not any(needed[1:]):
        return of_x, None, None, None
    of_left, of_right = torch.zeros_like(left), torch.zeros_like(right)
    of_middle = torch.zeros_like(middle) if needed[3] else None
    slices = _Slices(left, middle, right)
    of_matrix = middle.new_empty(slices.shape)
    for e, rows, of_rows in zip(experts, x.split(sizes), grad.split(sizes), strict=True):
        torch.mm(of_rows.T, rows, out=of_matrix)
        slices.add_gradients((left[e], middle, right[e]), (of_left[e], of_middle, of_right[e]), of_matrix)
    return of_x, of_left, of_right, of_middle


class _ChainRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, middle: Tensor, groups: Active, keep: bool
    ) -> Tensor:
        ctx.groups = groups
        y, *kept = products((x, left, right, middle), groups, keep=keep)
        ctx.save_for_backward(x, left, right, middle, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, middle, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        return (*gradients(grad, (x, left, right, middle), ctx.groups, kept, needed), None, None)


def _fewest_slices(size: int, bytes_each: int) -> int:
    """Return the smallest number of equal slices of a leg for which a slice fits the cache."""
    fitting = (n for n in range(1, size + 1) if size % n == 0 and size // n * bytes_each <= _SLICE_BYTES)
    return next(fitting, size)


def _words(tensor: Tensor) -> Tensor:
    """View the last dimension as words of 16 or 8 bytes if possible, which makes copies faster."""
    run = tensor.shape[-1] * tensor.element_size()
    for word in (torch.complex128, torch.float64):
        if run % word.itemsize == 0:
            return tensor.view(word)
    return tensor
