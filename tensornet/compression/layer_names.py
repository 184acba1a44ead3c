"""Split the names of layers into the block and the name inside the block."""

import os.path
from collections.abc import Sequence
from typing import NamedTuple


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
