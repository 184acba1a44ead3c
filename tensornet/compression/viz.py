"""Pictures of plans: loss over bits, bits and rank of every layer, losses of the plain methods.

Functions that draw on axes take a `Palette`, so that a page can draw the same pictures in its own colours.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensornet._util import import_optional
from tensornet.compression.layer_plan import LayerName, LayerPlan, layer_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Smallest predicted loss increase that is drawn on a logarithmic axis.
FLOOR = 1e-7
#: Loss increases above this, in nats, are not drawn: the model is useless there.
_USELESS = 12.0
_WIDTH = 9.0  # inches


@dataclass(frozen=True)
class Palette:
    """Colours of a picture by their role.

    Args:
        ink: text.
        muted: labels of axes.
        grid: lines behind the data.
        ours: the plan.
        nearest: round to nearest.
        gptq: GPTQ.
        svd: plain SVD.
        dense: the dense model.
    """

    ink: str = "#1a1f2b"
    muted: str = "#667085"
    grid: str = "#e3e6eb"
    ours: str = "#2563eb"
    nearest: str = "#d9730d"
    gptq: str = "#0e7f4f"
    svd: str = "#8b5cf6"
    dense: str = "#98a2b3"


DEFAULT = Palette()


@dataclass(frozen=True)
class Mark:
    """One model in the picture of loss over bits.

    Args:
        label: its name.
        bits: of a weight of the compressed layers.
        loss_increase: over the dense model.
        color: of the mark.
        measured: filled, else a ring.
    """

    label: str
    bits: float
    loss_increase: float
    color: str
    measured: bool = False


@dataclass(frozen=True)
class BaselineLosses:
    """Predicted loss increase of the plain methods, by layer and over sizes.

    Args:
        nearest: by layer, of rounding to nearest in the largest format of at most the bytes of its plan, or
            in the smallest.
        svd: by layer, of the truncated SVD of at most those bytes.
        nearest_curve: `(bytes of all layers, loss increase)`, of one format for all layers.
        svd_curve: likewise, of one ratio for all layers.
    """

    nearest: Mapping[str, float] = field(default_factory=dict)
    svd: Mapping[str, float] = field(default_factory=dict)
    nearest_curve: tuple[tuple[int, float], ...] = ()
    svd_curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Panel:
    """Layers of one kind, from left to right.

    Args:
        title: the kind.
        layers: names of layers by their place.
        ticks: labels of all places.
    """

    title: str
    layers: tuple[tuple[int, str], ...]
    ticks: tuple[str, ...]


def draw_loss_over_bits(
    axes: "Axes",
    layers: Sequence[LayerPlan],
    curve: Sequence[tuple[int, float]],
    marks: Sequence[Mark],
    losses: BaselineLosses | None = None,
    palette: Palette = DEFAULT,
    *,
    label: str = "loss increase",
) -> None:
    """Draw the predicted loss increase over bits of a weight, of baselines and of models.

    Args:
        axes: to draw on.
        layers: as planned.
        curve: of the plan, `(bytes of all layers, predicted loss increase)`.
        marks: models.
        losses: curves of the plain methods.
        palette: colours.
        label: of the vertical axis.
    """
    from matplotlib.ticker import NullFormatter

    weights = sum(layer.params_before for layer in layers)

    def line(points: Sequence[tuple[int, float]], color: str, label: str, **options: Any) -> list[float]:
        shown = [(8 * size / weights, loss) for size, loss in sorted(points) if FLOOR < loss < _USELESS]
        if shown:
            axes.plot(*zip(*shown, strict=True), color=color, label=label, **options)
        return [loss for _, loss in shown]

    values = line(curve, palette.ours, "this method, predicted", linewidth=2)
    if losses is not None:
        options = {"linewidth": 1.2, "alpha": 0.8}
        values += line(losses.nearest_curve, palette.nearest, "round to nearest, predicted", **options)
        values += line(losses.svd_curve, palette.svd, "plain SVD, predicted", **options)
    for mark in marks:
        fill = mark.color if mark.measured else "none"
        style: dict[str, Any] = {"color": mark.color, "markerfacecolor": fill, "markersize": 8, "zorder": 4}
        if mark.loss_increase > FLOOR:
            values.append(min(mark.loss_increase, _USELESS))
            axes.plot([mark.bits], values[-1:], "o", **style)
        else:  # no increase has no place on a logarithmic axis: at its lower end
            axes.plot([mark.bits], [0.03], "v", transform=axes.get_xaxis_transform(), **style)
    dense = 8 * sum(layer.bytes_before for layer in layers) / weights
    axes.set_yscale("log")
    low, high = min(values, default=1e-3), max(values, default=1.0)
    axes.set_ylim(low / 2, high * 2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)
    smallest = min([mark.bits for mark in marks] + [8 * size / weights for size, _ in curve] + [2.0])
    _bits_axis(axes, smallest, dense, palette)
    plain_axes(axes, palette, grid="both")


def _bits_axis(axes: "Axes", smallest: float, dense: float, palette: Palette) -> None:
    """Scale the axis of bits a weight, and mark the dense model at its end."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    axes.axvline(dense, color=palette.dense, linestyle="--", linewidth=1.1)
    axes.annotate(
        "dense",
        (dense, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -10),
        textcoords="offset points",
        ha="right",
        color=palette.muted,
        fontsize=8,
    )
    axes.set_xscale("log")
    ticks = [bits for bits in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64) if 0.9 <= bits <= 1.05 * dense]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.set_xlim(0.9 * smallest, 1.1 * dense)
    axes.set_xlabel("bits of a weight, scales included")


def draw_bits(axes: "Axes", layers: Sequence[LayerPlan], palette: Palette = DEFAULT) -> None:
    """Draw bits of a weight as a map: blocks from left to right, layers of a block from top to bottom.

    Ranks are written into the cells of networks, as far as they are wide enough.
    """
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    names = layer_names([layer.name for layer in layers])
    rows, columns, cells = grid_of(names)
    most = max(layer.bits_per_weight for layer in layers)
    for layer, name in zip(layers, names, strict=True):
        row, column = cells[name.name]
        strength = 0.06 + 0.5 * layer.bits_per_weight / most  # text stays readable on the darkest
        corner = (column - 0.47, row - 0.46)
        axes.add_patch(Rectangle(corner, 0.94, 0.92, facecolor=to_rgba(palette.ours, strength), linewidth=0))
        label = f"{layer.bits_per_weight:.3g}"
        if rank := _rank(layer):
            label += f"\nr {rank}"
        if len(columns) <= 32:
            small = 7.5 if len(columns) <= 16 else 5
            axes.text(column, row, label, ha="center", va="center", fontsize=small, color=palette.ink)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), rows)
    step = max(1, len(columns) // 16)
    axes.set_xticks(list(range(0, len(columns), step)), columns[::step])
    axes.set_xlabel("block" if len(columns) > 1 else "")
    plain_axes(axes, palette, grid=None)


def draw_layer_losses(
    axes: "Axes",
    panel: Panel,
    losses: Mapping[str, Mapping[str, float]],
    palette: Palette = DEFAULT,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw the predicted loss increase of one panel of layers, one line for each method.

    Args:
        axes: to draw on.
        panel: of `panels_of`.
        losses: by method and layer, `"this plan"` among them.
        palette: colours.
        limits: of the logarithmic axis, for several panels of one picture.
    """
    from matplotlib.ticker import MaxNLocator, NullFormatter

    low, high = limits or loss_limits(losses)
    styles = {
        "plain SVD": {"marker": "s", "color": palette.svd, "markersize": 3.5},
        "round to nearest": {"marker": "^", "color": palette.nearest, "markersize": 4},
        "this plan": {"marker": "o", "color": palette.ours, "markersize": 4.5},
    }
    for method, known in losses.items():
        points = [(x, max(known[name], low)) for x, name in panel.layers]
        axes.plot(*zip(*points, strict=True), label=method, linewidth=1, **styles[method])  # type: ignore[arg-type]

    def label(value: float, _: float) -> str:
        return panel.ticks[int(value)] if 0 <= value < len(panel.ticks) else ""

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(-0.5, len(panel.ticks) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(label)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title, loc="left", fontsize=9, color=palette.ink)
    plain_axes(axes, palette, grid="y")


def losses_by_method(
    layers: Sequence[LayerPlan], losses: BaselineLosses | None
) -> dict[str, Mapping[str, float]]:
    """Collect the predicted loss increase of every layer, by method; the plan comes last."""
    found: dict[str, Mapping[str, float]] = {}
    if losses is not None and losses.svd:
        found = {"plain SVD": losses.svd, "round to nearest": losses.nearest}
    return {**found, "this plan": {layer.name: layer.loss_increase or 0.0 for layer in layers}}


def loss_limits(losses: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Return the limits of a logarithmic axis that shows all losses but zeros."""
    values = [x for known in losses.values() for x in known.values() if x > FLOOR]
    return min(values, default=FLOOR) / 2, max(values, default=1.0) * 2


def plain_axes(axes: "Axes", palette: Palette, *, grid: str | None) -> None:
    """Remove ticks, frames and other marks without data from axes."""
    axes.tick_params(length=0, which="both", colors=palette.muted)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(palette.grid)
    axes.xaxis.label.set_color(palette.muted)
    axes.yaxis.label.set_color(palette.muted)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=palette.grid)  # type: ignore[arg-type]  # "x", "y" or "both"


def plan_figure(
    layers: Sequence[LayerPlan], curve: Sequence[tuple[int, float]], loss_increase: float | None
) -> "Figure":
    """Draw a plan: loss over bits if it is predicted, and bits and ranks of all layers.

    Args:
        layers: of the plan.
        curve: `(bytes of all layers, predicted loss increase)`; empty without a prediction.
        loss_increase: predicted for the plan.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    module = import_optional("matplotlib.figure", extra="viz", user="plan.plot()")
    names = layer_names([layer.name for layer in layers])
    rows, columns, _ = grid_of(names)
    map_height = 1.0 + 0.32 * len(rows)
    heights = [3.0, map_height] if curve else [map_height]
    width = min(24.0, max(_WIDTH, 0.42 * len(columns)))
    figure: Figure = module.Figure(figsize=(width, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if curve:
        bits = _mean_bits(layers)
        marks = [] if loss_increase is None else [Mark("this plan", bits, loss_increase, DEFAULT.ours)]
        draw_loss_over_bits(panels[0], layers, curve, marks)
        panels[0].set_title(f"{bits:.2f} bits a weight", loc="left", fontsize=10)
    draw_bits(panels[-1], layers)
    panels[-1].set_title("bits of a weight, and rank (r) of networks", loc="left", fontsize=10)
    return figure


def report_figure(layers: Sequence[LayerPlan], errors: Mapping[str, float]) -> "Figure":
    """Draw a finished compression: the plan, and the loss or the weight error of every layer.

    Args:
        layers: of the plan that was applied.
        errors: relative Frobenius error of each layer.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    module = import_optional("matplotlib.figure", extra="viz", user="report.plot()")
    rows, columns, _ = grid_of(layer_names([layer.name for layer in layers]))
    predicted = all(layer.loss_increase is not None for layer in layers)
    height = 1.2 + 0.32 * len(rows)
    width = min(24.0, max(_WIDTH, 0.42 * len(columns)))
    figure: Figure = module.Figure(figsize=(width, height + 3.2), layout="constrained")
    bits, values = figure.subplots(2, 1, height_ratios=[height, 3.2])
    draw_bits(bits, layers)
    bits.set_title(f"bits of a weight, {_mean_bits(layers):.2f} in the mean", loc="left", fontsize=10)
    places = range(len(layers))
    if predicted:
        values.bar(places, [layer.loss_increase or 0.0 for layer in layers], color=DEFAULT.ours)
        values.set_ylabel("predicted loss increase")
    else:
        values.plot(places, [layer.baseline_error for layer in layers], "s", color=DEFAULT.svd, markersize=4)
        values.plot(places, [errors[layer.name] for layer in layers], "o", color=DEFAULT.ours, markersize=4)
        values.legend(["plain SVD, same size", "this model"], frameon=False, fontsize=8)
        values.set_ylabel("relative error of the weight")
    values.set_xlabel("layer, in the order of the model")
    plain_axes(values, DEFAULT, grid="y")
    return figure


def _mean_bits(layers: Sequence[LayerPlan]) -> float:
    """Compute the mean bits of a weight of these layers."""
    return 8 * sum(layer.bytes_after for layer in layers) / sum(layer.params_before for layer in layers)


def _rank(layer: LayerPlan) -> str:
    """Return the bonds of a planned network as text; empty for a matrix."""
    if layer.topology is None:
        return ""
    return "x".join(str(size) for size in layer.topology.bond_dims.values() if size > 1)


# --- places of layers in a picture -------------------------------------------------------------------


def grid_of(names: Sequence[LayerName]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Arrange layers: kinds as rows, blocks as columns.

    Returns:
        Labels of rows and of columns, and `(row, column)` of each layer by its name.

    Example:
        >>> from tensornet.compression.layer_plan import layer_names
        >>> from tensornet.compression.viz import grid_of
        >>> grid_of(layer_names(["h.0.up", "h.0.down", "h.1.up"]))
        (['up', 'down'], ['0', '1'], {'h.0.up': (0, 0), 'h.0.down': (1, 0), 'h.1.up': (0, 1)})
    """
    rows: dict[str, int] = {}
    columns: dict[tuple[str, int], int] = {}
    cells = {}
    for name in names:
        stack = re.sub(r"\d+$", "", name.place) if name.block is not None else ""
        row = name.kind if name.block is not None else name.name
        column = columns.setdefault((stack, name.block or 0), len(columns)) if name.block is not None else 0
        cells[name.name] = (rows.setdefault(row, len(rows)), column)
    several = len({stack for stack, _ in columns}) > 1  # encoder and decoder: their first letters
    labels = [f"{stack[:3]}{block}" if several else str(block) for stack, block in columns]
    return list(rows), labels or [""], cells


def panels_of(names: Sequence[LayerName]) -> list[Panel]:
    """Arrange layers in panels, one for each kind over blocks; without blocks all are in one.

    Example:
        >>> from tensornet.compression.layer_plan import layer_names
        >>> from tensornet.compression.viz import panels_of
        >>> [panel.title for panel in panels_of(layer_names(["h.0.up", "h.0.down", "h.1.up"]))]
        ['up', 'down']
    """
    rows, columns, cells = grid_of(names)
    if len(columns) == 1:
        return [Panel("", tuple((cells[x.name][0], x.name) for x in names), tuple(rows))]
    return [
        Panel(
            kind,
            tuple(sorted((cells[x.name][1], x.name) for x in names if cells[x.name][0] == row)),
            tuple(columns),
        )
        for row, kind in enumerate(rows)
    ]
