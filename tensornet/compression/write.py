"""Round a model block by block, each block on the inputs that it will really get."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from tensornet.calibration.batches import BatchLike, first_rows, read_batches
from tensornet.calibration.blockwise import inputs_by_block
from tensornet.calibration.calibrate import MomentRecorder, fast_dtype, lowered, observed
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import Loaded, Walk, find_blocks, in_memory
from tensornet.compression.apply import LayerCache, compress_layer, with_cores
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.sensitivity import input_weighting, is_known, never_ran
from tensornet.compression.survey import FULL_UP_TO, is_inside
from tensornet.errors import TargetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.targets import LayerSelection, Target

#: Number of tokens on which the inputs of the blocks are computed.
WRITE_TOKENS = 16_384


@torch.no_grad()
def compress_blocks(
    model: nn.Module,
    plan: CompressionPlan,
    batches: Iterable[BatchLike],
    *,
    tokens: int = WRITE_TOKENS,
    states: Any = None,
    loaded: Loaded = in_memory,
    progress: bool = False,
) -> Iterator[tuple[str, LayerCache]]:
    """Compress the layers of a plan block by block, and yield the new layers of each finished block.

    The layers of a block are rounded with error feedback along their inputs. These are the inputs that the
    layers get if all earlier blocks are compressed, as in GPTQ. Embeddings that no other layer shares come
    first, under the name `""`. The other layers outside of the blocks come last, under the same name.

    While the items are produced, weights of finished blocks may have their rounded values. They return to
    their own when the next block is ready, or when the generator is closed.

    Args:
        model: the dense model for which the plan was made.
        plan: a plan without networks; layers that are not in it stay dense.
        batches: batches as for `calibrate`; the first `tokens` tokens are read.
        tokens: number of tokens to read.
        states, loaded: see `survey`.
        progress: whether to show a progress bar.

    Yields:
        The name of the block, and its new modules with their errors (see `LayerCache`).

    Raises:
        TargetError: there is no batch, or a planned layer never runs.
        NonFiniteError: the inputs of a layer are not finite; the message names the layer.

    Reference:
        Frantar et al. 2023, "GPTQ", section 4 (blocks are compressed one after another).
    """
    recorder = MomentRecorder(full_gradients=False, full_up_to=FULL_UP_TO)
    device = next(model.parameters()).device
    precision = partial(lowered, device, fast_dtype(model))
    layers = {layer.name: layer for layer in plan if layer.topology is not None}
    names: Any = list(layers)
    given = read_batches(batches, model, tokens=tokens)
    if not given:
        raise TargetError("No batches: pass at least one, better 16 of 1,000 tokens.")
    with (
        observed(model, recorder, LayerSelection(target_modules=names)) as found,
        tqdm(total=len(layers), desc="rounding", disable=not progress, unit="layer") as bar,
    ):
        targets = [x for x in found if x.name in layers]
        with recorder.paused(), precision():
            blocks = find_blocks(model, first_rows(given[0], 1))
        walk = Walk(model, blocks, given, {} if states is None else states, loaded)

        def compressed(some: Sequence[Target], stats: CalibrationStats | None) -> LayerCache:
            made: LayerCache = {}
            for target in some:
                layer = layers[target.name]
                weighting = Weighting() if stats is None else input_weighting(target, stats)
                new, error = compress_layer(target.matrix, layer, weighting, plan.rounding)
                made[layer.name, layer.topology, layer.storage] = with_cores(target, new), error
                bar.update()
            return made

        # Weights that are replaced by their rounded values while the walk needs these.
        with ExitStack() as tables, ExitStack() as block:
            first = [x for x in targets if blocks and _is_table(x)]
            if first:
                with walk.loaded(walk.ends):
                    made = compressed(first, None)
                    tables.enter_context(rounded_weights(first, made))
                    yield "", made
            for name, stats in inputs_by_block(walk, recorder, precision=precision):
                block.close()  # the hidden states after the previous block have been computed
                here = [x for x in targets if x not in first and _belongs(x, name, blocks)]
                for target in here:
                    if not is_known(target, stats):
                        raise never_ran(target)
                made = compressed(here, stats)
                block.enter_context(rounded_weights(here, made))
                yield name, made


def _is_table(target: Target) -> bool:
    """Return True if only embeddings use a weight; the moments of their inputs are counts of tokens."""
    return all(kind.name == "embedding" for kind in target.kinds)


def _belongs(target: Target, block: str, blocks: Sequence[str]) -> bool:
    """Return True if a weight belongs to a block or, if its name is empty, to none of the blocks."""
    if block:
        return is_inside(target, block)
    return not any(is_inside(target, other) for other in blocks)


@contextmanager
def rounded_weights(targets: Iterable[Target], made: LayerCache) -> Iterator[None]:
    """Return a context in which weights have the values of their new layers; then they get their own back."""
    modules = {name: new[0] for (name, _, _), (new, _) in made.items()}
    before = [(x.matrix, x.matrix.clone()) for x in targets]
    try:
        for (matrix, _), target in zip(before, targets, strict=True):
            matrix.copy_(modules[target.name].to_matrix())
        yield
    finally:
        for matrix, own in before:
            matrix.copy_(own)
