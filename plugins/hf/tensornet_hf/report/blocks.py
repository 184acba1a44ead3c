"""Rows of the table of layers, grouped by block, with marks on one logarithmic scale for all of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensornet.compression import CompressionPlan, LayerReport
from tensornet.compression.baselines import BaselineLosses
from tensornet.compression.plan import layer_names

#: Width of the scale, in CSS pixels, and the margin that keeps its marks inside.
WIDTH, MARGIN = 200, 6
#: Tables of models with at most so many layers start unfolded.
_FEW = 8


@dataclass(frozen=True)
class Values:
    """Predicted loss increase, or relative weight error, of one layer or block by method; None if unknown."""

    ours: float | None
    nearest: float | None = None
    svd: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One layer of the table.

    Args:
        layer: its report.
        short: its name within the block.
        rise: predicted loss increase.
        marks: `(x, role)` on the scale, roles as `"ours"`.
    """

    layer: LayerReport
    short: str
    rise: Values
    marks: tuple[tuple[float, str], ...]

    @property
    def bits(self) -> float:
        """Bits of a weight."""
        return 8 * self.layer.bytes_after / self.layer.params_before


@dataclass(frozen=True)
class BlockRows:
    """Layers of one block.

    Args:
        name: of the block.
        rows: its layers.
        rise: predicted loss increase of all of them.
        unfolded: whether the table is open at first.
    """

    name: str
    rows: tuple[LayerRow, ...]
    rise: Values
    unfolded: bool

    @property
    def bits(self) -> float:
        """Mean bits of a weight."""
        layers = [row.layer for row in self.rows]
        return 8 * sum(x.bytes_after for x in layers) / sum(x.params_before for x in layers)


@dataclass(frozen=True)
class Scale:
    """Logarithmic scale from `low` to `high`.

    Args:
        low: smallest value; smaller ones lie there.
        high: largest value.
        of_losses: whether it is of predicted losses, else of weight errors.
    """

    low: float
    high: float
    of_losses: bool

    def place(self, value: float) -> float:
        """Return the x coordinate of a value."""
        span = math.log(self.high / self.low) or 1.0
        share = math.log(max(value, self.low) / self.low) / span
        return round(MARGIN + share * (WIDTH - 2 * MARGIN), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Powers of ten, at most four, with their labels."""
        low, high = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        step = max(1, math.ceil((high - low + 1) / 4))
        return [(self.place(10.0**k), f"{10.0**k:g}") for k in range(low, high + 1, step)]


def table_of_layers(
    plan: CompressionPlan, layers: Sequence[LayerReport], losses: BaselineLosses
) -> tuple[list[BlockRows], Scale]:
    """Group layers by block, each with its marks.

    Args:
        plan: gives predicted losses.
        layers: reports, in the order of the plan.
        losses: of the plain methods; where nothing is predicted marks are weight errors.
    """
    predicted = all(layer.loss_increase is not None for layer in plan)
    rises = [
        Values(layer.loss_increase, losses.nearest.get(layer.name), losses.svd.get(layer.name))
        for layer in plan
    ]
    marked = rises if predicted else [Values(x.error, None, x.baseline_error) for x in layers]
    scale = _scale(marked, predicted)
    names = layer_names([layer.name for layer in layers])
    groups: dict[str, list[LayerRow]] = {}
    for name, layer, rise, mark in zip(names, layers, rises, marked, strict=True):
        row = LayerRow(layer, name.kind, rise, _marks(mark, scale))
        groups.setdefault(name.place if name.block is not None else "", []).append(row)
    blocks = [
        BlockRows(name, tuple(rows), _total([row.rise for row in rows]), len(layers) <= _FEW)
        for name, rows in groups.items()
    ]
    return blocks, scale


def _scale(values: Sequence[Values], of_losses: bool) -> Scale:
    known = [x for value in values for x in vars(value).values() if x is not None and x > 0]
    if not known:
        return Scale(1e-3, 1.0, of_losses)
    high = max(known)
    # More than seven decades would hide the differences that matter.
    return Scale(max(min(known), 1e-7 * high) / 1.2, 1.2 * high, of_losses)


def _marks(values: Values, scale: Scale) -> tuple[tuple[float, str], ...]:
    roles: Mapping[str, Any] = {"svd": values.svd, "nearest": values.nearest, "ours": values.ours}
    return tuple((scale.place(value), role) for role, value in roles.items() if value is not None)


def _total(values: Sequence[Values]) -> Values:
    def total(name: str) -> float | None:
        known = [getattr(value, name) for value in values]
        return None if None in known else sum(known)

    return Values(total("ours"), total("nearest"), total("svd"))
