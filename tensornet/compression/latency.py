"""How long a layer will take in each of the forms that a planner may choose."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tensornet.contraction.cost import dense_seconds
from tensornet.contraction.machine import Machine
from tensornet.network import plan_operator
from tensornet.nn.strategy import CACHED, DEFAULT_CACHE_LIMIT, RECONSTRUCT, route_seconds
from tensornet.topologies import low_rank
from tensornet.topology import Topology

#: Shares of the full rank at which times are predicted; between them they are interpolated.
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Clock:
    """Predicts milliseconds of one forward pass of a layer in eval, by the route that is fastest.

    A matrix of moderate size is kept once it is rebuilt, so no form takes longer than the dense layer.

    Args:
        tokens: of the forward pass.
        machine: whose constants are used.
        itemsize: bytes of a number.
    """

    tokens: int
    machine: Machine
    itemsize: int
    _known: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def milliseconds(self, topology: Topology) -> float:
        """Of a layer in this form."""
        plan = plan_operator(topology)
        rows, columns = topology.shape
        kept = rows * columns * self.itemsize <= DEFAULT_CACHE_LIMIT
        routes = (*range(len(plan.applies)), CACHED if kept else RECONSTRUCT)
        return 1e3 * min(
            route_seconds(plan, route, self.tokens, self.machine, self.itemsize) for route in routes
        )

    def low_ranks(self, shape: tuple[int, int]) -> Tensor:
        """Of every rank from 1 to the full one."""
        if shape not in self._known:
            full = min(shape)
            tried = sorted({max(1, round(share * full)) for share in _SHARES})
            times = [
                self.milliseconds(low_rank(out_features=shape[0], in_features=shape[1], rank=rank))
                for rank in tried
            ]
            self._known[shape] = torch.from_numpy(np.interp(np.arange(1, full + 1), tried, times))
        return self._known[shape]

    def dense(self, shape: tuple[int, int]) -> float:
        """Of the dense layer."""
        return 1e3 * dense_seconds(*shape, self.tokens, self.machine, self.itemsize)
