"""Moments of one block at a time, collected while walking over the blocks of a model.

The forward walk stores the hidden states before every block. The loss is computed from the last ones and
differentiated. The backward walk runs each block again on its stored inputs and differentiates it, so the
moments of the inputs and gradients of a block exist only while this block is visited.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from tensornet.calibration.batches import run_model
from tensornet.calibration.calibrate import MomentRecorder, checked_losses, mean_loss
from tensornet.calibration.losses import TokenLosses
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import Walk

#: Context in which models run, such as `torch.autocast`; called once for each pass.
Precision = Callable[[], AbstractContextManager[Any]]


def moments_by_block(
    walk: Walk,
    recorder: MomentRecorder,
    loss_fn: TokenLosses,
    *,
    precision: Precision = nullcontext,
    source: str = "calibration data",
    visited: Callable[[], object] = lambda: None,
) -> Iterator[tuple[str, CalibrationStats]]:
    """Yield the moments of the inputs and gradients of every block, from the last block to the first.

    The layers outside of the blocks come last, under the name `""`. If the model is one block, it is the
    only item. The weights of a block are not loaded when its moments are yielded.

    Args:
        walk: a walk that has not begun. Hidden states are replaced by gradients.
        recorder: receives the inputs and gradients of the layers (see `calibrate.observed`).
        loss_fn: the losses of single tokens, which are summed and differentiated.
        precision: context in which the model runs.
        source: name of the data, for reports.
        visited: function that is called after each block of the forward walk, to show progress.

    Raises:
        NonFiniteError: inputs or gradients of a layer are not finite; the message names the layer.
        TargetError: no token has a loss.
    """
    model, batches = walk.model, walk.batches

    # Forward walk: store the hidden states before every block.
    with recorder.paused(), precision():
        first = [walk.model.get_submodule(walk.names[0])] if walk.names else []
        with walk.loaded([*walk.ends, *(x for block in first for x in block.modules())]):
            walk.enter(skip=True)
        while walk.position < len(walk.names):
            with walk.loaded(walk.block.modules()):
                walk.advance(keep=True)
            visited()

    # Compute the losses from the last hidden states, and replace these states by their gradients.
    total, scored = 0.0, 0
    with walk.loaded(walk.ends), torch.enable_grad():
        for number, batch in enumerate(batches):
            hidden = walk.states[walk.position, number].requires_grad_() if walk.names else None
            recorder.expect(batch)
            with walk.leaving(number, hidden), precision():
                each = checked_losses(loss_fn(model, batch))
                with recorder.differentiating():
                    each.sum().backward()
            if hidden is not None:
                assert hidden.grad is not None
                walk.states[walk.position, number] = hidden.grad
            walk.losses.append(each.detach().float().flatten().cpu())
            total, scored = total + float(each.detach().sum()), scored + each.numel()
    loss = mean_loss(total, scored, loss_fn)
    outside = recorder.finish(scored, loss, source)

    # Backward walk: run each block again, differentiate, and replace its stored input by the gradient.
    for position in reversed(range(len(walk.names))):
        recorder.restart()
        walk.position = position
        with walk.loaded(walk.block.modules()), torch.enable_grad():
            for number, batch in enumerate(batches):
                recorder.expect(batch)
                hidden = walk.states[position, number].requires_grad_()
                with precision():
                    output = walk.run(number, hidden)
                    with recorder.differentiating():
                        output.backward(walk.states[position + 1, number].to(output.dtype))
                assert hidden.grad is not None
                walk.states[position, number] = hidden.grad
                del walk.states[position + 1, number]
        yield walk.names[position], recorder.finish(scored, loss, source)

    # Differentiate what runs before the first block. If a block is a single layer, this layer was called even
    # where the block was skipped, so its statistics are removed.
    if walk.names:
        recorder.restart()
        with walk.loaded(walk.ends), torch.enable_grad():
            for number, batch in enumerate(batches):
                recorder.expect(batch)
                with precision():
                    hidden = walk.first_hidden(number)
                    if hidden.requires_grad:
                        with recorder.differentiating():
                            hidden.backward(walk.states[0, number].to(hidden.dtype))
        outside = joined(outside, recorder.finish(scored, loss, source))
    yield "", without(outside, walk.names)


def inputs_by_block(
    walk: Walk,
    recorder: MomentRecorder,
    *,
    loss_fn: TokenLosses | None = None,
    scored: int = 0,
    start: int = 0,
    precision: Precision = nullcontext,
) -> Iterator[tuple[str, CalibrationStats]]:
    """Yield the moments of the inputs of each block, in order; those of layers outside of blocks come last.

    The weights of a block are loaded when its moments are yielded, and the caller may change them: the hidden
    states that the next block reads are computed afterwards, with the changed weights.

    Args:
        walk, recorder, precision: see `moments_by_block`.
        loss_fn: the losses of single tokens; if given, losses are computed at the end.
        scored: number of losses to compute; they are appended to `walk.losses`.
        start: index of the first block to visit; `walk.states` contains the hidden states before it.
    """
    with recorder.paused(), precision():
        first = [walk.model.get_submodule(walk.names[0])] if walk.names else []
        with walk.loaded([*walk.ends, *(x for block in first for x in block.modules())]):
            walk.enter(skip=True)
    if start:
        for number in range(len(walk.batches)):
            del walk.states[0, number]
        walk.position = start
    while walk.position < len(walk.names):
        recorder.restart()
        with walk.loaded(walk.block.modules()):
            with precision(), torch.no_grad():
                for number, batch in enumerate(walk.batches):
                    recorder.expect(batch)
                    walk.run(number)
            yield walk.names[walk.position], recorder.finish(1, None, "")
            with recorder.paused(), precision():
                walk.advance()
    recorder.restart()
    with walk.loaded(walk.ends), torch.no_grad():

        def run(number: int, function: Callable[..., Any]) -> Any:
            hidden = walk.states[walk.position, number] if walk.names else None
            with walk.leaving(number, hidden), precision():
                return function(walk.model, walk.batches[number])

        for number, batch in enumerate(walk.batches):
            recorder.expect(batch)
            run(number, run_model)
        yield "", without(recorder.finish(1, None, ""), walk.names)
        with recorder.paused():
            for number in range(len(walk.batches)):
                if loss_fn is None or sum(map(len, walk.losses)) >= scored:
                    break
                walk.losses.append(run(number, loss_fn).float().flatten().cpu())


def joined(first: CalibrationStats, second: CalibrationStats) -> CalibrationStats:
    """Join the statistics of different layers; for a layer in both, those of the second are taken."""
    return replace(
        first,
        rows={**first.rows, **second.rows},
        columns={**first.columns, **second.columns},
        coherence={**first.coherence, **second.coherence},
        counts={**first.counts, **second.counts},
        factors={**first.factors, **second.factors},
    )


def without(stats: CalibrationStats, names: Collection[str]) -> CalibrationStats:
    """Return the statistics of all layers except the named ones."""
    return replace(
        stats,
        rows={name: x for name, x in stats.rows.items() if name not in names},
        columns={name: x for name, x in stats.columns.items() if name not in names},
        coherence={name: x for name, x in stats.coherence.items() if name not in names},
        counts={name: x for name, x in stats.counts.items() if name not in names},
        factors={name: x for name, x in stats.factors.items() if name not in names},
    )
