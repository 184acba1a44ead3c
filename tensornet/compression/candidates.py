"""The forms one layer may take, with the size and the price of each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensornet.compression.allocate import CostCurve
from tensornet.compression.latency import Clock
from tensornet.compression.leg_search import best_dims
from tensornet.compression.network_fit import decompose_network, starts_of
from tensornet.compression.stored_error import decompose_at, rounding_costs, stored_error, stored_network
from tensornet.compression.weighted import frobenius_errors, tail_costs
from tensornet.errors import TopologyError
from tensornet.linalg.weighted_svd import Weighting, weighted_svd
from tensornet.network import TensorNetwork
from tensornet.nn.encoding import PLAIN, Storage
from tensornet.topologies import low_rank, topology_family
from tensornet.topology import Topology

#: What `LayerForms` holds for each form, beside how it is made.
_VALUES = ("params", "num_bytes", "costs", "forecasts", "errors", "milliseconds")
#: Partial traces of a moment name two indices for each leg, with letters.
MAX_LEGS = 25


@dataclass(frozen=True)
class Prices:
    """What errors in a weight cost: when a form is chosen, and when the loss is forecast."""

    choice: Weighting
    forecast: Weighting


@dataclass(frozen=True)
class LayerForms:
    """Forms of one layer, the dense one last where it is allowed.

    Args:
        params: stored numbers of each form, shape `(forms,)`.
        num_bytes: their bytes, shape `(forms,)`.
        costs: what decides; adds over layers, shape `(forms,)`.
        forecasts: predicted rise of the loss of a token, shape `(forms,)`.
        errors: relative Frobenius error of each, shape `(forms,)`.
        milliseconds: predicted time of a forward pass, shape `(forms,)`; zeros where nobody asked.
        make: topology (None for dense) and storage of a form, by its index.
    """

    params: Tensor
    num_bytes: Tensor
    costs: Tensor
    forecasts: Tensor
    errors: Tensor
    milliseconds: Tensor
    make: Callable[[int], tuple[Topology | None, Storage]]

    def curve(self, unit: str) -> CostCurve:
        """Costs over `"params"`, `"num_bytes"` or `"milliseconds"`."""
        return CostCurve(getattr(self, unit), self.costs)

    def only(self, indices: Sequence[int]) -> "LayerForms":
        """Some of the forms."""
        values = {name: getattr(self, name)[list(indices)] for name in _VALUES}
        return LayerForms(**values, make=lambda index: self.make(indices[index]))

    def hull(self) -> tuple[tuple[int, float], ...]:
        """Lower convex hull of forecasts over parameters: the only forms a global budget ever takes."""
        points = sorted(zip(self.params.tolist(), self.forecasts.tolist(), strict=True))
        hull: list[tuple[float, float]] = []
        for point in points:
            while len(hull) > 1 and _above(hull[-2], hull[-1], point):
                hull.pop()
            if not hull or point[1] < hull[-1][1]:
                hull.append(point)
        return tuple((int(size), cost) for size, cost in hull)


def low_rank_forms(
    matrix: Tensor,
    prices: Prices,
    storage: Storage,
    *,
    max_rank: int | None = None,
    rel_error: float | None = None,
    clock: Clock | None = None,
) -> LayerForms:
    """Every rank, priced by the whitened singular values, and dense.

    Args:
        matrix: shape `(out, in)`.
        prices: of errors.
        storage: how the factors would be kept.
        max_rank: largest rank; dense is then no choice.
        rel_error: forms with a larger relative Frobenius error are no choice.
        clock: predicts times.
    """
    result = weighted_svd(matrix, prices.choice)
    errors = frobenius_errors(result, matrix)[1:]
    costs, forecasts = result.error[1:], tail_costs(result, prices.forecast)[1:]
    if storage.int8:
        added = rounding_costs(matrix, result, storage, (prices.choice, prices.forecast, Weighting()))
        costs, forecasts = costs.cpu() + added[0], forecasts.cpu() + added[1]
        energy = matrix.double().square().sum().cpu().clamp_min(1e-300)
        errors = (errors.cpu().square() + 2 * added[2] / energy).sqrt()
    params, sizes = low_rank_sizes((matrix.shape[0], matrix.shape[1]), storage, matrix.dtype)
    ranks = torch.arange(1, len(errors) + 1)  # fewer than the full rank where a moment is singular
    keep = torch.ones_like(ranks, dtype=torch.bool)
    if max_rank is not None:
        keep &= ranks <= max_rank
    if rel_error is not None:
        keep &= errors.cpu() <= rel_error
    rows, columns = matrix.shape  # not in `make`, which would keep the whole matrix alive
    times, dense_time = torch.zeros(len(params)), 0.0
    if clock is not None:
        times, dense_time = clock.low_ranks((rows, columns)), clock.dense((rows, columns))
    dense = [] if max_rank is not None and max_rank < len(errors) else [float(matrix.numel())]
    if dense:  # forms that save nothing would only be other ways to write it
        saves = (params < matrix.numel()) | (sizes < matrix.numel() * matrix.element_size())
        keep &= (saves | (times < dense_time))[: len(keep)]
    kept = ranks[keep]

    def with_dense(values: Tensor, last: float) -> Tensor:
        chosen = values.cpu().double()[: len(keep)][keep]
        return torch.cat([chosen, chosen.new_tensor([last] * len(dense))])

    def make(index: int) -> tuple[Topology | None, Storage]:
        if index == len(kept):
            return None, PLAIN
        return low_rank(out_features=rows, in_features=columns, rank=int(kept[index])), storage

    return LayerForms(
        params=with_dense(params, float(matrix.numel())),
        num_bytes=with_dense(sizes, float(matrix.numel() * matrix.element_size())),
        costs=with_dense(costs, 0.0),
        forecasts=with_dense(forecasts, 0.0),
        errors=with_dense(errors, 0.0),
        milliseconds=with_dense(times, dense_time),
        make=make,
    )


#: Shares of the largest bond at which networks other than low rank are tried; between them costs are
#: interpolated.
_TRIED = (0.02, 0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 1.0)


def network_forms(
    matrix: Tensor,
    prices: Prices,
    storage: Storage,
    family: str,
    *,
    max_bond: int | None = None,
    rel_error: float | None = None,
    clock: Clock | None = None,
    search_dims: bool = False,
    **options: Any,
) -> LayerForms:
    """Caps on the bonds of any family, priced by trying a few, and dense.

    Costs are those of starts, lowered by what fitting a start in the middle gains.

    Args: as `low_rank_forms`, and
        family: a registered family.
        search_dims: choose the leg sizes of a chain by price (`best_dims`).
        options: passed to its `build`.

    Raises:
        TopologyError: more legs than prices can be taken apart into.
    """
    build = topology_family(family).build
    rows, columns = matrix.shape
    full = build(rows, columns, **options)
    if max(len(full.out_dims), len(full.in_dims)) > MAX_LEGS:
        raise TopologyError(
            f"With calibration data a network has at most {MAX_LEGS} out-legs and as many in-legs, got "
            f"{len(full.out_dims)} and {len(full.in_dims)}; take fewer sites, or objective='weight'."
        )
    if search_dims and family == "mpo":
        outs, ins = best_dims(matrix, prices.choice, storage, (full.out_dims, full.in_dims))
        options = {"out_dims": outs, "in_dims": ins}
        full = build(rows, columns, **options)
    legs = (*full.out_dims, *full.in_dims)  # a whole Tucker network is one core: its bonds grow up to legs
    top = min(max(full.bond_dims.values() or legs), max_bond or 10**9)
    tried = sorted({max(1, round(share * top)) for share in _TRIED})
    caps = sorted({max(1, round(k * top / 400)) for k in range(1, 401)} | set(tried))
    topologies = [build(rows, columns, max_bond=cap, **options) for cap in caps]
    starts = starts_of(matrix, [topologies[caps.index(cap)] for cap in tried], prices.choice)
    gaps = [matrix - _as_stored(start, storage, matrix.dtype).to_matrix() for start in starts]
    chosen, foreseen = ([x.cost(gap) for gap in gaps] for x in (prices.choice, prices.forecast))
    if prices.choice != Weighting():
        middle = len(tried) // 2
        fitted = decompose_network(matrix, topologies[caps.index(tried[middle])], prices.choice).network
        gap = matrix - _as_stored(fitted, storage, matrix.dtype).to_matrix()
        chosen = _scaled(tried, chosen, middle, prices.choice.cost(gap))
        foreseen = _scaled(tried, foreseen, middle, prices.forecast.cost(gap))
    costs, forecasts = (_interpolated(caps, tried, values) for values in (chosen, foreseen))
    norm = max(float(matrix.norm()), 1e-300)
    errors = _interpolated(caps, tried, [float(gap.norm()) / norm for gap in gaps])
    dense = max_bond is None
    params = [float(storage.num_params(topology)) for topology in topologies]
    sizes = [float(storage.num_bytes(topology, matrix.dtype)) for topology in topologies]
    times, dense_time = [0.0] * len(caps), 0.0
    if clock is not None:
        times = [clock.milliseconds(topologies[caps.index(cap)]) for cap in tried]
        times, dense_time = _interpolated(caps, tried, times), clock.dense((rows, columns))
    dense_params, dense_size = float(matrix.numel()), float(matrix.numel() * matrix.element_size())
    keep = [k for k in range(len(caps)) if rel_error is None or errors[k] <= rel_error]
    if dense:  # as for low rank
        keep = [k for k in keep if params[k] < dense_params or sizes[k] < dense_size or times[k] < dense_time]

    def kept(values: list[float], last: float = 0.0) -> Tensor:
        return torch.tensor([values[k] for k in keep] + [last] * dense, dtype=torch.float64)

    def make(index: int) -> tuple[Topology | None, Storage]:
        return (None, PLAIN) if index == len(keep) else (topologies[keep[index]], storage)

    return LayerForms(
        params=kept(params, dense_params),
        num_bytes=kept(sizes, dense_size),
        costs=kept(costs),
        forecasts=kept(forecasts),
        errors=kept(errors),
        milliseconds=kept(times, dense_time),
        make=make,
    )


def joined(forms: Sequence[LayerForms]) -> LayerForms:
    """The choice between all forms of several families."""
    starts = [0]
    for form in forms:
        starts.append(starts[-1] + len(form.params))

    def make(index: int) -> tuple[Topology | None, Storage]:
        family = next(k for k in range(len(forms)) if index < starts[k + 1])
        return forms[family].make(index - starts[family])

    values = {name: torch.cat([getattr(form, name) for form in forms]) for name in _VALUES}
    return LayerForms(**values, make=make)


def keep_promise(forms: LayerForms, matrix: Tensor, weighting: Weighting, rel_error: float) -> LayerForms:
    """Forms without those too small to keep a relative error, which is found by decomposing.

    The errors of forms are estimates: of starts that are fitted later to prices of the loss, which lets the
    Frobenius error grow, and before rounding. The smallest form that is left has been tried.

    Args:
        forms: of one layer, in which estimates keep the error.
        matrix: its weight.
        weighting: at which plans are carried out.
        rel_error: what is promised.
    """
    order = forms.params.argsort(stable=True).tolist()
    place = 0
    while place < len(order):
        topology, storage = forms.make(order[place])
        if topology is None:
            break
        error = stored_error(matrix, decompose_at(matrix, topology, weighting), storage)
        if error <= rel_error:
            break
        wanted = float(forms.errors[order[place]]) * rel_error / error
        later = range(place + 1, len(order))
        step = max(1, (len(order) - place) // 8)
        place = next((k for k in later if float(forms.errors[order[k]]) < wanted), place + step)
    return forms.only(sorted(order[place:]))


def _as_stored(network: TensorNetwork, storage: Storage, dtype: torch.dtype) -> TensorNetwork:
    """With the rounding of eight bits; fixing a gauge adds none worth the time."""
    return stored_network(network, storage, dtype) if storage.int8 else network


def _scaled(caps: Sequence[int], values: Sequence[float], index: int, known: float) -> list[float]:
    """Values by the factor that makes one of them what it is known to be; the smallest cap gains nothing."""
    factor = min(known / values[index], 1.0) if values[index] > 0 else 1.0
    if factor == 0 or index == 0:
        return list(values)
    shares = np.interp(np.log(caps), [math.log(caps[0]), math.log(caps[index])], [0.0, 1.0])
    return [float(value * factor**share) for value, share in zip(values, shares, strict=True)]


def _interpolated(caps: Sequence[int], tried: Sequence[int], values: Sequence[float]) -> list[float]:
    """Values at all caps, linear in the logarithm between those tried; beside an exact form, as they are."""
    logs = np.log(np.maximum(values, 1e-300))
    plain, geometric = np.interp(caps, tried, values), np.exp(np.interp(caps, tried, logs))
    exact = np.array(values) <= 1e-12 * max(*values, 1e-300)
    beside = np.interp(caps, tried, exact.astype(float)) > 0
    return np.where(beside, plain, geometric).tolist()


def dense_form(matrix: Tensor, clock: Clock | None = None) -> LayerForms:
    """No choice but to stay dense."""
    count = torch.tensor([float(matrix.numel())], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    time = zero if clock is None else zero + clock.dense((matrix.shape[0], matrix.shape[1]))
    size = count * matrix.element_size()
    return LayerForms(count, size, zero, zero, zero, time, lambda index: (None, PLAIN))


@lru_cache(maxsize=256)
def low_rank_sizes(shape: tuple[int, int], storage: Storage, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stored numbers and bytes of every rank from 1 to the full one."""
    topologies = [
        low_rank(out_features=shape[0], in_features=shape[1], rank=rank) for rank in range(1, min(shape) + 1)
    ]
    params = torch.tensor([storage.num_params(t) for t in topologies], dtype=torch.float64)
    sizes = torch.tensor([storage.num_bytes(t, dtype) for t in topologies], dtype=torch.float64)
    return params, sizes


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether `b` lies on or above the line from `a` to `c`."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
