"""Figures of the HTML report: loss over bits, loss of each layer, bits of each layer.

Drawing a figure needs matplotlib.
"""

import io
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.report import ModelFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colors by role: text, labels of axes, grid lines, this plan, the baselines, the dense model. HTML pages
#: replace the colors by variables, so every role needs a different color.
COLORS = {
    "ink": "#1a1f2b",
    "muted": "#667085",
    "grid": "#e3e6eb",
    "ours": "#2563eb",
    "nearest": "#d9730d",
    "gptq": "#0e7f4f",
    "svd": "#8b5cf6",
    "dense": "#98a2b3",
}
#: Limits of the logarithmic axis of predicted loss increases in nats; above the upper one a model is useless.
FLOOR, _USELESS = 1e-7, 12.0
#: Width of figures in inches; the page scales them to its own width.
_WIDTH = 10.0


@dataclass(frozen=True)
class Mark:
    """One model in the plot of loss against bits.

    Args:
        label: name of the model.
        bits: bits per weight of the compressed layers.
        loss_increase: loss increase over the dense model.
        color: color of the mark.
        measured: True if the loss was measured; the mark is then filled, else a ring.
    """

    label: str
    bits: float
    loss_increase: float
    color: str
    measured: bool = False


# --- figures of a report ----------------------------------------------------------------------------


def draw_report(
    plan: CompressionPlan,
    models: Sequence[ModelFacts],
    losses: Mapping[str, Mapping[str, float]],
    colors: Mapping[str, str],
) -> dict[str, str]:
    """Draw the figures of a report as SVG: loss increase over bits, loss increase and bits of each layer.

    Args:
        plan: the plan.
        models: the compressed model and the baselines.
        losses: predicted loss increases of the baselines, by method and layer.
        colors: role of the color of each baseline, by name (see `COLORS`).
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    style: Any = {
        "svg.fonttype": "none",  # keep text as text: it is then searchable and uses the font of the page
        "svg.hashsalt": "tensornet",  # equal plots give equal bytes
        "font.size": 9,
        "axes.edgecolor": COLORS["grid"],
        "axes.labelcolor": COLORS["muted"],
        "axes.titlecolor": COLORS["ink"],
        "text.color": COLORS["ink"],
        "xtick.color": COLORS["muted"],
        "ytick.color": COLORS["muted"],
        "xtick.labelcolor": COLORS["muted"],
        "ytick.labelcolor": COLORS["ink"],
        "grid.color": COLORS["grid"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    layers, found = list(plan), {}
    with matplotlib.rc_context(style):
        marks = [
            Mark(x.name, x.bits, x.loss_increase, COLORS[colors.get(x.name, "ours")], x.measured)
            for x in models
            if x.loss_increase is not None and x.bits is not None
        ]
        curve = plan.curve()
        if curve or len(marks) > 1:
            figure = Figure(figsize=(6.0, 4.0), layout="constrained")
            axes = figure.subplots()
            draw_loss_over_bits(axes, layers, curve, marks)
            handles = [
                Line2D([], [], color=line.get_color(), label=str(line.get_label()))
                for line in axes.lines
                if not str(line.get_label()).startswith("_")
            ]
            for mark in marks:
                how = "measured" if mark.measured else "predicted"
                face = mark.color if mark.measured else "none"
                dot: Any = {"marker": "o", "linestyle": "none", "markerfacecolor": face}
                handles.append(Line2D([], [], color=mark.color, label=f"{mark.label}, {how}", **dot))
            figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=9.5)
            found["loss"] = _svg(figure)
        if all(layer.loss_increase is not None for layer in layers):
            found["layers"] = _svg(losses_figure(layers, losses))
        names, _, _ = grid_of([layer.name for layer in layers])
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.34 * len(names)), layout="constrained")
        draw_bits(figure.subplots(), layers)
        found["bits"] = _svg(figure)
    return found


def losses_figure(layers: Sequence[LayerPlan], others: Mapping[str, Mapping[str, float]]) -> Any:
    """Plot predicted loss increases, with a panel for each kind of layer and a line for each method.

    Args:
        layers: layers of a plan that predicts losses.
        others: losses of the baselines `"plain SVD"` and `"round to nearest"`, by the name of the layer.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter

    losses = {**others, "this plan": {layer.name: layer.loss_increase or 0.0 for layer in layers}}
    styles: dict[str, dict[str, Any]] = {
        "plain SVD": {"marker": "s", "color": COLORS["svd"], "markersize": 3.5},
        "round to nearest": {"marker": "^", "color": COLORS["nearest"], "markersize": 4},
        "this plan": {"marker": "o", "color": COLORS["ours"], "markersize": 4.5},
    }
    values = [x for known in losses.values() for x in known.values() if x > FLOOR]
    low, high = min(values, default=FLOOR) / 2, max(values, default=1.0) * 2
    # Draw a panel for each kind of layer, with block numbers on the horizontal axis. If there is only one
    # block, draw a single panel with the kinds of layers on that axis.
    kinds, blocks, cells = grid_of([layer.name for layer in layers])
    panels = [
        (kind, blocks, [(c, x) for x, (r, c) in cells.items() if r == k]) for k, kind in enumerate(kinds)
    ]
    if len(blocks) == 1:
        panels = [("", kinds, [(row, x) for x, (row, _) in cells.items()])]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(_WIDTH, 0.6 + 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(panels))
        if number >= len(panels):
            continue
        title, ticks, places = panels[number]
        for method, known in losses.items():
            points = [(x, max(known[name], low)) for x, name in sorted(places)]
            axes.plot(*zip(*points, strict=True), label=method, linewidth=1, **styles[method])

        def label(value: float, _: float, ticks: Sequence[str] = ticks) -> str:
            return ticks[int(value)] if 0 <= value < len(ticks) else ""

        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.set_xlim(-0.5, len(ticks) - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(label)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, loc="left", fontsize=9, color=COLORS["ink"])
        simplify_axes(axes, grid="y")
        axes.tick_params(labelsize=7.5)
        if number + columns >= len(panels) > 1:
            axes.set_xlabel("block", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("predicted loss", fontsize=8)
    lines = grid.flat[0].lines[::-1]
    figure.legend(handles=lines, loc="outside upper left", ncols=len(lines), fontsize=8.5)
    return figure


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # HTML does not allow the XML header
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns|xmlns:xlink)="[^"]*"', "", text, count=2)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # several plots on a page would repeat ids
    for role, color in COLORS.items():
        text = text.replace(color, f"var(--{role})")
    return text


# --- parts of figures -------------------------------------------------------------------------------


def draw_loss_over_bits(
    axes: "Axes",
    layers: Sequence[LayerPlan],
    curve: Sequence[tuple[int, float]],
    marks: Sequence[Mark],
) -> None:
    """Draw the predicted loss increase over bits per weight as a curve, and models as marks.

    Args:
        axes: axes to draw on.
        layers: layers of the plan.
        curve: pairs `(bytes of all layers, predicted loss increase)`.
        marks: models to draw as marks.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter

    weights = sum(layer.params_before for layer in layers)
    shown = [(8 * size / weights, loss) for size, loss in sorted(curve) if FLOOR < loss < _USELESS]
    if shown:
        points = zip(*shown, strict=True)
        axes.plot(*points, color=COLORS["ours"], label="this method, predicted", linewidth=2)
    values = [loss for _, loss in shown]
    for mark in marks:
        fill = mark.color if mark.measured else "none"
        style: dict[str, Any] = {"color": mark.color, "markerfacecolor": fill, "markersize": 8, "zorder": 4}
        if mark.loss_increase > FLOOR:
            values.append(min(mark.loss_increase, _USELESS))
            axes.plot([mark.bits], values[-1:], "o", **style)
        else:  # zero cannot be drawn on a logarithmic axis, so the mark is at its lower end
            axes.plot([mark.bits], [0.03], "v", transform=axes.get_xaxis_transform(), **style)
    axes.set_yscale("log")
    axes.set_ylim(min(values, default=1e-3) / 2, max(values, default=1.0) * 2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss increase, nats per token")
    # The horizontal axis ends at the dense model.
    dense = 8 * sum(layer.bytes_before for layer in layers) / weights
    smallest = min([mark.bits for mark in marks] + [8 * size / weights for size, _ in curve] + [2.0])
    axes.axvline(dense, color=COLORS["dense"], linestyle="--", linewidth=1.1)
    axes.annotate(
        "dense",
        (dense, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -10),
        textcoords="offset points",
        ha="right",
        color=COLORS["muted"],
        fontsize=9,
    )
    axes.set_xscale("log")
    ticks = [bits for bits in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64) if 0.9 <= bits <= 1.05 * dense]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.set_xlim(0.9 * smallest, 1.1 * dense)
    axes.set_xlabel("bits of a weight, scales included")
    simplify_axes(axes, grid="both")


def draw_bits(axes: "Axes", layers: Sequence[LayerPlan]) -> None:
    """Draw the bits per weight of all layers as a table of colored cells.

    There is a column for each block, and a row for each kind of layer. Bits and ranks are written into the
    cells if the cells are wide enough.
    """
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    rows, columns, cells = grid_of([layer.name for layer in layers])
    most = max(layer.bits_per_weight for layer in layers)
    for layer in layers:
        row, column = cells[layer.name]
        strength = 0.06 + 0.5 * layer.bits_per_weight / most  # text is readable on the darkest color
        color = to_rgba(COLORS["ours"], strength)
        axes.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, facecolor=color, linewidth=0))
        label = f"{layer.bits_per_weight:.3g}"
        bonds = {} if layer.topology is None else layer.topology.bond_dims
        if rank := "x".join(str(size) for size in bonds.values() if size > 1):
            label += f"\nr {rank}"
        if len(columns) <= 32:
            small = 7.5 if len(columns) <= 16 else 5
            axes.text(column, row, label, ha="center", va="center", fontsize=small, color=COLORS["ink"])
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), rows)
    step = max(1, len(columns) // 16)
    axes.set_xticks(list(range(0, len(columns), step)), columns[::step])
    axes.set_xlabel("block" if len(columns) > 1 else "")
    simplify_axes(axes, grid=None)


def simplify_axes(axes: "Axes", *, grid: str | None) -> None:
    """Remove tick marks and two spines, and draw grid lines along `grid`: `"x"`, `"y"`, `"both"` or None."""
    axes.tick_params(length=0, which="both", colors=COLORS["muted"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLORS["grid"])
    axes.xaxis.label.set_color(COLORS["muted"])
    axes.yaxis.label.set_color(COLORS["muted"])
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=COLORS["grid"])  # type: ignore[arg-type]


def grid_of(names: Sequence[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Arrange layers in a table: a row for each kind of layer, a column for each block.

    Returns:
        Labels of rows and of columns, and `(row, column)` of each layer by its name.
    """
    rows: dict[str, int] = {}
    columns: dict[tuple[str, int], int] = {}
    cells = {}
    for name, (block, place, kind) in zip(names, layer_names(names), strict=True):
        row, column = name, 0
        if block is not None:
            row, column = kind, columns.setdefault((re.sub(r"\d+$", "", place), block), len(columns))
        cells[name] = (rows.setdefault(row, len(rows)), column)
    several = len({stack for stack, _ in columns}) > 1  # blocks of encoder and decoder get a prefix
    labels = [f"{stack[:3]}{block}" if several else str(block) for stack, block in columns]
    return list(rows), labels or [""], cells


class LayerName(NamedTuple):
    """Parts of a layer's name: the index of its block, the name of this block, and the name inside the block.

    For a layer outside of blocks, the index is None, and the name of its parent replaces that of the block.
    """

    block: int | None
    place: str
    kind: str


def layer_names(names: Sequence[str]) -> list[LayerName]:
    """Split the name of each layer after the index of its block."""
    parts = [name.split(".") for name in names]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))  # `commonprefix` accepts lists too
    found = []
    for part in parts:
        at = next((k for k, word in enumerate(part) if word.isdigit()), None)
        if at is None or at == len(part) - 1:
            block, cut = None, len(part) - 1
        else:
            block, cut = int(part[at]), at + 1
        first = max(0, min(shared - 1, cut - 2))
        found.append(LayerName(block, ".".join(part[first:cut]), ".".join(part[cut:])))
    return found
