"""Survey a model block by block: predict the losses of all schemes of all layers, in one block's memory."""

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tensornet._util import on_cpu_unless_said
from tensornet.calibration.batches import (
    BatchLike,
    check_batches,
    device_of,
    read_batches,
    tokens_of,
)
from tensornet.calibration.blockwise import begin_walk, inputs_by_block, moments_by_block
from tensornet.calibration.calibrate import (
    ENOUGH_LOSSES,
    MomentRecorder,
    lowered,
    observed,
)
from tensornet.calibration.losses import TokenLosses
from tensornet.calibration.stats import CalibrationStats, weight_samples
from tensornet.calibration.walk import (
    Loaded,
    block_bar,
    block_of,
    in_memory,
    walk_dtype,
)
from tensornet.compression.allocate import Candidate, SurveyedLayer
from tensornet.compression.candidates import groups_by_inputs
from tensornet.compression.config import CompressionConfig, check_config
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planning import unfit_formats, without_unseen
from tensornet.compression.sensitivity import is_known
from tensornet.compression.shared_cores import SharedCandidate, candidates_of
from tensornet.compression.survey import Survey, untargeted_sizes
from tensornet.compression.tasks import Calls, price_group
from tensornet.errors import BudgetError
from tensornet.linalg.svd import OF_LAYER, check_finite
from tensornet.nn.extension import shared_candidates
from tensornet.nn.storage import PLAIN
from tensornet.nn.targets import Target, check_loaded, check_model, list_weights
from tensornet.nn.unfuse import unfused

#: Number of tokens on which a survey differentiates the loss, by `CompressionConfig.survey_kind`.
SURVEY_TOKENS = {"fast": 4096, "networks": 16_384, "thorough": 32_768}
#: Rank of the factors of gradient moments, by `CompressionConfig.survey_kind`. Rounding damps these moments
#: so much that only directions with far more than the mean gradient matter. Networks are fitted with little
#: damping.
GRADIENT_RANK = {"fast": 16, "networks": 384, "thorough": 256}
#: Largest number of tokens that a survey of number formats reads to get 1,024 losses of rows.
MOST_TOKENS = 32_768
#: Largest number of features for which a full moment of inputs is stored. Since only those of one block are
#: in memory, it is far above that of `calibrate`.
FULL_UP_TO = 1 << 15


class FindCandidates(Protocol):
    """Function that finds the candidates of layers, such as `find_candidates`."""

    def __call__(
        self, targets: Sequence[Target], config: CompressionConfig, *, stats: CalibrationStats
    ) -> Iterable[Sequence[Candidate]]:
        """Return the candidates of each layer."""


@torch.inference_mode(False)  # gradients are needed even if the caller is in inference mode
@on_cpu_unless_said
def survey_model(
    model: nn.Module,
    batches: Iterable[BatchLike],
    config: CompressionConfig,
    *,
    loss_fn: TokenLosses | None = None,
    tokens: int | None = None,
    source: str = "calibration data",
    states: Any = None,
    loaded: Loaded = in_memory,
    device: torch.device | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    find: FindCandidates | None = None,
    executor: Executor | None = None,
    progress: bool = False,
) -> Survey:
    """Predict the loss increase of every network and number format of all targeted layers.

    The model is walked over block by block (see `moments_by_block`). For the layers of a block, the full
    moment `C` of the inputs and the moment `R` of the gradients are collected; of `R` only the diagonal if
    all candidates are number formats and `config.effort` is not `"thorough"`. Predicted losses of networks
    of all ranks, and of rounding with error feedback, follow from them in closed form. A thorough survey also
    tries networks in number formats. Then the moments are dropped, so a survey needs the memory of one block,
    besides hidden states and a factor of low rank of each `R`.

    If `config.objective` is `"activation"`, the model only runs forward, and errors of outputs are
    predicted.

    Args:
        model: any module. If its blocks do not form a single chain, it is surveyed as one block.
        batches: batches as for `calibrate`; the first `tokens` tokens are read.
        config: the options, with a budget, number formats or a topology.
        loss_fn: see `calibrate`.
        tokens: number of tokens to read; by default `SURVEY_TOKENS`. If the loss belongs to
            rows instead of tokens, 1,024 rows or 32,768 tokens are read.
        source: name of the data, for reports.
        states: mapping for the hidden states (see `Walk`); by default they stay in memory.
        loaded: context in which the weights of given modules are in memory (see `Walk`).
        device: device to which `loaded` moves weights; by default, that of the model.
        inputs: mean squares of the inputs of layers by name, shape `(in,)`, such as those of an importance
            matrix. They replace the moments of the inputs, of which only the diagonal is then known.
        find: function that finds the candidates of layers from the configuration and the moments; by
            default `find_candidates`.
        executor: executor that finds the candidates while this process runs the next block; by default, this
            process finds them, too. The survey does not depend on the number of workers. Moments of two
            blocks are then in memory.
        progress: whether to show a progress bar.

    Raises:
        TargetError: there is no batch, no layer is selected, no token has a loss, or experts that could share
            a core are asked for and there are none.
        NonFiniteError: a weight, inputs or gradients of a layer are not finite; the message names the layer.
        BudgetError: a layer has no candidate that keeps the limits of the configuration.
        FormatError: no number format fits any layer.
        WorkerError: a process of the executor died.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> batches = [(torch.randn(64, 64), torch.randint(8, (64,)))]
        >>> survey = tn.survey(model, batches, tn.CompressionConfig(bits_per_weight=4.25))
        >>> survey.plan(bits_per_weight=3).bits_per_weight <= 3
        True
    """
    check_model(model)
    check_config(config)
    check_batches(batches, "survey")
    recorder = MomentRecorder(
        diagonal_gradients=config.survey_kind == "fast",
        full_up_to=FULL_UP_TO if inputs is None else 0,
        rank=GRADIENT_RANK[config.survey_kind],
    )
    tokens = tokens or SURVEY_TOKENS[config.survey_kind]
    objective = "activation" if config.objective == "activation" else "curvature"
    families = () if config.survey_kind == "fast" or find is dense_only else config.families
    # A lazy source is priced by one thread, so that the result does not depend on the number of workers.
    alone = executor is not None or loaded is not in_memory
    device = device or device_of(model)
    precision = partial(lowered, device, walk_dtype(model, loaded, device))
    with observed(model, recorder, config) as targets:
        if loaded is in_memory:
            check_loaded(targets)
        unfit = unfit_formats(targets, config)
        with recorder.paused():
            walk, loss_fn, of_tokens = begin_walk(
                model,
                batches,
                targets,
                tokens=tokens,
                most=most_tokens(config.survey_kind),
                loss_fn=loss_fn,
                gradients=objective == "curvature",
                device=device,
                states=states,
                loaded=loaded,
                precision=precision,
            )
        names, given = walk.names, walk.batches

        # Find the candidates of every block as soon as its moments are known, then drop the moments.
        surveyed: dict[str, SurveyedLayer] = {}
        begun: deque[tuple[list[SurveyedLayer], Calls]] = deque()  # blocks whose candidates are being found

        def collect() -> None:
            some, calls = begun.popleft()
            facts = chain.from_iterable(calls.results())
            for layer, (found, spectrum) in zip(some, facts, strict=True):
                surveyed[layer.name] = replace(layer, candidates=tuple(found), spectrum=tuple(spectrum))

        stacks: dict[tuple[str, ...], Sequence[SharedCandidate]] = {}
        factors: dict[str, Tensor] = {}
        heads: dict[str, Tensor] = {}
        seen: dict[str, tuple[Tensor, int]] = {}
        unrouted: list[str] = []
        loss: float | None = None
        count = sum(map(tokens_of, given))
        visits = len(names) * (2 if loss_fn is not None else 1) + 1
        with (
            block_bar("surveying", visits, count, progress=progress) as visited,
            ExitStack() as unfinished,
        ):
            for name, stats in (
                inputs_by_block(walk, recorder, precision=precision)
                if loss_fn is None
                else moments_by_block(
                    walk, recorder, loss_fn, precision=precision, source=source, visited=visited
                )
            ):
                if inputs is not None:
                    known_inputs = {x: inputs[x] for x in stats.columns if x in inputs}
                    stats = replace(stats, columns={**stats.columns, **known_inputs})
                here = [
                    x
                    for x in targets
                    if x.name not in surveyed and (not name or block_of(x.name, names) == name)
                ]
                known = [x for x in here if is_known(x, stats)]
                with loaded([module for x in known for module in x.modules], dtype=None):
                    for target in known:
                        check_finite(target.matrix, f"Layer {target.name!r}", OF_LAYER)
                    layers = [SurveyedLayer.of(x, ()) for x in known]
                    surveyed |= {x.name: x for x in layers}
                    if find is None:
                        groups = list(groups_by_inputs(known, config, objective, stats))
                        arguments = [(group, config, objective, families, alone) for group in groups]
                        weights = [sum(x.matrix.numel() for x in group) for group in groups]
                        calls = Calls(price_group, arguments, weights, executor)
                        unfinished.callback(calls.cancel)
                        begun.append((layers, calls))
                        del groups, arguments, calls
                    else:
                        for layer, found in zip(layers, find(known, config, stats=stats), strict=True):
                            surveyed[layer.name] = replace(layer, candidates=tuple(found))
                    if config.share_experts and find is not dense_only:
                        stacks |= shared_candidates(known, stats, config)
                unrouted += [x.name for x in known if all(stats.counts.get(y) == 0 for y in x.names)]
                factors |= {y: stats.factors[y] for x in known for y in x.names if y in stats.factors}
                heads |= tied_heads(known, stats) if config.survey_kind != "fast" else {}
                seen |= seen_inputs(known, stats)
                loss = stats.loss
                del stats  # the moments of a block need more memory than anything else
                while len(begun) > (executor is not None):
                    collect()
                visited()
            while begun:
                collect()
    kept, unseen = without_unseen(targets, [x for x in targets if x.name not in surveyed])
    template = CompressionPlan(
        (),
        objective=objective,
        rounding=config.rounding,
        dense_loss=None if loss is None or math.isnan(loss) else loss,
        calibration=source,
        of_tokens=of_tokens,
        effort=config.effort,
        unseen=unseen,
        unrouted=tuple(unrouted),
        unfit=unfit,
    )
    surveyed_layers = tuple(surveyed[x.name] for x in kept)
    key = {"tokens": str(count), "text": tensor_digest(given), "inputs": tensor_digest([inputs or {}])}
    losses = tuple(float(f"{x:.4g}") for part in walk.losses for x in part.tolist())
    sizes = untargeted_sizes(model, kept)
    with unfused(model):
        samples = weight_samples(list_weights(model))
    return Survey(
        config,
        surveyed_layers,
        template,
        sizes,
        key=key,
        losses=losses,
        samples=samples,
        factors=factors,
        inputs=seen,
        heads=heads,
        shared=candidates_of(stacks, targets) if config.share_experts and find is not dense_only else (),
    )


def dense_only(
    targets: Sequence[Target], config: CompressionConfig, *, stats: CalibrationStats
) -> list[list[Candidate]]:
    """Return the dense matrix as the only candidate of each layer; for surveys that only collect moments."""
    return [[Candidate(None, PLAIN, x.matrix.nbytes, x.matrix.numel(), 0.0, 0.0)] for x in targets]


def most_tokens(kind: str) -> float:
    """Return the largest number of tokens that a survey reads to get enough losses of rows.

    Networks are fitted with little damping to the moments of the gradients, so they need all these losses.
    """
    return math.inf if kind == "networks" else MOST_TOKENS


def tied_heads(targets: Iterable[Target], stats: CalibrationStats) -> dict[str, Tensor]:
    """Return `Survey.heads`: moments of the inputs of layers that share their weight with an embedding."""
    return {
        name: stats.columns[name].float().cpu()
        for target in targets
        if any(kind.name == "embedding" for kind in target.kinds)
        for name, kind in zip(target.names, target.kinds, strict=True)
        if kind.name != "embedding" and name in stats.columns
    }


def seen_inputs(targets: Iterable[Target], stats: CalibrationStats) -> dict[str, tuple[Tensor, int]]:
    """Return `Survey.inputs` of the layers that read activations, by name of the weight."""
    found = {}
    for target in targets:
        for name, kind in zip(target.names, target.kinds, strict=True):
            if kind.name != "embedding" and name in stats.columns and target.name not in found:
                moment = stats.columns[name]
                diagonal = moment if moment.ndim == 1 else moment.diagonal()
                found[target.name] = (diagonal.float().cpu().clone(), stats.counts.get(name, 0))
    return found


def survey_or_load(
    model: nn.Module,
    batches: Sequence[BatchLike],
    config: CompressionConfig,
    file: str | os.PathLike[str] | None,
    *,
    tokens: int | None = None,
    **options: Any,
) -> Survey:
    """Read the survey of a model from a file, or survey the model and write the file.

    Args:
        model, batches, config, tokens, options: see `survey`.
        file: file of the survey; if None, the model is surveyed and nothing is written.

    Raises:
        TargetError: the survey was made for another model.
        BudgetError: the survey was made with another text or with other options.
    """
    if file is None or not Path(file).exists():
        survey = survey_model(model, batches, config, tokens=tokens, **options)
        if file is not None:
            survey.save(file)
        return survey
    survey = Survey.load(file)
    survey.check_model(model)
    kind, rows = config.survey_kind, 0 if survey.template.of_tokens else ENOUGH_LOSSES
    count = tokens or SURVEY_TOKENS[kind]
    read = read_batches(batches, model, tokens=count, rows=rows, most=most_tokens(kind))
    if survey.key.get("text") != tensor_digest(read):
        raise BudgetError(
            f"The survey in {file} was made on other text: {survey.key.get('tokens')} tokens, from "
            f"{survey.template.calibration}. Give the same text and number of tokens, or another file."
        )
    if survey.key.get("inputs") != tensor_digest([options.get("inputs") or {}]):
        raise BudgetError(
            f"The survey in {file} was made with another importance matrix, or without one. Give the same "
            "importance matrix, or another file."
        )
    return survey.with_config(config)


def tensor_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Compute a checksum of the names, dtypes, shapes and values of the tensors in batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
                found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
