"""Training with `Trainer`: callbacks for mixtures, and healing of compressed models."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

import tensornet as tn
from tensornet._util import in_eval_mode
from tensornet.errors import TargetError
from tensornet.healing import HealingConfig, trained_scales
from tensornet.healing.heal import (
    Parameters,
    only_training,
    output_distance,
    relative_groups,
    trained_parameters,
)
from tensornet_moe import GradientMask, SharedCoreMoE, linear_fade, shared_parameters
from tensornet_moe.mask import Granularity


class GradientMaskCallback(TrainerCallback, ExportableState):
    """Attaches a `tensornet_moe.GradientMask` while `Trainer` trains, and saves it in checkpoints.

    A run resumed from a checkpoint continues the draws of the interrupted one.

    Args:
        p: probability of leaving a shared core alone in a step.
        granularity: `"core"` or `"element"`.
        seed: of the draws.
        fade_steps: fade `p` linearly to 0 over so many steps; constant if absent.
        compensate: see `GradientMask`.
        target: which part of the model is masked, the whole if absent: a function of the model.

    Raises (when training begins):
        TargetError: there is no core that experts share.

    Example:
        >>> callback = th.GradientMaskCallback(p=0.8, fade_steps=1000)  # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        p: float,
        *,
        granularity: Granularity = "core",
        seed: int = 0,
        fade_steps: int | None = None,
        compensate: bool = False,
        target: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.options: dict[str, Any] = {
            "p": p,
            "granularity": granularity,
            "seed": seed,
            "compensate": compensate,
        }
        self.fade_steps, self.target = fade_steps, target
        self.mask: GradientMask | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach a mask, with the state of the checkpoint that is resumed."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self.mask is not None:
            self.mask.detach()
        self.mask = GradientMask(
            model if self.target is None else self.target(model),
            **self.options,
            schedule=None if self.fade_steps is None else linear_fade(self.fade_steps),
        )
        self.mask.attach(optimizer)
        states: Any = state.stateful_callbacks  # annotated as the list it is made from
        stored = states.get(type(self).__name__) if isinstance(states, dict) else None
        if state.global_step > 0 and isinstance(stored, dict) and stored["attributes"]:
            saved = dict(stored["attributes"])
            saved["generator"] = torch.tensor(list(bytes.fromhex(saved["generator"])), dtype=torch.uint8)
            self.mask.load_state_dict(saved)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the mask."""
        if self.mask is not None:
            self.mask.detach()

    def state(self) -> dict[str, Any]:
        """Return the state that `Trainer` writes to `trainer_state.json`."""
        if self.mask is None:
            return {"args": {}, "attributes": {}}
        state = self.mask.state_dict()
        return {"args": {}, "attributes": {**state, "generator": bytes(state["generator"].tolist()).hex()}}


class RouterStatsCallback(TrainerCallback):
    """Logs router statistics and the movement of cores at the logging steps of `Trainer`.

    One row a logged step in `.history`, and in the logs, averaged over layers:

    - `moe/load_max`: largest share of the tokens that one expert gets; `1 / E` when even;
    - `moe/load_entropy`: of the load, relative to `log E`: 1 when even, 0 when one expert gets all;
    - `moe/dropped`: share of tokens that no expert computes;
    - `moe/balance_loss`, `moe/z_loss`: unweighted auxiliary losses;
    - `moe/update_shared`, `moe/update_private`: relative change of shared and private cores in this step,
      `|new - old| / |old|` over all of them: the imbalance that the gradient mask is about.

    `.history` also holds `load`, the tokens of each expert by layer. The statistics are those of the last
    micro-batch before the step, on this process.

    Raises (when training begins):
        TargetError: the model has no mixture.

    Example:
        >>> callback = th.RouterStatsCallback()  # Trainer(..., callbacks=[callback])
        >>> callback.history
        []
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self._before: dict[str, list[Tensor]] = {}
        self._latest: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the model has a mixture to observe."""
        if not _mixtures(kwargs["model"]):
            raise TargetError(
                f"{type(kwargs['model']).__name__} has no mixture to watch; tensornet_hf.upcycle makes them."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the cores if this step is logged."""
        step = state.global_step + 1
        due = step % max(1, int(state.logging_steps)) == 0 or (step == 1 and args.logging_first_step)
        self._before = (
            {kind: [p.detach().clone() for p in parts] for kind, parts in _cores(kwargs["model"]).items()}
            if due
            else {}
        )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the movement of the cores, if this step is logged."""
        if not self._before:
            return
        model = kwargs["model"]
        row = _measure(_mixtures(model))
        for kind, parts in _cores(model).items():
            row[f"moe/update_{kind}"] = _relative_change(self._before[kind], parts)
        self._before = {}
        self._latest = dict(row)
        loads = {name: m.stats.load.tolist() for name, m in _mixtures(model).items() if m.stats is not None}
        self.history.append({"step": state.global_step + 1, **row, "load": loads})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the statistics to the logs and to the history of the trainer, which has copied them already."""
        if logs is not None and "loss" in logs:
            logs.update(self._latest)
            if state.log_history:
                state.log_history[-1].update(self._latest)


def _mixtures(model: nn.Module) -> dict[str, SharedCoreMoE]:
    return {name: part for name, part in model.named_modules() if isinstance(part, SharedCoreMoE)}


def _cores(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    shared = shared_parameters(model)
    known = {id(p) for p in shared}
    experts = [p for m in _mixtures(model).values() for p in m.experts.parameters()]
    return {"shared": shared, "private": [p for p in experts if id(p) not in known]}


def _measure(mixtures: dict[str, SharedCoreMoE]) -> dict[str, float]:
    stats = [m.stats for m in mixtures.values() if m.stats is not None]
    rows: dict[str, list[float]] = {}
    for entry in stats:
        computed = entry.load.sum().clamp_min(1)
        experts = torch.tensor(float(max(len(entry.load), 2)))
        values = {
            "load_max": entry.load.max() / computed,
            "load_entropy": entry.entropy / experts.log().to(entry.entropy),
            "dropped": entry.dropped / entry.tokens.clamp_min(1),
            "balance_loss": entry.balance,
            "z_loss": entry.z,
        }
        for name, value in values.items():
            rows.setdefault(f"moe/{name}", []).append(float(value))
    return {name: sum(values) / len(values) for name, values in rows.items()}


@torch.no_grad()
def _relative_change(before: list[Tensor], after: list[nn.Parameter]) -> float:
    if not after:
        return 0.0
    moved = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    size = sum(float(b.square().sum()) for b in before)
    return (moved / size) ** 0.5 if size > 0 else 0.0


# --- healing --------------------------------------------------------------------------------------------

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
