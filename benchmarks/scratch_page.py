"""Write the tables and the picture of docs/moe_from_scratch.md from the records of moe_from_scratch.py.

    python benchmarks/scratch_page.py

The text of the page is written by hand; what lies between `<!-- table -->` or `<!-- forms -->` and
`<!-- end -->` is replaced. The second table compares the runs of `moe_from_scratch_forms.json` with the dense
run of that record, since its text is a later edition of that of the first.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, ROOT

PAGE, PICTURE = ROOT / "docs" / "moe_from_scratch.md", ROOT / "docs" / "moe_from_scratch.svg"
MILLION = 1_000_000
MARKS = (1, 2, 3, 4)
#: Millions of tokens at which the forms of the second table are judged.
FORMS_AT = 1


def losses(run: Mapping[str, Any]) -> dict[float, float]:
    """Held-out loss by millions of tokens, rounded as the marks are named."""
    return {round(point["tokens"] / MILLION, 1): point["loss"] for point in run["history"]}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run, smallest feed-forward networks last among those of one loss."""
    dense = losses(next(run for run in runs if run["row"]["name"] == "dense"))
    switch = next(run for run in runs if run["row"]["name"] == "Switch")["expert_parameters"]
    marks = " | ".join(f"{mark} M" for mark in MARKS)
    lines = [
        f"| row | parameters | of Switch | MFLOP a token | {marks} | to dense | load entropy | tokens/s |",
        "|---|" + "--:|" * (len(MARKS) + 6),
    ]
    for run in sorted(runs, key=_rank):
        found = losses(run)
        last = max((mark for mark in found if mark in dense), default=None)
        gain = "" if last is None else f"{found[last] - dense[last]:+.3f} at {last:g} M"
        entropy = run["history"][-1]["entropy"]
        cells = (
            run["row"]["name"] + ("" if run["seed"] == 0 else f", seed {run['seed']}"),
            f"{run['expert_parameters']:,}",
            f"{run['expert_parameters'] / switch:.2f}",
            f"{run['flops_per_token'] / MILLION:.2f}",
            *(f"{found[mark]:.3f}" if mark in found else "" for mark in MARKS),
            gain,
            "" if entropy is None else f"{entropy:.2f}",
            f"{run['tokens'] / run['seconds']:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rank(run: Mapping[str, Any]) -> tuple[float, float]:
    """By the loss at the most common mark; runs that have not come there last."""
    found = losses(run)
    return (found.get(3, 99.0), found[max(found)])


def forms_table(runs: Sequence[Mapping[str, Any]], older: Sequence[Mapping[str, Any]]) -> str:
    """Loss of every form minus that of the dense run of its record, the older record beside it."""
    switch = next(run for run in older if run["row"]["name"] == "Switch")["expert_parameters"]
    gains = (_gains(runs), _gains(older))
    sizes = {run["row"]["name"]: run for run in (*older, *runs)}
    lines = ["| row | parameters | of Switch | to dense | to dense, first table |", "|---|--:|--:|--:|--:|"]
    known = {name: min(gain[name] for gain in gains if name in gain) for name in {*gains[0], *gains[1]}}
    for name in sorted(known, key=lambda name: (known[name], name)):
        size = sizes[name]["expert_parameters"]
        cells = (f"{gain[name]:+.3f}" if name in gain else "" for gain in gains)
        lines.append("| " + " | ".join((name, f"{size:,}", f"{size / switch:.2f}", *cells)) + " |")
    return "\n".join(lines)


def _gains(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Loss minus that of the dense run at `FORMS_AT`, by row."""
    found = {run["row"]["name"]: losses(run) for run in runs}
    dense = found["dense"][FORMS_AT]
    return {name: loss[FORMS_AT] - dense for name, loss in found.items() if FORMS_AT in loss}


def fill(page: str, record: Mapping[str, Any], forms: Mapping[str, Any]) -> str:
    """Return the page with its tables replaced."""
    older = [run for run in record["rows"] if run["history"]]
    made = {"table": table(older), "forms": forms_table(forms["rows"], older)}
    return re.sub(
        r"(<!-- (\w+) -->)\n.*?(<!-- end -->)",
        lambda m: f"{m[1]}\n{made[m[2]]}\n{m[3]}",
        page,
        flags=re.DOTALL,
    )


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Held-out loss against bytes of the model, at 3 million tokens."""
    with plt.rc_context({"svg.hashsalt": "scratch", "svg.fonttype": "none", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
        for run in record["rows"]:
            loss = losses(run).get(3)
            if loss is None:
                continue
            name = run["row"]["name"]
            colour = "black" if run["row"]["kind"] == "dense" else "tab:blue"
            colour = "tab:red" if run["row"]["kind"] == "switch" else colour
            axis.plot(run["bytes"] / MILLION, loss, "o", color=colour)
            axis.annotate(
                name, (run["bytes"] / MILLION, loss), (4, 4), textcoords="offset points", fontsize=7
            )
        axis.set(xscale="log", xlabel="model, MB in float32", ylabel="held-out loss after 3 million tokens")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Rewrite the page and the picture."""
    record, forms = (
        json.loads((RECORDS / f"moe_from_scratch{name}.json").read_text()) for name in ("", "_forms")
    )
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), record, forms), encoding="utf-8")
    draw(record, PICTURE)


if __name__ == "__main__":
    main()
