"""Do experts that share their center beat a Switch mixture at equal parameters, and does the mask help?

    python benchmarks/mpoe_vs_switch.py [--text FOLDER] [--state FOLDER] [--tables gpt2 t5] [--toy]

Two embedded models, trained on one book, are fine-tuned on quotations: a GPT-2 as a language model, a T5 that
restores vowels (`mpoe_tasks.py`, which also says where the text comes from). Each row of a table is the same
model with other feed-forward networks, all made from its trained ones (`mpoe_rows.py`).

Every row gets the same number of steps, the same batches for a seed and the same tuning effort: each rate of
the grid is tried once, with the first seed; the one with the lowest loss on the tuning part is used for all
seeds, and the table shows the test part. Each run is written to the state folder as it ends and is not
repeated: the script can be stopped and called again. All tables take about an hour of one core. Writes the
record `mpoe_vs_switch.json`, which keeps the tables that were not asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, paired_medians, record
from mpoe_rows import Recipe, Row, build, optimizer_of, stepper, train
from mpoe_tasks import (
    LanguageModelling,
    Quotations,
    Task,
    VowelRestoration,
    divided,
    fetch,
    read_quotations,
)

from tensornet_hf.embedded import heldout_text

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "benchmarks"

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
        task: the class.
        sizes: how much is trained and judged on.
        recipe: steps and the rest.
        rates: grid of learning rates.
        rows: what is compared.
        seeds: the rates are tried with the first.
        repeats: steps that are timed.
    """

    task: type[LanguageModelling] | type[VowelRestoration]
    sizes: dict[str, int]
    recipe: Recipe
    rates: tuple[float, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    repeats: int = 7


SETTINGS = {
    "gpt2": Setting(
        LanguageModelling,
        {"train_size": 48_000, "judge_size": 16_000, "batch": 4},
        Recipe(steps=160),
        (7.5e-4, 1.5e-3, 3e-3, 6e-3),
        ROWS,
    ),
    "t5": Setting(
        VowelRestoration,
        {"train_size": 8_000, "judge_size": 1_000, "batch": 32},
        Recipe(steps=200),
        (5e-4, 1e-3, 2e-3, 4e-3),
        ROWS,
    ),
    "t5-few": Setting(
        VowelRestoration,
        {"train_size": 400, "judge_size": 1_000, "batch": 32},
        Recipe(steps=100),
        (6e-5, 2e-4, 6e-4, 1.8e-3),
        (*PLAIN, *MASKS, *MASK_VARIANTS),
    ),
}


class State:
    """Finished runs of one table by key, written to the disk after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def run(self, setting: Setting, task: Task, row: Row, rate: float, seed: int) -> dict[str, Any]:
        """Read or make the result of a run; every option that changes it is part of its key."""
        key = f"{setting.task.__name__} {setting.sizes} {setting.recipe} {row} rate {rate:g} seed {seed}"
        if key not in self.runs:
            result = train(task, row, rate=rate, seed=seed, recipe=setting.recipe)
            self.runs[key] = result
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.runs, indent=1))
            print(
                f"{self.path.stem:7} {row.name:34} rate {rate:<7g} seed {seed}  {result['loss']:.4f}",
                flush=True,
            )
        return self.runs[key]


def summary(row: Row, runs: Sequence[dict[str, Any]], tried: dict[float, float]) -> dict[str, Any]:
    """Summarize a row in one line: means and standard deviations over the seeds."""
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
    """Measure the median processor seconds of a step, with all rows in turn in one process."""
    steps = {}
    for row in rows:
        model = build(task, row, seed=0).train()
        optimizer = optimizer_of(model, row, 1e-4, setting.recipe)
        steps[row.name] = stepper(model, optimizer, task.batches(0))
    return {
        name: timing.median
        for name, timing in paired_medians(steps, setting.repeats, clock=time.process_time).items()
    }


def table(setting: Setting, quotations: Quotations, state: State) -> list[dict[str, Any]]:
    """Make the missing runs of one table and return its lines."""
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


def claims(lines: Sequence[dict[str, Any]], name: str) -> dict[str, str]:
    """State the result of one table: Switch, and the best mixtures within fractions of its parameters."""
    rows = [line for line in lines if line["table"] == name and line["row"] != "dense"]
    switch = next((line for line in rows if line["row"] == "Switch"), None)
    if switch is None:
        return {}
    found = {"Switch": f"{switch['loss']:.4f} ± {switch['loss_spread']:.4f}"}
    for part in (7, 14, 20):
        small = [x for x in rows if part * x["expert_parameters"] <= switch["expert_parameters"]]
        if small:
            best = min(small, key=lambda line: line["loss"])
            found[f"best with 1/{part} of its experts' parameters or less"] = (
                f"{best['loss']:.4f} ± {best['loss_spread']:.4f} "
                f"({best['row']}, 1/{switch['expert_parameters'] / best['expert_parameters']:.1f})"
            )
    return found


def toy(setting: Setting) -> Setting:
    """Shrink the settings of a table so that it runs in seconds."""
    return dataclasses.replace(
        setting,
        sizes={"train_size": 260, "judge_size": 260, "batch": 2},
        recipe=Recipe(steps=1),
        rates=setting.rates[:2],
        rows=setting.rows[:3],
        seeds=(0, 1),
        repeats=1,
    )


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what is missing, write the record, return its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="folder of quotations; fetched with apt if absent")
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
    tables = dict.fromkeys(line["table"] for line in lines)
    claimed = {f"{name}: {k}": v for name in tables for k, v in claims(lines, name).items()}
    settings = known["settings"] | {
        name: {"rates": s.rates, "seeds": s.seeds, **dataclasses.asdict(s.recipe), **s.sizes}
        for name, s in SETTINGS.items()
        if name in given.tables
    }
    return record("mpoe_vs_switch", lines, folder=given.records, summary=claimed, settings=settings)


if __name__ == "__main__":
    print(main())
