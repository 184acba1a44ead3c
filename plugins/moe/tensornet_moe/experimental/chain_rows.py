"""Product of rows with the matrices of chains that share their middle core, slice by slice on CPUs.

Let `M` be the middle core of a chain, and `L` and `R` the products of the cores before and after it. The
matrix is `W[(o p q), (i j k)] = sum_lr L[o, i, l] M[l, p, j, r] R[r, q, k]`. It takes two thin products,
first `T = L M`, then `T R`, and one copy that brings rows and columns into order. This module is faster than
the same operations recorded by autograd for three reasons. Both products work on a slice of the middle that
fits the second-level cache, in memory that is reused for every slice and every expert. The copy moves whole
runs of `k` as single words. The backward pass adds each expert's gradient to that of the middle in place.
Only the matrices are kept for the backward pass, and only if the rows need a gradient. `T`, as large as a
matrix, is recomputed. With 8 experts of 768 x 3072 and 2,048 tokens on one core, recomputing the matrices as
well would make a step 5 % slower.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from tensornet._util import transforms_active
from tensornet.topology import Topology
from tensornet_moe.experts import BUILT_ALONE, SharedCoreExperts
from tensornet_moe.grouped_linear import Groups

#: Largest bytes of a slice of `T`. It and a slice of the matrix should fit into the second-level cache.
_SLICE_BYTES = 2**20

#: Largest number of elements of `L` or `R`, as a fraction of the elements of a matrix.
_SMALL_ENDS = 1 / 8


def use_chain_rows(model: nn.Module) -> int:
    """Make the banks of a model use `chain_kernel` if their topology is a chain with one shared inner core.

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
        if isinstance(bank, SharedCoreExperts) and middle_of(bank.topology, bank.shared) is not None:
            bank.kernel = chain_kernel
            found += 1
    return found


def middle_of(topology: Topology, shared: Sequence[str]) -> int | None:
    """Return the index of the only shared core of a chain with small `L` and `R`; None for other networks.

    Args:
        topology: the operator of one expert.
        shared: names of the shared cores.

    Example:
        >>> topology = tn.topologies.mpo(out_dims=(4, 192, 4), in_dims=(4, 48, 4))
        >>> middle_of(topology, ("1",)), middle_of(topology, ("0", "2"))
        (1, None)
    """
    names, count, size = topology.core_names, len(topology.cores), topology.size_of
    if len(shared) != 1 or topology.terms or topology.padded_shape != topology.shape:
        return None
    middle = names.index(shared[0])
    bonds = [topology.cores[0].labels[0], *(core.labels[-1] for core in topology.cores)]
    legs = list(zip(topology.out_labels, topology.in_labels, strict=False))
    chain = [(bonds[n], *pair, bonds[n + 1]) for n, pair in enumerate(legs) if n < count]
    if [core.labels for core in topology.cores] != chain or not 0 < middle < count - 1:
        return None
    if len(topology.out_labels) != count or size[bonds[0]] * size[bonds[-1]] != 1 or len(set(bonds)) <= count:
        return None
    left = size[bonds[middle]] * math.prod(size[x] for pair in legs[:middle] for x in pair)
    right = size[bonds[middle + 1]] * math.prod(size[x] for pair in legs[middle + 1 :] for x in pair)
    return middle if max(left, right) <= _SMALL_ENDS * math.prod(topology.shape) else None


def chain_kernel(bank: SharedCoreExperts, x: Tensor, groups: Groups) -> Tensor | None:
    """Compute `y_r = W_e(r) x_r`; None if the kernel cannot be used. See `SharedCoreExperts.kernel`."""
    middle = middle_of(bank.topology, bank.shared)
    if middle is None or bank.out_features * bank.in_features < BUILT_ALONE or groups.sizes is None:
        return None
    if x.device.type != "cpu" or x.dtype != bank.dtype or x.dtype not in (torch.float32, torch.float64):
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if transforms_active() or forward_ad._current_level >= 0:
        return None
    cores = list(bank.cores().values())

    def merged(part: Sequence[Tensor]) -> Tensor:
        """Multiply neighbouring private cores, each `(E, left, out, in, right)`, into one."""

        def pair(left: Tensor, right: Tensor) -> Tensor:
            return torch.einsum("eaoib,ebpjc->eaopijc", left, right).flatten(2, 3).flatten(3, 4)

        return reduce(pair, part)

    ends = merged(cores[:middle]).squeeze(1), merged(cores[middle + 1 :]).squeeze(-1)
    return chain_rows(x, ends, cores[middle], groups.sizes)


def chain_rows(x: Tensor, ends: tuple[Tensor, Tensor], middle: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute `y_r = W_e(r) x_r` for rows sorted by expert; it can be differentiated only once.

    Args:
        x: shape `(rows, i * j * k)`.
        ends: `L` of all experts, `(E, o, i, l)`, and `R`, `(E, r, q, k)`.
        middle: the shared core, `(l, p, j, r)`.
        sizes: number of rows of each expert.

    Returns:
        Shape `(rows, o * p * q)`.

    Example:
        >>> ends = torch.randn(2, 2, 3, 6), torch.randn(2, 4, 2, 2)
        >>> y = chain_rows(torch.randn(5, 3 * 4 * 2), ends, torch.randn(6, 5, 4, 4), (0, 5))
        >>> y.shape
        torch.Size([5, 20])
    """
    keep = torch.is_grad_enabled() and x.requires_grad
    return _ChainRows.apply(x, *ends, middle, [(e, n) for e, n in enumerate(sizes) if n], keep)


class _ChainRows(torch.autograd.Function):
    """Autograd function of `chain_rows`; `groups` has `(expert, number of rows)` for experts with rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        middle: Tensor,
        groups: list[tuple[int, int]],
        keep: bool,
    ) -> Tensor:
        saved = (x, left, right, middle)
        left, right, middle = left.contiguous(), right.contiguous(), middle.contiguous()
        slices = _Slices(left, middle, right)
        matrices = [middle.new_empty(slices.shape) for _ in range(len(groups) if keep else 1)]
        y, start = x.new_empty(len(x), slices.shape[0]), 0
        for n, (e, size) in enumerate(groups):
            matrix, rows = matrices[n if keep else 0], slice(start, start := start + size)
            slices.build(left[e], middle, right[e], matrix)
            torch.mm(x[rows], matrix.T, out=y[rows])
        ctx.groups = groups
        ctx.save_for_backward(*saved, *(matrices if keep else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, middle, *kept = (tensor.contiguous() for tensor in ctx.saved_tensors)
        grad, needed = grad.contiguous(), ctx.needs_input_grad[:4]
        of_x = torch.empty_like(x) if needed[0] else None
        of_left, of_right = torch.zeros_like(left), torch.zeros_like(right)
        of_middle = torch.zeros_like(middle) if needed[3] else None
        slices, start = _Slices(left, middle, right), 0
        of_matrix = middle.new_empty(slices.shape)
        for n, (e, size) in enumerate(ctx.groups):
            rows = slice(start, start := start + size)
            if of_x is not None:
                torch.mm(grad[rows], kept[n], out=of_x[rows])
            if any(needed[1:]):
                torch.mm(grad[rows].T, x[rows], out=of_matrix)
                cores, gradients = (left[e], middle, right[e]), (of_left[e], of_middle, of_right[e])
                slices.add_gradients(cores, gradients, of_matrix)
        return of_x, of_left, of_right, of_middle, None, None


class _Slices:
    """Memory for one slice of `T` and of the matrix, reused for every slice and every expert."""

    def __init__(self, left: Tensor, middle: Tensor, right: Tensor) -> None:
        (_, o, i, _), (_, p, j, r), (_, _, q, k) = left.shape, middle.shape, right.shape
        # Split `p` into as few equal slices as possible, each at most `_SLICE_BYTES`.
        each = o * i * j * r * middle.element_size()
        fitting = (n for n in range(1, p + 1) if p % n == 0 and p // n * each <= _SLICE_BYTES)
        self.count = next(fitting, p)
        width = p // self.count
        self.shape, self.legs = (o * p * q, i * j * k), (o, self.count, width, q, i, j, k)
        self.half = middle.new_empty(o * i, width * j * r)
        self.whole = middle.new_empty(o * i * width * j, q * k)
        self.ordered = _words(self.whole.view(o, i, width, j, q, k))

    def of_matrix(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """View the parts of a matrix that the slices fill, with dimensions ordered as in `self.ordered`."""
        return _words(matrix.view(self.legs)).permute(1, 0, 4, 2, 5, 3, 6).unbind(0)

    def of_middle(self, middle: Tensor) -> tuple[Tensor, ...]:
        """View the slices of the middle core, each `(l, width * j * r)`."""
        return middle.view(len(middle), self.count, -1).unbind(1)

    def build(self, left: Tensor, middle: Tensor, right: Tensor, matrix: Tensor) -> None:
        """Write one expert's matrix, shape `(o * p * q, i * j * k)`, into `matrix`."""
        left, right = left.flatten(0, 1), right.flatten(1)
        for piece, place in zip(self.of_middle(middle), self.of_matrix(matrix), strict=True):
            torch.mm(left, piece, out=self.half)
            torch.mm(self.half.view(-1, len(right)), right, out=self.whole)
            place.copy_(self.ordered)

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


def _words(tensor: Tensor) -> Tensor:
    """View the last dimension as words of 16 or 8 bytes if possible, which makes copies faster."""
    run = tensor.shape[-1] * tensor.element_size()
    for word in (torch.complex128, torch.float64):
        if run % word.itemsize == 0:
            return tensor.view(word)
    return tensor
