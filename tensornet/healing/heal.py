"""Healing: distil a dense model into the cores of its compressed student."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode, progress_bar, without_cache
from tensornet.calibration.batches import Batch, BatchLike, as_batch, check_batches
from tensornet.errors import NonFiniteError, TargetError
from tensornet.healing.checkpoint import load_state, save_state
from tensornet.healing.config import HealingConfig
from tensornet.healing.held_weights import held_weights
from tensornet.healing.objective import end_to_end_step, layer_step, output_distance
from tensornet.healing.trained import (
    compressed_layers,
    only_training,
    relative_groups,
    row_orders,
    trained_parameters,
)
from tensornet.healing.trained_scales import trained_scales
from tensornet.io import check_place
from tensornet.nn.module import NetworkModule
from tensornet.nn.unfuse import unfused


@dataclass(frozen=True)
class HealReport:
    """Result of healing.

    Args:
        losses: distance to the dense model at each end-to-end step made in this call.
        layer_losses: mean relative squared error of the layers' outputs at each layer-wise step.
        steps: steps made in all, earlier calls that were resumed included.
        trained: number of parameters that were trained.
        seconds: time of this call, by its clock.

    Example:
        >>> import copy
        >>> teacher = torch.nn.Linear(16, 16)
        >>> student = torch.nn.Sequential(copy.deepcopy(teacher))
        >>> _ = tn.compress(student, tn.CompressionConfig(max_bond=4, objective="weight"), progress=False)
        >>> report = tn.heal(student, torch.nn.Sequential(teacher), [torch.randn(64, 16)], steps=5)
        >>> report.steps, len(report.losses)
        (5, 5)
    """

    losses: tuple[float, ...]
    layer_losses: tuple[float, ...]
    steps: int
    trained: int
    seconds: float


@torch.inference_mode(False)  # and with gradients, whatever a caller has switched off
def heal(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[BatchLike],
    config: HealingConfig | None = None,
    **options: Any,
) -> HealReport:
    """Distil a dense model into the cores of its compressed student; matrices outside them stay frozen.

    First layer by layer (each compressed layer learns the dense layer's outputs for the dense layer's inputs,
    without a backward pass through the model), then end to end. AdamW without weight decay, gradients clipped
    to norm 1; the learning rate rises for a twentieth of the steps and falls to zero. With `autocast` the
    frozen matrices of both models are cast or unpacked once and held in that dtype until the end, unless
    `hold_weights=False`.

    Args:
        model: compressed, changed in place.
        teacher: the dense model, on the same device; not changed.
        data: batches as for `calibrate`; walked through again when they end. At least as varied as what the
            model will see, and much of it: a few ten thousand tokens heal well, a hundred overfit.
        config: options in one object; or
        options: fields of `HealingConfig` as keyword arguments, such as `steps=300`.

    Returns:
        Losses and the number of steps.

    Raises:
        TargetError: nothing to train, no data, or a teacher that is trained itself or has other layers.
        TypeError: an option that `HealingConfig` does not have, or both a config and options.
        ValueError: an option is out of its range.
        NonFiniteError: the distance became NaN or infinite; the checkpoint holds an earlier state.
        FormatError: the checkpoint is damaged, of another model, or of a run with other `layer_steps`.
        DestinationError: the checkpoint cannot be written there.

    Reference:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network"; Shazeer, Stern 2018,
        "Adafactor", section 8, for learning rates relative to the size of parameters.

    Example:
        >>> import copy
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> model = copy.deepcopy(teacher)
        >>> _ = tn.compress(model, tn.CompressionConfig(max_bond=4, objective="weight"), progress=False)
        >>> report = tn.heal(model, teacher, [torch.randn(64, 16)], steps=30, lr=1e-2)
        >>> report.losses[-1] < report.losses[0]
        True
    """
    if config is not None and options:
        raise TypeError(
            f"heal takes a config or options, got both; put {', '.join(options)} into the config."
        )
    config = HealingConfig(**options) if config is None else config
    check_batches(data, "heal")
    codes = config.parameters == "codes"
    with trained_scales(model, codes=codes) if config.selects_parameters else nullcontext():
        return _healed(model, teacher, data, config)


def _healed(
    model: nn.Module, teacher: nn.Module, data: Iterable[BatchLike], config: HealingConfig
) -> HealReport:
    start = config.clock()
    run = _Run.start(model, teacher, config)
    batches = _forever(data, skip=run.done)
    device = next(model.parameters()).device
    apart = unfused(teacher) if config.layer_steps else nullcontext()
    trained, held = run.trained.values(), config.autocast if config.hold_weights else None
    with (
        apart,
        in_eval_mode(model, teacher),
        without_cache(model),
        without_cache(teacher),
        only_training(model, trained),
        held_weights(model, teacher, dtype=held, trained=trained),
    ):
        bar = progress_bar(
            total=config.total, initial=run.done, desc="healing", disable=not config.progress, unit="step"
        )
        while run.done < config.total and (gone := run.progress(config.clock() - start)) < 1:
            loss = run.step(as_batch(next(batches), model, device), gone)
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            if run.done % config.save_every == 0 and run.done < config.total:
                run.save()
        bar.close()
        run.save()
    return run.report(config.clock() - start)


@dataclass
class _Run:
    """State of one call of `heal`."""

    model: nn.Module
    teacher: nn.Module
    config: HealingConfig
    layers: Mapping[str, NetworkModule]
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    done: int = 0
    losses: list[float] = field(default_factory=list)
    layer_losses: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, model: nn.Module, teacher: nn.Module, config: HealingConfig) -> "_Run":
        """Select what is trained, and resume from the checkpoint if it exists."""
        trained = trained_parameters(model, teacher, config.parameters, config.layer_steps)
        groups = (
            relative_groups(trained.values())
            if config.selects_parameters
            else [{"params": [*trained.values()], "size": 1.0}]
        )
        # One pass over memory in place of seven: on a CPU a step would spend a quarter of its time in them.
        fused = all(x.device.type == "cpu" and x.is_floating_point() for x in trained.values())
        optimizer = torch.optim.AdamW(groups, lr=config.rate, weight_decay=0.0, fused=fused or None)
        run = cls(model, teacher, config, compressed_layers(model), trained, optimizer)
        if run.checkpoint is not None:
            check_place("The checkpoint", run.checkpoint)
            if run.checkpoint.is_file():
                run.done = load_state(
                    run.checkpoint, trained, run.fixed, optimizer, layer_steps=config.layer_steps
                )
        return run

    @property
    def checkpoint(self) -> Path | None:
        """Checkpoint file, None if not requested."""
        return None if self.config.checkpoint is None else Path(self.config.checkpoint)

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Tensors that are stored beside the trained ones."""
        return row_orders(self.layers) if self.config.selects_parameters else {}

    def progress(self, seconds: float) -> float:
        """Return the finished fraction, by steps or by time, whichever is larger."""
        by_time = 0.0 if self.config.max_seconds is None else seconds / self.config.max_seconds
        return max(self.done / self.config.total, by_time)

    def step(self, batch: Batch, progress: float) -> float:
        """Make one step, layer-wise or end to end, and return its loss.

        Raises:
            NonFiniteError: the loss is NaN or infinite; no parameter was changed.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            warm_up = min(1.0, (progress + 1 / config.total) * 20)
            group["lr"] = config.rate * group["size"] * warm_up * (1 - progress)
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, dtype=config.autocast, enabled=config.autocast is not None):
            if self.done < config.layer_steps:
                loss = layer_step(self.layers, self.teacher, batch)
                self.layer_losses.append(loss)
            else:
                distance = config.distance or partial(output_distance, temperature=config.temperature)
                loss = end_to_end_step(self.model, self.teacher, batch, distance)
                self.losses.append(loss)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The distance to the dense model became {loss} at step {self.done}; use a smaller lr than "
                f"{config.rate}."
            )
        _clip(self.trained.values())
        with torch.device("cpu"):  # counters of Adam belong there, also under `torch.set_default_device`
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss

    def save(self) -> None:
        """Write the checkpoint, if requested."""
        if self.checkpoint is not None:
            save_state(
                self.checkpoint,
                self.trained,
                self.fixed,
                self.optimizer,
                self.done,
                layer_steps=self.config.layer_steps,
            )

    def report(self, seconds: float) -> HealReport:
        """Build the report."""
        count = sum(parameter.numel() for parameter in self.trained.values())
        return HealReport(tuple(self.losses), tuple(self.layer_losses), self.done, count, seconds)


def _clip(parameters: Iterable[nn.Parameter]) -> None:
    """Clip gradients to norm 1; smaller ones are not even written, as torch's own function would."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm > 1:
        nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)


def _forever(data: Iterable[BatchLike], *, skip: int) -> Iterator[BatchLike]:
    """Yield batches without end, from where an earlier run stopped."""
    position = 0
    while True:
        before = position
        for batch in data:
            if position >= skip:
                yield batch
            position += 1
        if position == before:
            raise TargetError(
                "heal ran out of batches; pass a list or another collection that can be walked again, "
                "not an iterator."
            )
