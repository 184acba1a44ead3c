"""Train specialists of domains with transformers' `Trainer`: the command `tensornet specialize`."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tensornet._util import check_size, in_eval_mode
from tensornet.compression.surveying import tensor_digest
from tensornet.errors import DestinationError, TargetError
from tensornet.io import new_file
from tensornet_hf.checkpoint import load, on_device, read_json, resolve_folder
from tensornet_hf.specialist_files import DESCRIPTION, PretrainedSpecialists, load_specialists, specialists
from tensornet_hf.staging import begin, file_marks, staging
from tensornet_hf.text import (
    bos_token,
    load_tokenizer,
    read_text,
    require_causal,
    token_ids,
    usual_context,
    whole_windows,
)
from tensornet_moe.sharing import Share
from tensornet_moe.specialist_layers import SpecialistLinear

#: Smallest number of windows of a domain; the last tenth, at least two, is held out.
LEAST_WINDOWS = 12
#: How often the held-out loss is measured, and how many times it may fail to improve.
_MEASURED, _PATIENCE = 8, 2
_LONGEST = 512
#: Learning rates that are tried, from the middle one up or down as long as the loss falls.
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
_FIRST_RATE = 5e-3
#: A trial takes this part of the steps, but at least a few steps of each domain.
_TRIAL, _LEAST_TRIAL = 0.125, 8
#: Short trials favor high rates, at which longer training may diverge. So a higher rate is chosen only if it
#: increases the gain over the trunk by this fraction.
_CLEARLY = 0.1


@dataclass(frozen=True)
class SpecializeReport:
    """Result of `specialize`; `print` shows the losses as a table of domains by specialists.

    Args:
        losses: held-out loss of each domain by specialist, in nats per token; the specialist `"trunk"` is the
            trunk alone. Only the domains of this run are measured.
        bytes: bytes of the shared cores (`"shared"`), of each specialist, and of a new one (`"next"`).
        steps: number of training steps, of all new specialists together.
        rate: peak learning rate.
        rates: held-out loss after a short trial of each learning rate that was tried; empty if it was given.

    Example:
        >>> losses = {"law": {"trunk": 3.0, "law": 2.5}}
        >>> sizes = {"shared": 4096, "law": 256, "next": 256}
        >>> print(th.SpecializeReport(losses, sizes, steps=40, rate=0.01))
           held-out loss           trunk             law
                     law          3.0000          2.5000
                   bytes                             256
        shared cores: 4,096 bytes
        trained for 40 steps at the rate 0.01
    """

    losses: dict[str, dict[str, float]]
    bytes: dict[str, int]
    steps: int
    rate: float
    rates: dict[float, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        columns = list(next(iter(self.losses.values())))
        rows = [["held-out loss", *columns]]
        rows += [[name, *(f"{values[x]:.4f}" for x in columns)] for name, values in self.losses.items()]
        rows.append(["bytes", *(f"{self.bytes[x]:,}" if x in self.bytes else "" for x in columns)])
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(self.rates.items()))
        return "\n".join(
            [
                *("".join(f"{cell:>16}" for cell in row) for row in rows),
                f"shared cores: {self.bytes['shared']:,} bytes",
                f"trained for {self.steps:,} steps at the rate {self.rate:g}"
                + (f" (losses after short trials: {tried})" if tried else ""),
            ]
        )


def _example(number: int, ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids, "specialist": torch.tensor(number)}


def _batches_in_turn(
    windows: Sequence[Tensor], *, steps: int, batch_size: int, seed: int
) -> list[dict[str, Tensor]]:
    """Return the examples of `steps` batches: each batch has one domain, and the domains take turns.

    Batches of several domains would train worse: each specialist would get more, but noisier, steps.
    """
    draw = torch.Generator().manual_seed(seed)
    needed = -(-steps // len(windows)) * batch_size
    orders = []
    for x in windows:
        rounds = [torch.randperm(len(x), generator=draw) for _ in range(-(-needed // len(x)))]
        orders.append(torch.cat(rounds)[:needed].split(batch_size))
    found = []
    for step in range(steps):
        turn, number = divmod(step, len(windows))
        found += [_example(number, windows[number][k]) for k in orders[number][turn]]
    return found


class _TrainedCores(nn.Module):
    """The cores that are trained, as a model for `Trainer`, whose checkpoints then contain nothing else.

    The adapters of PEFT that share cores cannot take this place: `Trainer` restores only one of several.
    """

    def __init__(self, specialists: PretrainedSpecialists, names: Sequence[str]) -> None:
        super().__init__()
        self.specialists, self.names = specialists, list(names)
        self.cores = nn.ParameterList(specialists.parameters(*names))

    def forward(self, input_ids: Tensor, labels: Tensor, specialist: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch; `specialist: (rows,)` contains the number of each row's specialist."""
        rows = [self.names[int(k)] for k in specialist]
        with self.specialists.use(rows[0] if len(set(rows)) == 1 else rows):
            return {"loss": self.specialists.model(input_ids=input_ids, labels=labels).loss}

    def train(self, mode: bool = True) -> "_TrainedCores":
        """Set the mode of the trunk, which is no submodule."""
        self.specialists.model.train(mode)
        return super().train(mode)


def specialize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    domains: Mapping[str, str | os.PathLike[str]],
    *,
    share: Share = "ends",
    rank: int = 32,
    steps: int = 400,
    lr: float | None = None,
    batch_size: int = 8,
    context: int | None = None,
    target_modules: Sequence[str] | None = None,
    resume: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> SpecializeReport:
    """Train a specialist for each domain, and save them in a folder.

    The specialists are trained together: each batch has one domain, and the domains take turns. In a new
    folder, the shared cores are trained with them, and then frozen. In a folder that already contains
    specialists, only the new ones are trained, so that all others stay bit-identical.

    The last tenth of each text is held out: training ends early if the mean loss of the domains no longer
    falls, and the best state is kept. If the trunk alone is better for a domain, the change of its specialist
    is zero. To continue an interrupted run from its last checkpoint, repeat the call.

    Args:
        source: folder or hub id of the trunk, a causal language model.
        destination: a new folder, or one that `specialize` or `PretrainedSpecialists.save` wrote for this
            trunk.
        domains: text files by the name of the new specialist.
        share, rank, target_modules: see `tensornet_moe.specialists`; ignored for an existing folder.
        steps: largest number of steps for each domain.
        lr: peak learning rate of AdamW; by default, the best one in short trials.
        batch_size: number of windows in a batch.
        context: number of tokens in a window; the context of the model, at most 512, if absent.
        resume: continue an interrupted run. If False, its files are deleted.
        device: device of the model.
        seed: seed of the order of the windows.
        progress: show progress bars.

    Raises:
        TargetError: a text is too short, the trunk is not a causal language model, or the folder is of
            another trunk; nothing was changed.
        ValueError: a name is taken or not a word, or an option is out of its range; nothing was changed.
        DestinationError: the destination contains something else, or another run is writing it.
        FormatError: the interrupted run depended on other files, options or versions.

    Example:
        >>> from pathlib import Path
        >>> text = th.embedded.heldout_text()
        >>> _ = Path("first.txt").write_text(text[:6000])
        >>> _ = Path("second.txt").write_text(text[6000:12000].upper())
        >>> files = {"first": "first.txt", "second": "second.txt"}
        >>> report = th.specialize(
        ...     th.embedded.gpt2_path(), "all", files, steps=8, lr=0.01, context=32, rank=4
        ... )
        >>> list(report.losses), list(report.losses["first"])
        (['first', 'second'], ['trunk', 'first', 'second'])
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("rank", rank)):
        check_size(name, value, error=ValueError)
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr={lr} must be a positive number, or None for short trials.")
    if not domains:
        raise TargetError("Name at least one domain: domains={'law': 'law.txt'}.")
    texts = {name: read_text(Path(file)) for name, file in domains.items()}
    folder, target = resolve_folder(os.fspath(source)), Path(destination).expanduser().resolve()
    marks = file_marks(folder)
    model = on_device(load(folder), device)
    require_causal(model)
    tokenizer = load_tokenizer(folder)
    length, bos = context or usual_context(model, _LONGEST), bos_token(tokenizer)
    training, held_out = {}, {}
    for name, text in texts.items():
        ids = token_ids(tokenizer, text)
        windows = whole_windows(ids, length, bos)
        if len(windows) < LEAST_WINDOWS:
            raise TargetError(
                f"The text of {name!r} is too short: {len(ids)} tokens, but {LEAST_WINDOWS} windows of "
                f"{length} are needed. Give more text, or choose shorter windows (context=)."
            )
        last = max(len(windows) // 10, 2)
        training[name], held_out[name] = windows[:-last], windows[-last:]
    if old := (target / DESCRIPTION).is_file():
        s = load_specialists(target, model)
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DestinationError(
            f"{target} exists already, and is not a folder of specialists. Choose another name."
        )
    else:
        s = specialists(model, rank=rank, share=share, target_modules=target_modules)
    depends_on = {
        "specialists": [*s.names, tensor_digest([s.tensors()])] if old else [],
        "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        "options": [share, rank, target_modules, steps, lr, batch_size, length, str(device), seed],
    }
    for name in domains:
        s.add(name)
    s.freeze(old)

    losses = {name: {"trunk": mean_loss(s, None, x, batch_size)} for name, x in held_out.items()}
    examples: dict[str, Any] = {
        "training": list(training.values()),
        "held_out": list(held_out.values()),
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
    }
    with staging(target) as work:
        begin(work, marks, depends_on, resume=resume)
        trials: dict[float, float] = {}
        if lr is None:
            trial = max(math.ceil(_TRIAL * steps), min(_LEAST_TRIAL, steps))
            trunk = sum(x["trunk"] for x in losses.values()) / len(losses)
            lr = _best_rate(s, list(domains), work, trials, trunk, steps=trial * len(domains), **examples)
        trainer = _trainer(s, list(domains), work / "run", lr=lr, steps=steps * len(domains), **examples)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work / "run")))
        for name, windows in held_out.items():
            undo_harm(s, name, windows, batch_size)
        s.freeze()
        s.save(target, trunk=str(folder))
        shutil.rmtree(work, ignore_errors=True)
    for name, windows in held_out.items():
        losses[name] |= {x: mean_loss(s, x, windows, batch_size) for x in s.names}
    return SpecializeReport(losses, s.bytes(), int(trainer.state.global_step), lr, trials)


def _best_rate(
    s: PretrainedSpecialists,
    names: Sequence[str],
    work: Path,
    found: dict[float, float],
    trunk: float,
    **options: Any,
) -> float:
    """Return the best learning rate of short runs.

    Args:
        s, names: the specialists, and the names of those that are trained.
        work: the staging folder.
        found: the held-out loss of each rate that was tried is put here.
        trunk: the held-out loss of the trunk alone.
        options: as for `_trainer`.
    """
    start, file = s.snapshot(), work / "rates.json"
    if file.is_file():  # of an interrupted run
        found |= {float(rate): loss for rate, loss in read_json(file).items()}

    def loss(rate: float) -> float:
        if rate not in found:
            trainer = _trainer(s, names, work / "trial", lr=rate, trial=True, **options)
            trainer.train()
            measured = float(trainer.evaluate()["eval_loss"])
            found[rate] = measured if math.isfinite(measured) else 1e9
            s.restore(start)
            with new_file(file) as partial:
                partial.write_text(json.dumps(found), encoding="utf-8")
        return found[rate]

    best = RATES.index(_FIRST_RATE)
    for step, margin in ((1, _CLEARLY), (-1, 0.0)):
        while 0 <= best + step < len(RATES):
            least = loss(RATES[best])
            if loss(RATES[best + step]) >= least - margin * max(trunk - least, 0.0):
                break
            best += step
    return RATES[best]


def _trainer(
    s: PretrainedSpecialists,
    names: Sequence[str],
    folder: Path,
    *,
    training: Sequence[Tensor],
    held_out: Sequence[Tensor],
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    progress: bool,
    trial: bool = False,
) -> Trainer:
    """Return a `Trainer` of specialists, which keeps the best state; a trial measures and saves nothing."""
    every = max(steps // _MEASURED, 1)
    when = "no" if trial else "steps"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        train_sampling_strategy="sequential",  # the examples are shuffled already
        learning_rate=lr,
        weight_decay=0.0,
        warmup_steps=0.05,
        lr_scheduler_type="linear",
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        eval_strategy=when,
        eval_steps=every,
        save_strategy=when,
        save_steps=every,
        save_total_limit=2,
        logging_steps=every,
        load_best_model_at_end=not trial,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=[],
        seed=seed,
        use_cpu=_device(s).type == "cpu",
        disable_tqdm=not progress,
    )
    nn.Module.to(s.model, arguments.device)  # `Trainer` moves only the cores
    trainer = Trainer(
        model=_TrainedCores(s, names),
        args=arguments,
        train_dataset=_batches_in_turn(training, steps=steps, batch_size=batch_size, seed=seed),
        # Short domains are repeated, so that all domains have the same weight in the held-out loss.
        eval_dataset=[
            _example(k, x[j % len(x)]) for j in range(max(map(len, held_out))) for k, x in enumerate(held_out)
        ],
        callbacks=[] if trial else [EarlyStoppingCallback(early_stopping_patience=_PATIENCE)],
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)  # it would print every loss on stdout
    return trainer


def _device(s: PretrainedSpecialists) -> torch.device:
    return next(iter(s.layers.values())).weight.device


@torch.no_grad()
def undo_harm(s: PretrainedSpecialists, name: str, held_out: Tensor, batch_size: int) -> None:
    """Set the change of a specialist to zero if the trunk alone has a lower held-out loss."""
    if mean_loss(s, name, held_out, batch_size) > mean_loss(s, None, held_out, batch_size):
        cores = s.tensors(name)
        for layer_name, layer in s.layers.items():
            assert isinstance(layer, SpecialistLinear)
            cores[f"{layer_name}.core_{layer.private[0]}"].zero_()


@torch.no_grad()
def mean_loss(s: PretrainedSpecialists, which: str | None, windows: Tensor, batch_size: int) -> float:
    """Return the mean cross entropy of windows of tokens, in nats per token."""
    total = 0.0
    with in_eval_mode(s.model), s.use(which):
        for ids in windows.to(_device(s)).split(batch_size):
            total += float(s.model(input_ids=ids, labels=ids).loss) * len(ids)
    return total / len(windows)
