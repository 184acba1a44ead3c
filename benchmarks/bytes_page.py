"""Write the figures of docs/bytes.md and README.md, and the picture, from records.

    python benchmarks/bytes_page.py

The records are those of bytes.py, whole_model.py and generation.py. The text is written by hand; what lies
between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, ROOT, fill_tables

from tensornet.compression.forecast import Forecast, Rise

Row = Mapping[str, Any]
PAGE, PICTURE = ROOT / "docs" / "bytes.md", ROOT / "docs" / "bytes.svg"
SIZES = (8.25, 6.25, 4.25, 3.25, 2.25)
#: At 8.25 bits rises are noise, which a logarithmic axis would enlarge.
PICTURED = SIZES[1:]
MODELS = {"gpt2": "embedded GPT-2", "minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M, turned"}
METHODS = {
    "plan": "**one plan (ours)**",
    "two-sided": "two-sided rounding, same bits (ours)",
    "one-sided": "one-sided rounding, same bits (ours)",
    "nearest": "round to nearest (ours)",
    "gptq": "GPTQ (llmcompressor)",
    "autoround": "auto-round",
    "hqq": "hqq",
    "torchao": "round to nearest (torchao)",
}
PEERS = ("gptq", "autoround", "hqq", "torchao")
STYLES = {
    "plan": ("o-", "C0", 2.2),
    "gptq": ("s--", "C1", 1.3),
    "autoround": ("^--", "C2", 1.3),
    "hqq": ("D:", "C3", 1.1),
    "torchao": ("v:", "C7", 1.1),
}


def main() -> None:
    """Replace the generated parts."""
    record = json.loads((RECORDS / "bytes.json").read_text())
    for name, other in (("whole", "whole_model"), ("speed", "generation")):
        path = RECORDS / f"{other}.json"
        record[name] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for page in (PAGE, ROOT / "README.md", ROOT / "docs" / "index.md"):
        page.write_text(filled(page.read_text(), record))
    draw(record["rows"], PICTURE)


def filled(text: str, record: Mapping[str, Any]) -> str:
    """Fill a page with figures from a record."""
    rows = record["rows"]
    parts = {
        "why": why(rows),
        "result": result(rows),
        "bytes": bytes_table(rows),
        "forecast": forecast_table(rows),
        "time": time_table(rows),
        "samples": samples_table(rows),
        "whole": whole_table(record.get("whole", ())),
        "speed": speed_table(record.get("speed", ())),
        "origin": origin(record),
    }
    return fill_tables(text, parts)


def rises(rows: Sequence[Row], model: str, method: str, bits: float) -> list[float]:
    """List the measured loss increases, one for each seed."""
    return [
        row["loss_increase"]
        for row in rows
        if (row["model"], row["method"], row["bits"]) == (model, method, bits) and "loss_increase" in row
    ]


def refused(rows: Sequence[Row], model: str, method: str, bits: float) -> bool:
    """Return True if a package refused a model or a number of bits."""
    wanted = (model, method, bits)
    return any((r["model"], r["method"], r["bits"]) == wanted and "refused" in r for r in rows)


def best_peer(rows: Sequence[Row], model: str, bits: float) -> tuple[str, float] | None:
    """Find the installed package with the lowest mean loss increase; return both."""
    found = {m: statistics.mean(x) for m in PEERS if (x := rises(rows, model, m, bits))}
    return min(found.items(), key=lambda item: item[1]) if found else None


def standard_error(rows: Sequence[Row], model: str, method: str, bits: float) -> float:
    """Return the largest standard error of a method over its seeds; 0 where none is known."""
    wanted = (model, method, bits)
    found = [
        row["standard_error"]
        for row in rows
        if (row["model"], row["method"], row["bits"]) == wanted and "standard_error" in row
    ]
    return float(max(found, default=0.0))


def difference(rows: Sequence[Row], model: str, bits: float) -> tuple[float, float] | None:
    """Subtract the best peer's mean loss increase from the plan's, with standard error; None without either.

    Both rises are taken as independent, which overstates the error: they are measured on the same tokens.
    """
    ours, peer = rises(rows, model, "plan", bits), best_peer(rows, model, bits)
    if not ours or peer is None:
        return None
    errors = (standard_error(rows, model, name, bits) for name in ("plan", peer[0]))
    return statistics.mean(ours) - peer[1], math.hypot(*errors)


def result(rows: Sequence[Row]) -> str:
    """Summarize each model that has a plan in one line, relative to the best peer."""
    lines = []
    for model, title in MODELS.items():
        parts = []
        for bits in SIZES[1:]:
            ours, peer = rises(rows, model, "plan", bits), best_peer(rows, model, bits)
            if ours and peer is not None:
                mean = statistics.mean(ours)
                parts.append(f"{mean / peer[1]:.2f}x at {bits} bits ({number(mean)}, {number(peer[1])})")
        if parts:
            unit = next(row["unit"] for row in rows if row["model"] == model)
            known = {row["method"] for row in rows if row["model"] == model}
            missing = [METHODS[method] for method in PEERS if method not in known]
            left_out = f" (not measured: {', '.join(missing)})" if missing else ""
            lines.append(
                f"- {title}: loss increase of one plan, relative to the best installed quantizer{left_out}: "
                f"{', '.join(parts)}; {unit}."
            )
    return "\n".join(lines)


def why(rows: Sequence[Row]) -> str:
    """Write three lines for the README: equal bytes, planning, forecast."""
    at, parts = 4.25, []
    for model, title in (("smollm2", "SmolLM2-135M (off its 4-bit grid)"), ("gpt2", "the embedded GPT-2")):
        named = [(statistics.mean(x), m) for m in PEERS if (x := rises(rows, model, m, at))]
        if ours := rises(rows, model, "plan", at):
            peers = ", ".join(f"{number(mean)} by {METHODS[method]}" for mean, method in sorted(named))
            parts.append(f"of {title} rises by {number(statistics.mean(ours))} nats; {peers}")
    return (
        f"- Less loss at the same bytes. At {at} bits a weight the loss {'. That '.join(parts)}.\n"
        "- Layers differ. Each gets its own integers, of 2 to 8 bits, or rank, by the predicted increase of "
        "the loss.\n"
        "- The loss is predicted before you pay it, and measured after. Where plain int4 or int8 is best, "
        "the plan chooses it."
    )


def bytes_table(rows: Sequence[Row]) -> str:
    """Tabulate loss increases, a line for each method and a column for each size."""
    heads = " | ".join(f"{bits}" for bits in SIZES)
    lines = [f"| model | method | {heads} |", "|---|---|" + "--:|" * len(SIZES)]
    for model, title in MODELS.items():
        for method, name in METHODS.items():
            cells = [cell(rows, model, method, bits) for bits in SIZES]
            if any(cells):
                lines.append(f"| {title} | {name} | {' | '.join(cells)} |")
        gaps = [difference(rows, model, bits) for bits in SIZES]
        if any(gaps):
            cells = ["" if gap is None else f"{number(gap[0])} ({number(gap[1])})" for gap in gaps]
            lines.append(f"| {title} | plan less best package (standard error) | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(rows: Sequence[Row], model: str, method: str, bits: float) -> str:
    """Format the mean over seeds, and half of their range where there are several."""
    found = rises(rows, model, method, bits)
    if not found:
        return "refused" if refused(rows, model, method, bits) else ""
    text = number(statistics.mean(found))
    return f"{text} ± {number((max(found) - min(found)) / 2)}" if len(found) > 1 else text


def corrected(plans: Sequence[Row], row: Row, source: str) -> float | None:
    """Correct a prediction by the increases that the plans of its seed had on one validation text."""
    measured = [
        (other["predicted"]["alone"], rise["value"])
        for other in plans
        if (other["model"], other["seed"]) == (row["model"], row["seed"])
        and (rise := other["validation"].get(source)) is not None
        and Rise(**rise).significant
    ]
    return Forecast.through(measured).rise(row["predicted"]["alone"]) if measured else None


def forecast_table(rows: Sequence[Row]) -> str:
    """Tabulate predicted over measured loss increases of the plan, mean over seeds."""
    plans = [row for row in rows if row["method"] == "plan"]
    sources = list(dict.fromkeys(name for row in plans for name in row["validation"]))
    titles = {"judged source": "the judged source", "other source": "another source"}
    heads = [f"corrected, text of {titles.get(name, name)}" for name in sources]
    lines = ["| model | bits | measured (standard error) | moments alone | " + " | ".join(heads) + " |"]
    lines.append("|---|--:|--:|--:|" + "--:|" * len(heads))
    for model, title in MODELS.items():
        for bits in SIZES:
            found = [row for row in plans if row["model"] == model and row["bits"] == bits]
            if not found:
                continue
            measured = statistics.mean(row["loss_increase"] for row in found)
            error = standard_error(rows, model, "plan", bits)
            predictions = [[row["predicted"]["alone"] for row in found]]
            predictions += [[corrected(plans, row, source) for row in found] for source in sources]
            cells = [ratio(values, measured) for values in predictions]
            lines.append(f"| {title} | {bits} | {number(measured)} ({number(error)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(predicted: Sequence[float | None], measured: float) -> str:
    """Divide the mean of the predictions by the measurement."""
    known = [value for value in predicted if value is not None]
    return f"{statistics.mean(known) / measured:.2f}x" if known and measured > 0 else ""


def time_table(rows: Sequence[Row]) -> str:
    """Tabulate processor seconds and peak memory of a plan and of GPTQ at one size."""
    at, steps = 4.25, ("calibrate", "plan", "verify", "round")
    lines = [f"| model | method | processor | {' | '.join(steps)} | peak memory, MiB |"]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|")
    for model, title in MODELS.items():
        for method in ("plan", "gptq"):
            wanted = (model, method, at)
            found = [r for r in rows if (r["model"], r["method"], r["bits"]) == wanted and "peak_mib" in r]
            if not found:
                continue
            row, seconds = found[-1], found[-1]["seconds"]
            cells = [number_of_seconds(seconds.get(name)) for name in steps]
            if "all" in seconds:
                cells = [f"{seconds['all']:.0f} in all", "", "", ""]
            cells = [title, METHODS[method], row["device"], *cells, f"{row['peak_mib']:,}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def samples_table(rows: Sequence[Row], model: str = "smollm2") -> str:
    """Tabulate greedy continuations of one prompt by the dense model, the plan and GPTQ."""
    lines = ["| bits | model | goes on |", "|--:|---|---|"]
    for bits in (4.25, 3.25):
        for method in ("plan", "gptq"):
            wanted = (model, method, bits)
            found = [r for r in rows if (r["model"], r["method"], r["bits"]) == wanted and r.get("sample")]
            if found and len(lines) == 2:
                lines.append(f"| 32 | dense | {one_line(found[0]['dense_sample'])} |")
            lines += [f"| {bits} | {METHODS[method]} | {one_line(found[0]['sample'])} |"] if found else []
    return "\n".join(lines)


def whole_table(rows: Sequence[Row]) -> str:
    """Tabulate the perplexity of a whole model at byte ratios, relative to the dense model."""
    if not rows:
        return "Not measured yet."
    lines = ["| share of the bytes | file, MB | after | perplexity | times dense |", "|--:|--:|---|--:|--:|"]
    for row in sorted(rows, key=lambda row: -row["share"]):
        after = {"": "calibration alone", "healed": "refined and healed"}.get(row["after"], row["after"])
        after += ", gains alone" if row.get("trained") == "vectors" else ""
        cells = f"{100 * row['share']:.0f} % | {row['file_bytes'] / 1e6:.1f} | {after}"
        lines.append(f"| {cells} | {row['perplexity']:.2f} | {row['perplexity_ratio']:.3f} |")
    return "\n".join(lines)


def speed_table(rows: Sequence[Row]) -> str:
    """Tabulate the speed of generation relative to the dense model in bfloat16, and the bytes held."""
    sides = {"int4": "int4", "planned": "planned", "int8:row": "int8, a scale a row"}
    lines = [f"| processor | threads | tokens in one pass | {' | '.join(sides.values())} |"]
    lines.append("|---|--:|---|--:|--:|--:|")
    modes = {"eager": "", "compiled": ", both compiled", "tuned": ", both compiled and tuned"}
    found: dict[tuple[str, int, int, int], dict[str, str]] = {}
    held: dict[str, str] = {}
    for row in rows:
        key = (row["device"], row["threads"], row["tokens"], [*modes].index(row["mode"]))
        found.setdefault(key, {})[row["side"]] = f"{row['times_bfloat16']:.2f}x"
        held[row["side"]] = f"{row['held_MiB']:.0f}"
    for (device, threads, tokens, mode), ratios in sorted(found.items()):
        passed = f"{tokens}{[*modes.values()][mode]}"
        cells = [device, str(threads), passed, *(ratios.get(side, "") for side in sides)]
        lines.append(f"| {' | '.join(cells)} |")
    if held:
        lines.append(
            f"| held, MiB (dense {held['bfloat16']}) | | | {' | '.join(held[side] for side in sides)} |"
        )
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Escape a text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def number_of_seconds(value: float | None) -> str:
    """Round to whole seconds; empty where a step was not measured."""
    return "" if value is None else f"{value:.0f}"


def origin(record: Mapping[str, Any]) -> str:
    """Say where the record was made and what it still lacks."""
    rows = record["rows"]
    commits = sorted({row["commit"][:10] for row in rows})
    machines = sorted({row["device"] for row in rows})
    dirty = ", some with uncommitted changes" if any(row["dirty"] for row in rows) else ""
    texts = []
    for model, title in MODELS.items():
        found = [row for row in rows if row["model"] == model]
        if not found:
            texts.append(f"{title}: not measured yet")
            continue
        left = [name for name in METHODS if not any(row["method"] == name for row in found)]
        plain = ", ".join(METHODS[name].strip("*") for name in left)
        text = f"{title}: calibrated on {found[0]['calibration_tokens']:,} tokens, judged on "
        text += f"{found[0]['judged_tokens']:,}"
        texts.append(text + (f"; not measured yet: {plain}" if left else ""))
    return (
        f"Commits {', '.join(commits)}{dirty}, {' and '.join(machines)}, {record['dtype']}, one thread of "
        "shared machines.\n" + "\n".join(f"{text}." for text in texts)
    )


def number(value: float) -> str:
    """Format with two significant digits below 0.1 and three decimals above."""
    if abs(value) < 1e-5:
        return "0"
    if abs(value) >= 0.1:
        return f"{value:.3f}"
    digits = 1
    while abs(value) < 10.0**-digits:
        digits += 1
    return f"{value:.{digits + 1}f}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw loss increase over bits of a weight for the plan and its peers, a panel for each model."""
    models = [m for m in MODELS if any(row["model"] == m and row["method"] == "plan" for row in rows)]
    with plt.rc_context({"svg.hashsalt": "bytes", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.4), squeeze=False)
        for axes, model in zip(panels[0], models, strict=True):
            for method, (style, color, width) in STYLES.items():
                points = [
                    (bits, statistics.mean(found))
                    for bits in PICTURED
                    if (found := rises(rows, model, method, bits)) and statistics.mean(found) > 0
                ]
                if points:
                    name = METHODS[method].strip("*")
                    axes.plot(*zip(*points, strict=True), style, color=color, lw=width, ms=4, label=name)
            axes.set(yscale="log", xlabel="bits of a weight, scales included", title=MODELS[model])
            axes.set_xticks(PICTURED)
            unit = next(row["unit"] for row in rows if row["model"] == model)
            axes.set_ylabel(f"loss increase ({unit})")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].legend(frameon=False, fontsize=8)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
