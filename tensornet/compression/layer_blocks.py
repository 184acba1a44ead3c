"""Split layer names into block and kind, for pictures and tables of large models."""

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerName:
    """Parts of the name of a layer: its block, and its name within the block.

    Args:
        name: in the model.
        block: index of the block, None outside of blocks.
        place: name of the block, such as `"layers.3"`; the name up to its last dot outside of blocks.
        kind: what follows, such as `"mlp.up_proj"`.
    """

    name: str
    block: int | None
    place: str
    kind: str


def layer_names(names: Sequence[str]) -> list[LayerName]:
    """Split the names of layers at the number of their block.

    Example:
        >>> from tensornet.compression.layer_blocks import layer_names
        >>> parts = layer_names(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
        >>> [(part.place, part.kind) for part in parts]
        [('layers.0', 'mlp.up_proj'), ('layers.1', 'mlp.up_proj')]
    """
    parts = [name.split(".") for name in names]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))  # works on lists as on strings
    found = []
    for name, part in zip(names, parts, strict=True):
        at = next((k for k, word in enumerate(part) if word.isdigit()), None)
        if at is None or at == len(part) - 1:
            block, cut = None, len(part) - 1
        else:
            block, cut = int(part[at]), at + 1
        first = max(0, min(shared - 1, cut - 2))
        found.append(LayerName(name, block, ".".join(part[first:cut]), ".".join(part[cut:])))
    return found


def grid_of(names: Sequence[LayerName]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Arrange layers: kinds as rows, blocks as columns.

    Returns:
        Labels of rows and of columns, and `(row, column)` of each layer by its name.

    Example:
        >>> from tensornet.compression.layer_blocks import grid_of, layer_names
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


def panels_of(names: Sequence[LayerName]) -> list[Panel]:
    """Arrange layers in panels, one for each kind over blocks; without blocks all are in one.

    Example:
        >>> from tensornet.compression.layer_blocks import layer_names, panels_of
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
