"""Inputs of the layers of a block as they arrive: after the layers before them have been rounded.

The layers of a block are visited in waves. A wave is a set of layers that read the same tensor, such as the
projections of queries, keys and values, or that are alternatives, such as the experts of a mixture. When the
inputs of a wave are known, the caller rounds its layers, and the block runs again up to the next wave.

A dense twin runs beside the compressed model: the same block with dense weights on the hidden states of the
dense model. So the inputs that a layer gets in both models are compared, token by token. If the output of a
layer is added to another tensor (the residual stream), these tensors are compared too.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the only way to see what an output is added to
from torch.utils._pytree import tree_leaves  # no public function walks over nested tuples

from tensornet.calibration.batches import Stop, token_mask
from tensornet.calibration.blockwise import Precision, inputs_outside
from tensornet.calibration.calibrate import MomentRecorder, token_rows
from tensornet.calibration.losses import TokenLosses
from tensornet.calibration.moment_sums import add_products
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import Walk, block_of

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Mismatch:
    """Difference between what a layer gets in the dense model and in the compressed model.

    The layer reads `x` in the dense model and `x~` in the compressed model. Its output is added to `h` and
    `h~`. All means are over tokens.

    Args:
        inputs: mean of `(x - x~) x~^T`, shape `(in, in)`.
        residual: mean of `(h - h~) x~^T`, shape `(out, in)`; None if the output is not added to anything.
        tokens: number of tokens.
    """

    inputs: Tensor
    residual: Tensor | None
    tokens: int


@dataclass(frozen=True)
class Wave:
    """Layers whose inputs are known.

    Args:
        names: names of the layers.
        stats: moments of their inputs in the compressed model.
        mismatch: differences from the dense model, by layer; without layers whose tokens cannot be paired.
    """

    names: Sequence[str]
    stats: CalibrationStats
    mismatch: Mapping[str, Mismatch]


class TwinRecorder(MomentRecorder):
    """Recorder that compares what layers get in the compressed model with what they get in the dense model.

    For each block, the dense model runs first (`watching`), then the compressed model once for each wave of
    layers (`comparing`). Outside of these contexts, this is a `MomentRecorder`.
    """

    def restart(self) -> None:
        """Delete all sums."""
        super().restart()
        self._watching = False
        self._wave: frozenset[str] | None = None  # layers that are compared
        # Calls and additions that are left until all layers of the wave have been compared. It starts at 0 if
        # the batch shall run to the end.
        self._open = 0
        self._number = -1  # index of the batch
        self._inputs: dict[tuple[str, ...], Tensor] = {}  # sums of (x - x~) x~^T, by layers that share them
        self._residuals: dict[str, Tensor] = {}  # sums of (h - h~) x~^T

    @contextmanager
    def watching(self, model: nn.Module, block: str) -> Iterator[None]:
        """Return a context in which the dense model runs; what the layers of a block get is kept."""
        self.restart()
        self._watching = True
        self._modules = {x: model.get_submodule(x) for x in self.layers if block_of(x, (block,))}
        self._unpaired = {x for x in self._modules if len(self._alternatives(x)) > 1}
        self._dense: dict[str, deque[Tensor]] = {}  # inputs, one for each call of the layer
        self._streams: dict[str, deque[Tensor]] = {}  # what the outputs were added to
        self._events: list[Counter[str]] = []  # calls and additions in each batch, by layer
        self._groups: list[tuple[list[str], Tensor]] = []  # the inputs of the first batch, and their layers
        with self._additions(self._modules.keys() - self._unpaired):
            yield
            self._settle()
        self.restart()

    def waves(self) -> list[list[str]]:
        """List the waves of layers of the block, in the order in which their inputs arrive."""
        found: list[tuple[list[str], Tensor]] = []
        for layers, tokens in self._groups:
            families = {x for name in layers for x in self._alternatives(name)}
            # Experts are looked for first: one that gets all tokens reads the same as other layers.
            joined = [wave for wave, _ in found if not families.isdisjoint(wave)] or [
                wave for wave, read in found if read.shape == tokens.shape and torch.equal(read, tokens)
            ]
            if not joined:
                joined = [[]]
                found.append((joined[0], tokens))
            wave = joined[0]
            wave += [x for x in sorted(families) if x not in wave]
        self._groups.clear()
        waves = [wave for wave, _ in found]
        if rest := sorted(self._modules.keys() - {name for wave in waves for name in wave}):
            waves.append(rest)  # layers that did not run on the first batch
        return waves

    @contextmanager
    def comparing(self, wave: Sequence[str]) -> Iterator[None]:
        """Return a context in which the compressed model runs, to compare what the layers of a wave get."""
        self.restart()
        self._wave = frozenset(wave)
        writers = [name for name in wave if self._streams.get(name)]
        with self._additions(writers) if writers else nullcontext():
            yield
        self.restart()
        for name in wave:
            self._dense.pop(name, None)
            self._streams.pop(name, None)

    def mismatches(self, counts: Mapping[str, int]) -> dict[str, Mismatch]:
        """Return the differences of the layers of the wave, given the number of tokens of each."""
        found = {}
        for names, total in self._inputs.items():
            tokens = counts[names[0]]
            mean = total / tokens
            for name in names:
                residual = self._residuals.get(name)
                found[name] = Mismatch(mean, None if residual is None else residual / tokens, tokens)
        return {name: x for name, x in found.items() if name not in self._unpaired}

    def expect(self, batch: Mapping[str, Any]) -> None:
        """Set the batch on which the model runs next; padding in the batch is ignored."""
        self._settle()
        super().expect(batch)
        self._number += 1
        if self._watching:
            self._events.append(Counter())
        elif self._wave is not None:
            # A mixture may send other tokens to its experts than in the dense model, so all of it runs.
            self._open = (
                0 if self._wave & self._unpaired else sum(self._events[self._number][x] for x in self._wave)
            )

    def see_input(self, name: str, x: Tensor) -> None:
        """Add the moment of a layer's input to its sum, and compare it with that in the dense model."""
        if self._wave is None or name in self._wave:
            super().see_input(name, x)
            if self.seeing:
                self._happened(name)

    def _alternatives(self, name: str) -> list[str]:
        """List the layers of the block that read tokens in place of a layer, including the layer itself."""
        return [x for x in self.siblings.get(name, (name,)) if x in self._modules]

    def _settle(self) -> None:
        last = self._last
        if last is not None and self._watching:
            for name in last.layers:
                if name not in self._unpaired:
                    self._dense.setdefault(name, deque()).append(last.tokens)
            if not self._number:
                self._groups.append((last.layers, last.tokens))
            self._last = None
            return
        if last is not None and self._wave is not None:
            self._compare(tuple(last.layers), last.tokens)
        super()._settle()

    def _compare(self, layers: tuple[str, ...], tokens: Tensor) -> None:
        """Add `(x - x~) x~^T` to the sum of the layers that have read a tensor."""
        dense = [self._dense[x].popleft() if self._dense.get(x) else None for x in layers]
        first = dense[0]
        unlike = any(x is not first for x in dense)
        if first is None or first.shape != tokens.shape or unlike or first.is_complex():
            self._unpaired.update(layers)
            return
        if layers not in self._inputs:
            self._inputs[layers] = torch.zeros(2 * tokens.shape[1:], device=tokens.device)
        add_products(self._inputs[layers], first - tokens, tokens)

    def _added(self, name: str, stream: Tensor) -> None:
        """Keep the tensor to which an output is added, or compare it with that of the dense model."""
        rows = token_rows(stream, token_mask(self.batch, stream.shape[:-1]))
        if self._watching:
            self._streams.setdefault(name, deque()).append(rows)
        else:
            dense, last = self._streams[name].popleft(), self._last
            if last is None or name not in last.layers or not len(rows) == len(dense) == len(last.tokens):
                self._unpaired.add(name)
            else:
                if name not in self._residuals:
                    shape = rows.shape[1], last.tokens.shape[1]
                    self._residuals[name] = torch.zeros(shape, device=rows.device)
                add_products(self._residuals[name], dense - rows, last.tokens)
        self._happened(name)

    def _happened(self, name: str) -> None:
        """Count a call or an addition; raise `Stop` after the last one of a wave."""
        if self._watching:
            self._events[-1][name] += 1
        elif self._wave is not None:
            self._open -= 1
            if not self._open:
                raise Stop

    @contextmanager
    def _additions(self, layers: Iterable[str]) -> Iterator[None]:
        """Return a context in which `_added` is called when the output of a layer is added to a tensor."""
        mode = _Additions(self._added)
        handles = [self._modules[x].register_forward_hook(partial(mode.watch, x)) for x in layers]
        try:
            with mode:
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Additions(TorchDispatchMode):
    """Mode that notes to what the outputs of layers are added.

    Only tensors that existed before the output count. Within an activation function, an output may be added
    to a power of itself.

    Args:
        added: function that is called with the name of a layer and the tensor.
    """

    def __init__(self, added: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.added = added
        self.outputs: dict[str, tuple[Tensor, set[int]]] = {}  # output of a layer, and memory used since then

    def watch(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a layer."""
        if isinstance(output, Tensor):
            self.outputs[name] = output, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.outputs:
            read = {_memory(x) for x in args if isinstance(x, Tensor)}
            made = {_memory(x) for x in tree_leaves(result) if isinstance(x, Tensor)} - read
            for _, later in self.outputs.values():
                later |= made
            if func in _ADDITIONS:
                for one, other in (args[:2], args[1::-1]):
                    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
                        self._see(one, other)
        return result

    def _see(self, one: Tensor, other: Tensor) -> None:
        """Report an addition if `one` is the output of a layer."""
        for name, (output, later) in self.outputs.items():
            if _memory(one) == _memory(output) and one.numel() == output.numel():
                del self.outputs[name]
                if _memory(other) not in later:
                    self.added(name, other)
                break


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def inputs_on_arrival(
    walk: Walk,
    twin: Walk,
    recorder: TwinRecorder,
    *,
    loss_fn: TokenLosses | None = None,
    scored: int = 0,
    precision: Precision = nullcontext,
) -> Iterator[tuple[str, Iterator[Wave]]]:
    """Yield each block and the waves of its layers; the layers outside of blocks are one wave, the last one.

    The caller takes one wave after the other, and may change the weights of its layers before it takes the
    next. The hidden states for the next block are computed after the last wave.

    Args:
        walk: the walk over the compressed model, which has been entered.
        twin: the same walk over the dense model.
        recorder: receives the inputs of the layers (see `calibrate.observed`).
        loss_fn, scored, precision: see `inputs_by_block`.
    """
    batches = walk.batches
    while walk.position < len(walk.names):
        name = walk.names[walk.position]
        with walk.loaded(walk.block.modules()):
            with precision(), torch.no_grad(), recorder.watching(walk.model, name):
                for number, batch in enumerate(batches):
                    recorder.expect(batch)
                    twin.states[twin.position + 1, number] = twin.run(number)
            yield name, _waves(walk, recorder, precision)
            with recorder.paused(), precision():
                walk.advance()
        for number in range(len(batches)):
            del twin.states[twin.position, number]
        twin.position += 1
    recorder.restart()
    for name, stats in inputs_outside(walk, recorder, loss_fn=loss_fn, scored=scored, precision=precision):
        yield name, iter([Wave(sorted(stats.counts), stats, {})])


def _waves(walk: Walk, recorder: TwinRecorder, precision: Precision) -> Iterator[Wave]:
    """Run the block at the position of a walk up to each wave of its layers."""
    for names in recorder.waves():
        with recorder.comparing(names):
            with precision(), torch.no_grad():
                for number, batch in enumerate(walk.batches):
                    recorder.expect(batch)
                    with suppress(Stop):
                        walk.run(number)
            stats = recorder.finish(1, None, "")
            mismatch = recorder.mismatches(stats.counts)
        yield Wave(names, stats, mismatch)
        del stats, mismatch  # they need more memory than anything else
