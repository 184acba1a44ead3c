"""Do experts with a shared center beat a Switch mixture at equal parameters, and does a gradient mask help?

    python benchmarks/mpoe_vs_switch.py [--text FOLDER] [--state FOLDER] [--tables gpt2 t5] [--toy]

This package's two models, trained on the Bible, are fine-tuned on quotations: a GPT-2 as a language model,
and a T5 that restores vowels (see `mpoe_tasks.py`, also for the text). Each row of a table is the same model
with other feed-forward networks, which `th.upcycle` makes from the trained ones.

Every row gets the same number of steps, the same batches for a seed, and the same tuning effort. Each
learning rate of a grid is tried once, with the first seed. The rate with the lowest loss on the tuning part
is used for all seeds. The table shows losses on the test part. Each finished run is written to the state
folder and is not repeated, so the script can be stopped and called again. All tables take about an hour of
one core. Writes the record `mpoe_vs_switch.json`; tables that were not requested are kept in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tensornet_hf as th
import tensornet_moe as tm

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, paired_medians, record
from mpoe_tasks import (
    LanguageModelling,
    Quotations,
    Task,
    VowelRestoration,
    divided,
    fetch,
    read_quotations,
)

from tensornet.topologies import mpo
from tensornet_hf.embedded import heldout_text

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "benchmarks"

WEIGHT_DECAY, WARMUP, BALANCE = 0.01, 0.1, 0.01


@dataclass(frozen=True)
class Row:
    """One way to build and train the feed-forward networks.

    Args:
        name: name of the row in tables.
        experts: number of experts; 0 means the dense model.
        ends: leg sizes of the first and of the last of three cores; None means dense matrices as experts.
        max_bond: largest bond; None decomposes matrices exactly.
        shared: which cores the experts share.
        mask_p: probability of the gradient mask; 1 freezes the shared cores.
        mask: further options of `GradientMask`; `("fade", fraction)` reduces the probability to 0 over this
            fraction of the steps.
        across: whether all layers share one center.
    """

    name: str
    experts: int = 8
    ends: tuple[int, int] | None = (4, 4)
    max_bond: int | None = None
    shared: str | tuple[str, ...] = "center"
    mask_p: float = 0.0
    mask: tuple[tuple[str, Any], ...] = ()
    across: bool = False


MASKS = (
    Row("MPOE, mask 0.5", mask_p=0.5),
    Row("MPOE, mask 0.9", mask_p=0.9),
    Row("MPOE, center frozen", mask_p=1.0),
)
MASK_VARIANTS = (
    Row("MPOE, mask 0.5, compensated", mask_p=0.5, mask=(("compensate", True),)),
    Row("MPOE, mask 0.5 by element", mask_p=0.5, mask=(("granularity", "element"),)),
    Row("MPOE, mask 0.9, fading", mask_p=0.9, mask=(("fade", 1.0),)),
)
PLAIN = (Row("dense", experts=0), Row("Switch", ends=None), Row("MPOE"))
ROWS = (
    *PLAIN,
    Row("MPOE, bonds 12", max_bond=12),
    *MASKS,
    Row("MPOE, E = 16", experts=16),
    Row("every core private", shared="none"),
    Row("MPOE, ends 2x2", ends=(2, 2)),
    Row("Switch, E = 32", experts=32, ends=None),
    Row("MPOE, E = 32, ends 2x2", experts=32, ends=(2, 2)),
    Row("MPOE, one center for all layers", across=True),
)


@dataclass(frozen=True)
class Setting:
    """Settings of one table.

    Args:
        task: class of the task.
        sizes: options of the task: sizes of the texts and of batches.
        steps: number of training steps; there is a linear warm-up, then a cosine decay to 0, and gradients
            are clipped to norm 1.
        rates: grid of learning rates.
        rows: rows of the table.
        seeds: seeds of the runs; the rates are tried with the first.
        repeats: number of steps that are timed.
    """

    task: type[LanguageModelling] | type[VowelRestoration]
    sizes: dict[str, int]
    steps: int
    rates: tuple[float, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    repeats: int = 7


SETTINGS = {
    "gpt2": Setting(
        LanguageModelling,
        {"train_size": 48_000, "judge_size": 16_000, "batch": 4},
        160,
        (7.5e-4, 1.5e-3, 3e-3, 6e-3),
        ROWS,
    ),
    "t5": Setting(
        VowelRestoration,
        {"train_size": 8_000, "judge_size": 1_000, "batch": 32},
        200,
        (5e-4, 1e-3, 2e-3, 4e-3),
        ROWS,
    ),
    "t5-few": Setting(
        VowelRestoration,
        {"train_size": 400, "judge_size": 1_000, "batch": 32},
        100,
        (6e-5, 2e-4, 6e-4, 1.8e-3),
        (*PLAIN, *MASKS, *MASK_VARIANTS),
    ),
}


def build(task: Task, row: Row, *, seed: int) -> nn.Module:
    """Build the model of a row; the seed initializes the routers."""
    model = task.model()
    if row.experts == 0:
        return model
    words: dict[str, Any] = {"router": "switch", "balance_coef": BALANCE}
    if row.across:
        words |= {"pool": "all", "balance": "layer"}
    th.upcycle(model, experts=experts_of(row), **words)
    if row.across:  # each layer has the experts that start as its network; they share the center
        (pool,) = (part for part in model.modules() if isinstance(part, tm.ExpertPool))
        layers = mixtures(model)
        for place, layer in enumerate(layers):
            layer.experts = tm.PooledExperts(pool, range(place, pool.num_experts, len(layers)))
            layer.router = tm.SwitchRouter(task.d_model, row.experts)
    torch.manual_seed(seed)
    # Draw routers again: `upcycle` seeds layer k with seed + k, so different seeds would share some routers.
    for layer in mixtures(model):
        layer.router.weight.data = torch.randn(layer.router.weight.shape) * 0.1 / math.sqrt(task.d_model)
    return model


def experts_of(row: Row) -> Callable[[Tensor], tm.ExpertBank]:
    """Return the function that makes experts: chains with a large center, or dense matrices for Switch."""

    def make(weights: Tensor) -> tm.ExpertBank:
        rows, columns = weights.shape[1:]
        if row.ends is None:
            return tm.mixtures.make_bank(weights, experts=row.experts, share="none")
        a, b = row.ends
        legs = {size: (a, size // (a * b), b) for size in (rows, columns)}
        options: dict[str, Any] = {"out_dims": legs[rows], "in_dims": legs[columns], "max_bond": row.max_bond}
        if len(weights) == 1:
            return tm.SharedCoreExperts.from_dense(
                weights[0], num_experts=row.experts, share=row.shared, **options
            )
        center = ("1",)
        return tm.mixtures.experts_from(weights, len(weights) * row.experts, mpo(**options), center)

    return make


def mixtures(model: nn.Module) -> list[tm.SharedCoreMoE]:
    """List the mixtures of a model in order."""
    return [m for m in model.modules() if isinstance(m, tm.SharedCoreMoE)]


def expert_parameters(model: nn.Module) -> int:
    """Count the parameters of all feed-forward networks, with biases and shared cores, without routers."""
    names = {"mlp", "DenseReluDense"}  # names of the networks in GPT-2 and T5
    sites = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    parts = [getattr(site, "experts", site) for site in sites]
    parts += [m for m in model.modules() if isinstance(m, tm.ExpertPool)]
    return sum(p.numel() for part in parts for p in part.parameters())


def optimizer_of(
    model: nn.Module, row: Row, rate: float, steps: int, *, seed: int = 0
) -> torch.optim.Optimizer:
    """Make the optimizer of a row and attach its gradient mask; frozen cores are not optimized."""
    if row.mask_p == 1:
        for core in tm.shared_parameters(model):
            core.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    if 0 < row.mask_p < 1:
        options = dict(row.mask)
        if fade := options.pop("fade", None):
            options["schedule"] = tm.linear_fade(round(fade * steps))
        # The hooks of the optimizer keep the mask alive.
        tm.GradientMask(model, p=row.mask_p, seed=seed, **options).attach(optimizer)
    return optimizer


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Tensor]]
) -> Callable[[], float]:
    """Return a function that makes one training step and returns its loss, including router losses."""

    def step() -> float:
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


@torch.no_grad()
def judge(model: nn.Module, batches: list[tuple[dict[str, Tensor], int]]) -> dict[str, float]:
    """Compute the mean loss of a token in nats, the accuracy, and the relative entropy of expert load."""
    layers = mixtures(model)
    loads: list[Tensor] = [torch.zeros(m.num_experts) for m in layers]
    loss = right = count = 0.0
    model.eval()
    for batch, tokens in batches:
        out = model(**batch)
        loss += float(out.loss) * tokens
        labels, guess = batch["labels"], out.logits.argmax(-1)
        if "attention_mask" not in batch:
            labels, guess = labels[:, 1:], guess[:, :-1]
        right += float((labels == guess).sum())
        count += tokens
        for load, layer in zip(loads, layers, strict=True):
            load += layer.stats.load if layer.stats is not None else 0
    model.train()
    result = {"loss": loss / count, "accuracy": right / count}
    if layers:
        shares = [load / load.sum() for load in loads]
        entropies = [float(torch.special.entr(s).sum()) / math.log(len(s)) for s in shares]
        result["entropy"] = statistics.mean(entropies)
    return result


def train(task: Task, row: Row, *, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Build, train and evaluate the model of one row once.

    Args:
        task, row: the task and the row.
        rate: largest learning rate.
        seed: seed of the routers, the order of the data, and the mask.
        steps: number of training steps.
    """
    model = build(task, row, seed=seed).train()
    optimizer = optimizer_of(model, row, rate, steps, seed=seed)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * s / steps))),
    )
    step = stepper(model, optimizer, task.batches(seed))
    losses, started = [], time.process_time()
    for _ in range(steps):
        losses.append(step())
        schedule.step()
    seconds = time.process_time() - started
    return {
        "row": row.name,
        "rate": rate,
        "seed": seed,
        "tune_loss": judge(model, task.judge("tune"))["loss"],
        **judge(model, task.judge("test")),
        "train_loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "cpu_seconds": seconds,
        "expert_parameters": expert_parameters(model),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


class State:
    """Finished runs of one table, stored in a file.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def run(self, setting: Setting, task: Task, row: Row, rate: float, seed: int) -> dict[str, Any]:
        """Return the stored result of a run, or make the run and store it; the key contains all options."""
        key = f"{setting.task.__name__} {setting.sizes} {setting.steps} {row} rate {rate:g} seed {seed}"
        if key not in self.runs:
            result = train(task, row, rate=rate, seed=seed, steps=setting.steps)
            self.runs[key] = result
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.runs, indent=1))
            print(
                f"{self.path.stem:7} {row.name:34} rate {rate:<7g} seed {seed}  {result['loss']:.4f}",
                flush=True,
            )
        return self.runs[key]


def summary(row: Row, runs: Sequence[dict[str, Any]], tried: dict[float, float]) -> dict[str, Any]:
    """Summarize the runs of a row: means and standard deviations over the seeds.

    Args:
        row: the row.
        runs: results of the runs, one for each seed.
        tried: loss on the tuning part for each learning rate.
    """
    losses, accuracies = [r["loss"] for r in runs], [r["accuracy"] for r in runs]
    return {
        "row": row.name,
        "options": {k: str(v) for k, v in dataclasses.asdict(row).items() if k != "name"},
        "expert_parameters": runs[0]["expert_parameters"],
        "bytes": 4 * runs[0]["parameters"],
        "parameters": runs[0]["parameters"],
        "rate": runs[0]["rate"],
        "tune_loss_by_rate": {f"{rate:g}": loss for rate, loss in tried.items()},
        "loss_by_seed": {str(r["seed"]): r["loss"] for r in runs},
        "loss": statistics.mean(losses),
        "loss_spread": statistics.stdev(losses),
        "accuracy": statistics.mean(accuracies),
        "accuracy_spread": statistics.stdev(accuracies),
        "train_loss": statistics.mean(r["train_loss"] for r in runs),
        "entropy": statistics.mean(r["entropy"] for r in runs) if "entropy" in runs[0] else None,
    }


def seconds_per_step(setting: Setting, task: Task, rows: Sequence[Row]) -> dict[str, float]:
    """Measure the median processor seconds of a training step of each row, with all rows timed in turn."""
    steps = {}
    for row in rows:
        model = build(task, row, seed=0).train()
        optimizer = optimizer_of(model, row, 1e-4, setting.steps)
        steps[row.name] = stepper(model, optimizer, task.batches(0))
    return {
        name: timing.median
        for name, timing in paired_medians(steps, setting.repeats, clock=time.process_time).items()
    }


def table(setting: Setting, quotations: Quotations, state: State) -> list[dict[str, Any]]:
    """Make the missing runs of one table, and return its rows for the record."""
    task = setting.task(quotations, **setting.sizes)
    first, lines = setting.seeds[0], {}
    for row in setting.rows:
        tried = {rate: state.run(setting, task, row, rate, first)["tune_loss"] for rate in setting.rates}
        best = min(tried, key=tried.__getitem__)
        lines[row] = summary(
            row, [state.run(setting, task, row, best, seed) for seed in setting.seeds], tried
        )
    seconds = seconds_per_step(setting, task, list(lines))
    return [{**line, "seconds_per_step": seconds[row.name]} for row, line in lines.items()]


def toy(setting: Setting) -> Setting:
    """Shrink the settings of a table so that it runs in a few seconds."""
    return dataclasses.replace(
        setting,
        sizes={"train_size": 260, "judge_size": 260, "batch": 2},
        steps=1,
        rates=setting.rates[:2],
        rows=setting.rows[:3],
        seeds=(0, 1),
        repeats=1,
    )


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="folder of quotations (default: download with apt)")
    parser.add_argument("--state", type=Path, default=CACHE / "mpoe", help="folder of finished runs")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--tables", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--toy", action="store_true", help="a few steps on verses of the embedded text")
    given = parser.parse_args(arguments)

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    quotations = (
        divided(heldout_text().split("\n")) if given.toy else read_quotations(given.text or fetch(CACHE))
    )
    lines: list[dict[str, Any]] = []
    for name in given.tables:
        setting = toy(SETTINGS[name]) if given.toy else SETTINGS[name]
        found = table(setting, quotations, State(given.state / f"{name}.json"))
        lines += [{"table": name, **line} for line in found]
    path = given.records / "mpoe_vs_switch.json"
    known = json.loads(path.read_text()) if path.is_file() else {"rows": [], "settings": {}}
    lines += [line for line in known["rows"] if line["table"] not in given.tables]
    settings = known["settings"] | {
        name: {"rates": s.rates, "seeds": s.seeds, "steps": s.steps, **s.sizes}
        for name, s in SETTINGS.items()
        if name in given.tables
    }
    return record("mpoe_vs_switch", lines, folder=given.records, settings=settings)


if __name__ == "__main__":
    print(main())
