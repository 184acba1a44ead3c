"""Train specialists of domains with transformers' `Trainer`: the command `tensornet specialize`."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tensornet._util import check_size, in_eval_mode
from tensornet.errors import DestinationError, TargetError
from tensornet.healing.heal import only_training
from tensornet_hf.checkpoint import load, on_device, resolve_folder
from tensornet_hf.specialist_files import DESCRIPTION, Specialists, load_specialists, specialists
from tensornet_hf.streaming import digest, staging
from tensornet_hf.text import (
    bos_token,
    load_tokenizer,
    read_text,
    require_causal,
    token_ids,
    usual_context,
    whole_windows,
)
from tensornet_moe import parameter_groups
from tensornet_moe.sharing import Share

CORES = "cores.safetensors"
#: Smallest number of windows of a domain; the last tenth, at least two, is held out.
LEAST_WINDOWS = 12
#: How often the held-out loss is measured in a phase, and how many times it may fail to improve.
_MEASURED, _PATIENCE = 8, 2
_LONGEST = 512
#: Largest number of windows of each domain on which a router is fitted; they are evenly spaced.
_ROUTED_WINDOWS = 1000
#: Column of the losses if the router chooses; no specialist can have this name.
ROUTED = "router"


@dataclass(frozen=True)
class SpecializeReport:
    """Result of `specialize`; `print` shows the losses as a table of domains by specialists.

    Args:
        losses: held-out loss of each domain by specialist, in nats per token; the specialist `"trunk"` is the
            trunk alone, and `"router"` what the router chooses. Only the domains of this run are measured.
        bytes: bytes of the shared cores (`"shared"`), of each specialist, and of a new one (`"next"`).
        steps: number of training steps of each phase.
        moved: relative change of each specialist that was not trained, see `Specialists.movement`; exactly 0
            unless the shared cores were trained.
        routed: the share of correct choices of the router by domain; empty if no router was fitted.

    Example:
        >>> losses = {"law": {"trunk": 3.0, "law": 2.5}}
        >>> print(th.SpecializeReport(losses, {"shared": 4096, "law": 256, "next": 256}, {"law": 40}))
           held-out loss           trunk             law
                     law          3.0000          2.5000
                   bytes                             256
        shared cores: 4,096 bytes
    """

    losses: dict[str, dict[str, float]]
    bytes: dict[str, int]
    steps: dict[str, int]
    moved: dict[str, float] = field(default_factory=dict)
    routed: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of the table."""
        columns = list(next(iter(self.losses.values())))
        rows = [[name, *(f"{values[x]:.4f}" for x in columns)] for name, values in self.losses.items()]
        sizes = ["bytes", *(f"{self.bytes[x]:,}" if x in self.bytes else "" for x in columns)]
        return ["held-out loss", *columns], [*rows, sizes]

    def notes(self) -> list[str]:
        """Return the lines below the table."""
        lines = [f"shared cores: {self.bytes['shared']:,} bytes"]
        if any(self.moved.values()):
            moved = ", ".join(f"{name} by {value:.2%}" for name, value in self.moved.items())
            lines.append(f"the shared cores were trained, which changed {moved}")
        if self.routed:
            found = ", ".join(f"{name} {value:.0%}" for name, value in self.routed.items())
            lines.append(f"correct choices of the router: {found}")
        return lines

    def __str__(self) -> str:
        """Return the table, and the lines below it."""
        header, rows = self.rows()
        lines = ["".join(f"{cell:>16}" for cell in row) for row in (header, *rows)]
        return "\n".join([*lines, *self.notes()])


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


class SpecialistTrainer(Trainer):
    """`Trainer` that uses the specialist of each row, and whose checkpoints contain only trained cores.

    Args:
        specialists: the specialists of the trained model.
        names: names by the numbers in the entry `specialist` of the batches.
        kwargs: arguments of `Trainer`.
    """

    def __init__(self, *, specialists: Specialists, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(model=specialists.model, **kwargs)
        self.specialists, self.names = specialists, list(names)
        self.model_accepts_loss_kwargs = False  # the loss is already a mean over the batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the batch, each row with its specialist."""
        batch = {key: value for key, value in inputs.items() if key != "specialist"}
        rows = [self.names[int(k)] for k in inputs["specialist"]]
        with self.specialists.use(rows[0] if len(set(rows)) == 1 else rows):
            outputs = model(**batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    # The following methods are private, but `Trainer` has no public ones that say what a checkpoint contains.
    # The ordinary ones would write the whole trunk each time.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_cores(self.specialists, self.names), folder / CORES)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_cores(self.specialists, Path(resume_from_checkpoint) / CORES)

    def _load_best_model(self) -> None:
        restore_cores(self.specialists, Path(str(self.state.best_model_checkpoint)) / CORES)


def trained_cores(specialists: Specialists, names: Sequence[str]) -> dict[str, Tensor]:
    """Copy the shared cores and those of some specialists to the CPU, keyed by `specialist/layer.core_k`."""
    parts = {"shared": specialists.tensors(), **{name: specialists.tensors(name) for name in names}}
    return {
        f"{name}/{key}": core.detach().cpu().contiguous()
        for name, cores in parts.items()
        for key, core in cores.items()
    }


def restore_cores(specialists: Specialists, file: Path) -> None:
    """Copy the cores of a file that contains `trained_cores` into the model."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, core in load_file(file).items():
        name, _, rest = key.partition("/")
        found.setdefault(name, {})[rest] = core
    specialists.restore(found)


def specialize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    domains: Mapping[str, str | os.PathLike[str]],
    *,
    share: Share = "ends",
    rank: int = 32,
    steps: int = 400,
    lr: float = 1e-2,
    batch_size: int = 8,
    context: int | None = None,
    target_modules: Sequence[str] | None = None,
    train_shared: bool = False,
    router: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> SpecializeReport:
    """Train a specialist for each domain, and save them in a folder.

    In a new folder, the specialists are trained together with the shared cores, which are then frozen. In a
    folder that already contains specialists, only the new ones are trained, each alone, so that all others
    stay equal bit for bit. The last tenth of each text is held out: training ends early if its loss (the mean
    of the domains that are trained together) no longer falls, and the best state is kept. If that is the
    trunk, the change of the specialist is zero. A run that was interrupted continues from its last checkpoint
    if it is called again.

    Args:
        source: folder or hub id of the trunk, a causal language model.
        destination: a new folder, or one that `specialize` or `Specialists.save` wrote for this trunk.
        domains: text files by the name of the new specialist. With `router`, the files of all specialists:
            those that the folder already contains are not trained again.
        share, rank, target_modules: see `tensornet_moe.specialists`; ignored for an existing folder.
        steps: largest number of steps for each domain.
        lr: peak learning rate of AdamW.
        batch_size: number of windows in a batch.
        context: number of tokens in a window; the context of the model, at most 512, if absent.
        train_shared: also train the shared cores of an existing folder together with the new specialists, at
            the rates of `tensornet_moe.parameter_groups`. This changes the others, and the report says by how
            much.
        router: fit a router on the texts, see `Specialists.fit_router`, and save it in the folder.
        device: device of the model.
        seed: seed of the order of the windows.
        progress: show progress bars.

    Raises:
        TargetError: a text is too short, the trunk is not a causal language model, the folder is of another
            trunk, or a router lacks the text of a specialist; nothing was changed.
        ValueError: a name is taken or not a word, or an option is out of its range; nothing was changed.
        DestinationError: the destination contains something else, or another run is writing it.

    Example:
        >>> from pathlib import Path
        >>> text = th.embedded.heldout_text()
        >>> _ = Path("first.txt").write_text(text[:6000])
        >>> _ = Path("second.txt").write_text(text[6000:12000].upper())
        >>> files = {"first": "first.txt", "second": "second.txt"}
        >>> report = th.specialize(th.embedded.gpt2_path(), "all", files, steps=8, context=32, rank=4)
        >>> list(report.losses), list(report.losses["first"])
        (['first', 'second'], ['trunk', 'first', 'second'])
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("rank", rank)):
        check_size(name, value, error=ValueError)
    if not domains:
        raise TargetError("Name at least one domain: domains={'law': 'law.txt'} (--domain law=law.txt).")
    texts = {name: read_text(Path(file)) for name, file in domains.items()}
    folder, target = resolve_folder(os.fspath(source)), Path(destination).expanduser().resolve()
    old = (target / DESCRIPTION).is_file()
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
                f"{length} are needed. Give more text, or choose shorter windows (context=, --context)."
            )
        last = max(len(windows) // 10, 2)
        training[name], held_out[name] = windows[:-last], windows[-last:]
    if old:
        s = load_specialists(target, model)
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DestinationError(
            f"{target} exists already, and is not a folder of specialists. Choose another name."
        )
    else:
        s = specialists(model, rank=rank, share=share, target_modules=target_modules)
    others = [name for name in s.names if name not in domains]
    if router and (others or len(domains) < 2):
        raise TargetError(
            "A router needs the texts of all specialists, at least two: also give domains="
            f"{{{', '.join(f'{name!r}: FILE' for name in others or ['another'])}}} (--domain NAME=FILE)."
        )
    names = [name for name in domains if not (router and name in s.names)]
    untrained = [name for name in s.names if name not in names]
    for name in names:
        s.add(name)
    before = s.snapshot() if train_shared else {}

    losses = {name: {"trunk": mean_loss(s, None, x, batch_size)} for name, x in held_out.items()}
    taken: dict[str, int] = {}
    options = [share, rank, target_modules, train_shared, steps, lr, batch_size, length, seed]
    key = digest([str(folder), texts, s.names, *options])
    with staging(target) as work:
        run = work / "specialize.json"
        if not run.exists() or json.loads(run.read_text()) != key:
            for outdated in work.glob("phase-*"):
                shutil.rmtree(outdated)
            run.write_text(json.dumps(key))
        phases = [(f"phase-{name}", [name]) for name in names]
        if together := (train_shared or not old) and len(s.shared_parameters()) > 0 and len(names) > 0:
            phases = [("phase-together", names)]
        s.freeze(not together)
        for phase, members in phases:
            taken[phase.removeprefix("phase-")] = _train(
                s,
                members,
                work / phase,
                [training[name] for name in members],
                [held_out[name] for name in members],
                # Learning shared cores needs the full rate, but other specialists already depend on old ones.
                slow_shared=old,
                steps=steps * len(members),
                lr=lr,
                batch_size=batch_size,
                device=torch.device(device),
                seed=seed,
                progress=progress,
            )
        s.freeze()
        accuracy = {}
        if router:
            drawn = {name: x[:: math.ceil(len(x) / _ROUTED_WINDOWS)] for name, x in training.items()}
            batches = {name: [{"input_ids": x} for x in w.split(batch_size)] for name, w in drawn.items()}
            accuracy = s.fit_router(batches)
        s.save(target, trunk=str(folder), force=train_shared)
        shutil.rmtree(work, ignore_errors=True)
    for name, windows in held_out.items():
        columns = [*s.names, *([ROUTED] if router else [])]
        losses[name] |= {x: mean_loss(s, x, windows, batch_size) for x in columns}
    moved = s.movement({name: before[name] for name in ("shared", *untrained)}) if before else {}
    moved = {name: moved.get(name, 0.0) for name in untrained}
    return SpecializeReport(losses, s.bytes(), taken, moved, accuracy)


def _train(
    s: Specialists,
    names: Sequence[str],
    folder: Path,
    training: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    slow_shared: bool,
    steps: int,
    lr: float,
    batch_size: int,
    device: torch.device,
    seed: int,
    progress: bool,
) -> int:
    """Train specialists in one phase, and return the number of steps; a finished phase is only restored."""
    done = folder / CORES
    if done.exists():
        restore_cores(s, done)
        return int((folder / "steps").read_text())
    every = max(steps // _MEASURED, 1)
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
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        logging_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=[],
        seed=seed,
        use_cpu=device.type == "cpu",
        disable_tqdm=not progress,
    )
    with only_training(s.model, s.parameters(*names)):
        groups: Any = parameter_groups(s.model, lr=lr) if slow_shared else s.parameters(*names)
        trainer = SpecialistTrainer(
            specialists=s,
            names=names,
            args=arguments,
            optimizers=(torch.optim.AdamW(groups, lr=lr, weight_decay=0.0), None),
            train_dataset=_batches_in_turn(training, steps=steps, batch_size=batch_size, seed=seed),
            # Short domains are repeated, so that all domains have the same weight in the held-out loss.
            eval_dataset=[
                _example(k, x[j % len(x)])
                for j in range(max(map(len, held_out)))
                for k, x in enumerate(held_out)
            ],
            callbacks=[EarlyStoppingCallback(early_stopping_patience=_PATIENCE)],
        )
        if not progress:
            trainer.remove_callback(PrinterCallback)  # it would print every loss on stdout
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        taken = int(trainer.state.global_step)
    for name, windows in zip(names, held_out, strict=True):
        undo_harm(s, name, windows, batch_size)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / "steps").write_text(str(taken))
    save_file(trained_cores(s, names), folder / f"{CORES}.partial")
    os.replace(folder / f"{CORES}.partial", done)
    return taken


@torch.no_grad()
def undo_harm(s: Specialists, name: str, held_out: Tensor, batch_size: int) -> None:
    """Set the change of a specialist to zero if the trunk alone has a lower held-out loss."""
    if mean_loss(s, name, held_out, batch_size) > mean_loss(s, None, held_out, batch_size):
        cores = s.tensors(name)
        for layer_name, layer in s.layers.items():
            cores[f"{layer_name}.core_{layer.private[0]}"].zero_()


@torch.no_grad()
def mean_loss(s: Specialists, which: str | None, windows: Tensor, batch_size: int) -> float:
    """Return the mean cross entropy of windows of tokens, in nats per token; `"router"` lets it choose."""
    device, total = next(iter(s.layers.values())).weight.device, 0.0
    with in_eval_mode(s.model):
        for ids in windows.to(device).split(batch_size):
            with s.use(s.route(input_ids=ids) if which == ROUTED else which):
                total += float(s.model(input_ids=ids, labels=ids).loss) * len(ids)
    return total / len(windows)
