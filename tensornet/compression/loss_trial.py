"""Measure the loss of a model with some layers as planned, on a few rows of text, as cheaply as possible."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode
from tensornet.calibration.batches import BatchLike, some_rows
from tensornet.calibration.blockwise import find_chains, hidden_of, replaced_blocks
from tensornet.calibration.losses import TokenLosses, losses_against
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan
from tensornet.compression.forecast import Rise, light_copy, opposite_errors
from tensornet.compression.layer_plan import LayerPlan
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.rounded_layers import RoundedLayers
from tensornet.nn.unfuse import unfused

#: Tokens that losses are measured on.
TOKENS = 1024
#: Errors of models whose blocks cannot be left out: they need what a block does besides its output.
_CANNOT_SKIP = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


class LossTrial:
    """Dense model with the losses of a few rows, to compare partly compressed copies with.

    To explain how this works: blocks in front of the first compressed layer return what they return in the
    dense model, which is kept. So layers of the last block cost little more than that block and the head.

    Args:
        model: dense; it stays as it is.
        stats: that plans were made with.
        batches: as for `calibrate`; some rows are taken.
        loss_fn: see `tensornet.calibration.losses`; `losses_against(model)` if absent.
        rounded: takes layers that were rounded before, and keeps those that are rounded.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        stats: CalibrationStats,
        batches: Sequence[BatchLike],
        loss_fn: TokenLosses | None,
        rounded: RoundedLayers,
    ) -> None:
        self.model, self.stats, self.rounded = model, stats, rounded
        self.loss_fn = loss_fn or losses_against(model, remember=True)
        self.batches = some_rows(batches, model, TOKENS)
        self.blocks: tuple[str, ...] = ()
        self.outputs: list[list[Any]] = []  # by batch and block
        with in_eval_mode(model):
            self.loss_fn(model, self.batches[0])  # a model may be asked first where it scores labels
            chains = find_chains(model, self.batches[0])
        blocks = max(chains.values(), key=len, default=())
        self.dense = self._losses(model, self._recording(blocks))
        self.blocks = blocks
        if not self._can_skip():
            self.blocks, self.outputs = (), []

    @torch.no_grad()
    def rise(
        self, plan: CompressionPlan, layers: Sequence[LayerPlan], modules: Sequence[str], enough: float
    ) -> Rise:
        """Measure the loss increase of some layers of a plan, first-order noise removed.

        Args:
            plan: of the whole model.
            layers: those to be compressed.
            modules: names of all modules that hold their weights.
            enough: a rise certainly below this is not measured with the opposite errors as well.
        """
        compressed = light_copy(self.model)
        part = replace(plan, layers=tuple(layers), baseline=None, verification=None)
        apply_plan(compressed, part, self.stats, rounded=self.rounded)
        first = self._first_block(modules)
        found = self._losses(compressed, self._skipping(first))
        rise = Rise.of(found - self.dense)
        if rise.value + 2 * rise.standard_error <= enough:
            return rise
        with unfused(self.model), opposite_errors(self.model, compressed):
            opposite = self._losses(compressed, self._skipping(first))
        return Rise.of((found + opposite) / 2 - self.dense)

    def _losses(self, model: nn.Module, blocks: "_Blocks") -> Tensor:
        """Collect the losses of all rows, shape `(tokens,)`, with blocks run in another way."""
        found = []
        with in_eval_mode(model):
            for number, batch in enumerate(self.batches):
                with blocks(model, number):
                    found.append(self.loss_fn(model, batch).double().flatten().cpu())
        return torch.cat(found)

    def _recording(self, blocks: Sequence[str]) -> "_Blocks":
        """Keep copies of what blocks return."""

        @contextmanager
        def context(model: nn.Module, number: int) -> Iterator[None]:
            kept: list[Any] = [None] * len(blocks)
            self.outputs.append(kept)

            def step(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                kept[index] = _copied(output)
                return output

            with replaced_blocks(model, blocks, step):
                yield

        return context

    def _skipping(self, first: int) -> "_Blocks":
        """Leave out the blocks in front of one, and return their outputs that are kept."""

        @contextmanager
        def context(model: nn.Module, number: int) -> Iterator[None]:
            def step(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                return forward(*args, **kwargs) if index >= first else _copied(self.outputs[number][index])

            with replaced_blocks(model, self.blocks if first else (), step):
                yield

        return context

    def _first_block(self, modules: Sequence[str]) -> int:
        """Find the first block that holds one of some modules; 0 if one of them is outside of all blocks."""
        found = []
        for name in modules:
            inside = (k for k, block in enumerate(self.blocks) if f"{name}.".startswith(f"{block}."))
            found.append(next(inside, 0))
        return min(found, default=0)

    def _can_skip(self) -> bool:
        """Return True if the dense losses of a batch are the same with all blocks but the last left out."""
        if not self.blocks:
            return False
        skipping, copied = self._skipping(len(self.blocks) - 1), light_copy(self.model)
        try:
            with in_eval_mode(copied), skipping(copied, 0):
                found = self.loss_fn(copied, self.batches[0]).double().flatten().cpu()
        except _CANNOT_SKIP:
            return False
        return torch.allclose(found, self.dense[: len(found)], rtol=1e-4, atol=1e-5)


_Blocks = Callable[[nn.Module, int], Any]


def _copied(output: Any) -> Any:
    """Copy the hidden state in the output of a block, which others may change in place."""
    hidden = hidden_of(output).clone()
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
