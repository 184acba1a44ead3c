"""Grouped matrix products `y_r = W_e(r) x_r`: rows sorted by expert, one matrix for each expert.

In all functions `x: (rows, in)` has the dtype of the product, and the result has shape `(rows, out)`.
There are two implementations. `grouped_mm` is one kernel that needs no sizes on the host and can be compiled;
the other is a loop that calls matmul for each expert. Which one is faster on CPUs depends on the number of
rows. On one CPU core, with 8 experts of 768 x 3072, the times of forward and backward are:

- 2048 rows: 0.64 s with the loop, 0.80 s with `grouped_mm`;
- 64 rows: 0.22 s with the loop, 0.15 s with `grouped_mm`.

So on CPUs the loop is used if there are at least `_LOOP_ROWS` rows per expert. On other devices `grouped_mm`
is used if its kernel supports the shapes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOOP_ROWS = 32
_ALIGNMENT = 16  # bytes; `grouped_mm` needs rows that start at multiples of this
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Groups:
    """Assignment of rows to experts; the rows are sorted by expert.

    Args:
        counts: number of rows of each expert, shape `(E,)`, integer.
        expert_of_row: expert of each row, ascending, shape `(rows,)`.
        sizes: `counts` as integers on the host; None in compiled code, where they are unknown.
    """

    counts: Tensor
    expert_of_row: Tensor
    sizes: tuple[int, ...] | None

    @property
    def active(self) -> list[int] | None:
        """Indices of the experts to which at least one row is routed; None in compiled code.

        If there are no rows, the result is `[0]`, so that all parameters still get a gradient.
        """
        if self.sizes is None:
            return None
        return [e for e, size in enumerate(self.sizes) if size] or [0]


def group_rows(expert_of_row: Tensor, num_experts: int) -> Groups:
    """Make the `Groups` of rows that are sorted by expert."""
    experts = torch.arange(num_experts, device=expert_of_row.device)
    counts = (expert_of_row.unsqueeze(-1) == experts).sum(0)
    # On GPUs, `tolist` synchronizes once per layer. But then experts without rows need no matrices.
    sizes = None if torch.compiler.is_compiling() else tuple(counts.tolist())
    return Groups(counts, expert_of_row, sizes)


def one_group(x: Tensor) -> Groups:
    """Assign all rows to one expert."""
    counts = torch.full((1,), len(x), dtype=torch.long, device=x.device)
    expert_of_row = torch.zeros(len(x), dtype=torch.long, device=x.device)
    return Groups(counts, expert_of_row, None if torch.compiler.is_compiling() else (len(x),))


def takes_grouped_mm(x: Tensor, out_features: int, groups: Groups) -> bool:
    """Return True if `grouped_mm` supports the shapes and is faster than a loop over experts."""
    if x.dtype not in _DTYPES:
        return False
    if any(size * x.element_size() % _ALIGNMENT for size in (x.shape[-1], out_features)):
        return False
    if groups.sizes is None:
        return x.dtype is torch.bfloat16  # the only dtype for which it compiles
    if x.device.type == "cpu":
        return 0 < len(x) < _LOOP_ROWS * len(groups.sizes) and torch.is_grad_enabled()
    return len(x) > 0


def grouped_linear(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """Multiply rows by the matrices `(n, out, in)` of all or only the active experts, with `grouped_mm`."""
    active = groups.active
    counts = groups.counts
    if active is not None and len(active) == len(matrices) < len(counts):
        counts = counts[torch.tensor(active, device=counts.device)]
    ends = counts.cumsum(0).to(torch.int32)
    # The matrices of a padded topology are slices, whose rows may not be aligned.
    matrices = matrices.contiguous()
    return torch.nn.functional.grouped_mm(x, matrices.transpose(-1, -2), offs=ends)


def looped_linear(x: Tensor, matrices: Iterable[Tensor], groups: Groups) -> Tensor:
    """Multiply rows by the matrices `(out, in)` of the active experts, with one matmul for each expert."""
    assert groups.sizes is not None
    assert groups.active is not None
    pieces = x.split([groups.sizes[e] for e in groups.active])
    return torch.cat(
        [torch.nn.functional.linear(piece, w) for piece, w in zip(pieces, matrices, strict=True)]
    )


def rows_linear(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """Multiply rows by the matrices `(E, out, in)` of all experts, without `grouped_mm`."""
    if groups.active is None:
        return expert_linear(x, matrices, groups.counts)
    each = matrices.unbind(0)
    return looped_linear(x, [each[e] for e in groups.active], groups)


def masked_linear(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """Multiply every row by the matrices `(E, out, in)` of all experts, and keep its own expert's result.

    Rows may be in any order. This takes as long as `E` dense layers, but uses only standard operations of
    fixed sizes, so that exported programs run without Python and without custom operators.
    """
    y = x.new_zeros(x.shape[0], matrices.shape[1])
    for expert, matrix in enumerate(matrices.unbind()):
        chosen = (groups.expert_of_row == expert).unsqueeze(-1)
        y = torch.where(chosen, torch.nn.functional.linear(x, matrix), y)
    return y


@torch.library.custom_op("tensornet_moe::expert_linear", mutates_args=())
def expert_linear(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Multiply rows by matrices `(E, out, in)` in compiled code; expert `e` has `counts[e]` rows.

    The counts are known only at run time, so a loop over experts cannot be compiled. This custom operator is
    opaque to the compiler, so that a mixture compiles to one graph in every dtype; `grouped_mm` compiles for
    bfloat16 only.
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
