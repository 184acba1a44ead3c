"""The transformers that moe_from_scratch.py trains, and what each is trained to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from scratch_rows import Row, Sizes, build
from scratch_t5 import batch_generator, build_t5, corrupt, span_loss, t5_networks
from scratch_text import Corpus


class Builder(Protocol):
    """A function that builds the model of a row."""

    def __call__(self, row: Row, sizes: Sizes, *, seed: int) -> nn.Module:
        """Build it."""


@dataclass(frozen=True)
class Architecture:
    """A transformer and its task.

    Args:
        build: the model of a row.
        examples: what `loss` takes, one row a window, of windows of text; a generator decides what is random.
        loss: mean loss of a token.
        networks: the feed-forward networks in order.
    """

    build: Builder
    examples: Callable[[Tensor, Sizes, torch.Generator], Tensor]
    loss: Callable[[nn.Module, Tensor, Sizes], Tensor]
    networks: Callable[[nn.Module], list[nn.Module]]

    def batch(self, corpus: Corpus, sizes: Sizes, step: int, *, windows: int, seed: int) -> Tensor:
        """Return the batch of a step: a function of step and seed."""
        text = corpus.batch(step, windows=windows, context=sizes.context, seed=seed)
        return self.examples(text, sizes, batch_generator(seed, step))

    def held_out(self, corpus: Corpus, sizes: Sizes, part: str, limit: int) -> Tensor:
        """Return up to `limit` examples of a part, the same for every row and seed."""
        text = corpus.windows(part, context=sizes.context, limit=limit)
        return self.examples(text, sizes, torch.Generator().manual_seed(0))


def cross_entropy(model: nn.Module, batch: Tensor, sizes: Sizes) -> Tensor:
    """Mean loss of the next token in nats."""
    ids = batch.long()
    logits = model(input_ids=ids[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gpt2_networks(model: nn.Module) -> list[nn.Module]:
    """List the feed-forward networks of a GPT-2."""
    return [block.mlp for block in model.get_submodule("transformer.h").children()]


ARCHITECTURES = {
    "gpt2": Architecture(build, lambda text, sizes, generator: text, cross_entropy, gpt2_networks),
    "t5": Architecture(build_t5, corrupt, span_loss, t5_networks),
}
