"""Custom operators of `chain_rows`, for compiled code.

The row count of each expert is known only at run time, and a compiler would build all matrices at once in
fresh memory: the operators are opaque to it and run what eager code runs, see `chain_rows.py`.
"""

from typing import Any

import torch
from torch import Tensor

from tensornet_moe.chain_rows import gradients, products


@torch.library.custom_op("tensornet_moe::chain_products", mutates_args=())
def _chain_products(
    x: Tensor, left: Tensor, right: Tensor, middle: Tensor, counts: Tensor, keep: bool
) -> list[Tensor]:
    groups = _groups(counts)
    made = iter(products((x, left, right, middle), groups, keep=keep))
    y = next(made)
    if not keep:
        return [y]
    active = dict(zip(groups[0], made, strict=True))
    shape = (y.shape[1], x.shape[1])
    # Memory that is never written to is never handed out: a place for an idle expert costs nothing.
    return [y, *(active[e] if e in active else x.new_empty(shape) for e in range(len(left)))]


@_chain_products.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, middle: Tensor, counts: Tensor, keep: bool) -> list[Tensor]:
    rows = left.shape[1] * middle.shape[1] * right.shape[2]
    matrices = [x.new_empty(rows, x.shape[1]) for _ in range(len(left) if keep else 0)]
    return [x.new_empty(x.shape[0], rows), *matrices]


@torch.library.custom_op("tensornet_moe::chain_gradients", mutates_args=())
def _chain_gradients(
    grad: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    middle: Tensor,
    counts: Tensor,
    matrices: list[Tensor],
) -> list[Tensor]:
    experts, sizes = _groups(counts)
    kept = [matrices[e] for e in experts] if matrices else []
    needed = (bool(matrices), True, True, True)
    made = gradients(grad, (x, left, right, middle), (experts, sizes), kept, needed)
    return [gradient for gradient in made if gradient is not None]


@_chain_gradients.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    middle: Tensor,
    counts: Tensor,
    matrices: list[Tensor],
) -> list[Tensor]:
    cores = [torch.empty_like(core, memory_format=torch.contiguous_format) for core in (left, right, middle)]
    return [torch.empty_like(x), *cores] if matrices else cores


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.keep = inputs[-1]
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    x, left, right, middle, counts, *matrices = ctx.saved_tensors
    found = torch.ops.tensornet_moe.chain_gradients(grads[0], x, left, right, middle, counts, matrices)
    return (*([] if ctx.keep else [None]), *found, None, None)


_chain_products.register_autograd(_backward, setup_context=_save)


def compiled_chain_rows(x: Tensor, ends: tuple[Tensor, Tensor], middle: Tensor, counts: Tensor) -> Tensor:
    """Compute `chain_rows` in compiled code, where row counts are a tensor.

    Args:
        x: shape `(rows, i * j * k)`.
        ends: left ends `(E, o, i, l)` and right ends `(E, r, q, k)`.
        middle: the shared core, `(l, p, j, r)`.
        counts: rows of each expert, shape `(E,)`.

    Returns:
        Shape `(rows, o * p * q)`.

    Example:
        >>> ends = torch.randn(2, 2, 3, 6), torch.randn(2, 4, 2, 2)
        >>> counts = torch.tensor([2, 3])
        >>> compiled_chain_rows(torch.randn(5, 3 * 4 * 2), ends, torch.randn(6, 5, 4, 4), counts).shape
        torch.Size([5, 20])
    """
    keep = torch.is_grad_enabled() and x.requires_grad
    made: list[Tensor] = torch.ops.tensornet_moe.chain_products(x, *ends, middle, counts, keep)
    return made[0]


def _groups(counts: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the experts that have rows and their numbers of rows; the first expert if there is no row."""
    found = [(e, size) for e, size in enumerate(counts.tolist()) if size] or [(0, 0)]
    experts, sizes = zip(*found, strict=True)
    return experts, sizes
