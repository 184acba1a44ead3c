"""Write the table and the picture of docs/quality.md from the records of quality.py and encoder.py.

    python benchmarks/quality_page.py

The text of the page is written by hand; what lies between `<!-- table NAME -->` and `<!-- end -->` is
replaced.
"""

from __future__ import annotations

import json
import math
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
from quality import METHODS

PAGE, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality.svg"
LAYERS = {"mlp": "MLPs", "all": "all linear layers"}
STYLES = {"ours": "o-", "curvature": "s--", "svd_llm": "^--", "svd_llm_pivoted": "v:", "mpo2": "D-."}


def main() -> None:
    """Replace the generated parts."""
    rows = json.loads((RECORDS / "quality.json").read_text())["rows"]
    parts = {"quality": quality_table(rows), "samples": samples(rows)}
    if (RECORDS / "encoder.json").is_file():
        parts["encoder"] = encoder_table(json.loads((RECORDS / "encoder.json").read_text())["rows"])
    text = PAGE.read_text()
    for name, content in parts.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, c=content: m[1] + c + "\n" + m[2], text, flags=re.S)
    PAGE.write_text(text)
    draw(rows)


def rise(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Measured rise of the loss over the dense model on the same text."""
    dense = [x for x in rows if x["method"] == "dense" and x["tokens"] == row["tokens"]]
    return row["loss"] - dense[0]["loss"] if dense else None


def quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows, by layers, method and size."""
    lines = [
        "| layers | method | kept | perplexity | rise of the loss | foreseen | held-out tokens |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    order = ["dense", *METHODS]
    for row in sorted(rows, key=lambda x: (x["layers"], order.index(x["method"]), -x["ratio"])):
        title = METHODS[row["method"]].title if row["method"] in METHODS else "dense"
        if row.get("healed"):
            title += f", healed {row['heal_steps']} steps ({row['heal_seconds']:.0f} s)"
        foreseen = row.get("predicted_rise")
        measured = rise(row, rows)
        lines.append(
            f"| {LAYERS.get(row['layers'], '')} | {title} | {row['ratio']:.0%} | {row['perplexity']:.4g} | "
            f"{'' if measured is None else f'{measured:.3f}'} | "
            f"{'' if foreseen is None else f'{foreseen:.3f}'} | {row['tokens']:,} |"
        )
    return "\n".join(lines)


def samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the models say."""
    lines = ["| model | greedy continuation |", "|---|---|"]
    for row in rows:
        if row["method"] in ("dense", "ours", "svd_llm", "mpo2"):
            name = (
                row["method"]
                if row["method"] == "dense"
                else f"{METHODS[row['method']].title}, {row['ratio']:.0%}"
            )
            where = "" if row["method"] == "dense" else f" of {LAYERS[row['layers']]}"
            said = " ".join(row["sample"].split()).replace("|", "\\|")
            lines.append(f"| {name}{where} | {said} |")
    return "\n".join(lines)


def encoder_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Cosines and hits of the sentence encoder."""
    lines = ["| method | kept | cosine | foreseen | top-1 |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        title = METHODS[row["method"]].title if row["method"] in METHODS else "dense"
        foreseen = row.get("predicted_cosine")
        lines.append(
            f"| {title} | {row['ratio']:.0%} | {row['cosine']:.3f} | "
            f"{'' if foreseen is None else f'{foreseen:.3f}'} | {row['top1']:.3f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]]) -> None:
    """The frontier, and foreseen against measured rises."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    dense = next((row["perplexity"] for row in rows if row["method"] == "dense"), None)
    for axis, (layers, title) in zip(axes, LAYERS.items(), strict=False):
        for method, style in STYLES.items():
            points = sorted(
                (row["ratio"], row["perplexity"])
                for row in rows
                if (row["method"], row["layers"]) == (method, layers) and not row.get("healed")
            )
            if points:
                axis.plot(*zip(*points, strict=True), style, label=METHODS[method].title, markersize=5)
        if dense is not None:
            axis.axhline(dense, color="0.6", linewidth=1)
            axis.annotate("dense", (0.42, dense), va="bottom", color="0.4")
        axis.set(title=title, xlabel="share of parameters kept", ylabel="perplexity", yscale="log")
        axis.set_yticks([30, 50, 100, 200, 400], ["30", "50", "100", "200", "400"])
        axis.minorticks_off()
        if len(axis.lines) > 1:
            axis.legend(fontsize=7)
    compared = [(row["predicted_rise"], rise(row, rows)) for row in rows if row.get("predicted_rise")]
    points = [(a, b) for a, b in compared if b is not None and b > 0]
    if points:
        axes[2].loglog(*zip(*points, strict=True), "o")
        low, high = (math.exp(f(math.log(v) for pair in points for v in pair)) for f in (min, max))
        line = [low / 1.3, high * 1.3]
        axes[2].plot(line, line, color="0.6")
        axes[2].fill_between(line, [0.8 * v for v in line], [1.2 * v for v in line], color="0.9", zorder=0)
    axes[2].set(title="rise of the loss (band: 20 %)", xlabel="foreseen", ylabel="measured")
    ticks = [0.1, 0.2, 0.5, 1, 2]
    axes[2].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[2].set_yticks(ticks, [str(tick) for tick in ticks])
    axes[2].minorticks_off()
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
