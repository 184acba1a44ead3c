"""A stack of experts as one parameter, and Gaussian matrices for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensornet.nn.unfuse import register_stacked_matrices


class Experts(nn.Module):
    """Experts of one shape `(experts, out, in)`, each of which reads tokens of its own."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weights.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eti,eoi->eto", x, self.w)


register_stacked_matrices(f"{Experts.__module__}.{Experts.__qualname__}", {"w": "eoi"})


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
