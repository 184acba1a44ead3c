"""Topology proposals for a shape and a number of parameters, with error bounds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensornet.topologies.leg_dims import divisors
from tensornet.topology import Topology

if TYPE_CHECKING:
    from tensornet.topologies.base import TopologyFamily

#: Matrix products are fastest where sizes are multiples of this.
KERNEL_STEP = 16

#: Cuts are tried at the divisors nearest to these powers of a size.
_CUT_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Proposal:
    """Proposed topology with bounds of its error before decomposition.

    Args:
        topology: bonds included.
        lower: no network of this topology has a smaller relative error on the matrix.
        upper: its decomposition has at most this error.
        worst: no matrix of this shape has a larger one; None where no such bound is known.
        baseline: whether it stays in the result even if another one beats it, because people compare.

    Example:
        >>> family = tn.topologies.topology_family("low_rank")
        >>> topology = tn.topologies.low_rank(out_features=12, in_features=8, rank=3)
        >>> tn.topologies.Proposal(topology, lower=0.2, upper=0.2, worst=None).topology.num_params
        60
    """

    topology: Topology
    lower: float
    upper: float
    worst: float | None
    baseline: bool = False


Dims = tuple[tuple[int, ...], tuple[int, ...]]


def known_proposal(
    topology: Topology, exact: float | None, worst: float, *, baseline: bool = False
) -> Proposal:
    """Propose a topology with its exact error or, without a matrix, its worst-case error."""
    error = worst if exact is None else exact
    return Proposal(topology, error, error, worst, baseline)


def uniform_proposals(family: "TopologyFamily", shape: tuple[int, int], params: int) -> Iterator[Proposal]:
    """Propose the largest uniform bond that fits, for any family; its error is unknown in advance."""

    def fits(bond: int) -> bool:
        return family.build(*shape, max_bond=bond).num_params <= params

    if fits(1):
        bond = _largest(fits, max(shape))
        yield Proposal(family.build(*shape, max_bond=bond), 0.0, 1.0, None)


def cut_dims(shape: tuple[int, int]) -> Iterator[Dims]:
    """Split rows and columns into two factors each."""
    for a in _cuts(shape[0]):
        for c in _cuts(shape[1]):
            yield (a, shape[0] // a), (c, shape[1] // c)


def _cuts(size: int) -> list[int]:
    choices = divisors(size)
    nearest = {min(choices, key=lambda d: abs(math.log(d) - power * math.log(size))) for power in _CUT_POWERS}
    return sorted(nearest)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """Find the largest number in `1 .. limit` that fits, given that 1 fits."""
    low, high = 1, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
