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
from matplotlib.ticker import NullFormatter

from tensornet.compression import CompressionPlan, LayerPlan
from tensornet.compression.baselines import GPTQ, NEAREST, SVD, BaselineLosses
from tensornet.compression.plan import layer_names
from tensornet.compression.viz import (
    Mark,
    Palette,
    draw_bits,
    draw_layer_losses,
    draw_loss_over_bits,
    grid_of,
    loss_limits,
    losses_by_method,
    panels_of,
    plain_axes,
)
from tensornet_hf.report.facts import ModelFacts
from tensornet_hf.report.spectra import BondSpectrum

#: Role of a colour, which is a CSS variable of the page, and its stand-in in the picture.
_ROLES = ("ink", "muted", "grid", "ours", "nearest", "gptq", "svd", "dense")
_STAND_INS = {role: f"#0102{number:02x}" for number, role in enumerate(_ROLES, start=3)}
PALETTE = Palette(**_STAND_INS)
_COLORS = {NEAREST: PALETTE.nearest, GPTQ: PALETTE.gptq, SVD: PALETTE.svd}

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the font of the page
    "svg.hashsalt": "tensornet",  # the same picture gives the same bytes
    "font.size": 9,
    "axes.edgecolor": PALETTE.grid,
    "axes.labelcolor": PALETTE.muted,
    "axes.titlecolor": PALETTE.ink,
    "text.color": PALETTE.ink,
    "xtick.color": PALETTE.muted,
    "ytick.color": PALETTE.muted,
    "xtick.labelcolor": PALETTE.muted,
    "ytick.labelcolor": PALETTE.ink,
    "grid.color": PALETTE.grid,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

_WIDTH = 10.0  # inches; the page scales pictures to its own width
PANELS = 24
_POINTS = 160
_FLOOR = 1e-3  # singular values below this share of the largest are off the picture


def loss_picture(
    plan: CompressionPlan,
    models: Sequence[tuple[ModelFacts, float, bool]],
    losses: BaselineLosses,
    label: str = "rise of the loss",
) -> str | None:
    """Draw the rise of the loss over bits of a weight: predicted curves, and models as dots.

    Args:
        plan: gives our curve and the dense end.
        models: each with the rise of its loss, and whether that was measured; ours first.
        losses: predicted curves of the plain methods.
        label: of the vertical axis.

    Returns:
        The picture, None where there is nothing but one dot to draw.
    """
    if not plan.curve(unit="bytes") and len(models) < 2:
        return None
    marks = [
        Mark(model.name, model.bits or 0.0, rise, _COLORS.get(model.name, PALETTE.ours), measured)
        for model, rise, measured in models
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.0, 4.0), layout="constrained")
        axes = figure.subplots()
        draw_loss_over_bits(axes, plan, marks, losses, PALETTE, label=label)
        lines = [
            Line2D([], [], color=line.get_color(), label=str(line.get_label()))
            for line in axes.lines
            if not str(line.get_label()).startswith("_")
        ]
        dots = [
            Line2D(
                [],
                [],
                color=mark.color,
                marker="o",
                linestyle="none",
                markerfacecolor=mark.color if mark.measured else "none",
                label=f"{mark.label}, {'measured' if mark.measured else 'predicted'}",
            )
            for mark in marks
        ]
        figure.legend(handles=[*lines, *dots], loc="outside lower left", ncols=2, fontsize=8)
        return _svg(figure)


def layer_losses_picture(layers: Sequence[LayerPlan], losses: BaselineLosses) -> str | None:
    """Draw the predicted loss increase of every layer beside the plain methods at the same bytes.

    Returns:
        The picture, None where nothing is predicted.
    """
    if any(layer.loss_increase is None for layer in layers):
        return None
    panels = panels_of(layer_names([layer.name for layer in layers]))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    known = losses_by_method(layers, losses)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.6 + 1.75 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, panel in zip(grid.flat, panels, strict=False):
            draw_layer_losses(axes, panel, known, PALETTE, loss_limits(known))
            axes.tick_params(labelsize=7.5)
        for number, axes in enumerate(grid.flat):
            axes.set_visible(number < len(panels))
            if number + columns >= len(panels) and len(panels) > 1:
                axes.set_xlabel("block", fontsize=8)
        for axes in grid[:, 0]:
            axes.set_ylabel("predicted rise", fontsize=8)
        _legend(figure, grid.flat[0].lines[::-1])
        return _svg(figure)


def bits_picture(layers: Sequence[LayerPlan]) -> str:
    """Draw bits of a weight and ranks of all layers as a map."""
    rows, _, _ = grid_of(layer_names([layer.name for layer in layers]))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.34 * len(rows)), layout="constrained")
        draw_bits(figure.subplots(), layers, PALETTE)
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
            plain_axes(axes, PALETTE, grid=None)
            axes.tick_params(labelsize=7)
        for axes in list(grid.flat)[len(chosen) :]:
            axes.set_axis_off()
        handles = [
            Line2D([], [], color=PALETTE.ours, label="singular values kept"),
            Line2D([], [], color=PALETTE.dense, label="truncated"),
            Line2D([], [], color=PALETTE.nearest, linestyle="--", label="truncation"),
        ]
        if not all(s.exact for name in chosen for s in spectra[name]):
            handles.append(
                Line2D([], [], color=PALETTE.nearest, linestyle=":", label="rank of the same size")
            )
        _legend(figure, handles)
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
    for color, part in (
        (PALETTE.ours, [k for k in shown if k < kept]),
        (PALETTE.dense, [k for k in shown if k >= kept - 1]),
    ):
        axes.plot([k + 1 for k in part], [values[k] for k in part], color=color, alpha=alpha, linewidth=1.6)
    if kept < len(values) or not spectrum.exact:
        axes.axvline(
            kept + 0.5, color=PALETTE.nearest, linestyle="--" if spectrum.exact else ":", linewidth=1.1
        )
        # Above the line for the first bond, below it for the next, so that neighbours do not collide.
        axes.annotate(
            str(kept),
            (kept + 0.5, 1 - 0.14 * number),
            xycoords=("data", "axes fraction"),
            xytext=(3, -7),
            textcoords="offset points",
            fontsize=7,
            color=PALETTE.nearest,
        )


def spread_indices(length: int, points: int) -> list[int]:
    """Choose at most `points` of the indices `0 ... length - 1`, evenly spread."""
    return sorted({round(k * (length - 1) / max(1, points - 1)) for k in range(points)})


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8.5)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # no XML header inside HTML
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns|xmlns:xlink)="[^"]*"', "", text, count=2)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same names in every picture of one page
    for role, color in _STAND_INS.items():
        text = text.replace(color, f"var(--{role})")
    return text
