"""Write the tables and the picture of docs/mpoe.md from the record of mpoe_vs_switch.py.

    python benchmarks/mpoe_page.py

The text of the page is written by hand; what lies between `<!-- table NAME -->` or
`<!-- rates NAME -->` and `<!-- end -->` is replaced.
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

PAGE, PICTURE = ROOT / "docs" / "mpoe.md", ROOT / "docs" / "mpoe.svg"
TITLES = {
    "gpt2": "GPT-2, quotations",
    "t5": "T5, vowels of quotations",
    "t5-few": "T5, 400 phrases",
    "t5-long": "T5, 400 phrases, 200 steps",
    "gpt2-sgd": "GPT-2, SGD",
}
PANELS = ("gpt2", "t5")  # in the others nearly all rows have one size
MARKERS = "os^vD<>Ph"
HEADER = (
    "| row | in experts | of Switch | total | held-out loss | accuracy | s/step | load entropy | rate |",
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render one table as Markdown; the lowest loss of a mixture is bold."""
    switch = next((r["expert_parameters"] for r in rows if r["row"] == "Switch"), None)
    best = min((r["loss"] for r in rows if r["row"] != "dense"), default=None)
    lines = list(HEADER)
    for r in rows:
        share = "-" if switch is None else f"1/{switch / r['expert_parameters']:.1f}"
        loss = f"{r['loss']:.4f} ± {r['loss_spread']:.4f}"
        cells = (
            r["row"],
            f"{r['expert_parameters']:,}",
            "1" if r["row"] == "Switch" else share,
            f"{r['parameters']:,}",
            f"**{loss}**" if r["loss"] == best else loss,
            f"{100 * r['accuracy']:.2f} ± {100 * r['accuracy_spread']:.2f} %",
            f"{r['seconds_per_step']:.3f}",
            "-" if r["entropy"] is None else f"{r['entropy']:.2f}",
            f"{r['rate']:g}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rates(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate the loss on the tuning part at every rate, first seed; the chosen rate is bold."""
    columns = list(rows[0]["tune_loss_by_rate"])
    lines = ["| row | " + " | ".join(f"rate {c}" for c in columns) + " |", "|---|" + "--:|" * len(columns)]
    for r in rows:
        cells = [
            f"**{loss:.4f}**" if float(rate) == r["rate"] else f"{loss:.4f}"
            for rate, loss in r["tune_loss_by_rate"].items()
        ]
        lines.append("| " + " | ".join([r["row"], *cells]) + " |")
    return "\n".join(lines)


def tables(record: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Group the rows of the record by table, in the order of the record."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault(row["table"], []).append(row)
    return found


def fill(page: str, record: Mapping[str, Any]) -> str:
    """Replace the tables of the page.

    Raises:
        KeyError: the page asks for a table that the record lacks.
    """
    by_name = tables(record)

    def replacement(match: re.Match[str]) -> str:
        kind = {"table": table, "rates": rates}[match[2]]
        return f"{match[1]}\n{kind(by_name[match[3]])}\n<!-- end -->"

    pattern = r"(<!-- (table|rates) ([\w-]+) -->)\n.*?<!-- end -->"
    return re.sub(pattern, replacement, page, flags=re.DOTALL)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw held-out loss against expert parameters, one panel for each table whose sizes differ."""
    by_name = {name: rows for name, rows in tables(record).items() if name in PANELS}
    with plt.rc_context({"svg.hashsalt": "mpoe", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(
            1, len(by_name), figsize=(6 * len(by_name), 4.8), squeeze=False, layout="constrained"
        )
        for axis, (name, rows) in zip(axes[0], by_name.items(), strict=True):
            for number, r in enumerate(rows):
                group = "dense" if r["row"] == "dense" else "Switch" if "Switch" in r["row"] else "MPOE"
                colour = {"dense": "black", "Switch": "tab:red", "MPOE": "tab:blue"}[group]
                axis.errorbar(
                    r["expert_parameters"],
                    r["loss"],
                    yerr=r["loss_spread"],
                    fmt=MARKERS[number % len(MARKERS)],
                    color=colour,
                    markerfacecolor="none" if number >= len(MARKERS) else colour,
                    capsize=2,
                    markersize=5,
                    label=r["row"],
                )
            axis.set_xscale("log")
            axis.set_xlabel("parameters in experts")
            axis.set_ylabel("held-out loss (nats a token)")
            axis.set_title(TITLES[name])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata)
        plt.close(figure)


def main() -> None:
    """Rewrite the page and the picture."""
    record = json.loads((RECORDS / "mpoe_vs_switch.json").read_text())
    PAGE.write_text(fill(PAGE.read_text(), record))
    draw(record, PICTURE)
    print(PAGE)


if __name__ == "__main__":
    main()
