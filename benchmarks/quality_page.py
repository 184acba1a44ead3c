"""Write the tables and the picture of docs/quality.md from records.

The records are those of quality.py, forecast.py, encoder.py and low_rank_choices.py.

    python benchmarks/quality_page.py

The text of the page is written by hand; what lies between `<!-- table NAME -->` and `<!-- end -->` is
replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, ROOT, fill_tables
from quality import METHODS

Row = Mapping[str, Any]
PAGE, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality.svg"
LAYERS = {"mlp": "MLPs", "all": "all linear layers"}
RATIOS = (0.9, 0.8, 0.6, 0.4, 0.3)
SOURCES = {"heldout": "Debian handbook", "training": "PostgreSQL manual", "calibration": "Python tutorials"}
#: Forecasts are held to account down to this keep ratio.
FORECAST_FROM = 0.6
#: Samples on the page, by method, layers and keep ratio: what a reader needs to hear the difference.
SAMPLES = (
    ("dense", None, 1.0),
    ("ours", "all", 0.8),
    ("ours_int8", "mlp", 0.8),
    ("ours", "all", 0.6),
    ("svd_llm", "all", 0.8),
    ("svd", "mlp", 0.8),
)
#: How a method is drawn, by its key and what came after compression.
STYLES = {
    ("ours", ""): ("o-", "C0"),
    ("ours", "refined"): ("x:", "C4"),
    ("ours", "healed"): ("*-", "C2"),
    ("svd_llm", ""): ("^--", "C1"),
    ("svd", ""): ("v--", "C7"),
}


def main() -> None:
    """Replace the generated parts."""
    PAGE.write_text(filled(PAGE.read_text(), RECORDS))
    draw(quality_rows(RECORDS), PICTURE)


def filled(text: str, records: Path) -> str:
    """Fill the page with tables made from the records of a folder."""
    rows = quality_rows(records)
    encoder = json.loads((records / "encoder.json").read_text())["rows"]
    foreseen_rows = json.loads((records / "forecast.json").read_text())["rows"]
    parts = {
        "quality": quality_table(rows),
        "forecast": forecast_table(rows, foreseen_rows),
        "sources": sources_table(foreseen_rows),
        "healing": healing_table(rows),
        "samples": samples(rows),
        "encoder": encoder_table(encoder),
        "encoder forecast": encoder_forecast_table(encoder),
        "choices": choices_table(json.loads((records / "low_rank_choices.json").read_text())["rows"]),
    }
    return fill_tables(text, parts)


def quality_rows(records: Path) -> list[Row]:
    """Read the rows of the language model."""
    rows: list[Row] = json.loads((records / "quality.json").read_text())["rows"]
    return rows


def title(row: Row) -> str:
    """Name a method and the step after it."""
    name = METHODS[row["method"]].title if row["method"] in METHODS else "dense"
    return name + (f", {row['after']}" if row["after"] else "")


def dense_row(rows: Sequence[Row]) -> Row:
    """Return the row of the dense model."""
    return next(row for row in rows if row["method"] == "dense")


def rise(row: Row, rows: Sequence[Row]) -> float:
    """Compute the measured loss increase over the dense model on the same text."""
    return float(row["loss"] - dense_row(rows)["loss"])


def quality_table(rows: Sequence[Row]) -> str:
    """Tabulate perplexities, a line for each method and a column for each keep ratio."""
    dense = dense_row(rows)
    heads = " | ".join(f"{ratio:.0%}" for ratio in RATIOS)
    lines = [
        f"Dense: {dense['perplexity']:.2f} on {dense['tokens']:,} tokens.",
        "",
        f"| layers | method | {heads} |",
        "|---|---|" + "--:|" * len(RATIOS),
    ]
    for layers, method, after in _kinds(rows):
        found = {row["ratio"]: row for row in rows if _kind(row) == (layers, method, after)}
        cells = [_perplexity(found[ratio]["perplexity"]) if ratio in found else "" for ratio in RATIOS]
        name = title(next(iter(found.values())))
        lines.append(f"| {LAYERS[layers]} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forecast_table(rows: Sequence[Row], foreseen_rows: Sequence[Row]) -> str:
    """Tabulate measured loss increases and predictions, without and with a measurement on other windows."""
    corrected = {(r["method"], r["layers"], r["ratio"]): r["foreseen heldout"] for r in foreseen_rows}
    lines = [
        "| layers | method | kept | measured | moments alone | measured on other pages |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in sorted(foreseen(rows), key=lambda row: (_kind(row), -row["ratio"])):
        measured = rise(row, rows)
        better = corrected.get((row["method"], row["layers"], row["ratio"]))
        lines.append(
            f"| {LAYERS[row['layers']]} | {title(row)} | {row['ratio']:.0%} | {measured:.3f} | "
            f"{_off(row['predicted_rise'], measured)} | "
            f"{'' if better is None else _off(better, measured)} |"
        )
    return "\n".join(lines)


def sources_table(rows: Sequence[Row]) -> str:
    """Tabulate loss increases on every source and predictions from every source; bold from the same one."""
    lines = [
        f"| layers | kept | judged on | measured | moments alone | {' | '.join(SOURCES.values())} |",
        "|---|--:|---|--:|--:|" + "--:|" * len(SOURCES),
    ]
    for row in rows:
        if row["ratio"] < FORECAST_FROM:
            continue
        for judged, name in SOURCES.items():
            measured = row[f"rise {judged}"]
            cells = [_off(row[f"foreseen {source}"], measured) for source in SOURCES]
            cells = [f"**{x}**" if s == judged else x for s, x in zip(SOURCES, cells, strict=True)]
            lines.append(
                f"| {LAYERS[row['layers']]} | {row['ratio']:.0%} | {name} | {measured:.3f} | "
                f"{_off(row['price'], measured)} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def foreseen(rows: Sequence[Row], least: float = FORECAST_FROM) -> list[Row]:
    """Select rows with a forecast and at least this keep ratio."""
    return [row for row in rows if row.get("predicted_rise") is not None and row["ratio"] >= least]


def healing_table(rows: Sequence[Row]) -> str:
    """Tabulate what healing gained, and what it cost."""
    lines = [
        "| layers | kept | before | healed | steps | tokens | processor seconds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "healed" not in row["after"]:
            continue
        same = {"layers": row["layers"], "method": row["method"], "ratio": row["ratio"], "after": ""}
        before = next((x for x in rows if all(x[k] == v for k, v in same.items())), None)
        lines.append(
            f"| {LAYERS[row['layers']]} | {row['ratio']:.0%} | "
            f"{'' if before is None else _perplexity(before['perplexity'])} | "
            f"{_perplexity(row['perplexity'])} | {row['heal_steps']:,} | {row['heal_tokens']:,} | "
            f"{row['heal_seconds']:.0f} |"
        )
    return "\n".join(lines)


def samples(rows: Sequence[Row]) -> str:
    """List the samples that the models wrote."""
    lines = ["| model | greedy continuation |", "|---|---|"]
    plain = {(row["method"], row.get("layers"), row.get("ratio")): row for row in rows if not row["after"]}
    for method, layers, ratio in SAMPLES:
        row = dense_row(rows) if method == "dense" else plain.get((method, layers, ratio))
        if row is None:
            continue  # not measured yet
        where = f", {ratio:.0%} of {LAYERS[layers]}" if layers else ""
        said = " ".join(row["sample"].split()).replace("|", "\\|")
        lines.append(f"| {title(row)}{where} | {said} |")
    return "\n".join(lines)


def encoder_table(rows: Sequence[Row]) -> str:
    """Tabulate cosines of the sentence encoder, a line for each method and a column for each keep ratio."""
    lines = [
        f"| layers | method | {' | '.join(f'{r:.0%}' for r in RATIOS)} |",
        "|---|---|" + "--:|" * len(RATIOS),
    ]
    kinds = sorted({_kind(row) for row in rows if row["method"] != "dense"}, key=_order)
    for layers, method, after in kinds:
        found = {row["ratio"]: row for row in rows if _kind(row) == (layers, method, after)}
        cells = [f"{found[ratio]['cosine']:.3f}" if ratio in found else "" for ratio in RATIOS]
        lines.append(f"| {LAYERS[layers]} | {title(next(iter(found.values())))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def encoder_forecast_table(rows: Sequence[Row]) -> str:
    """Tabulate the loss of cosine: measured, predicted, and predicted with a measurement on other text."""
    lines = [
        "| layers | kept | measured | moments alone | measured here | measured elsewhere |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.get("price") is None or row["ratio"] < FORECAST_FROM:
            continue
        measured = 1 - row["cosine"]
        known = [row.get(name) for name in ("price", "foreseen here", "foreseen elsewhere")]
        cells = " | ".join("" if value is None else _off(value, measured) for value in known)
        lines.append(f"| {LAYERS[row['layers']]} | {row['ratio']:.0%} | {measured:.3f} | {cells} |")
    return "\n".join(lines)


def choices_table(rows: Sequence[Row]) -> str:
    """Tabulate the divergence from the dense model relative to the base, a line for each variant."""
    ratios = sorted({row["ratio"] for row in rows}, reverse=True)
    heads = " | ".join(f"{ratio:.0%}, {use}" for ratio in ratios for use in ("chosen", "reported"))
    lines = [f"| change | {heads} |", "|---|" + "--:|" * 2 * len(ratios)]
    for name in dict.fromkeys(row["variant"] for row in rows if row["variant"] != "base"):
        found = {row["ratio"]: row for row in rows if row["variant"] == name}
        cells = [
            f"{found[ratio][f'{use} divergence over base'] - 1:+.1%}"
            for ratio in ratios
            for use in ("chosen", "reported")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the frontier of each method, and predicted against measured loss increases."""
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 5.6), layout="constrained")
    for axis, layers in zip(axes, LAYERS, strict=False):
        _frontier(axis, rows, layers)
    _forecasts(axes[2], rows)
    found = [axis.get_legend_handles_labels() for axis in axes[:2]]
    lines = {name: line for handles, names in found for line, name in zip(handles, names, strict=True)}
    # Below the axes: inside, it would hide lines.
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=3, fontsize=8)
    with plt.rc_context({"svg.hashsalt": "quality"}):  # the same picture gives the same bytes
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    plt.close(figure)


#: Text in the middle of a picture.
_INSIDE: Mapping[str, Any] = {"xycoords": "axes fraction", "ha": "center", "va": "top", "fontsize": 8}


def _frontier(axis: Any, rows: Sequence[Row], layers: str) -> None:
    dense = dense_row(rows)["perplexity"]
    top = 3000.0
    for (method, after), (style, color) in STYLES.items():
        points = sorted((r["ratio"], r["perplexity"]) for r in rows if _kind(r) == (layers, method, after))
        name = title({"method": method, "after": after})
        if points and min(y for _, y in points) > 1e4:  # a line that nobody would see
            axis.annotate(f"{name}: above the picture", (0.62, 0.97), **_INSIDE)
        elif points:
            axis.plot(*zip(*points, strict=True), style, color=color, label=name, markersize=6)
            top = max(top, min(max(y for _, y in points), 1e4))
    axis.axhline(dense, color="0.6", linewidth=1)
    axis.annotate("dense", (0.92, dense), ha="right", va="top", color="0.4")
    axis.set(title=LAYERS[layers], xlabel="keep ratio", ylabel="perplexity", yscale="log")
    axis.set(xlim=(0.27, 0.93), ylim=(0.85 * dense, top))
    ticks = [30, 50, 100, 200, 500, 1000, 2000]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _forecasts(axis: Any, rows: Sequence[Row]) -> None:
    known = foreseen(rows, least=0.0)
    for layers, mark in (("mlp", "o"), ("all", "s")):
        points = [(row["predicted_rise"], rise(row, rows)) for row in known if row["layers"] == layers]
        if points:
            axis.loglog(*zip(*points, strict=True), mark, label=LAYERS[layers])
    line = [0.025, 6.0]
    axis.plot(line, line, color="0.6")
    axis.fill_between(line, [0.8 * v for v in line], [1.2 * v for v in line], color="0.9", zorder=0)
    axis.set(title="rise of the loss (band: 20 %)", xlabel="predicted", ylabel="measured")
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    if known:
        axis.legend(fontsize=8)


def _kind(row: Row) -> tuple[str, str, str]:
    return row["layers"], row["method"], row["after"]


def _kinds(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """List the lines of the table: MLPs first, methods in their order, trained ones last."""
    return sorted({_kind(row) for row in rows if row["method"] in METHODS}, key=_order)


def _order(kind: tuple[str, str, str]) -> tuple[int, int, int]:
    layers, methods, after = list(LAYERS), list(METHODS), ["", "refined", "healed", "refined, healed"]
    return layers.index(kind[0]), methods.index(kind[1]), after.index(kind[2])


def _off(foreseen: float, measured: float) -> str:
    return f"{foreseen:.3f} ({foreseen / measured - 1:+.0%})"


def _perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


if __name__ == "__main__":
    main()
