"""Moments of one block at a time, collected while walking over the blocks of a model.

The forward walk stores the hidden states before every block. The loss is computed from the last ones and
differentiated. The backward walk runs each block again on its stored inputs and differentiates it, so the
moments of the inputs and gradients of a block exist only while this block is visited.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial, reduce
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from tensornet._util import check_type
from tensornet.calibration.batches import (
    BatchLike,
    Stop,
    as_batch,
    check_batches,
    device_of,
    read_batches,
    run_model,
    small_batch,
    tokens_of,
)
from tensornet.calibration.calibrate import (
    ENOUGH_LOSSES,
    OWN_LOSSES,
    MomentRecorder,
    checked_losses,
    fast_dtype,
    lowered,
    mean_loss,
    observed,
)
from tensornet.calibration.losses import (
    TokenLosses,
    comparable_losses,
    default_losses,
    has_token_losses,
    label_losses,
)
from tensornet.calibration.stats import CalibrationStats, weight_samples
from tensornet.calibration.walk import Loaded, Walk, block_bar, blocks_to_walk, in_memory
from tensornet.errors import TargetError
from tensornet.nn.targets import LayerSelection, Target, check_loaded, check_model

#: Context in which models run, such as `torch.autocast`; called once for each pass.
Precision = Callable[[], AbstractContextManager[Any]]
#: Number of tokens that `calibrate` reads by default.
CALIBRATION_TOKENS = 16_384


@torch.inference_mode(False)  # gradients are needed even if the caller is in inference mode
def calibrate(
    model: nn.Module,
    batches: Iterable[BatchLike],
    *,
    config: LayerSelection | None = None,
    loss_fn: TokenLosses | None = None,
    tokens: int | None = None,
    gradients: bool = True,
    autocast: torch.dtype | Literal["auto"] | None = "auto",
    source: str = "calibration data",
    progress: bool = False,
) -> CalibrationStats:
    """Collect second moments of layer inputs and gradients, to predict the loss increase of weight errors.

    The model is walked over block by block, forward and backward, in eval mode on the device of its
    parameters, and is not changed. The moments of all layers are kept. Calls such as `compress` and `survey`,
    which drop the moments of a block as soon as the losses of its layers are predicted, need far less memory.

    If factors are fitted to moments of `n` independent tokens, the loss increase is larger by a fraction
    `(rows + columns) / n` than with exact moments. Pass batches in random order.

    Args:
        model: any module; layers of registered kinds are observed (see `tensornet.nn.LayerKind`).
        batches: iterable of batches. A batch may be a mapping of keyword arguments of the model (a Hugging
            Face batch). It may be a tensor, the first argument of the model, such as token indices
            `(rows, tokens)`. Or it may be a pair `(inputs, labels)`, as from a `DataLoader`.
        config: selects the layers to observe; all layers if absent.
        loss_fn: function that returns the losses of single tokens (see `tensornet.calibration.losses`);
            `sampled_losses` gives the true Fisher matrix instead of the empirical one. By default, the loss
            is the cross entropy of the labels (of the next token for classes such as `*ForCausalLM`), or the
            model's own mean loss for each token. If there are neither labels nor an own loss, it is the
            distance from the dense outputs.
        tokens: number of tokens to read, without padding; the last batch is cut. If the model does not read
            tokens, rows are counted instead (an image counts as 196 tokens). By default 16,384; if the loss
            belongs to rows instead of tokens, 1,024 rows are read.
        gradients: whether to differentiate the loss; this takes three times as long as only running the
            model. If False, only moments of inputs are collected.
        autocast: dtype in which the model runs under autocast. `"auto"` is `torch.bfloat16` for large float32
            models on devices where it is faster (`fast_dtype`); None keeps the caller's autocast. All moments
            are computed in float32.
        source: name of the data, for reports.
        progress: whether to show a progress bar.

    Raises:
        TargetError: there is no batch, or a batch has an unknown form.
        NonFiniteError: inputs or gradients of a layer are not finite; the message names the layer.
        ValueError: an option is out of range; the message names the option.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> batches = [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(4)]  # (inputs, labels)
        >>> stats = tn.calibrate(model, batches)
        >>> sorted(stats.columns), stats.tokens, stats.has_gradients
        (['0', '2'], 128, True)
    """
    check_model(model)
    if config is not None:
        advice = "a CompressionConfig, or LayerSelection(target_modules=...)"
        check_type("config", config, LayerSelection, advice)
    check_batches(batches, "calibrate")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}.")
    if autocast == "auto":
        autocast = fast_dtype(model)
    recorder = MomentRecorder()
    device = next(model.parameters()).device
    precision = partial(lowered, device, autocast)
    with observed(model, recorder, config) as targets:
        check_loaded(targets)
        with recorder.paused():
            walk, loss_fn, of_tokens = begin_walk(
                model,
                batches,
                targets,
                tokens=tokens or CALIBRATION_TOKENS,
                loss_fn=loss_fn,
                gradients=gradients,
                most=tokens or math.inf,
                precision=precision,
            )
        count, visits = sum(map(tokens_of, walk.batches)), len(walk.names) * (2 if gradients else 1) + 1
        with block_bar("calibrating", visits, count, progress=progress) as visited:
            parts = []
            for _, stats in (
                moments_by_block(walk, recorder, loss_fn, precision=precision, visited=visited)
                if gradients and loss_fn is not None
                else inputs_by_block(walk, recorder, loss_fn=loss_fn, precision=precision)
            ):
                parts.append(stats)
                visited()
        fingerprint = weight_samples(targets)
    found = reduce(joined, parts)
    tokens = max(found.counts.values(), default=0)
    loss = found.loss if gradients else None
    return replace(
        found, tokens=tokens, loss=loss, source=source, of_tokens=of_tokens, fingerprint=fingerprint
    )


def begin_walk(
    model: nn.Module,
    batches: Iterable[BatchLike],
    targets: Sequence[Target],
    *,
    tokens: int,
    most: float = math.inf,
    loss_fn: TokenLosses | None = None,
    gradients: bool = True,
    device: torch.device | None = None,
    states: Any = None,
    loaded: Loaded = in_memory,
    precision: Precision = nullcontext,
) -> tuple[Walk, TokenLosses | None, bool]:
    """Read batches, find out which loss a model has, and begin a walk over its blocks.

    Args:
        model: the model, in eval mode.
        batches: batches in one of the forms that `as_batch` accepts.
        targets: the observed layers.
        tokens: number of tokens to read. If the loss belongs to rows instead of tokens, 1,024 rows are read.
        most: number of tokens at which reading ends, even if there are too few rows.
        loss_fn: loss function; by default that of `default_losses`.
        gradients: whether the loss will be differentiated.
        device, states, loaded: see `Walk`.
        precision: context in which the model runs.

    Returns:
        The walk; the loss function, or None without gradients; and whether losses are those of tokens.

    Raises:
        TargetError: there is no batch.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise TargetError("Calibration got no batches; pass at least one, better 16 of 1,000 tokens.")
    batch = as_batch(first, model, device or device_of(model))
    of_tokens = False
    with torch.no_grad(), precision():
        if gradients and loaded is not in_memory:  # the whole model cannot run, as its weights are not loaded
            loss_fn, of_tokens = loss_fn or label_losses, has_token_losses(model)
        elif gradients and (loss_fn is None or loss_fn in OWN_LOSSES):
            default, entropies = default_losses(model, small_batch(batch, model) or batch)
            loss_fn = loss_fn or default
            of_tokens = loss_fn in OWN_LOSSES and entropies
        names = blocks_to_walk(model, targets, batch, loaded)
    rows = 0 if of_tokens or not gradients or most <= tokens else ENOUGH_LOSSES
    given = read_batches(chain([first], batches), model, tokens=tokens, rows=rows, most=most)
    return Walk(model, names, given, {} if states is None else states, loaded), loss_fn, of_tokens


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
    labelled = all(batch.get("labels") is not None for batch in batches)
    compared = comparable_losses(loss_fn, labelled=labelled)
    with walk.loaded(walk.ends), torch.enable_grad():
        for number, batch in enumerate(batches):
            hidden = walk.states[walk.position, number].requires_grad_() if walk.names else None
            recorder.expect(batch)
            with walk.leaving(number, hidden), precision():
                each = checked_losses(loss_fn(model, batch))
                with recorder.differentiating():
                    each.sum().backward()
            if compared is not None and compared is not loss_fn:
                with recorder.paused(), torch.no_grad(), walk.leaving(number, hidden), precision():
                    walk.losses.append(compared(model, batch).float().flatten().cpu())
            elif compared is not None:
                walk.losses.append(each.detach().float().flatten().cpu())
            if hidden is not None:
                assert hidden.grad is not None
                walk.states[walk.position, number] = hidden.grad
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
                hidden = walk.states[position, number]
                if differentiable := hidden.is_floating_point():  # an embedding may be the first block
                    hidden.requires_grad_()
                with precision():
                    output = walk.run(number, hidden)
                    with recorder.differentiating():
                        output.backward(walk.states[position + 1, number].to(output.dtype))
                if differentiable:
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
                    with suppress(Stop):
                        walk.run(number)
                    if not number:
                        recorder.stop_at_last(walk.names[walk.position])
            yield walk.names[walk.position], recorder.finish(1, None, "")
            with recorder.paused(), precision():
                walk.advance()
    recorder.restart()
    yield from inputs_outside(walk, recorder, loss_fn=loss_fn, scored=scored, precision=precision)


def inputs_outside(
    walk: Walk,
    recorder: MomentRecorder,
    *,
    loss_fn: TokenLosses | None = None,
    scored: int = 0,
    precision: Precision = nullcontext,
) -> Iterator[tuple[str, CalibrationStats]]:
    """Yield the moments of the inputs of the layers outside of blocks, under the name `""`.

    Then compute losses (see `inputs_by_block`). If the model is one block, all its layers are outside.
    """
    with walk.loaded(walk.ends), torch.no_grad():

        def run(number: int, function: Callable[..., Any]) -> Any:
            hidden = walk.states[walk.position, number] if walk.names else None
            with walk.leaving(number, hidden), precision():
                return function(walk.model, walk.batches[number])

        for number, batch in enumerate(walk.batches):
            recorder.expect(batch)
            # The batches of a model that is one block may be meant for a loss function.
            with suppress(Stop):
                run(number, run_model if walk.names or loss_fn is None else loss_fn)
            if not number:
                recorder.stop_at_last()
        yield "", without(recorder.finish(1, None, ""), walk.names)
        with recorder.paused():
            for number in range(len(walk.batches)):
                if loss_fn is None or sum(map(len, walk.losses)) >= scored:
                    break
                walk.losses.append(run(number, loss_fn).float().flatten().cpu())


#: Fields of the statistics that map names of layers to values.
_BY_LAYER = ("rows", "columns", "coherence", "counts", "factors")


def joined(first: CalibrationStats, second: CalibrationStats) -> CalibrationStats:
    """Join the statistics of different layers; for a layer in both, those of the second are taken."""
    both: dict[str, Any] = {x: {**getattr(first, x), **getattr(second, x)} for x in _BY_LAYER}
    return replace(first, **both)


def without(stats: CalibrationStats, names: Collection[str]) -> CalibrationStats:
    """Return the statistics of all layers except the named ones."""
    kept: dict[str, Any] = {
        x: {k: v for k, v in getattr(stats, x).items() if k not in names} for x in _BY_LAYER
    }
    return replace(stats, **kept)
