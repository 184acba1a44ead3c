"""Layers that were rounded to measure their losses, kept for the plan that takes them as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from tensornet.compression.layer_plan import LayerPlan
from tensornet.nn.encoding import Storage
from tensornet.nn.layer_kinds import layer_bias
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.targets import Target
from tensornet.topology import Topology

_Key = tuple[str, Topology | None, Storage]


@dataclass
class RoundedLayers:
    """Tensor-network modules by layer and form; they take the memory of the compressed layers."""

    _made: dict[_Key, tuple[list[nn.Module], float]] = field(default_factory=dict)

    def keep(self, layer: LayerPlan, modules: Sequence[nn.Module], error: float) -> None:
        """Remember the modules of a layer as planned, one for each name, and its relative error."""
        self._made[_key(layer)] = list(modules), error

    def find(self, layer: LayerPlan, target: Target) -> tuple[list[nn.Module], float] | None:
        """Return the modules of a layer as planned, with the biases of the modules they replace."""
        found = self._made.get(_key(layer))
        if found is None:
            return None
        modules, error = found
        for new, module in zip(modules, target.modules, strict=True):
            if isinstance(new, TensorNetworkLinear):
                new.bias = layer_bias(module)
        return list(modules), error


def _key(layer: LayerPlan) -> _Key:
    return layer.name, layer.topology, layer.storage
