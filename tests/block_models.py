"""Small chains of blocks that read vectors, and random batches of vectors and of padded text."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def numbers(seed: int) -> tuple[Tensor, Tensor]:
    """20 vectors of 8 features, and a class of each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, 8, generator=generator), torch.randint(4, (20,), generator=generator)


def text(seed: int, rows: int = 3) -> dict[str, Tensor]:
    """Rows of 9 tokens; the second row ends with padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 101, (rows, 9), generator=generator)
    mask = torch.ones(rows, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def perceptron() -> nn.Module:
    """Five blocks, two of which have no weights."""
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))


class TwoReaders(nn.Module):
    """Two layers of one block use one weight, and so do layers of two blocks if `apart`."""

    def __init__(self, apart: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)
        )
        self.blocks[1][2].weight = self.blocks[1][0].weight
        if apart:
            self.blocks[2][0].weight = self.blocks[0][0].weight
        self.head = nn.Linear(8, 4)

    def forward(self, input: Tensor) -> Tensor:
        for block in self.blocks:
            input = block(input)
        return self.head(input)
