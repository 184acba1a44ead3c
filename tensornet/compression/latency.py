"""Predicted time of a layer for each of its candidates."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tensornet.contraction.cost import Machine, dense_seconds
from tensornet.contraction.plan import plan_operator
from tensornet.nn.integer_cost import product_cost, unpacking_cost
from tensornet.nn.storage import Storage
from tensornet.quantization import NumberFormat
from tensornet.topology import Topology

#: Fractions of the largest bond at which times are predicted; between them they are interpolated.
_TRIED = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Clock:
    """Predicts the milliseconds of a layer's forward pass by its fastest route, without a kept matrix.

    Args:
        tokens: of the forward pass.
        machine: whose constants are used.
        itemsize: bytes of a number.
    """

    tokens: int
    machine: Machine
    itemsize: int
    _known: dict[tuple[Topology, Topology, int], Tensor] = field(default_factory=dict, repr=False)

    def milliseconds(self, topology: Topology) -> float:
        """Predict the time of a layer with this topology."""
        plan = plan_operator(topology)
        route = plan.fastest(self.tokens, self.machine, self.itemsize)
        return 1e3 * plan.seconds(route, self.tokens, self.machine, self.itemsize)

    def integers(self, number_format: NumberFormat, shape: tuple[int, int]) -> float:
        """Predict the time of a dense matrix in an integer format."""
        cost = product_cost(number_format, shape, self.tokens, self.machine, self.itemsize)
        return 1e3 * cost.seconds

    def unpacking(self, topologies: Sequence[Topology], storage: Storage) -> Tensor:
        """Predict the times to unpack the integer cores of these topologies, zeros without any."""
        costs = [unpacking_cost(x, storage, self.machine, self.itemsize).seconds for x in topologies]
        return 1e3 * torch.tensor(costs, dtype=torch.float64)

    def ladder(self, topologies: Sequence[Topology]) -> Tensor:
        """Predict the times of layers whose topologies differ in their bonds, by increasing bond."""
        key = (topologies[0], topologies[-1], len(topologies))
        if key not in self._known:
            last = len(topologies) - 1
            tried = sorted({round(fraction * last) for fraction in _TRIED})
            times = [self.milliseconds(topologies[place]) for place in tried]
            self._known[key] = torch.from_numpy(np.interp(np.arange(last + 1), tried, times))
        return self._known[key]

    def dense(self, shape: tuple[int, int]) -> float:
        """Predict the time of the dense layer."""
        # A network of one core takes as long: the tie goes to the dense layer, whatever the rounding.
        return (1 - 1e-9) * 1e3 * dense_seconds(*shape, self.tokens, self.machine, self.itemsize)
