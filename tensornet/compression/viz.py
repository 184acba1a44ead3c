"""Figures of plans and reports, and the parts of figures that the HTML report of `tensornet_hf` draws too.

Only `plot` methods and that report import this module. Drawing a figure needs matplotlib.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensornet._util import import_optional
from tensornet.compression.layer_names import layer_names

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
FLOOR, _USELESS = 1e-7, 12.0
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
    """Plot the bits and ranks of all layers, and their predicted losses or (without predictions) errors.

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
        errors = {"svd": [x.baseline_error or 0.0 for x in layers], "ours": [x.error or 0.0 for x in layers]}
        for role, marker in (("svd", "s"), ("ours", "o")):
            values.plot(places, errors[role], marker, color=COLORS[role], markersize=4)
        values.legend(["plain SVD, same size", "this model"], frameon=False, fontsize=8)
        values.set_ylabel("relative error of the weight")
    values.set_xlabel("layer, in the order of the model")
    simplify_axes(values, grid="y")
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
    simplify_axes(axes, grid="both")


def draw_bits(axes: "Axes", layers: Layers) -> None:
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
