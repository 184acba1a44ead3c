"""Candidates of one layer: networks with an encoding of their cores, their size, time and predicted loss.

A candidate is a topology and a `Storage`, the encoding of its cores; the dense matrix is the last one. The
topologies and losses come from the family (`TopologyFamily.ladder`); bytes and times are added here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tensornet.compression.allocate import CostCurve, lower_hull
from tensornet.compression.config import CompressionConfig
from tensornet.compression.latency import Clock
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.encoding import PLAIN, Storage, decode, encode
from tensornet.quantization import Rounding
from tensornet.quantization.scales import scales_underflow
from tensornet.topologies import Decomposition, TopologyFamily, topology_family
from tensornet.topologies.results import RoundTrip
from tensornet.topology import Topology

#: Fields of `LayerCandidates` with one value for each candidate.
_VALUES = ("params", "num_bytes", "costs", "forecasts", "errors", "milliseconds")


@dataclass(frozen=True)
class LayerCandidates:
    """Candidates of one layer, the dense matrix last where it is allowed.

    Args:
        params: stored numbers of each candidate, shape `(candidates,)`.
        num_bytes: their bytes, shape `(candidates,)`.
        costs: what decides; adds over layers, shape `(candidates,)`.
        forecasts: predicted loss increase, shape `(candidates,)`.
        errors: relative Frobenius error of each, shape `(candidates,)`.
        milliseconds: predicted time of a forward pass, shape `(candidates,)`; zeros where nobody asked.
        make: topology (None for dense) and storage of a candidate, by its index.
        uniform: indices of the dense matrix in each number format, by the name of the format.
        nearest: predicted loss increase of rounding to nearest in each integer format, for comparison.
    """

    params: Tensor
    num_bytes: Tensor
    costs: Tensor
    forecasts: Tensor
    errors: Tensor
    milliseconds: Tensor
    make: Callable[[int], tuple[Topology | None, Storage]]
    uniform: Mapping[str, int] = field(default_factory=dict)
    nearest: Mapping[str, float] = field(default_factory=dict)

    def curve(self, unit: str) -> CostCurve:
        """Build the cost curve over `"params"`, `"num_bytes"` or `"milliseconds"`."""
        return CostCurve(getattr(self, unit), self.costs)

    def only(self, indices: Sequence[int]) -> "LayerCandidates":
        """Select candidates by index."""
        values = {name: getattr(self, name)[list(indices)] for name in _VALUES}
        places = {old: new for new, old in enumerate(indices)}
        uniform = {name: places[k] for name, k in self.uniform.items() if k in places}
        return replace(self, **values, make=lambda index: self.make(indices[index]), uniform=uniform)

    def free(self) -> "LayerCandidates":
        """Copy the candidates with all predicted losses set to zero."""
        nothing = torch.zeros_like(self.costs)
        return replace(self, costs=nothing, forecasts=nothing, nearest=dict.fromkeys(self.nearest, 0.0))

    def hull(self, unit: str) -> tuple[tuple[int, float], ...]:
        """Compute the lower convex hull of forecasts over a size, from which budgets of the model choose."""
        sizes, costs = getattr(self, unit).tolist(), self.forecasts.tolist()
        return tuple((int(sizes[k]), costs[k]) for k in lower_hull(sizes, costs))


def family_candidates(
    matrix: Tensor,
    sensitivity: Sensitivity,
    storage: Storage,
    family: TopologyFamily,
    *,
    max_bond: int | None = None,
    rel_error: float | None = None,
    clock: Clock | None = None,
    search_legs: bool = False,
    options: dict[str, Any] | None = None,
) -> LayerCandidates:
    """Build the candidates of one family for one matrix, and the dense one.

    Args:
        matrix: shape `(out, in)`.
        sensitivity: of the loss to errors.
        storage: encoding of the cores.
        family: a registered one.
        max_bond: largest bond; where it excludes some, dense is not a candidate.
        rel_error: drop candidates with a larger relative Frobenius error.
        clock: predicts times.
        search_legs: let the family choose its leg sizes for this matrix.
        options: of the family's `build`.

    Raises:
        TopologyError: the options do not fit, or are unknown.
    """
    chosen = dict(options or {})
    if search_legs:
        chosen = family.search_legs(matrix, sensitivity.choice, storage.num_params, **chosen)
    ladder = family.ladder(
        matrix,
        (sensitivity.choice, sensitivity.forecast),
        max_bond=max_bond,
        round_trip=_rounding(storage, matrix, sensitivity),
        **chosen,
    )
    topologies = ladder.topologies
    params, sizes = _sizes(_Rungs(topologies), storage, matrix.dtype)
    shape = (matrix.shape[0], matrix.shape[1])
    dense = [float(matrix.numel())] if ladder.complete else []
    dense_bytes, dense_time = float(matrix.numel() * matrix.element_size()), 0.0
    times = torch.zeros(len(topologies), dtype=torch.float64)
    if clock is not None:
        times, dense_time = clock.ladder(topologies), clock.dense(shape)
        if storage.quantized:
            times = times + clock.unpacking(topologies, storage)
    keep = torch.ones(len(topologies), dtype=torch.bool)
    if rel_error is not None:
        keep &= ladder.errors <= rel_error
    if dense:  # candidates that save nothing would only be other ways to write the matrix
        keep &= (params < matrix.numel()) | (sizes < dense_bytes) | (times < dense_time)
    kept = keep.nonzero().squeeze(1).tolist()

    def with_dense(values: Tensor, last: float = 0.0) -> Tensor:
        return torch.cat([values[keep], values.new_tensor([last] * len(dense))])

    def make(index: int) -> tuple[Topology | None, Storage]:
        if index == len(kept):
            return None, PLAIN
        topology = topologies[kept[index]]
        return topology, storage.for_topology(topology)

    return LayerCandidates(
        params=with_dense(params, float(matrix.numel())),
        num_bytes=with_dense(sizes, dense_bytes),
        costs=with_dense(ladder.losses[0]),
        forecasts=with_dense(ladder.losses[1]),
        errors=with_dense(ladder.errors),
        milliseconds=with_dense(times, dense_time),
        make=make,
    )


def _rounding(storage: Storage, matrix: Tensor, sensitivity: Sensitivity) -> RoundTrip | None:
    """Wrap `round_trip` for `TopologyFamily.ladder`; None where nothing is rounded.

    Losses of formats whose scales underflow are measured: in a pivoted network one factor is as small as the
    matrix, and predictions take both as balanced.
    """
    if not storage.quantized:
        return None
    number_format = storage.number_format
    predicted = number_format.is_integer and not scales_underflow(matrix, number_format, sensitivity.choice)
    return RoundTrip(
        lambda network: round_trip(network, storage, matrix.dtype, sensitivity.choice, sensitivity.rounding),
        number_format if predicted else None,
    )


def storage_of(config: CompressionConfig, objective: str) -> Storage:
    """Choose the encoding of cores: pivoted with calibration data unless the configuration names another."""
    pivoted = objective != "weight" if config.pivoted is None else config.pivoted
    return Storage(pivoted=pivoted)


def joined(candidates: Sequence[LayerCandidates]) -> LayerCandidates:
    """Join the candidates of several families."""
    starts = [0]
    for found in candidates:
        starts.append(starts[-1] + len(found.params))

    def make(index: int) -> tuple[Topology | None, Storage]:
        family = next(k for k in range(len(candidates)) if index < starts[k + 1])
        return candidates[family].make(index - starts[family])

    values = {name: torch.cat([getattr(found, name) for found in candidates]) for name in _VALUES}
    uniform = {
        name: start + k
        for start, found in zip(starts, candidates, strict=False)
        for name, k in found.uniform.items()
    }
    nearest = {name: loss for found in candidates for name, loss in found.nearest.items()}
    return LayerCandidates(**values, make=make, uniform=uniform, nearest=nearest)


def dense_candidate(matrix: Tensor, clock: Clock | None = None) -> LayerCandidates:
    """Build candidates with the dense matrix as the only choice."""
    count = torch.tensor([float(matrix.numel())], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    time = zero if clock is None else zero + clock.dense((matrix.shape[0], matrix.shape[1]))
    size = count * matrix.element_size()
    return LayerCandidates(count, size, zero, zero, zero, time, lambda index: (None, PLAIN))


def keep_promise(
    candidates: LayerCandidates, matrix: Tensor, weighting: Weighting, rel_error: float
) -> LayerCandidates:
    """Drop candidates whose measured error exceeds `rel_error`.

    The errors of candidates are estimates: of starts that are fitted later to the loss, which lets the
    Frobenius error grow, and before rounding. The smallest candidate that is left has been decomposed.

    Args:
        candidates: of one layer; their estimates keep the error.
        matrix: its weight.
        weighting: at which plans are carried out.
        rel_error: the promise.
    """
    order = candidates.params.argsort(stable=True).tolist()
    place = 0
    while place < len(order):
        topology, storage = candidates.make(order[place])
        if topology is None:
            break
        made = topology_family(topology.family).fit(matrix, topology, weighting)
        error = stored_error(matrix, made, storage, weighting)
        if error <= rel_error:
            break
        wanted = float(candidates.errors[order[place]]) * rel_error / error
        later = range(place + 1, len(order))
        step = max(1, (len(order) - place) // 8)
        place = next((k for k in later if float(candidates.errors[order[k]]) < wanted), place + step)
    return candidates.only(sorted(order[place:]))


def round_trip(
    network: TensorNetwork,
    storage: Storage,
    dtype: torch.dtype,
    weighting: Weighting | None = None,
    rounding: Rounding = "two_sided",
) -> TensorNetwork:
    """Encode the cores of a network in a dtype, and decode them again.

    Args:
        network: to be stored.
        storage: how its cores are kept.
        dtype: of the model.
        weighting: sensitivity of the loss, with which cores are rounded to integers.
        rounding: how, see `CompressionConfig`.
    """
    kept = encode(network.topology, storage, network.to(dtype).cores, weighting, rounding)
    # Integers are looked at in full precision.
    seen = network.cores[0].dtype if storage.own_dtypes else None
    return TensorNetwork(network.topology, decode(network.topology, storage, kept, dtype=seen))


def stored_error(
    matrix: Tensor, made: Decomposition, storage: Storage, weighting: Weighting | None = None
) -> float:
    """Compute the relative Frobenius error of the stored network: certified if plain, else measured."""
    if storage.plain:
        return made.error
    return relative_gap(matrix, round_trip(made.network, storage, matrix.dtype, weighting).to_matrix())


def relative_gap(matrix: Tensor, other: Tensor) -> float:
    """Compute `|W - W'|_F / |W|_F`."""
    exact = matrix.double()
    gap = torch.linalg.vector_norm(exact - other.double())
    return float(gap / torch.linalg.vector_norm(exact).clamp_min(1e-300))


@dataclass(frozen=True)
class _Rungs:
    """Topologies of a ladder as a key: hashed by the first and the last, since to hash all takes long."""

    topologies: tuple[Topology, ...]

    def __hash__(self) -> int:
        return hash((len(self.topologies), self.topologies[:1], self.topologies[-1:]))


@lru_cache(maxsize=256)
def _sizes(rungs: _Rungs, storage: Storage, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Count stored numbers and bytes of each topology; cached, since layers of one shape share candidates."""
    topologies = rungs.topologies
    params = torch.tensor([storage.num_params(t) for t in topologies], dtype=torch.float64)
    sizes = torch.tensor([storage.num_bytes(t, dtype) for t in topologies], dtype=torch.float64)
    return params, sizes
