"""Callbacks for training mixtures, and healing (retraining) of compressed models, both with `Trainer`."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from tensornet._util import in_eval_mode
from tensornet.errors import TargetError
from tensornet.healing import trained_scales
from tensornet.healing.heal import (
    Parameters,
    default_rate,
    only_training,
    output_distance,
    relative_groups,
    trained_parameters,
)
from tensornet_moe import (
    ExpertPool,
    GradientMask,
    SharedCoreMoE,
    linear_fade,
    shared_parameters,
    update_biases,
)
from tensornet_moe.mask import Granularity


class GradientMaskCallback(TrainerCallback, ExportableState):
    """Apply a `tensornet_moe.GradientMask` while `Trainer` trains, and save its state in checkpoints.

    A run that is resumed from a checkpoint continues the random sequence of the interrupted run.

    Args:
        p: probability that a shared core is not updated in a step.
        granularity: mask whole cores (`"core"`) or single elements (`"element"`).
        seed: seed of the random masks.
        fade_steps: number of steps over which `p` decreases linearly to 0; None keeps `p` constant.
        compensate: see `GradientMask`.

    Raises (when training begins):
        TargetError: the experts of the model share no core.

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
    ) -> None:
        self.options: dict[str, Any] = {
            "p": p,
            "granularity": granularity,
            "seed": seed,
            "compensate": compensate,
            "schedule": None if fade_steps is None else linear_fade(fade_steps),
        }
        self.mask: GradientMask | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach a mask; if a checkpoint is resumed, restore the state of its mask."""
        self.on_train_end(args, state, control)  # remove the mask of an interrupted training
        self.mask = GradientMask(kwargs["model"], **self.options)
        self.mask.attach(kwargs["optimizer"])
        states = state.stateful_callbacks
        stored = states.get(type(self).__name__) if isinstance(states, dict) else None
        if state.global_step > 0 and isinstance(stored, dict) and stored["attributes"]:
            saved = dict(stored["attributes"])
            saved["generator"] = torch.tensor(list(bytes.fromhex(saved["generator"])), dtype=torch.uint8)
            self.mask.load_state_dict(saved)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the mask from the model."""
        if self.mask is not None:
            self.mask.detach()

    def state(self) -> dict[str, Any]:
        """Return the state of the mask, which `Trainer` writes to `trainer_state.json`."""
        if self.mask is None:
            return {"args": {}, "attributes": {}}
        state = self.mask.state_dict()
        return {"args": {}, "attributes": {**state, "generator": bytes(state["generator"].tolist()).hex()}}


class RouterBiasCallback(TrainerCallback):
    """Balance the load of experts without an auxiliary loss: call `tensornet_moe.update_biases` in each step.

    The model needs routers with a `bias_rate`, such as those of `th.upcycle(model, pool="all")`. The biases
    are buffers of the model, so checkpoints contain them.

    Raises (when training begins):
        TargetError: no router of the model has biases.

    Example:
        >>> callback = th.RouterBiasCallback()  # Trainer(..., callbacks=[callback])
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the model has routers with biases."""
        if all(mixture.router.bias_steps is None for mixture in _mixtures(kwargs["model"]).values()):
            raise TargetError(
                f"No router of this {type(kwargs['model']).__name__} has biases to update; upcycle the model "
                "with a bias_rate, such as 0.001."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the biases of all routers."""
        update_biases(kwargs["model"])


class RouterStatsCallback(TrainerCallback):
    """Log router statistics and the relative changes of cores at the logging steps of `Trainer`.

    Each logged step adds these values to the logs, and a row of them to `.history`. Router statistics are
    averaged over layers, and E is the number of experts.

    - `moe/load_max`: largest share of the tokens that an expert gets; `1 / E` if the load is even
    - `moe/load_entropy`: entropy of the load divided by `log E`; 1 if even, 0 if an expert gets all tokens
    - `moe/dropped`: share of tokens that no expert processes
    - `moe/balance_loss`, `moe/z_loss`: auxiliary losses before they are weighted
    - `moe/update_shared`, `moe/update_private`: relative change `|new - old| / |old|` of all shared and
      of all private cores in this step; the gradient mask is meant to balance the two

    `.history` also contains `load`, the number of tokens of each expert by layer. Router statistics are those
    of the last micro-batch before the step, on this process.

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the model has a mixture to observe."""
        if not _mixtures(kwargs["model"]):
            raise TargetError(
                f"{type(kwargs['model']).__name__} has no mixture to observe; use tensornet_hf.upcycle first."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the cores if this step is logged."""
        step = state.global_step + 1
        due = step % max(1, int(state.logging_steps)) == 0 or (step == 1 and args.logging_first_step)
        cores = _cores(kwargs["model"]) if due else {}
        self._before = {kind: [p.detach().clone() for p in parts] for kind, parts in cores.items()}

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect router statistics and the relative change of the cores, if this step is logged."""
        if not self._before:
            return
        stats = {name: m.stats for name, m in _mixtures(kwargs["model"]).items() if m.stats is not None}
        rows = []
        for entry in stats.values():
            experts = torch.tensor(float(max(len(entry.load), 2)))
            values = {
                "load_max": entry.load.max() / entry.load.sum().clamp_min(1),
                "load_entropy": entry.entropy / experts.log().to(entry.entropy),
                "dropped": entry.dropped / entry.tokens.clamp_min(1),
                "balance_loss": entry.balance,
                "z_loss": entry.z,
            }
            rows.append({f"moe/{name}": float(value) for name, value in values.items()})
        row = {name: sum(each[name] for each in rows) / len(rows) for name in (rows[0] if rows else {})}
        for kind, parts in _cores(kwargs["model"]).items():
            before = self._before[kind]
            moved = sum(float((new - old).square().sum()) for new, old in zip(parts, before, strict=True))
            size = sum(float(old.square().sum()) for old in before)
            row[f"moe/update_{kind}"] = (moved / size) ** 0.5 if size > 0 else 0.0
        self._before = {}
        self._latest = row
        loads = {name: entry.load.tolist() for name, entry in stats.items()}
        self.history.append({"step": state.global_step + 1, **row, "load": loads})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the statistics to the logs, and to the copy of the logs in the trainer's history."""
        if logs is not None and "loss" in logs:
            logs.update(self._latest)
            if state.log_history:
                state.log_history[-1].update(self._latest)


def _mixtures(model: nn.Module) -> dict[str, SharedCoreMoE]:
    return {name: part for name, part in model.named_modules() if isinstance(part, SharedCoreMoE)}


def _cores(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    shared = shared_parameters(model)
    known = {id(p) for p in shared}
    pools = [part for part in model.modules() if isinstance(part, ExpertPool)]
    networks = [*(m.experts for m in _mixtures(model).values()), *pools]
    experts = [p for network in networks for p in network.parameters()]
    return {"shared": shared, "private": [p for p in experts if id(p) not in known]}


# --- healing --------------------------------------------------------------------------------------------

#: Default training arguments. There is no weight decay, since it would shrink every core of a product.
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
    """`Trainer` whose loss is the distance from the dense model's outputs (see `output_distance`).

    It trains all parameters of the model that require gradients, such as cores or adapters.

    Args:
        teacher: the dense model; it is set to eval mode and moved to the device of the trained model.
        relative: make each learning rate relative to the root mean square of its parameter, as
            `tensornet.heal` does for cores.
        kwargs: arguments of `Trainer`.
    """

    def __init__(self, *, teacher: nn.Module, relative: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = teacher.eval().requires_grad_(False)
        self.relative = relative
        self.model_accepts_loss_kwargs = False  # the loss is already a mean over the batch

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of `Trainer`; with relative rates, each parameter has a group of its own."""
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
        """Return the distance of the model's outputs from the teacher's outputs (see `output_distance`)."""
        batch = {key: value for key, value in inputs.items() if key != "labels"}
        self.teacher.to(next(model.parameters()).device)
        with torch.no_grad():
            wanted = self.teacher(**batch)
        outputs = model(**batch)
        loss = output_distance(outputs, wanted, inputs)
        return (loss, outputs) if return_outputs else loss


def heal(
    model: PreTrainedModel,
    teacher: nn.Module,
    data: Dataset[Any],
    *,
    steps: int = 300,
    output_dir: str,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    parameters: Parameters = "auto",
    resume: bool = False,
    **arguments: Any,
) -> float:
    """Train the cores of a compressed model with `Trainer` to match the dense model's outputs.

    For integer cores, the scales are trained.

    Args:
        model: the compressed model; it is changed in place.
        teacher: the dense model; it is moved to the device of `model`, and not changed otherwise.
        data: dataset of examples with `input_ids`.
        steps: number of training steps.
        output_dir: folder for checkpoints.
        collate: function that collates examples; None uses the default of transformers.
        parameters: which parameters are trained (see `tensornet.heal`).
        resume: resume from the last checkpoint in `output_dir`, if there is one. By default a checkpoint is
            written every 50 steps.
        arguments: arguments of `TrainingArguments` that override `DEFAULTS`. `learning_rate` has the meaning
            of `lr` in `tensornet.heal`.

    Returns:
        The mean distance from the dense model's outputs over the steps of this call.

    Raises:
        TargetError: the model has no trainable cores, no parameter requires gradients, or `model` and
            `teacher` are the same.
    """
    last = get_last_checkpoint(output_dir) if resume and Path(output_dir).is_dir() else None
    chosen = parameters != "trainable"
    options = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        **{**DEFAULTS, "learning_rate": default_rate(parameters), **arguments},
    )
    with (
        trained_scales(model, codes=parameters == "codes") if chosen else nullcontext(),
        in_eval_mode(teacher),
        only_training(teacher, ()),
        only_training(model, trained_parameters(model, teacher, parameters).values()),
    ):
        trainer = HealingTrainer(
            model=model,
            teacher=teacher,
            relative=chosen,
            args=options,
            train_dataset=data,
            data_collator=collate,
        )
        return float(trainer.train(resume_from_checkpoint=last).training_loss)
