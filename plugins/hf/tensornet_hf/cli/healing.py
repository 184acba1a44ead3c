"""Where `tensornet compress --heal` keeps its work, so that a killed run need not begin again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tensornet as tn
from tensornet_hf.destinations import HUB
from tensornet_hf.sharded.source import digest, open_source


class HealingFile:
    """A file beside the destination, `.NAME.heal-KEY.safetensors`, that goes when the model is written.

    Args:
        destination: of the model; an address on the hub has no place beside it, and no file.
        folder: the dense model.
        options: JSON-ready, all that the healed model depends on: another command has another key.
    """

    def __init__(self, destination: str, folder: Path, options: Sequence[Any]) -> None:
        self.path: Path | None = None
        self._others: list[Path] = []
        if destination.startswith(HUB):
            return
        target = Path(destination).expanduser().absolute()
        marks = sorted(open_source(folder).marks.items())
        key = digest([marks, *options, tn.__version__, torch.__version__])[:16]
        self.path = target.with_name(f".{target.name}.heal-{key}.safetensors")
        if target.parent.is_dir():
            self._others = [x for x in target.parent.glob(f".{target.name}.heal-*") if x != self.path]

    def begin(self, *, resume: bool) -> Path | None:
        """The checkpoint to heal with; what other commands left for this destination is removed."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for file in self._others if resume else [*self._others, self.path]:
                file.unlink(missing_ok=True)
        return self.path

    def end(self) -> None:
        """The model is written; the checkpoint is not needed any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
