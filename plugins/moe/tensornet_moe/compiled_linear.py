"""The product of rows with their expert's matrix as one operator, for compiled code.

How many rows each expert has is known only when the code runs, and a loop over such sizes cannot be compiled.
As an operator of its own it is opaque to the compiler, so a mixture compiles into one graph in every dtype
(`grouped_mm` compiles for bfloat16 only).
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("tensornet_moe::expert_linear", mutates_args=())
def expert_linear(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """`y_r = W_e(r) x_r` for rows sorted by expert.

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
