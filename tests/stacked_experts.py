"""A stack of experts as one parameter, and Gaussian matrices for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensornet.nn.unfuse import Compound, Shared, StackedMatrices, register_compound


class Experts(nn.Module):
    """Experts of one shape `(experts, out, in)`, each of which reads tokens of its own."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weights.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eti,eoi->eto", x, self.w)


@register_compound
class SplitExperts(Compound):
    """The same experts, one layer each."""

    replaces = (Experts,)

    def __init__(self, stock: Experts, shared: Shared) -> None:
        names = tuple(f"{k}.w" for k in range(len(stock.w)))
        super().__init__(stock, (StackedMatrices("w", names, stock.w.shape[-1]),), shared)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.get_submodule(name) for name in self.layer_names)
        return torch.stack([layer(part) for layer, part in zip(layers, x.unbind(), strict=True)])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
