"""Compress a model block by block; each layer is calibrated on outputs of the compressed layers before it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tensornet._util import remembering
from tensornet.calibration.arrival import Mismatch, TwinRecorder, inputs_on_arrival
from tensornet.calibration.batches import (
    Batch,
    BatchLike,
    Stop,
    device_of,
    read_batches,
    run_model,
    tokens_of,
)
from tensornet.calibration.calibrate import ENOUGH_LOSSES, MomentRecorder, lowered, observed
from tensornet.calibration.losses import TokenLosses
from tensornet.calibration.moment_sums import numbered_parts
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import (
    Loaded,
    Walk,
    block_bar,
    block_of,
    blocks_to_walk,
    in_memory,
    outer_stacks,
    replaced_blocks,
    walk_dtype,
)
from tensornet.compression.apply import (
    NewLayers,
    check_fits,
    check_samples,
    compress_layer,
    warn_of_scales,
    with_cores,
)
from tensornet.compression.candidates import relative_gap
from tensornet.compression.correction import corrected
from tensornet.compression.loss_increase import LossIncrease
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.sensitivity import input_weighting, is_known, layer_weighting, never_ran
from tensornet.compression.surveying import FULL_UP_TO, most_tokens
from tensornet.compression.tasks import Task, compress_tasks
from tensornet.damping import MOMENT_DAMPING
from tensornet.errors import TargetError
from tensornet.linalg.weighted_svd import Weighting, damped
from tensornet.nn.extension import fit_shared
from tensornet.nn.module import NetworkModule
from tensornet.nn.targets import LayerSelection, Target

#: Number of tokens on which the inputs of the blocks are computed, by `CompressionPlan.survey_kind`.
WRITE_TOKENS = {"fast": 16_384, "networks": 32_768, "thorough": 32_768}


@runtime_checkable
class Resumable(Protocol):
    """Hidden states that outlive a run, as a mapping from `(block, batch)`."""

    def complete(self, batches: int) -> int:
        """Return the largest index of a block before which the states of all batches are known, or 0."""

    def clear(self) -> None:
        """Remove all states."""


@dataclass
class _Compressor:
    """Compresses layers for the inputs that they get.

    Args:
        plan: the plan.
        targets: the planned weights, by name.
        factors, executor, compress: see `compress_blocks`.
        uncorrected: names of the weights whose corrected target was not used, since it was too far away.
    """

    plan: CompressionPlan
    targets: Mapping[str, Target]
    factors: Mapping[str, Tensor]
    executor: Executor | None
    compress: Callable[..., Any]
    uncorrected: list[str] = field(default_factory=list)

    def __call__(
        self,
        some: Sequence[Target],
        stats: CalibrationStats | None,
        mismatch: Mapping[str, Mismatch] = MappingProxyType({}),
    ) -> dict[str, NewLayers]:
        """Compress some weights.

        Args:
            some: the weights.
            stats: moments of their inputs; None if the errors of the weights are minimized.
            mismatch: differences of the inputs from those in the dense model, by layer.

        Raises:
            TargetError: a layer never ran, or the plan was made for other weights.
        """
        check_samples(self.plan, some)
        for target in some:
            if stats is not None and not is_known(target, stats):
                raise never_ran(target)
        weightings = {
            x.name: weighting_of(x, self.plan[x.name], self.plan, stats, self.factors) for x in some
        }
        alone = [x for x in some if self.plan[x.name].shared_core is None]
        with remembering():  # layers with the same inputs share the factor of their moment
            aims = [self._aim(x, weightings[x.name], mismatch.get(x.name)) for x in alone]
        tasks = [
            Task(x.matrix if aim is None else aim, self.plan[x.name], weightings[x.name], self.plan.rounding)
            for x, aim in zip(alone, aims, strict=True)
        ]
        done: dict[str, NewLayers] = {}
        new: dict[str, nn.Module] = {}
        for target, aim, (layer, error) in zip(
            alone, aims, compress_tasks(tasks, self.compress, self.executor), strict=True
        ):
            if aim is not None:
                error = relative_gap(target.matrix, layer.to_matrix())
            done[target.name], new[target.name] = (with_cores(target, layer), error), layer
        warn_of_scales(alone, new, lambda target: weightings[target.name])
        for names in self.plan.stacks:
            if names[0] in weightings:
                stack = [self.targets[x] for x in names]
                fitted = fit_shared(stack, [weightings[x] for x in names], self.plan[names[0]])
                done |= dict(zip(names, fitted, strict=True))
        return done

    def _aim(self, target: Target, weighting: Weighting, mismatch: Mismatch | None) -> Tensor | None:
        """Return the matrix to approximate so that errors of earlier layers are corrected.

        The result is None if the weight itself is approximated. Baselines do so as published, and a format
        that is exact for a weight would not be exact for another matrix.
        """
        matrix, moment = target.matrix, weighting.columns
        wanted = self.plan.rounding == "two_sided" and self.plan[target.name].loss_increase != 0
        if mismatch is None or not wanted or matrix.is_complex() or moment is None or moment.ndim != 2:
            return None
        if (aim := corrected(matrix, moment, mismatch)) is None:
            self.uncorrected.append(target.name)
        return aim


@torch.no_grad()
def compress_blocks(
    model: nn.Module,
    plan: CompressionPlan,
    batches: Iterable[BatchLike],
    *,
    tokens: int | None = None,
    states: Any = None,
    loaded: Loaded = in_memory,
    device: torch.device | None = None,
    factors: Mapping[str, Tensor] | None = None,
    heads: Mapping[str, Tensor] | None = None,
    loss_fn: TokenLosses | None = None,
    losses: Sequence[float] = (),
    measured: list[LossIncrease] | None = None,
    uncorrected: list[str] | None = None,
    written: Callable[[str], bool] = lambda name: False,
    executor: Executor | None = None,
    compress: Callable[..., Any] = compress_layer,
    progress: bool = False,
) -> Iterator[tuple[str, dict[str, NewLayers]]]:
    """Compress the layers of a plan block by block, and yield the new layers of each finished block.

    A layer is decomposed, or rounded with error feedback, for the inputs that it gets if all layers that run
    before it are compressed (see `tensornet.calibration.arrival`). The dense model runs beside it, and with
    `method="auto"` a part of the difference from it is corrected (see `correction`). In a model that is one
    block, all layers get the inputs of the dense model. Embeddings come first, under the name `""`, and a
    head that is tied to one with it, since every hidden state begins with the embedding. The other layers
    outside of the blocks come last, under the same name. If the plan minimizes the errors of the weights, the
    model does not run, and no batches are needed.

    An interrupted run continues at the block whose hidden states are in `states`, if the layers of all
    earlier blocks have been written. Written layers are not yielded again, except those of a block that was
    being written.

    While the generator runs, the weights of `model` in finished blocks may be replaced by compressed values.
    The original values are restored when the next block is ready, or when the generator is closed.

    Args:
        model: the dense model for which the plan was made.
        plan: the plan; layers that are not in it stay dense.
        batches: batches as for `calibrate`; the first `tokens` tokens are read.
        tokens: number of tokens to read; by default `WRITE_TOKENS`.
        states, loaded, device: see `survey`. Mappings that outlive a run have the methods of `Resumable`.
        factors: moments of gradients, with which networks are fitted and errors are fed back along the
            outputs too (see `Survey`).
        heads: moments of the inputs of tied heads, with which their networks are fitted (see `Survey`).
        loss_fn, losses: loss function, and the losses of the dense model on the first tokens.
        measured: receives the loss increase on these tokens when the last block is finished.
        uncorrected: receives the names of weights for which a correction was not used, at the end.
        written: function that returns True if an interrupted run has written the new layer of a weight.
        executor: executor that compresses the layers of a block in parallel; by default, this process
            compresses them one after another.
        compress: function that compresses one layer, like `compress_layer`.
        progress: whether to show a progress bar.

    Yields:
        The name of the block, and for each of its layers the new modules and the error of the weight.

    Raises:
        TargetError: there is no batch, a planned layer never runs, or the plan was made for other weights.
        WorkerError: a process of the executor died.
        NonFiniteError: the inputs of a layer are not finite; the message names the layer.

    Reference:
        Frantar et al. 2023, "GPTQ", section 4 (blocks are compressed one after another); Li et al. 2025,
        "GPTAQ" (dense inputs beside them).
    """
    recorder = TwinRecorder(diagonal_gradients=True, full_up_to=FULL_UP_TO)
    device = device or device_of(model)
    precision = partial(lowered, device, walk_dtype(model, loaded, device))
    layers = {layer.name: layer for layer in plan if layer.topology is not None}
    # Experts without tokens need the moments of their mixture, so experts that stay dense are observed too.
    names: Any = [x.name for x in plan if x.name in layers or len(numbered_parts(x.name)) > 1]
    given = batches_to_write(batches, model, plan, tokens)
    if not given and plan.reads_data:
        raise TargetError("No batches: pass at least one, better 16 of 1,000 tokens.")
    if not layers:
        return
    with ExitStack() as contexts:
        found = contexts.enter_context(observed(model, recorder, LayerSelection(target_modules=names)))
        targets = [x for x in found if x.name in layers]
        known = {x.name: x for x in targets}
        for name, layer in layers.items():
            check_fits(model, layer, known.get(name))
        if plan.reads_data:
            with recorder.paused(), precision():
                blocks = blocks_to_walk(model, targets, given[0], loaded)
        else:
            blocks = tuple(chain(*outer_stacks(model, nn.ModuleList, least=1).values()))
        states = {} if states is None else states
        walk = Walk(model, blocks, given, states, loaded)
        twin = Walk(model, blocks, given, _Behind(states, len(given)), loaded)
        count = sum(map(tokens_of, given))
        # A tied head may use the same weight as an embedding.
        embeddings = [x for x in targets if any(kind.name == "embedding" for kind in x.kinds)]
        tables = [x for x in embeddings if blocks and not block_of(x.name, blocks)]
        start = states.complete(2 * len(given)) if isinstance(states, Resumable) and plan.reads_data else 0
        before = [x.name for x in targets if x in tables or block_of(x.name, blocks) in blocks[:start]]
        if start and not all(map(written, before)):
            states.clear()
            start = 0
        # Hidden states on disk begin with the rounded embedding, but a tied head is needed at the end.
        first = [x for x in tables if not start or len(x.names) > 1]
        visits = 1 + len(blocks[start:]) + bool(first)
        visited = contexts.enter_context(block_bar("rounding", visits, count, progress=progress))
        compressed = _Compressor(plan, known, factors or {}, executor, compress)

        if not plan.reads_data:
            for name in ("", *blocks):
                here = [x for x in targets if block_of(x.name, blocks) == name and not written(x.name)]
                with loaded([module for x in here for module in x.modules], dtype=None):
                    done = compressed(here, None)
                    visited()
                    yield name, done
            return

        # Weights have their compressed values as long as the walk needs these.
        with ExitStack() as ahead, ExitStack() as block:
            made: dict[str, NewLayers] = {}
            with recorder.paused(), precision():
                _enter(walk, twin, start)
            if first:
                # Networks depend on how often each row is looked up, which a run of the model shows.
                counting = any(_is_network(layers[x.name]) for x in first)
                ahead.enter_context(
                    walk.loaded(walk.ends if counting else [m for x in first for m in x.modules])
                )
                counts = seen_before(walk, recorder) if counting else None
                if counts is not None and heads:
                    counts = replace(counts, columns={**counts.columns, **heads})
                made = compressed(first, counts)
                visited()
                ahead.enter_context(rounded_weights(first, made, restored=loaded is in_memory))
                yield "", made
            tied = [x for x in first if len(x.names) > 1]
            made = {x.name: made[x.name] for x in tied}  # other new layers are not needed any more
            if first and not start:
                with recorder.paused(), precision(), walk.loaded(_modules_ahead(walk)):
                    for number in range(len(given)):
                        walk.states[0, number] = walk.first_hidden(number)
            ahead.close()
            for name, waves in inputs_on_arrival(
                walk, twin, recorder, loss_fn=loss_fn, scored=len(losses), precision=precision
            ):
                block.close()  # the hidden states after the previous block have been computed
                here = [x for x in targets if x not in tables and block_of(x.name, blocks) == name]
                new: dict[str, NewLayers] = {}
                if not name:
                    block.enter_context(rounded_weights(tied, made, restored=loaded is in_memory))
                for wave in waves:
                    some = [x for x in here if not set(x.names).isdisjoint(wave.names)]
                    new |= (done := compressed(some, wave.stats, wave.mismatch))
                    block.enter_context(rounded_weights(some, done, restored=loaded is in_memory))
                    del wave
                if missed := [x for x in here if x.name not in new]:
                    raise never_ran(missed[0])
                visited()
                yield name, new
        if uncorrected is not None:
            uncorrected += compressed.uncorrected
        if measured is not None and losses and walk.losses:
            # The survey may have read more batches than this walk, or fewer.
            after = torch.cat(walk.losses).double()
            dense = torch.tensor(losses[: len(after)], dtype=torch.float64)
            increases = after[: len(dense)] - dense
            source = plan.calibration or "calibration data"
            measured.append(LossIncrease.of(increases, source=source, dense_loss=float(dense.mean())))


class _Behind:
    """View of the hidden states of another walk in the same mapping, by larger indices of batches."""

    def __init__(self, states: Any, batches: int) -> None:
        self.states, self.batches = states, batches

    def __getitem__(self, key: tuple[int, int], /) -> Tensor:
        found: Tensor = self.states[key[0], key[1] + self.batches]
        return found

    def __setitem__(self, key: tuple[int, int], value: Tensor, /) -> None:
        self.states[key[0], key[1] + self.batches] = value

    def __delitem__(self, key: tuple[int, int], /) -> None:
        del self.states[key[0], key[1] + self.batches]


def _enter(walk: Walk, twin: Walk, start: int) -> None:
    """Enter a walk and its dense twin, both with the hidden states of the dense model.

    Args:
        walk, twin: the walks.
        start: index of the first block to visit, before which the hidden states are known if it is not 0.
    """
    if not walk.names:
        return
    with walk.loaded(_modules_ahead(walk)):
        walk.enter(skip=True)
    twin.follow(walk)
    for number in range(len(walk.batches)):
        if start:
            del walk.states[0, number]
        else:
            twin.states[0, number] = walk.states[0, number]
    walk.position = twin.position = start


def _modules_ahead(walk: Walk) -> list[nn.Module]:
    """List the modules that run if a model runs up to its first block, and those that run after the last."""
    return [*walk.ends, *walk.model.get_submodule(walk.names[0]).modules()]


def batches_to_write(
    batches: Iterable[BatchLike], model: nn.Module, plan: CompressionPlan, tokens: int | None = None
) -> list[Batch]:
    """Read the batches on which a plan is applied; by default `WRITE_TOKENS` tokens.

    If the loss belongs to rows, networks are fitted on the 1,024 rows on which the model was surveyed.
    """
    kind = plan.survey_kind
    by_rows = kind == "networks" and plan.objective == "curvature" and not plan.of_tokens
    rows = ENOUGH_LOSSES if by_rows and tokens is None else 0
    return read_batches(batches, model, tokens=tokens or WRITE_TOKENS[kind], rows=rows)


def read_enough(
    batches: Iterable[BatchLike], model: nn.Module, kind: str, tokens: int | None = None
) -> list[Batch]:
    """Read the batches that surveying and compressing a model need, whether losses are per row or per token.

    Args:
        batches: batches in one of the forms that `as_batch` accepts.
        model: the model.
        kind: kind of the survey (see `CompressionConfig.survey_kind`).
        tokens: number of tokens of the survey, if it was given.
    """
    least = max(WRITE_TOKENS[kind], tokens or 0)
    return read_batches(batches, model, tokens=least, rows=ENOUGH_LOSSES, most=max(least, most_tokens(kind)))


def seen_before(walk: Walk, recorder: MomentRecorder) -> CalibrationStats:
    """Run the model up to its first block on all batches; return the statistics of the layers that ran."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stop

    with replaced_blocks(walk.model, walk.names, stop):
        for batch in walk.batches:
            recorder.expect(batch)
            with suppress(Stop):
                run_model(walk.model, batch)
    return recorder.finish(1, None, "")


def weighting_of(
    target: Target,
    layer: LayerPlan,
    plan: CompressionPlan,
    stats: CalibrationStats | None,
    factors: Mapping[str, Tensor],
) -> Weighting:
    """Build the weighting of a weight, from moments of its inputs and the factors of its gradients."""
    if stats is None or plan.objective == "weight":
        return Weighting()
    uses = list(zip(target.names, target.kinds, strict=True))
    known = {name: moment_of(factors[name], target.matrix.device) for name in target.names if name in factors}
    if not _is_network(layer):
        # Rounding to integers damps the moments of the inputs itself.
        weighting = input_weighting(target, stats)
        feedback = plan.rounding == "two_sided" and uses[0][1].name != "embedding"
        rows = known.get(target.name)
        if rows is not None and rows.ndim == 2 and feedback:
            return replace(weighting, rows=damped(rows, MOMENT_DAMPING))
        return weighting
    tables = {name for name, kind in uses if kind.name == "embedding"}
    stats = replace(
        stats,
        rows={**stats.rows, **{name: x for name, x in known.items() if name not in tables}},
        columns={**stats.columns, **{name: x for name, x in known.items() if name in tables}},
    )
    return layer_weighting(target, plan.objective, stats) or Weighting()


def moment_of(factor: Tensor, device: torch.device) -> Tensor:
    """Make the moment of gradients `V V^T + diag(d)`; only the diagonal if `V` is empty.

    Args:
        factor: `V` and `d`, shape `(features, rank + 1)` (see `CalibrationStats`).
        device: device to use.
    """
    factor = factor.to(device, torch.float32)
    rest = factor[:, -1]
    return (factor[:, :-1] @ factor[:, :-1].mT).add_(rest.diag()) if factor.shape[1] > 1 else rest


def _is_network(layer: LayerPlan) -> bool:
    """Return True if a layer becomes a network, not a dense matrix in a number format."""
    return layer.topology is not None and layer.topology.family != "dense"


@contextmanager
def rounded_weights(
    targets: Iterable[Target], made: Mapping[str, NewLayers], *, restored: bool
) -> Iterator[None]:
    """Return a context in which weights have the values of their new layers.

    Args:
        targets: the weights.
        made: new layers of each weight, by its name.
        restored: whether the weights get their own values back afterwards.
    """
    before = [(x.matrix, x.matrix.clone()) for x in targets] if restored else []
    try:
        for target in targets:
            new = made[target.name][0][0]
            assert isinstance(new, NetworkModule)
            target.matrix.copy_(new.to_matrix())
        yield
    finally:
        for matrix, own in before:
            matrix.copy_(own)
