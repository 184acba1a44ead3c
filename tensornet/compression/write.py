"""Round a model block by block; each block is calibrated on the outputs of the rounded blocks before it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.calibration.batches import BatchLike, first_rows, read_batches, tokens_of
from tensornet.calibration.blockwise import inputs_by_block
from tensornet.calibration.calibrate import MomentRecorder, lowered, observed
from tensornet.calibration.losses import TokenLosses
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import (
    Loaded,
    Walk,
    block_bar,
    block_of,
    blocks_to_walk,
    in_memory,
    walk_dtype,
)
from tensornet.compression.apply import NewLayers, check_samples, compress_layer, with_cores
from tensornet.compression.loss_increase import LossIncrease
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.prices import PriceList
from tensornet.compression.sensitivity import input_weighting, is_known, never_ran
from tensornet.compression.survey import FULL_UP_TO
from tensornet.errors import CalibrationWarning, TargetError, WorkerError
from tensornet.linalg.weighted_svd import Weighting, damped
from tensornet.nn.module import NetworkModule
from tensornet.nn.targets import LayerSelection, Target

#: Number of tokens on which the inputs of the blocks are computed, for each effort.
WRITE_TOKENS = {"fast": 16_384, "thorough": 32_768}


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
    loss_fn: TokenLosses | None = None,
    losses: Sequence[float] = (),
    measured: list[LossIncrease] | None = None,
    finished: Callable[[LayerPlan], NewLayers | None] = lambda layer: None,
    start: int = 0,
    executor: Executor | None = None,
    compress: Callable[..., Any] = compress_layer,
    progress: bool = False,
) -> Iterator[tuple[str, dict[str, NewLayers]]]:
    """Compress the layers of a plan block by block, and yield the new layers of each finished block.

    The layers of a block are rounded with error feedback along their inputs. These are the inputs that the
    layers get if all earlier blocks are compressed, as in GPTQ. Embeddings that no other layer shares come
    first, under the name `""`. The other layers outside of the blocks come last, under the same name.

    While the items are produced, weights of finished blocks may have their rounded values. They return to
    their own when the next block is ready, or when the generator is closed.

    Args:
        model: the dense model for which the plan was made.
        plan: the plan; layers that are not in it stay dense.
        batches: batches as for `calibrate`; the first `tokens` tokens are read.
        tokens: number of tokens to read; by default `WRITE_TOKENS` of the plan's effort.
        states, loaded, device: see `survey`.
        factors: low-rank factors of the moments of gradients, for feedback along the outputs too (see
            `PriceList`).
        loss_fn, losses: loss function, and the losses of the dense model on the first tokens.
        measured: receives the loss increase on these tokens when the last block is finished.
        finished: function that returns the new modules of a layer if an interrupted run has finished it.
        start: index of the first block to visit; an interrupted run has finished those before, and `states`
            contains the hidden states that follow.
        executor: executor that rounds the layers of a block at the same time; by default, this process does.
        compress: function that compresses one layer, like `compress_layer`.
        progress: whether to show a progress bar.

    Yields:
        The name of the block, and for each of its layers the new modules and the error of the weight.

    Raises:
        TargetError: there is no batch, a planned layer never runs, or the plan was made for other weights.
        WorkerError: a process of the executor died.
        NonFiniteError: the inputs of a layer are not finite; the message names the layer.

    Reference:
        Frantar et al. 2023, "GPTQ", section 4 (blocks are compressed one after another).
    """
    recorder = MomentRecorder(diagonal_gradients=True, full_up_to=FULL_UP_TO)
    device = device or next(model.parameters()).device
    precision = partial(lowered, device, walk_dtype(model, loaded, device))
    layers = {layer.name: layer for layer in plan if layer.topology is not None}
    names: Any = list(layers)
    given = read_batches(batches, model, tokens=tokens or WRITE_TOKENS[plan.effort])
    if not given:
        raise TargetError("No batches: pass at least one, better 16 of 1,000 tokens.")
    if not layers:
        return
    with ExitStack() as contexts:
        found = contexts.enter_context(observed(model, recorder, LayerSelection(target_modules=names)))
        targets = [x for x in found if x.name in layers]
        with recorder.paused(), precision():
            blocks = blocks_to_walk(model, targets, first_rows(given[0], 1), loaded)
        walk = Walk(model, blocks, given, {} if states is None else states, loaded)
        count = sum(map(tokens_of, given))
        visits = 1 + len(blocks[start:]) + any(_is_table(x) for x in targets) * bool(blocks and not start)
        visited = contexts.enter_context(block_bar("rounding", visits, count, progress=progress))

        def compressed(some: Sequence[Target], stats: CalibrationStats | None) -> dict[str, NewLayers]:
            """Compress the layers that are not finished yet, and read the others."""
            check_samples(plan, some)
            done = {x.name: finished(layers[x.name]) for x in some}
            work = [x for x in some if done[x.name] is None]
            tasks = []
            for target in work:
                if stats is not None and not is_known(target, stats):
                    raise never_ran(target)
                weighting = Weighting() if stats is None else input_weighting(target, stats)
                if factors is not None and target.name in factors and plan.rounding == "two_sided":
                    rows = low_rank_moment(factors[target.name], target.matrix)
                    weighting = replace(weighting, rows=damped(rows, plan.damping))
                tasks.append((target.matrix, layers[target.name], weighting, plan.rounding))
            made = results(executor, compress, tasks)
            done |= {x.name: (with_cores(x, new), error) for x, (new, error) in zip(work, made, strict=True)}
            visited()
            return {name: x for name, x in done.items() if x is not None}

        # Weights have their rounded values as long as the walk needs these.
        with ExitStack() as tables, ExitStack() as block:
            first = [x for x in targets if blocks and _is_table(x)]
            if first and not start:
                tables.enter_context(walk.loaded([module for x in first for module in x.modules]))
                new = compressed(first, None)
                tables.enter_context(rounded_weights(first, new, restored=loaded is in_memory))
                yield "", new
            for name, stats in inputs_by_block(
                walk,
                recorder,
                loss_fn=loss_fn,
                scored=len(losses),
                start=start,
                precision=precision,
            ):
                tables.close()  # the hidden states before the first block have been computed
                block.close()  # and those after the previous block
                here = [x for x in targets if x not in first and block_of(x.name, blocks) == name]
                new = compressed(here, stats)
                del stats  # the moments need more memory than all else
                block.enter_context(rounded_weights(here, new, restored=loaded is in_memory))
                yield name, new
        if measured is not None and losses and walk.losses:
            before = torch.tensor(losses, dtype=torch.float64)
            increases = torch.cat(walk.losses)[: len(before)].double() - before
            source = plan.calibration or "calibration data"
            measured.append(LossIncrease.of(increases, source=source, dense_loss=float(before.mean())))


def factors_of(prices: PriceList | None, plan: CompressionPlan) -> Mapping[str, Tensor]:
    """Return the factors of gradient moments in a price list; without a list, warn that there are none."""
    if prices is None and plan.rounding == "two_sided":
        warnings.warn(
            "A finished plan without its price list is rounded with error feedback along the inputs of each "
            "layer only, which increases the loss more than feedback along the outputs too. Give the price "
            "list of the survey (prices=), or let the configuration be planned and applied in one call.",
            CalibrationWarning,
            stacklevel=3,
        )
    return {} if prices is None else prices.factors


def low_rank_moment(factor: Tensor, like: Tensor) -> Tensor:
    """Make a moment of gradients from its low-rank factor `V`: `V V^T` plus a multiple of the identity.

    The mean of its diagonal is 1, since `V` is the factor of a moment whose diagonal has this mean.

    Args:
        factor: the factor, shape `(out, rank)`.
        like: tensor with the device to use.
    """
    factor = factor.to(like.device, torch.float32)
    moment = factor @ factor.mT
    moment.diagonal().add_((1 - moment.diagonal().mean()).clamp_min(torch.finfo(torch.float32).eps))
    return moment


def results(
    executor: Executor | None, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Call a function for each tuple of arguments, in an executor or in this process.

    Raises:
        WorkerError: a process of the executor died.
    """
    if executor is None:
        return [function(*task) for task in tasks]
    futures = [executor.submit(function, *task) for task in tasks]
    try:
        return [future.result() for future in futures]
    except BrokenExecutor as error:
        raise WorkerError(
            f"A worker died ({error}), most likely because memory ran out. Use fewer workers. Finished "
            "layers are kept; run the same command again to continue."
        ) from error
    finally:
        for future in futures:
            future.cancel()


def _is_table(target: Target) -> bool:
    """Return True if only embeddings use a weight; the moments of their inputs are counts of tokens."""
    return all(kind.name == "embedding" for kind in target.kinds)


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
