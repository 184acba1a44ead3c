"""Plots of plans and reports: loss over bits, bits and ranks of layers, predicted losses of layers."""

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tensornet._util import import_optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Layers of a plan, `LayerPlan` objects. The class is not imported, since the import would be circular.
Layers = Sequence[Any]

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
_FLOOR, _USELESS = 1e-7, 12.0
#: Default width of a figure in inches.
_WIDTH = 9.0


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


# --- whole figures ----------------------------------------------------------------------------------


class LayerName(NamedTuple):
    """Parts of the name of a layer: the index and the name of its block, and its name inside the block.

    For a layer outside of blocks the index is None, and the name of its parent takes the place of the block.
    """

    block: int | None
    place: str
    kind: str


def layer_names(names: Sequence[str]) -> list[LayerName]:
    """Split the names of layers after the number of their block."""
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


def plan_figure(layers: Layers, curve: Sequence[tuple[int, float]], loss_increase: float | None) -> "Figure":
    """Plot a plan: the predicted loss over bits per weight, and the bits and ranks of all layers.

    Args:
        layers: layers of the plan.
        curve: pairs `(bytes of all layers, predicted loss increase)`; without them, loss is not plotted.
        loss_increase: predicted loss increase of the plan.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure, panels = _figure(layers, "plan.plot()", above=[3.0] if curve else [])
    if curve:
        bits = _mean_bits(layers)
        marks = [] if loss_increase is None else [Mark("this plan", bits, loss_increase, COLORS["ours"])]
        draw_loss_over_bits(panels[0], layers, curve, marks)
        panels[0].set_title(f"{bits:.2f} bits a weight", loc="left", fontsize=10)
    draw_bits(panels[-1], layers)
    panels[-1].set_title("bits of a weight, and rank (r) of networks", loc="left", fontsize=10)
    return figure


def report_figure(layers: Layers) -> "Figure":
    """Plot the bits, the ranks, and the predicted losses or the errors of all compressed layers.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure, (bits, values) = _figure(layers, "report.plot()", below=[3.2])
    draw_bits(bits, layers)
    bits.set_title(f"bits of a weight, {_mean_bits(layers):.2f} in the mean", loc="left", fontsize=10)
    places = range(len(layers))
    if all(layer.loss_increase is not None for layer in layers):
        values.bar(places, [layer.loss_increase or 0.0 for layer in layers], color=COLORS["ours"])
        values.set_ylabel("predicted loss increase")
    else:
        errors = {"svd": [x.baseline_error for x in layers], "ours": [x.error or 0.0 for x in layers]}
        for role, marker in (("svd", "s"), ("ours", "o")):
            values.plot(places, errors[role], marker, color=COLORS[role], markersize=4)
        values.legend(["plain SVD, same size", "this model"], frameon=False, fontsize=8)
        values.set_ylabel("relative error of the weight")
    values.set_xlabel("layer, in the order of the model")
    _plain(values, grid="y")
    return figure


def losses_figure(
    layers: Layers, others: Mapping[str, Mapping[str, float]], *, width: float = _WIDTH
) -> "Figure":
    """Plot predicted loss increases, with a panel for each kind of layer and a line for each method.

    Args:
        layers: layers of a plan that predicts losses.
        others: losses of the baselines `"plain SVD"` and `"round to nearest"`, by the name of the layer.
        width: width of the figure in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    module = import_optional("matplotlib.figure", extra="viz", user="a picture of losses")
    from matplotlib.ticker import MaxNLocator, NullFormatter

    losses = {**others, "this plan": {layer.name: layer.loss_increase or 0.0 for layer in layers}}
    styles: dict[str, dict[str, Any]] = {
        "plain SVD": {"marker": "s", "color": COLORS["svd"], "markersize": 3.5},
        "round to nearest": {"marker": "^", "color": COLORS["nearest"], "markersize": 4},
        "this plan": {"marker": "o", "color": COLORS["ours"], "markersize": 4.5},
    }
    values = [x for known in losses.values() for x in known.values() if x > _FLOOR]
    low, high = min(values, default=_FLOOR) / 2, max(values, default=1.0) * 2
    # Each kind of layer has a panel, with block numbers as horizontal axis; without blocks, there is one
    # panel.
    kinds, blocks, cells = grid_of([layer.name for layer in layers])
    panels = [
        (kind, blocks, [(c, x) for x, (r, c) in cells.items() if r == k]) for k, kind in enumerate(kinds)
    ]
    if len(blocks) == 1:
        panels = [("", kinds, [(row, x) for x, (row, _) in cells.items()])]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure: Figure = module.Figure(figsize=(width, 0.6 + 1.75 * rows), layout="constrained")
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
        _plain(axes, grid="y")
        axes.tick_params(labelsize=7.5)
        if number + columns >= len(panels) > 1:
            axes.set_xlabel("block", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("predicted loss", fontsize=8)
    lines = grid.flat[0].lines[::-1]
    figure.legend(handles=lines, loc="outside upper left", ncols=len(lines), fontsize=8.5)
    return figure


def _figure(
    layers: Layers, user: str, *, above: Sequence[float] = (), below: Sequence[float] = ()
) -> tuple["Figure", Any]:
    """Make a figure with a panel for `draw_bits`, and panels of the given heights above and below it."""
    module = import_optional("matplotlib.figure", extra="viz", user=user)
    rows, columns, _ = grid_of([layer.name for layer in layers])
    heights = [*above, 1.1 + 0.32 * len(rows), *below]
    width = min(24.0, max(_WIDTH, 0.42 * len(columns)))
    figure: Figure = module.Figure(figsize=(width, sum(heights)), layout="constrained")
    return figure, figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]


def _mean_bits(layers: Layers) -> float:
    return 8 * sum(layer.bytes_after for layer in layers) / sum(layer.params_before for layer in layers)


# --- parts of figures -------------------------------------------------------------------------------


def draw_loss_over_bits(
    axes: "Axes",
    layers: Layers,
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
    shown = [(8 * size / weights, loss) for size, loss in sorted(curve) if _FLOOR < loss < _USELESS]
    if shown:
        points = zip(*shown, strict=True)
        axes.plot(*points, color=COLORS["ours"], label="this method, predicted", linewidth=2)
    values = [loss for _, loss in shown]
    for mark in marks:
        fill = mark.color if mark.measured else "none"
        style: dict[str, Any] = {"color": mark.color, "markerfacecolor": fill, "markersize": 8, "zorder": 4}
        if mark.loss_increase > _FLOOR:
            values.append(min(mark.loss_increase, _USELESS))
            axes.plot([mark.bits], values[-1:], "o", **style)
        else:  # zero cannot be drawn on a logarithmic axis, so the mark is at its lower end
            axes.plot([mark.bits], [0.03], "v", transform=axes.get_xaxis_transform(), **style)
    axes.set_yscale("log")
    axes.set_ylim(min(values, default=1e-3) / 2, max(values, default=1.0) * 2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss increase")
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
    _plain(axes, grid="both")


def draw_bits(axes: "Axes", layers: Layers) -> None:
    """Draw the bits per weight of all layers as a table of colored cells.

    Columns are blocks, rows are the layers in a block. Bits and ranks are written into the cells if these are
    wide enough.
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
    _plain(axes, grid=None)


def _plain(axes: "Axes", *, grid: str | None) -> None:
    axes.tick_params(length=0, which="both", colors=COLORS["muted"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLORS["grid"])
    axes.xaxis.label.set_color(COLORS["muted"])
    axes.yaxis.label.set_color(COLORS["muted"])
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=COLORS["grid"])  # type: ignore[arg-type]  # "x", "y" or "both"


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
