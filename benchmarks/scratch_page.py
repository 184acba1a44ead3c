"""Write the tables and the picture of docs/moe_from_scratch.md from the records of moe_from_scratch.py.

    python benchmarks/scratch_page.py

The text is written by hand; what lies between `<!-- NAME -->` and `<!-- end -->` is replaced, as it
is in docs/mpoe.md, which shows the first table too.
`moe_from_scratch.json` holds all runs on one edition of the texts; `_causes` and `_mask` more runs on it, to
be compared with runs of the first; `_t5` those of another architecture, `_larger` of a larger model;
`_earlier` longer runs on an edition before it, each compared with the dense run of its own record.
`scratch_formats.json` has the same models in few bits, `trained_stacks.json` one of them with its experts
compressed.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, ROOT

#: The second shows the first table alone.
PAGES = (ROOT / "docs" / "moe_from_scratch.md", ROOT / "docs" / "mpoe.md")
PICTURE = ROOT / "docs" / "moe_from_scratch.svg"
MILLION = 1_000_000
MARKS = (1, 2, 3, 4, 6, 8)
DENSE, WIDE, SWITCH = "dense", "dense x2", "Switch, prob"
#: Parameters of the experts of Switch, eight networks with biases in two layers.
SWITCH_PARAMETERS = 529_408
#: Seed of the runs that are compared; others have a table of their own.
SEED = 0
#: Rate of the runs before rates were tuned; rows with no other have a table of their own.
FIRST_RATE = 0.003

Run = Mapping[str, Any]


def losses(run: Run, part: str = "loss") -> dict[float, float]:
    """Return held-out losses by millions of tokens, rounded as the marks are named."""
    return {round(point["tokens"] / MILLION, 1): point[part] for point in run["history"]}


def loss_at(run: Run, flops: float) -> float | None:
    """Interpolate the held-out loss at a number of FLOPs, linearly in its logarithm; None outside."""
    points = [(math.log(point["flops"]), point["loss"]) for point in run["history"]]
    for (x, a), (y, b) in itertools.pairwise(points):
        if x <= math.log(flops) <= y:
            return float(a + (b - a) * (math.log(flops) - x) / (y - x))
    return points[-1][1] if math.isclose(points[-1][0], math.log(flops), abs_tol=0.01) else None


def name_of(run: Run) -> str:
    """Return the name of a row, with the depth where it is not two layers."""
    layers = run["sizes"]["layers"]
    return str(run["row"]["name"]) + ("" if layers == 2 else f", {layers} layers")


def untuned(runs: Sequence[Run]) -> dict[str, Run]:
    """Collect runs of the first rate and the common seed, by name."""
    found = [run for run in runs if run["history"] and run["seed"] == SEED]
    return {name_of(run): run for run in found if run["recipe"]["rate"] == FIRST_RATE}


def compared(runs: Sequence[Run], mark: float) -> dict[str, Run]:
    """Collect runs of the common seed by name, each at the rate that is best on the tuning part at a mark.

    Rows that were trained with the first rate alone are left out.
    """
    groups: dict[str, list[Run]] = {}
    tried: dict[str, set[float]] = {}
    for run in runs:
        if run["seed"] == SEED and run["history"]:
            tried.setdefault(name_of(run), set()).add(run["recipe"]["rate"])
        if run["seed"] == SEED and mark in losses(run):
            groups.setdefault(name_of(run), []).append(run)
    return {
        name: min(found, key=lambda run: losses(run, "tune_loss")[mark])
        for name, found in groups.items()
        if tried[name] != {FIRST_RATE}
    }


def longest(runs: Sequence[Run]) -> int:
    """Return the last mark that both dense models have reached, in millions of tokens."""
    return max(mark for mark in MARKS if {DENSE, WIDE} <= compared(runs, mark).keys())


def long_table(runs: Sequence[Run]) -> str:
    """Tabulate the longest runs, at every mark and after equal arithmetic."""
    shown = longest(runs)
    named = compared(runs, shown)
    marks = [mark for mark in MARKS if any(mark in losses(run) for run in named.values())]
    dense = named[DENSE]
    budget = losses(dense, "flops")[shown]
    lines = [
        "| row | rate | parameters | of Switch | model, KB | MFLOP a token | "
        + " | ".join(f"{mark} M" for mark in marks)
        + f" | to dense | to {WIDE} | at {budget / 1e12:.2f} TFLOP | load entropy |",
        "|---|" + "--:|" * (len(marks) + 9),
    ]
    for name, run in sorted(named.items(), key=lambda item: losses(item[1])[shown]):
        found, entropy, equal = losses(run), run["history"][-1]["entropy"], loss_at(run, budget)
        cells = (
            name,
            *sizes(run),
            *(f"{found[mark]:.3f}" if mark in found else "" for mark in marks),
            f"{found[shown] - losses(dense)[shown]:+.3f}",
            f"{found[shown] - losses(named[WIDE])[shown]:+.3f}",
            "" if equal is None else f"{equal:.3f}",
            "" if entropy is None else f"{entropy:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sizes(run: Run) -> tuple[str, str, str, str, str]:
    """Format rate, parameters, fraction of Switch's parameters, bytes and arithmetic of a row."""
    parameters = run["expert_parameters"]
    return (
        f"{run['recipe']['rate']:g}",
        f"{parameters:,}",
        f"{parameters / SWITCH_PARAMETERS:.3f}",
        f"{run['bytes'] / 1000:,.0f}",
        f"{run['flops_per_token'] / MILLION:.2f}",
    )


def forms_table(named: Mapping[str, Run]) -> str:
    """Tabulate the runs after one million tokens, best first."""
    named = {name: run for name, run in named.items() if 1 in losses(run)}
    dense, wide = (losses(named[name])[1] for name in (DENSE, WIDE))
    lines = [
        f"| row | rate | parameters | of Switch | model, KB | MFLOP a token | 1 M | to dense | to {WIDE} |",
        "|---|" + "--:|" * 8,
    ]
    for name, run in sorted(named.items(), key=lambda item: losses(item[1])[1]):
        loss = losses(run)[1]
        cells = (name, *sizes(run), f"{loss:.3f}", f"{loss - dense:+.3f}", f"{loss - wide:+.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rates_table(runs: Sequence[Run]) -> str:
    """Tabulate the tuning loss of rows trained at several rates, at every mark that two rates share."""
    groups = grouped([run for run in runs if run["seed"] == SEED], by=name_of)
    rates = sorted({run["recipe"]["rate"] for found in groups.values() for run in found})
    lines = [
        "| row | tokens | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |",
        "|---|--:|" + "--:|" * len(rates),
    ]
    for name, found in groups.items():
        for mark in sorted({mark for run in found for mark in losses(run)}):
            tuned = {run["recipe"]["rate"]: losses(run, "tune_loss").get(mark) for run in found}
            cells = ["" if tuned.get(rate) is None else f"{tuned[rate]:.3f}" for rate in rates]
            if len(cells) - cells.count("") > 1:
                lines.append("| " + " | ".join((name, f"{mark:g} M", *cells)) + " |")
    return "\n".join(lines)


def seeds_table(runs: Sequence[Run]) -> str:
    """Tabulate the held-out loss of rows with several seeds, at the last mark that all of them reached."""
    groups = grouped(runs, by=lambda run: f"{name_of(run)} | {run['recipe']['rate']:g}")
    seeds = sorted({run["seed"] for found in groups.values() for run in found})
    lines = [
        "| row | rate | tokens | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|---|" + "--:|" * (len(seeds) + 3),
    ]
    for name, found in groups.items():
        mark = last_of_all(found)
        by_seed = {run["seed"]: losses(run)[mark] for run in found}
        cells = (f"{by_seed[seed]:.4f}" if seed in by_seed else "" for seed in seeds)
        mean = statistics.mean(by_seed.values())
        lines.append("| " + " | ".join((name, f"{mark:g} M", *cells, f"{mean:.4f}")) + " |")
    return "\n".join(lines)


def grouped(runs: Sequence[Run], by: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Group runs by a key, and keep groups of several."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run["history"]:
            groups.setdefault(by(run), []).append(run)
    return {name: found for name, found in sorted(groups.items()) if len(found) > 1}


def last_of_all(runs: Sequence[Run]) -> float:
    """Return the last mark that all given runs have reached, in millions of tokens."""
    return max(set.intersection(*(set(losses(run)) for run in runs)))


def earlier_table(runs: Sequence[Run]) -> str:
    """Tabulate the loss minus that of the dense run of the same record, by tokens."""
    named = {run["row"]["name"]: run for run in runs if run["history"]}
    dense = losses(named[DENSE])
    marks = [mark for mark in MARKS if mark in dense]
    lines = [
        "| row | parameters | of Switch | " + " | ".join(f"{mark} M" for mark in marks) + " |",
        "|---|--:|--:|" + "--:|" * len(marks),
    ]

    def order(item: tuple[str, Run]) -> tuple[int, float]:
        found = {mark: loss - dense[mark] for mark, loss in losses(item[1]).items() if mark in dense}
        return (0, found[3]) if 3 in found else (1, found[max(found)])

    for name, run in sorted(named.items(), key=order):
        found = losses(run)
        gains = (f"{found[mark] - dense[mark]:+.3f}" if mark in found else "" for mark in marks)
        lines.append("| " + " | ".join((name, *sizes(run)[1:3], *gains)) + " |")
    return "\n".join(lines)


def formats_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate loss and bytes of feed-forward networks by number format, for the first rate and seed."""
    rows = [row for row in rows if (row["seed"], row["rate"]) == (SEED, FIRST_RATE)]
    whole = {row["row"]: row["loss"] for row in rows if row["format"] == "float"}
    lines = [
        "| row | tokens | format | feed-forward, KB | held-out loss | rounding adds |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            row["row"],
            f"{row['tokens'] / MILLION:.0f} M",
            row["format"],
            f"{row['feed_forward_bytes'] / 1000:,.0f}",
            f"{row['loss']:.3f}",
            f"{row['loss'] - whole[row['row']]:+.4f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def causes_table(causes: Sequence[Run], runs: Sequence[Run]) -> str:
    """Loss and distance to the dense model after one and two million tokens, at one rate and seed."""
    names = (DENSE, "fine, MPOE", "fine-grained")
    common = [run for run in runs if name_of(run) in names and run["seed"] == SEED]
    rate = causes[0]["recipe"]["rate"]
    named = {name_of(run): run for run in (*common, *causes) if run["recipe"]["rate"] == rate}
    dense = losses(named[DENSE])
    lines = [
        "| row | parameters | of Switch | 1 M | 2 M | to dense, 1 M | to dense, 2 M |",
        "|---|" + "--:|" * 6,
    ]
    for name, run in sorted(named.items(), key=lambda item: losses(item[1]).get(1, 9)):
        found = losses(run)
        if 1 in found:
            cells = [name, *sizes(run)[1:3]]
            cells += [f"{found[mark]:.3f}" if mark in found else "" for mark in (1, 2)]
            cells += [f"{found[mark] - dense[mark]:+.3f}" if mark in found else "" for mark in (1, 2)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: Where runs of the mask are compared, by optimizer.
MASK_MARKS = {"AdamW": 0.5, "SGD": 0.5}


def mask_table(masks: Sequence[Run], runs: Sequence[Run]) -> str:
    """Loss with masks and rates of the center, minus that of no mask at the same rate and optimizer."""
    rate = next(run["recipe"]["rate"] for run in masks if optimizer_of(run) == "AdamW")
    names = ("fine, MPOE", "fine, MPOE, mask 0.9", "fine, MPOE, center rate 0.3")
    common = [
        run for run in runs if name_of(run) in names and run["seed"] == SEED and run["recipe"]["rate"] == rate
    ]
    lines = ["| optimizer | row | rate | tokens | loss | to no mask |", "|---|---|--:|--:|--:|--:|"]
    for optimizer, mark in MASK_MARKS.items():
        found = [run for run in (*common, *masks) if optimizer_of(run) == optimizer and mark in losses(run)]
        plain = {run["recipe"]["rate"]: losses(run)[mark] for run in found if plain_name(run) == "fine, MPOE"}
        for run in sorted(found, key=lambda run: losses(run)[mark]):
            loss, its = losses(run)[mark], run["recipe"]["rate"]
            cells = (optimizer, plain_name(run), f"{its:g}", f"{mark:g} M", f"{loss:.3f}")
            lines.append("| " + " | ".join((*cells, f"{loss - plain[its]:+.3f}")) + " |")
    return "\n".join(lines)


def optimizer_of(run: Run) -> str:
    """Name of the optimizer of a run."""
    return "SGD" if run["row"].get("options", {}).get("optimizer") == "sgd" else "AdamW"


def plain_name(run: Run) -> str:
    """Name of the row without the optimizer."""
    return name_of(run).removeprefix("SGD, ")


def table_of_a_record(runs: Sequence[Run]) -> str:
    """Rows of a record, each at its best rate by the tuning part, compared at the last mark that all have.

    The rate is that of the first seed; losses are means over all seeds with it, at marks that all reached.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run["history"]:
            groups.setdefault(run["row"]["name"], []).append(run)
    shown = max(set.intersection(*({m for run in found for m in losses(run)} for found in groups.values())))
    first = min(run["seed"] for run in runs if shown in losses(run))
    best = {name: at_best_rate(found, shown, first) for name, found in groups.items()}
    means = {name: mean_losses(found) for name, found in best.items()}
    marks = sorted({mark for found in means.values() for mark in found})
    lines = [
        "| row | rate | seeds | parameters | of Switch | MFLOP a token | "
        + " | ".join(f"{mark:g} M" for mark in marks)
        + f" | to dense, {shown:g} M | to {WIDE}, {shown:g} M |",
        "|---|" + "--:|" * (len(marks) + 7),
    ]
    dense, wide = (means[name][shown] for name in (DENSE, WIDE))
    switch = best[SWITCH][0]["expert_parameters"]
    for name, found in sorted(means.items(), key=lambda item: item[1][shown]):
        run = best[name][0]
        cells = (
            name,
            f"{run['recipe']['rate']:g}",
            str(len(best[name])),
            f"{run['expert_parameters']:,}",
            f"{run['expert_parameters'] / switch:.3f}",
            f"{run['flops_per_token'] / MILLION:.2f}",
            *(f"{found[mark]:.3f}" if mark in found else "" for mark in marks),
            f"{found[shown] - dense:+.3f}",
            f"{found[shown] - wide:+.3f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_best_rate(runs: Sequence[Run], mark: float, seed: int) -> list[Run]:
    """Select the runs that reached a mark at the rate that is best there for one seed, by the tuning part."""
    reached = [run for run in runs if mark in losses(run)]
    tuned = min(
        (run for run in reached if run["seed"] == seed), key=lambda run: losses(run, "tune_loss")[mark]
    )
    return [run for run in reached if run["recipe"]["rate"] == tuned["recipe"]["rate"]]


def mean_losses(runs: Sequence[Run]) -> dict[float, float]:
    """Average the held-out losses of several runs at the marks that all have reached."""
    common = set.intersection(*(set(losses(run)) for run in runs))
    return {mark: statistics.mean(losses(run)[mark] for run in runs) for mark in sorted(common)}


def stacks_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Relative error and added loss of compressed experts, by how much of their parameters is kept."""
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    found = {(row["method"], row["weighting"], row["keep"]): row for row in rows}
    lines = [
        "| method | weights | "
        + " | ".join(f"error, {keep:.0%} | loss added, {keep:.0%}" for keep in keeps)
        + " |",
        "|---|---|" + "--:|" * (2 * len(keeps)),
    ]
    for method, weighting in dict.fromkeys((row["method"], row["weighting"]) for row in rows):
        cells = [method, weighting]
        for keep in keeps:
            row = found.get((method, weighting, keep))
            cells += (
                ["", ""]
                if row is None
                else [f"{row['error']:.2f}", f"{row['loss'] - row['dense_loss']:+.4f}"]
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Time of a training step relative to dense experts, by form and threads; and compiled to eager."""
    columns = ("training step, {}", "training step with AdamW, {}", "training step, {}, compiled")
    lines = [
        "| experts | threads | times dense experts | the same with AdamW | compiled, times eager |",
        "|---|--:|--:|--:|--:|",
    ]
    for threads in sorted({row["threads"] for row in rows}):
        found = {row["what"]: row["ratio"] for row in rows if row["threads"] == threads}
        steps = [what for what in found if what.startswith(columns[0].format(""))]
        forms = [what.removeprefix(columns[0].format("")).removesuffix(", compiled") for what in steps]
        for form in dict.fromkeys(forms):
            ratios = [found.get(column.format(form)) for column in columns]
            cells = (form, str(threads), *("" if x is None else f"{x:.2f}" for x in ratios))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


RECORDS_READ = (
    "moe_from_scratch",
    "moe_from_scratch_earlier",
    "moe_from_scratch_causes",
    "moe_from_scratch_mask",
    "moe_from_scratch_t5",
    "moe_from_scratch_larger",
    "scratch_formats",
    "trained_stacks",
    "moe_step",
)


def fill(page: str, records: Mapping[str, Run]) -> str:
    """Return the page with its tables replaced.

    Args:
        page: Markdown.
        records: those of `RECORDS_READ` by name.
    """
    rows = {name.removeprefix("moe_from_scratch_"): record["rows"] for name, record in records.items()}
    runs = rows["moe_from_scratch"]
    made = {
        "long": long_table(runs),
        "forms": forms_table(compared(runs, 1)),
        "slow": forms_table(untuned(runs)),
        "rates": rates_table(runs),
        "seeds": seeds_table(runs),
        "causes": causes_table(rows["causes"], runs),
        "mask": mask_table(rows["mask"], [*runs, *rows["causes"]]),
        "t5": table_of_a_record(rows["t5"]),
        "t5_seeds": seeds_table(rows["t5"]),
        "larger": table_of_a_record(rows["larger"]),
        "larger_seeds": seeds_table(rows["larger"]),
        "earlier": earlier_table(rows["earlier"]),
        "formats": formats_table(rows["scratch_formats"]),
        "stacks": stacks_table(rows["trained_stacks"]),
        "speed": speed_table(rows["moe_step"]),
    }
    return re.sub(
        r"(<!-- (?!end )(\w+) -->)\n.*?(<!-- end -->)",
        lambda m: f"{m[1]}\n{made[m[2]]}\n{m[3]}",
        page,
        flags=re.DOTALL,
    )


def colour_of(run: Run) -> str:
    """Choose black for dense rows, red for experts that share nothing, blue for those that share."""
    return {"dense": "black", "switch": "tab:red"}.get(run["row"]["kind"], "tab:blue")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw loss differences from the dense model against tokens, and losses of long runs against bytes."""
    shown = longest(runs)
    named = compared(runs, shown)
    dense = losses(named[DENSE])
    with plt.rc_context({"svg.hashsalt": "scratch", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
        for run in named.values():
            found = {mark: loss - dense[mark] for mark, loss in losses(run).items() if mark in dense}
            left.plot(list(found), list(found.values()), "o-", color=colour_of(run), markersize=3)
            _label(left, run, (max(found), found[max(found)]))
            at = (run["bytes"] / 1000, losses(run)[shown])
            right.plot(*at, "o", color=colour_of(run), markersize=4)
            _label(right, run, at)
        left.set(xlabel="million tokens", ylabel="held-out loss minus that of the dense model")
        right.set(xlabel="model, KB in float32", ylabel=f"held-out loss after {shown} million tokens")
        for axis, room in ((left, 1.5), (right, 1.25)):
            axis.set_xlim(right=axis.get_xlim()[1] * room)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _label(axis: Any, run: Run, at: tuple[float, float]) -> None:
    """Label a run beside its point: dense ones above, others below, since two of them nearly coincide."""
    offset = (5, 3) if run["row"]["kind"] == "dense" else (5, -9)
    axis.annotate(name_of(run), at, offset, textcoords="offset points", fontsize=7)


def read(name: str) -> dict[str, Any]:
    """Read a record by name."""
    found: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    return found


def main() -> None:
    """Rewrite the page and the picture."""
    records = {name: read(name) for name in RECORDS_READ}
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), records), encoding="utf-8")
    draw(records["moe_from_scratch"]["rows"], PICTURE)


if __name__ == "__main__":
    main()
