"""Candidates of one family for one matrix, by increasing bond, with predicted loss increases."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tensornet.errors import TopologyError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.quantization.formats import NumberFormat
from tensornet.topology import Topology

if TYPE_CHECKING:
    from tensornet.topologies.base import TopologyFamily

#: Fractions of the largest bond at which candidates are decomposed; between them losses are interpolated.
_TRIED = (0.02, 0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 1.0)
#: Candidates made between bond 1 and the largest.
_RUNGS = 400
#: Partial traces of a moment name two indices for each leg, with letters.
MAX_LEGS = 25


@dataclass(frozen=True)
class RoundTrip:
    """Encode and decode the cores of a network, as they will be kept.

    Args:
        run: encodes and decodes.
        number_format: integer format of all cores, from which a family may predict losses without rounding;
            None for other encodings.
    """

    run: Callable[[TensorNetwork], TensorNetwork]
    number_format: NumberFormat | None = None

    def __call__(self, network: TensorNetwork) -> TensorNetwork:
        """Return the decoded network."""
        return self.run(network)


@dataclass(frozen=True)
class Ladder:
    """Candidates of one family for one matrix, by increasing bond.

    Args:
        topologies: of the candidates, by rising bond.
        losses: `1/2 tr(R E C E^T)` of each under each weighting that was asked for, shape
            `(weightings, candidates)`.
        errors: relative Frobenius error of each, shape `(candidates,)`.
        complete: whether the last candidate has the bonds of an exact network.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> family = tn.topologies.topology_family("low_rank")
        >>> ladder = family.ladder(torch.randn(12, 8), [Weighting()])
        >>> len(ladder.topologies), ladder.losses.shape
        (8, torch.Size([1, 8]))
    """

    topologies: tuple[Topology, ...]
    losses: Tensor
    errors: Tensor
    complete: bool


def bond_ladder(
    family: "TopologyFamily",
    matrix: Tensor,
    weightings: Sequence[Weighting],
    *,
    max_bond: int | None = None,
    round_trip: RoundTrip | None = None,
    **options: Any,
) -> Ladder:
    """Decompose at a few bonds of any family and interpolate between them; see `TopologyFamily.ladder`.

    Losses are those of starts, lowered by as much as fitting a start in the middle gains.

    Raises:
        TopologyError: the topology has more legs than a moment can be split into.
    """
    rows, columns = matrix.shape
    full = family.build(rows, columns, **options)
    if max(len(full.out_dims), len(full.in_dims)) > MAX_LEGS:
        raise TopologyError(
            f"With calibration data a network has at most {MAX_LEGS} out-legs and as many in-legs, got "
            f"{len(full.out_dims)} and {len(full.in_dims)}; take fewer sites, or objective='weight'."
        )
    legs = (*full.out_dims, *full.in_dims)  # a whole Tucker network is one core: its bonds grow up to legs
    largest = max(full.bond_dims.values() or legs)
    top = min(largest, max_bond or largest)
    tried = sorted({max(1, round(fraction * top)) for fraction in _TRIED})
    caps = sorted({max(1, round(k * top / _RUNGS)) for k in range(1, _RUNGS + 1)} | set(tried))
    topologies = [family.build(rows, columns, max_bond=cap, **options) for cap in caps]

    def gap(network: TensorNetwork) -> Tensor:
        return matrix - (network if round_trip is None else round_trip(network)).to_matrix()

    starts = family.starts(matrix, [topologies[caps.index(cap)] for cap in tried], weightings[0])
    gaps = [gap(start) for start in starts]
    losses = [[weighting.cost(x) for x in gaps] for weighting in weightings]
    if weightings[0] != Weighting():
        middle = len(tried) // 2
        fitted = gap(family.fit(matrix, topologies[caps.index(tried[middle])], weightings[0]).network)
        losses = [
            scaled(tried, values, middle, weighting.cost(fitted))
            for values, weighting in zip(losses, weightings, strict=True)
        ]
    norm = max(float(matrix.norm()), 1e-300)
    errors = interpolated(caps, tried, [float(x.norm()) / norm for x in gaps])
    return Ladder(
        tuple(topologies),
        torch.tensor([interpolated(caps, tried, values) for values in losses], dtype=torch.float64),
        torch.tensor(errors, dtype=torch.float64),
        complete=top == largest,
    )


def scaled(caps: Sequence[int], values: Sequence[float], index: int, known: float) -> list[float]:
    """Rescale a curve through one exact point; the smallest cap stays unscaled."""
    factor = min(known / values[index], 1.0) if values[index] > 0 else 1.0
    if factor == 0 or index == 0:
        return list(values)
    parts = np.interp(np.log(caps), [math.log(caps[0]), math.log(caps[index])], [0.0, 1.0])
    return [float(value * factor**part) for value, part in zip(values, parts, strict=True)]


def interpolated(caps: Sequence[int], tried: Sequence[int], values: Sequence[float]) -> list[float]:
    """Interpolate values log-linearly, but linearly next to an exact candidate."""
    logs = np.log(np.maximum(values, 1e-300))
    plain, geometric = np.interp(caps, tried, values), np.exp(np.interp(caps, tried, logs))
    exact = np.array(values) <= 1e-12 * max(*values, 1e-300)
    beside = np.interp(caps, tried, exact.astype(float)) > 0
    return np.where(beside, plain, geometric).tolist()
