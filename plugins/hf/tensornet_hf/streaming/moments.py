"""Store the moments of many layers on the disk, and join them into one file of statistics."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from tensornet.calibration import CalibrationStats
from tensornet.calibration.stats import STATS_VERSION
from tensornet.io import (
    ShardTask,
    Slice,
    load_slice,
    read_header,
    write_shard,
    write_tensors,
)


class Moments:
    """Collector of statistics that writes a few layers at a time to the disk.

    Args:
        folder: where they are kept until `write`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.sides: dict[str, dict[str, str]] = {"rows": {}, "columns": {}}
        self.stored: dict[str, Slice] = {}
        self.coherence: dict[str, float] = {}

    def add(self, stats: CalibrationStats) -> None:
        """Write the moments of some layers; shared tensors stay shared."""
        self.coherence |= stats.coherence
        tensors: dict[str, Tensor] = {}
        keys: dict[int, str] = {}
        for side, moments in (("rows", stats.rows), ("columns", stats.columns)):
            for name, moment in moments.items():
                key = keys.setdefault(id(moment), f"{side}.{name}")
                tensors[key] = moment.contiguous()
                self.sides[side][name] = key
        if tensors:
            path = self.folder / f"{len(self.stored)}.safetensors"
            write_tensors(path, tensors)
            self.stored |= read_header(path)

    def columns(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the moments of the inputs of some layers; a tensor that layers share is read once."""
        keys = {name: self.sides["columns"][name] for name in names if name in self.sides["columns"]}
        read = {key: load_slice(self.stored[key]) for key in dict.fromkeys(keys.values())}
        return {name: read[key] for name, key in keys.items()}

    def write(self, path: Path, **facts: Any) -> None:
        """Write the file that `CalibrationStats.load` reads, from the stored bytes.

        Args:
            path: of the file.
            facts: fields of `CalibrationStats` that are not moments.
        """
        header = {"version": STATS_VERSION, **facts, "coherence": self.coherence, **self.sides}
        write_shard(ShardTask(path, self.stored, {"calibration": json.dumps(header)}))
