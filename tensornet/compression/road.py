"""The steps of every compression, from a source to a sink: survey, plan, compress block by block, write.

A source is a dense model, in memory or opened lazily. A sink takes finished layers: the model itself, a
folder, or a file. `make_plan` does the first two steps, and can be called alone.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tensornet.calibration.losses import comparable_losses, label_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import Loaded, in_memory
from tensornet.compression.apply import compress_layer
from tensornet.compression.config import CompressionConfig, Method
from tensornet.compression.loss_increase import LossIncrease
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planning import plan as plan_by_weights
from tensornet.compression.sinks import Sink
from tensornet.compression.survey import Survey
from tensornet.compression.surveying import dense_only, survey_or_load
from tensornet.compression.tasks import compress_alone
from tensornet.compression.write import compress_blocks
from tensornet.errors import BudgetError, TargetError
from tensornet.nn.extension import ProvidedData
from tensornet.nn.targets import Target, list_weights
from tensornet.nn.unfuse import unfused


@dataclass(frozen=True)
class Source:
    """A dense model to compress.

    Args:
        model: the model.
        loaded: context in which the weights of given modules are in memory (see `Walk`).
        device: device on which the model runs; by default that of its parameters.
        states: function that returns the mapping for the hidden states of a walk, by the name of the walk
            ("surveyed" or "states"); by default they stay in memory.
    """

    model: nn.Module
    loaded: Loaded = in_memory
    device: torch.device | None = None
    states: Callable[[str], Any] = lambda _: {}


class Planned(NamedTuple):
    """Result of `make_plan`.

    Args:
        plan: the plan.
        survey: the survey from which it was chosen, or which has the moments that it needs; None if the
            errors of weights decide.
        weights: all weights of the model, with the reasons why some are not compressed.
    """

    plan: CompressionPlan
    survey: Survey | None
    weights: list[Target]

    @property
    def names(self) -> list[str]:
        """Names of the planned weights."""
        return [layer.name for layer in self.plan]


def make_plan(
    source: Source,
    config: CompressionConfig | CompressionPlan,
    data: ProvidedData,
    *,
    stats: CalibrationStats | None = None,
    survey: Survey | str | os.PathLike[str] | None = None,
    tokens: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
) -> Planned:
    """Survey a model and plan its compression.

    Args:
        source: the dense model.
        config: the options; or a finished plan, for which at most the moments that it needs are found.
        data: batches, their name and the loss function; without batches, the errors of the weights decide.
        stats: statistics in place of batches.
        survey: a survey of this model; or a file, which is read if it exists and written otherwise.
        tokens, executor: see `survey`.
        progress: whether to show progress bars.

    Raises:
        TargetError, BudgetError, NonFiniteError, FormatError, WorkerError: see `survey` and `Survey.plan`.
    """
    finished = isinstance(config, CompressionPlan)
    options = calibration_config(config) if isinstance(config, CompressionPlan) else config
    by_blocks = config.reads_data and bool(data.batches)
    if survey is not None and not by_blocks:
        raise TargetError("survey= needs calibration=batches, on which it was made; leave it out.")
    if isinstance(config, CompressionPlan) and isinstance(survey, (str, os.PathLike)):
        options = _surveyed_config(Path(survey), config) if Path(survey).is_file() else options
    found: Survey | None = None
    if isinstance(survey, Survey):
        found = survey if finished else survey.with_config(options)
    elif by_blocks and (not isinstance(config, CompressionPlan) or config.objective == "curvature"):
        found = survey_or_load(
            source.model,
            [*data.batches],
            options,
            survey,
            loss_fn=data.loss_fn,
            source=data.source,
            tokens=tokens,
            states=source.states("surveyed"),
            loaded=source.loaded,
            device=source.device,
            find=dense_only if finished else None,
            executor=executor,
            progress=progress,
        )
    if isinstance(config, CompressionPlan):
        plan = config
    elif found is not None:
        plan = found.plan()
    else:
        plan = plan_by_weights(source.model, config, stats, progress=progress)
    with unfused(source.model):
        return Planned(plan, found, list_weights(source.model))


class Done(NamedTuple):
    """Result of `run`.

    Args:
        plan: the plan, with the error of every layer.
        planned: the result of `make_plan`.
        measured: loss increase measured while the blocks were compressed; None without batches.
        sink: the finished sink.
        uncorrected: names of weights whose correction was too large to be used (see `correction`).
    """

    plan: CompressionPlan
    planned: Planned
    measured: LossIncrease | None
    sink: Sink
    uncorrected: tuple[str, ...]


def run(
    source: Source,
    planned: Planned,
    open_sink: Callable[[CompressionPlan], Sink],
    data: ProvidedData,
    *,
    stats: CalibrationStats | None = None,
    executor: Executor | None = None,
    progress: bool = False,
) -> Done:
    """Compress a planned model block by block into a sink.

    Args:
        source: the dense model.
        planned: the result of `make_plan` for this model.
        open_sink: function that makes the sink for a plan.
        data: batches, on which each block is compressed for the inputs that it will get.
        stats: statistics in place of batches; the sink then compresses the layers (`ReplacedLayers`).
        executor: executor that compresses the layers of a block; by default, this process does.
        progress: whether to show progress bars.

    Raises:
        TargetError, NonFiniteError, WorkerError: see `compress_blocks`.
        DestinationError: the sink cannot be written.
    """
    plan, survey = planned.plan, planned.survey
    measured: list[LossIncrease] = []
    uncorrected: list[str] = []
    sink = open_sink(plan)
    if stats is None:
        # Without other processes, a single thread would only be slower; a lazy source is read in both cases
        # by one thread, so that the result does not depend on the number of workers.
        alone = executor is not None or source.loaded is not in_memory
        default = None if source.loaded is in_memory else label_losses
        compared = comparable_losses(data.loss_fn, labelled=survey is not None and bool(survey.losses))
        blocks = compress_blocks(
            source.model,
            plan,
            data.batches,
            states=source.states("states"),
            loaded=source.loaded,
            device=source.device,
            loss_fn=compared or data.loss_fn or default,
            # A model in memory can be measured whole, when it is compressed.
            losses=() if survey is None or source.loaded is in_memory else survey.losses,
            factors=None if survey is None else survey.factors,
            heads=None if survey is None else survey.heads,
            measured=measured,
            uncorrected=uncorrected,
            written=sink.written,
            executor=executor,
            compress=compress_alone if alone else compress_layer,
            progress=progress,
        )
        for block, layers in blocks:
            sink.put(block, layers)
    sink.finish()
    errors = {x.name: sink.errors[x.name] for x in plan if x.topology is not None}
    return Done(plan.with_errors(errors), planned, next(iter(measured), None), sink, tuple(uncorrected))


def calibration_config(plan: CompressionPlan) -> CompressionConfig:
    """Make a configuration with which a survey selects the layers of a plan and finds the moments they need.

    Its budget and formats have no effect.
    """
    names: Any = [layer.name for layer in plan]
    networks = plan.survey_kind == "networks"
    scheme: dict[str, Any] = {"topology_options": {"max_bond": 1}} if networks else {"formats": ("float",)}
    method: Method = "gptq" if plan.objective == "activation" else "auto"
    return CompressionConfig(target_modules=names, method=method, effort=plan.effort, **scheme)


def _surveyed_config(survey: Path, plan: CompressionPlan) -> CompressionConfig:
    """Return the configuration of a survey whose moments are used to compress the layers of a plan.

    Raises:
        BudgetError: the plan has layers that were not surveyed.
    """
    known = Survey.load(survey)
    missing = sorted({x.name for x in plan} - {x.name for x in known.layers})
    if missing:
        raise BudgetError(
            f"The plan compresses {missing[0]} ({len(missing)} of {len(plan)} layers are missing), of which "
            f"{survey} says nothing. Give the survey from which the plan was made, or leave it out."
        )
    return known.config
