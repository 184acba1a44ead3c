"""Custom operator that multiplies each row by the matrix of its expert, for compiled code.

The row count of each expert is known only at run time, and a loop over such sizes cannot be compiled.
A custom operator is opaque to the compiler, so that a mixture compiles into one graph in every dtype
(`grouped_mm` compiles for bfloat16 only).
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("tensornet_moe::expert_linear", mutates_args=())
def expert_linear(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Compute `y_r = W_e(r) x_r` for rows sorted by expert.

    Args:
        x: shape `(rows, in)`.
        matrices: shape `(E, out, in)`.
        counts: rows of each expert, shape `(E,)`.

    Returns:
        Shape `(rows, out)`.
    """
    pieces = x.split(counts.tolist())
    return torch.cat(
        [torch.nn.functional.linear(piece, w) for piece, w in zip(pieces, matrices, strict=True)]
    )


@expert_linear.register_fake
def _(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[1])


@torch.library.custom_op("tensornet_moe::expert_outer", mutates_args=())
def _expert_outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    sizes = counts.tolist()
    return torch.stack([g.T @ piece for g, piece in zip(grad.split(sizes), x.split(sizes), strict=True)])


@_expert_outer.register_fake
def _(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, matrices, counts = ctx.saved_tensors
    return expert_linear(grad, matrices.transpose(1, 2), counts), _expert_outer(grad, x, counts), None


expert_linear.register_autograd(_backward, setup_context=_save)
