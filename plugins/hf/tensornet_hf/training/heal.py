"""Healing through transformers' `Trainer`: its schedules, precision, devices, logging and checkpoints."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import tensornet as tn
from tensornet._util import in_eval_mode
from tensornet.healing import HealingConfig, trained_scales
from tensornet.healing.config import Parameters
from tensornet.healing.objective import output_distance
from tensornet.healing.trained import (
    only_training,
    relative_groups,
    trained_parameters,
)

#: Arguments that suit cores: no decay (it would shrink products of cores twice), short warm-up, linear decay.
DEFAULTS: Mapping[str, Any] = {
    "weight_decay": 0.0,
    "warmup_steps": 0.05,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "save_steps": 50,
    "save_total_limit": 1,
}


class HealingTrainer(Trainer):
    """A `Trainer` whose loss is the divergence from the dense model's outputs.

    Args:
        teacher: the dense model; kept in eval mode, moved to the device of the training model.
        temperature: of the softmax whose divergence is lowered.
        relative: multiply the learning rate by the size of each parameter, as `tensornet.heal` does for
            cores.
        kwargs: of `Trainer`. The model's parameters that require gradients are trained: the cores after
            `freeze_all_but_cores`, or adapters.
    """

    def __init__(
        self, *, teacher: nn.Module, temperature: float = 1.0, relative: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.relative = relative
        self.model_accepts_loss_kwargs = False  # our loss is a mean over each batch already

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of `Trainer`, with one group for each parameter if rates are relative."""
        made = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.relative and not made:
            optimizer.param_groups = [
                {**group, **own, "lr": group["lr"] * own["size"]}
                for group in optimizer.param_groups
                for own in relative_groups(group["params"])
            ]
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the distance from the teacher's outputs, see `output_distance`."""
        batch = {key: value for key, value in inputs.items() if key != "labels"}
        device = next(model.parameters()).device
        self.teacher.to(device)
        with torch.no_grad():
            wanted = self.teacher(**batch)
        outputs = model(**batch)
        loss = output_distance(outputs, wanted, inputs, self.temperature)
        return (loss, outputs) if return_outputs else loss


def heal(
    model: PreTrainedModel,
    teacher: nn.Module,
    data: Dataset[Any],
    *,
    steps: int = 300,
    layer_steps: int = 0,
    output_dir: str,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    parameters: Parameters = "auto",
    resume: bool = False,
    **arguments: Any,
) -> float:
    """Distil the dense model into the cores, through `Trainer`; of integer cores the scales are trained.

    Args:
        model: compressed, changed in place.
        teacher: the dense model; only moved to the device of the other.
        data: of examples with `input_ids`, for example `TextWindows`.
        steps: end-to-end steps.
        layer_steps: layer-wise steps before them, made by `tensornet.heal`; not repeated when resuming.
        output_dir: for checkpoints.
        collate: puts examples together; transformers' default if absent.
        parameters: what is trained, see `tensornet.healing.HealingConfig`.
        resume: resume from the last checkpoint in `output_dir`, if there is one. `DEFAULTS` write one every
            50 steps.
        arguments: of `TrainingArguments`, on top of `DEFAULTS`; `learning_rate` means the same as `lr` of
            `tensornet.heal`.

    Returns:
        The mean divergence over the steps of this call.

    Raises:
        TargetError: the model has no trainable cores, nothing that requires gradients, or is the teacher.
    """
    last = get_last_checkpoint(output_dir) if resume and Path(output_dir).is_dir() else None
    config = HealingConfig(parameters=parameters)
    options = TrainingArguments(
        output_dir=output_dir, max_steps=steps, **{**DEFAULTS, "learning_rate": config.rate, **arguments}
    )
    with (
        trained_scales(model, codes=parameters == "codes") if config.selects_parameters else nullcontext(),
        in_eval_mode(teacher),
        only_training(teacher, ()),
        only_training(model, trained_parameters(model, teacher, parameters, layer_steps).values()),
    ):
        trainer = HealingTrainer(
            model=model,
            teacher=teacher,
            relative=config.selects_parameters,
            args=options,
            train_dataset=data,
            data_collator=collate,
        )
        if layer_steps and last is None:
            teacher.to(options.device)
            batches = trainer.get_train_dataloader()
            lr = options.learning_rate
            tn.heal(model, teacher, batches, steps=0, layer_steps=layer_steps, lr=lr, parameters=parameters)
        return float(trainer.train(resume_from_checkpoint=last).training_loss)
