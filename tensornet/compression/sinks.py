"""Sinks: where the new layers of a compressed model go, block by block.

`run` (see `tensornet.compression.road`) makes a sink for a plan, gives it the new layers of every block as
soon as they are known, and finishes it. A sink may be a model in memory, a folder, or a file of another
runtime.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tensornet.calibration.batches import Batch, run_model
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import LayerCache, NewLayers, apply_plan
from tensornet.compression.plan import CompressionPlan


class Sink(ABC):
    """Takes the new layers of a planned model.

    A sink is made for one plan, before any layer is compressed, so that it can refuse what it cannot store.
    `put` is called once for each block, and `finish` at the end. The model or the destination changes only in
    `finish`, so a run that fails leaves it unchanged.

    Attributes:
        errors: relative Frobenius error of each layer, by name of its weight; complete after `finish`.
    """

    errors: Mapping[str, float]

    def written(self, name: str) -> bool:
        """Return True if an interrupted run has already put the new layer of a weight into this sink."""
        return False

    @abstractmethod
    def put(self, block: str, layers: Mapping[str, NewLayers]) -> None:
        """Take the new layers of a block.

        Args:
            block: name of the block; empty for layers outside of blocks.
            layers: for each weight by name, the modules that replace those that use it, and its relative
                error.
        """

    @abstractmethod
    def finish(self) -> None:
        """Complete the result, and only then change the model or write to the destination."""


class ReplacedLayers(Sink):
    """Sink that replaces the layers of a model in memory: all of them, or none if an error occurs.

    Args:
        model: the dense model.
        plan: the plan.
        stats: statistics for layers that are not put into the sink; `finish` compresses these itself.
        batch, call: batch on which the model is run once before the replacement is final, and the function
            that runs it (see `tensornet.apply_plan`).
        progress: whether to show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        *,
        stats: CalibrationStats | None = None,
        batch: Batch | None = None,
        call: Callable[[nn.Module, Batch], object] = run_model,
        progress: bool = False,
    ) -> None:
        self.model, self.plan = model, plan
        self.options: dict[str, Any] = {"batch": batch, "call": call, "progress": progress}
        self.stats = stats
        self.cache: LayerCache = {}
        self.errors: dict[str, float] = {}

    def put(self, block: str, layers: Mapping[str, NewLayers]) -> None:
        """Keep the new layers until all are known."""
        for name, new in layers.items():
            layer = self.plan[name]
            self.cache[name, layer.topology, layer.storage] = new

    def finish(self) -> None:
        """Replace all layers; see `tensornet.apply_plan`."""
        self.errors = apply_plan(self.model, self.plan, self.stats, cache=self.cache, **self.options)
