"""Options of healing."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tensornet._util import check_size
from tensornet.calibration.batches import Batch

#: Distance between the outputs of the student and the teacher on a batch: a scalar.
Distance = Callable[[Any, Any, Batch], Tensor]
#: Which parameters are trained.
Parameters = Literal["auto", "cores", "vectors", "codes", "trainable"]


@dataclass(frozen=True)
class HealingConfig:
    """Options of `heal`.

    Args:
        steps: end-to-end steps, one batch each.
        layer_steps: layer-wise steps before them.
        lr: largest learning rate. For cores relative to the root mean square of each core, 5e-4 if absent,
            which suits some hundred steps of a pretrained model; models trained from scratch in an hour take
            five times as much. Gains and biases take six times the rate of cores, integers forty times that
            number of units a step (0.02). With `parameters="trainable"` absolute, and 1e-4 if absent.
        temperature: of the softmax whose divergence is lowered.
        distance: of the outputs of both models. If absent, the divergence of the logits; one minus the cosine
            of mean-pooled hidden states for models without logits; the relative squared difference for
            outputs that are tensors.
        parameters: `"cores"`, with 16-bit scales of integers; `"vectors"`, these and the gains and biases of
            the model, where scales of eight bits cannot be trained; `"codes"`, these and the integers
            themselves, rounded in each pass with the gradient of the values (straight-through), which heals
            more at two and three bits and takes 16 bytes a weight while it runs; `"trainable"` for all that
            require gradients now, such as adapters beside frozen cores. `"auto"` is `"cores"` where every
            compressed layer has something to train, else `"vectors"`.
        autocast: run both models in this dtype where that is safe; `torch.bfloat16` is twice as fast on
            recent processors and changes the result little.
        hold_weights: with `autocast`, hold the frozen matrices of both models in that dtype for all steps,
            where autocast would cast dense ones and unpack integers at each: faster, and takes the bytes of
            these matrices more.
        max_seconds: stop earlier; the learning rate then falls with time.
        clock: measures `max_seconds` and the time of the report: wall time, or `time.process_time` for the
            work of this process on a machine that is shared.
        checkpoint: safetensors file for cores and optimizer. If it exists, healing resumes from it, so the
            same call can be repeated after an interruption, with a model compressed anew the same way.
        save_every: steps between two writes of the checkpoint.
        progress: show a progress bar.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> tn.HealingConfig(steps=100).rate
        0.0005
    """

    steps: int = 300
    layer_steps: int = 0
    lr: float | None = None
    temperature: float = 1.0
    distance: Distance | None = None
    parameters: Parameters = "auto"
    autocast: torch.dtype | None = None
    hold_weights: bool = True
    max_seconds: float | None = None
    clock: Callable[[], float] = time.perf_counter
    checkpoint: str | Path | None = None
    save_every: int = 50
    progress: bool = False

    def __post_init__(self) -> None:
        check_size("steps", self.steps, least=0, error=ValueError)
        check_size("layer_steps", self.layer_steps, least=0, error=ValueError)
        check_size("save_every", self.save_every, error=ValueError)
        if self.parameters not in get_args(Parameters):
            raise ValueError(f"parameters must be one of {get_args(Parameters)}, got {self.parameters!r}.")
        for name in ("lr", "temperature", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value!r}.")

    @property
    def selects_parameters(self) -> bool:
        """True if `heal` selects what is trained, instead of taking what requires gradients.

        Where it does, scales of integers become trainable, learning rates are relative to the size of each
        parameter, and checkpoints hold the order of rows beside the cores.

        Example:
            >>> tn.HealingConfig().selects_parameters
            True
            >>> tn.HealingConfig(parameters="trainable").selects_parameters
            False
        """
        return self.parameters != "trainable"

    @property
    def rate(self) -> float:
        """Maximum learning rate; by default that of the trained parameters."""
        if self.lr is not None:
            return self.lr
        return 5e-4 if self.selects_parameters else 1e-4

    @property
    def total(self) -> int:
        """Number of steps of both kinds."""
        return self.layer_steps + self.steps
