"""Callbacks of `Trainer` for mixtures: mask the gradient of shared cores, log router statistics."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from tensornet.errors import TargetError
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
