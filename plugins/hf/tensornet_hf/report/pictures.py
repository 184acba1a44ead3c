"""Figures of the report, as inline SVG in the colours of the page.

matplotlib cannot write CSS variables, so every role is drawn in a colour of its own that nobody would
choose, and the finished SVG has these replaced: one picture serves light and dark pages alike.
"""

import io
import os.path
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from tensornet.compression import LayerPlan
from tensornet.compression.layer_plan import describe
from tensornet_hf.report.spectra import BondSpectrum

# role (a CSS variable of the page) -> stand-in colour
INK, MUTED, GRID, OURS, SVD, DENSE = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", OURS: "ours", SVD: "svd", DENSE: "dense"}

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the font of the page
    "svg.hashsalt": "tensornet",  # the same picture gives the same bytes
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

_WIDTH = 8.6  # inches; the page scales pictures to its own width
PANELS = 24
_POINTS = 160
_FLOOR = 1e-3  # singular values below this share of the largest are off the picture


def layers_picture(layers: Sequence[LayerPlan]) -> str:
    """Draw parameters before and after, topology with bonds, and each error beside that of plain SVD."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.0 + 0.27 * len(layers)), layout="constrained")
        sizes, errors = figure.subplots(1, 2, sharey=True, width_ratios=[1.15, 1])
        rows = range(len(layers))
        sizes.barh(rows, [x.params_before for x in layers], height=0.62, color=DENSE, label="dense")
        sizes.barh(rows, [x.params_after for x in layers], height=0.62, color=OURS, label="kept")
        widest = max(x.params_before for x in layers)
        for row, layer in enumerate(layers):
            form = describe(layer.topology, layer.storage)
            share = layer.params_after / layer.params_before
            sizes.text(
                layer.params_before + 0.02 * widest, row, f"{form}, {share:.0%}", va="center", color=MUTED
            )
        sizes.set_xlim(0, 1.55 * widest)  # room for the text
        sizes.set_xticks([tick for tick in MaxNLocator(4).tick_values(0, widest) if tick <= widest])
        sizes.set_yticks(list(rows), short_names([x.name for x in layers]))
        sizes.set_title("Parameters", loc="left", fontweight="bold")
        sizes.xaxis.set_major_formatter(lambda value, _: _thousands(value))
        svd, ours = [x.baseline_error for x in layers], [x.error or 0.0 for x in layers]
        errors.hlines(rows, ours, svd, color=GRID, linewidth=3)
        # Rings around dots: where the two agree both stay visible.
        errors.plot(svd, rows, "o", color=SVD, fillstyle="none", markersize=8, label="plain SVD, same size")
        errors.plot(ours, rows, "o", color=OURS, markersize=4.5, label="this model")
        errors.set_title("Relative error of the weight", loc="left", fontweight="bold")
        errors.set_xlim(0, 1.05 * max(0.01, *svd, *ours))
        sizes.set_ylim(len(layers) - 0.4, -0.6)
        for axes in (sizes, errors):
            _plain(axes)
            axes.grid(axis="x")
        _legend(figure, [*sizes.get_legend_handles_labels()[0], *errors.get_legend_handles_labels()[0]])
        return _svg(figure)


def spectra_picture(spectra: Mapping[str, Sequence[BondSpectrum]]) -> str:
    """Draw the singular values of each layer with the truncation; a chain has one line a bond."""
    chosen = spread(list(spectra), PANELS)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.5 + 1.55 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        smallest = min(value for name in chosen for x in spectra[name] for value in x.values)
        for axes, name, short in zip(grid.flat, chosen, short_names(chosen), strict=False):
            for number, spectrum in enumerate(spectra[name]):
                _draw_spectrum(axes, spectrum, number)
            axes.set_title(short, loc="left", fontsize=8)
            axes.set_yscale("log")
            low = max(_FLOOR, 0.7 * smallest)
            axes.set_ylim(low, 1.4)
            axes.set_yticks([tick for tick in (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001) if tick >= low])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            _plain(axes)
            axes.tick_params(labelsize=7)
        for axes in list(grid.flat)[len(chosen) :]:
            axes.set_axis_off()
        handles = [
            Line2D([], [], color=OURS, label="singular values kept"),
            Line2D([], [], color=DENSE, label="truncated"),
            Line2D([], [], color=SVD, linestyle="--", label="truncation"),
        ]
        if not all(s.exact for name in chosen for s in spectra[name]):
            handles.append(Line2D([], [], color=SVD, linestyle=":", label="rank of the same size"))
        _legend(figure, handles)
        return _svg(figure)


def curve_picture(
    points: Sequence[tuple[float, float]], kept: float, label: str = "predicted perplexity"
) -> str:
    """Draw the prediction, `(fraction of parameters kept, value)`, over all budgets, this one marked."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color=OURS)
        axes.axvline(kept, color=SVD, linestyle="--", linewidth=1.1)
        axes.annotate(
            f"this model, {kept:.0%}",
            (kept, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -9),
            textcoords="offset points",
            color=SVD,
        )
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("parameters of the compressed layers kept")
        axes.set_ylabel(label)
        _plain(axes)
        axes.grid(axis="both")
        return _svg(figure)


def short_names(names: Sequence[str]) -> list[str]:
    """Strip the dotted prefix that all names share; the last part always stays."""
    parts = [name.split(".") for name in names]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))  # works on lists as on strings
    return [".".join(p[shared:]) for p in parts]


def spread(names: Sequence[str], limit: int) -> list[str]:
    """Choose at most `limit` of the names, evenly spread, first and last included."""
    if len(names) <= limit:
        return list(names)
    return [names[round(k * (len(names) - 1) / (limit - 1))] for k in range(limit)]


def _draw_spectrum(axes: Axes, spectrum: BondSpectrum, number: int) -> None:
    values, kept = spectrum.values, spectrum.kept
    # Exact zeros (padding, a layer of lower rank) have no place on a logarithmic scale.
    shown = [k for k in spread_indices(len(values), _POINTS) if values[k] > 1e-12]
    alpha = max(0.35, 1 - 0.3 * number)
    for color, part in ((OURS, [k for k in shown if k < kept]), (DENSE, [k for k in shown if k >= kept - 1])):
        axes.plot([k + 1 for k in part], [values[k] for k in part], color=color, alpha=alpha, linewidth=1.6)
    if kept < len(values) or not spectrum.exact:
        axes.axvline(kept + 0.5, color=SVD, linestyle="--" if spectrum.exact else ":", linewidth=1.1)
        # Above the line for the first bond, below it for the next, so that neighbours do not collide.
        axes.annotate(
            str(kept),
            (kept + 0.5, 1 - 0.14 * number),
            xycoords=("data", "axes fraction"),
            xytext=(3, -7),
            textcoords="offset points",
            fontsize=7,
            color=SVD,
        )


def spread_indices(length: int, points: int) -> list[int]:
    """Choose at most `points` of the indices `0 ... length - 1`, evenly spread."""
    return sorted({round(k * (length - 1) / max(1, points - 1)) for k in range(points)})


def _plain(axes: Axes) -> None:
    axes.tick_params(length=0, which="both")
    axes.set_axisbelow(True)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8.5)


def _thousands(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # no XML header inside HTML
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns|xmlns:xlink)="[^"]*"', "", text, count=2)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same names in every picture of one page
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text
