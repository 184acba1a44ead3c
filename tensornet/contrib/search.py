"""Topology search: family, dims and bonds for a matrix and a parameter budget.

Candidates are proposed by their families, their errors bounded and their times predicted; few are decomposed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tensornet._util import check_dense, check_number, check_size
from tensornet.budget import Budget
from tensornet.contraction.cost import Machine, check_machine, default_machine, dense_seconds
from tensornet.contraction.plan import plan_operator
from tensornet.errors import BudgetError, ShapeError, TopologyError
from tensornet.linalg.svd import check_finite
from tensornet.linalg.tt_svd import CutSpectra
from tensornet.topologies import topology_family, topology_names
from tensornet.topologies.results import Proposal
from tensornet.topology import Topology

Objective = Literal["error", "time", "params"]
OBJECTIVES = ("error", "time", "params")

#: "time" compares candidates that use at least this fraction of the parameter budget: smaller networks are
#: always faster, but were not requested.
FULL_USE = 0.9

#: "time" accepts this multiple of the smallest error among those candidates.
TIME_SLACK = 1.25


@dataclass(frozen=True)
class SearchPoint:
    """Candidate topology with its parameters, error and predicted time.

    Args:
        topology: the network.
        params: stored numbers.
        milliseconds: predicted for one forward pass; the geometric mean over the token counts of the search.
        error: relative Frobenius error. If known from spectra, the smallest of all networks of this topology,
            which the decomposition reaches to half a percent; else the certified error of the decomposition.
            None without a matrix.
        error_bound: error that no matrix of this shape exceeds, None where the family has no such bound.

    Example:
        >>> from tensornet.contrib.search import search_topology
        >>> point = search_topology(torch.randn(32, 48), param_ratio=0.5).best()
        >>> point.params <= 32 * 48 / 2, 0 < point.error < 1
        (True, True)
    """

    topology: Topology
    params: int
    milliseconds: float
    error: float | None
    error_bound: float | None

    def __str__(self) -> str:
        error = "unknown" if self.ranked_error == 1.0 and self.error is None else f"{self.ranked_error:.5f}"
        known = "error" if self.error is not None else "error at most"
        return (
            f"{form(self.topology)}: {self.params:,} parameters, {known} {error}, {self.milliseconds:.4f} ms"
        )

    @property
    def ranked_error(self) -> float:
        """Error used for ranking: the error if known, else its bound, else 1."""
        found = self.error if self.error is not None else self.error_bound
        return 1.0 if found is None else found


@dataclass(frozen=True)
class TopologySearch:
    """Result of `search_topology`: iterate over the Pareto front, print it, or select the `best` point.

    Args:
        shape: `(out_features, in_features)`.
        tokens: token counts of the predicted times.
        max_params: the budget.
        dense_milliseconds: prediction for a dense layer.
        points: everything that was evaluated, by parameters.
        front: points that no other point beats in parameters, error and time at once.
        pruned: candidates that a bound ruled out before they were decomposed.

    Example:
        >>> from tensornet.contrib.search import search_topology
        >>> found = search_topology(torch.randn(32, 48), param_ratio=0.5)
        >>> found.best("params").params <= found.best("error").params
        True
    """

    shape: tuple[int, int]
    tokens: tuple[int, ...]
    max_params: int
    dense_milliseconds: float
    points: tuple[SearchPoint, ...]
    front: tuple[SearchPoint, ...]
    pruned: int

    def __repr__(self) -> str:
        return f"<TopologySearch {self.shape}: {len(self.front)} of {len(self.points)} points on the front>"

    def __iter__(self) -> Iterator[SearchPoint]:
        return iter(self.front)

    def __len__(self) -> int:
        return len(self.front)

    def best(
        self, objective: Objective = "error", *, max_error: float | None = None, max_ms: float | None = None
    ) -> SearchPoint:
        """Select the best point within the limits.

        Args:
            objective: `"error"`: smallest error. `"params"`: fewest parameters. `"time"`: fastest among those
                that use at least 90 % of the parameter budget (or of the largest point that meets the limits)
                and whose error is at most 1.25 times the smallest of those; with `max_error`, the fastest
                that keeps it.
            max_error: largest error to accept. Without a matrix the bound is compared.
            max_ms: largest predicted time to accept.

        Raises:
            ValueError: unknown objective.
            BudgetError: no candidate meets the limits, or a limit is not a number.
        """
        if objective not in OBJECTIVES:
            raise ValueError(f"Unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}.")
        for name, limit in (("max_error", max_error), ("max_ms", max_ms)):
            if limit is not None:
                check_number(name, limit)
        allowed = [
            point
            for point in self.points
            if point.ranked_error <= (math.inf if max_error is None else max_error)
            and point.milliseconds <= (math.inf if max_ms is None else max_ms)
        ]
        if not allowed:
            least = min(point.ranked_error for point in self.points)
            fastest = min(point.milliseconds for point in self.points)
            raise BudgetError(
                f"None of {len(self.points)} candidates meets max_error={max_error}, max_ms={max_ms}; the "
                f"smallest error is {least:.4g}, the fastest takes {fastest:.4g} ms. Raise a limit or the "
                "budget."
            )
        if objective == "error":
            return min(allowed, key=lambda point: (point.ranked_error, point.milliseconds))
        if objective == "params":
            return min(allowed, key=lambda point: (point.params, point.ranked_error))
        if max_error is None:
            largest = max(point.params for point in allowed)
            allowed = [point for point in allowed if point.params >= FULL_USE * largest]
            limit = TIME_SLACK * min(point.ranked_error for point in allowed)
            allowed = [point for point in allowed if point.ranked_error <= limit]
        return min(allowed, key=lambda point: (point.milliseconds, point.ranked_error))

    def __str__(self) -> str:
        known = any(point.error is not None for point in self.points)
        what = "error" if known else "error at most"
        lines = [
            f"{self.shape[0]} x {self.shape[1]}, at most {self.max_params:,} parameters, "
            f"{', '.join(map(str, self.tokens))} tokens: {len(self.points)} candidates kept, "
            f"{self.pruned} ruled out",
            f"  {'form':<44} {'parameters':>12} {what:>14} {'ms':>10}",
        ]
        for point in self.front:
            error = "" if point.ranked_error == 1.0 and not known else f"{point.ranked_error:.5f}"
            lines.append(
                f"  {form(point.topology):<44} {point.params:>12,} {error:>14} {point.milliseconds:>10.4f}"
            )
        total = self.shape[0] * self.shape[1]
        lines.append(f"  {'dense':<44} {total:>12,} {'0':>14} {self.dense_milliseconds:>10.4f}")
        return "\n".join(lines)


def form(topology: Topology) -> str:
    """Format family, dims and bonds in short; dims that follow from the shape are omitted."""
    bonds = "x".join(str(size) for size in topology.bond_dims.values() if size > 1) or "1"
    if (max(topology.out_dims), max(topology.in_dims)) == topology.shape:
        return f"{topology.family} {bonds}"
    outs = "x".join(map(str, topology.out_dims))
    ins = "x".join(map(str, topology.in_dims))
    return f"{topology.family} ({outs})x({ins}) {bonds}"


def pareto_front(points: Sequence[SearchPoint]) -> tuple[SearchPoint, ...]:
    """Select the Pareto-optimal points in parameters, error and time, sorted by parameters."""
    front: list[SearchPoint] = []
    for point in sorted(points, key=_key):
        mine = _key(point)
        if not any(all(a <= b for a, b in zip(_key(other), mine, strict=True)) for other in front):
            front.append(point)
    return tuple(front)


def _key(point: SearchPoint) -> tuple[float, float, float]:
    return point.params, point.ranked_error, point.milliseconds


#: Families that are searched by default: their errors are known from spectra, without decomposing.
FAMILIES = ("low_rank", "mpo", "block_tt")

#: Fractions of the parameter budget at which candidates are proposed, so that the front has several points.
_LEVELS = (1.0, 0.7, 0.5, 0.35, 0.25)


@torch.no_grad()
def search_topology(
    matrix_or_shape: Tensor | tuple[int, int],
    *,
    param_ratio: float | None = None,
    max_params: int | None = None,
    tokens: int | Sequence[int] = 256,
    families: Sequence[str] = FAMILIES,
    max_sites: int = 3,
    machine: Machine | None = None,
) -> TopologySearch:
    """Search family, dims and bonds for a matrix under a parameter budget.

    Times are predicted by the cost model for the faster of contracting and rebuilding; a matrix kept in eval
    takes the time of a dense layer whatever the topology. Errors of plain low rank, of two-site chains and of
    two-core block tensor trains are exact, from singular values of unfoldings; longer chains are bounded by
    the values of their unfoldings and decomposed only if no other candidate dominates the bounds. With a
    shape only, errors are unknown and points are ranked by the largest error any matrix of that shape can
    have: a bond `d` of at most `r` loses at most the fraction `1 - d/r` of the energy.

    Args:
        matrix_or_shape: matrix `(out_features, in_features)`, or its shape.
        param_ratio: largest keep ratio, relative to the dense parameters.
        max_params: largest number of parameters; the tighter of the two decides.
        tokens: token count for which times are predicted, or several: then times are geometric means, so
            that every count weighs the same.
        families: names of registered families, or one name. Others than the default ones are decomposed
            outright.
        max_sites: most cores of a chain.
        machine: constants for the prediction; those shipped for the device if absent.

    Returns:
        The Pareto front in parameters, error and milliseconds; see `TopologySearch.best`.

    Raises:
        BudgetError: no limit given, a limit out of range, or no network fits.
        NonFiniteError: the matrix holds NaN or infinity.
        ShapeError: not a matrix and not a shape.
        TopologyError: unknown family, or no family given.
        TypeError: `machine` is neither a Machine nor None.
        ValueError: `tokens` below 1 or `max_sites` below 2, or not integers.

    Example:
        >>> from tensornet.contrib.search import search_topology
        >>> found = search_topology(torch.randn(32, 48), param_ratio=0.5, tokens=(1, 256))
        >>> best = found.best("error")
        >>> best.topology.shape, best.params <= found.max_params
        ((32, 48), True)
    """
    matrix, shape = _operand(matrix_or_shape)
    budget = _budget(shape, param_ratio, max_params)
    counts = _counts(tokens)
    check_machine(machine)
    check_size("max_sites", max_sites, least=2, error=ValueError)
    families = (families,) if isinstance(families, str) else tuple(families or ())
    if not families:
        raise TopologyError(f"families is empty; name at least one of {', '.join(topology_names())}.")
    for family in families:
        topology_family(family)
    device = matrix.device if matrix is not None else torch.device("cpu")
    clock = _Clock(counts, machine or default_machine(device), 4 if matrix is None else matrix.element_size())
    spectra = None if matrix is None else CutSpectra(matrix)
    candidates = [
        candidate
        for level in _LEVELS
        for family in families
        for candidate in topology_family(family).proposals(shape, int(level * budget), spectra, max_sites)
    ]
    points, pruned = _evaluate(candidates, matrix, clock)
    if not points:
        raise BudgetError(
            f"No network of the families {', '.join(families)} for shape {shape} fits {budget:,} parameters; "
            f"raise the budget (plain low rank needs {sum(shape):,} at rank 1)."
        )
    return TopologySearch(
        shape=shape,
        tokens=counts,
        max_params=budget,
        dense_milliseconds=clock.dense(shape),
        points=tuple(sorted(points, key=lambda point: point.params)),
        front=pareto_front(points),
        pruned=pruned,
    )


class _Clock:
    """Predicted milliseconds of topologies, as geometric means over the token counts."""

    def __init__(self, tokens: Sequence[int], machine: Machine, itemsize: int) -> None:
        self.tokens, self.machine, self.itemsize = tokens, machine, itemsize

    def milliseconds(self, topology: Topology) -> float:
        plan = plan_operator(topology)
        machine, itemsize = self.machine, self.itemsize

        def seconds(count: int) -> float:
            return plan.seconds(plan.fastest(count, machine, itemsize), count, machine, itemsize)

        return self._mean(seconds)

    def at_least(self, topology: Topology) -> float:
        """Bound the time from below: every parameter is read once and multiplied once for each token."""
        read = topology.num_params * self.itemsize / self.machine.bandwidth
        fastest = max(self.machine.peak, self.machine.half_peak)
        return self._mean(lambda count: read + topology.num_params * count / fastest)

    def dense(self, shape: tuple[int, int]) -> float:
        return self._mean(lambda count: dense_seconds(*shape, count, self.machine, self.itemsize))

    def _mean(self, seconds: Callable[[int], float]) -> float:
        logs = [math.log(seconds(count)) for count in self.tokens]
        return 1e3 * math.exp(sum(logs) / len(logs))


def _evaluate(
    candidates: Sequence[Proposal], matrix: Tensor | None, clock: _Clock
) -> tuple[list[SearchPoint], int]:
    """Evaluate the candidates that no bound and no earlier point dominates; count the dominated ones.

    Baselines (plain low rank) are always evaluated, for comparison: a smaller candidate that dominates one by
    a bound does not help callers who want to use the whole budget.
    """
    points: list[SearchPoint] = []
    pruned = 0
    unique = {candidate.topology: candidate for candidate in candidates}
    for candidate in sorted(unique.values(), key=lambda x: (x.upper, x.topology.num_params)):
        topology = candidate.topology
        if not candidate.baseline and _beaten(candidate, clock.at_least(topology), points):
            pruned += 1
            continue
        milliseconds = clock.milliseconds(topology)
        if not candidate.baseline and _beaten(candidate, milliseconds, points):
            pruned += 1
            continue
        error = _error(candidate, matrix)
        points.append(SearchPoint(topology, topology.num_params, milliseconds, error, candidate.worst))
    return points, pruned


def _beaten(candidate: Proposal, milliseconds: float, points: Sequence[SearchPoint]) -> bool:
    params = candidate.topology.num_params
    return any(
        point.params <= params
        and point.ranked_error <= candidate.lower
        and point.milliseconds <= milliseconds
        for point in points
    )


def _error(candidate: Proposal, matrix: Tensor | None) -> float | None:
    if matrix is None:
        return None
    if candidate.lower == candidate.upper:
        return candidate.upper
    family = topology_family(candidate.topology.family)
    return min(family.decompose_to(matrix, candidate.topology).error, candidate.upper)


def _operand(matrix_or_shape: Tensor | tuple[int, int]) -> tuple[Tensor | None, tuple[int, int]]:
    if isinstance(matrix_or_shape, Tensor):
        check_dense(matrix_or_shape, "search_topology", "a matrix (out, in), or its shape,", 2)
        check_finite(matrix_or_shape, "The matrix")
        return matrix_or_shape, (matrix_or_shape.shape[0], matrix_or_shape.shape[1])
    if not isinstance(matrix_or_shape, Sequence) or len(matrix_or_shape) != 2:
        array = hasattr(matrix_or_shape, "shape")  # of another library, too long to be printed
        raise ShapeError(
            "search_topology needs a matrix (out, in) as a torch.Tensor, or its shape, two integers; got "
            f"{type(matrix_or_shape).__name__ if array else repr(matrix_or_shape)}."
        )
    rows, columns = matrix_or_shape
    return None, (
        check_size("out_features of the shape", rows, error=ShapeError),
        check_size("in_features of the shape", columns, error=ShapeError),
    )


def _counts(tokens: int | Sequence[int]) -> tuple[int, ...]:
    counts = tuple(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else (tokens,)
    if not counts:
        raise ValueError("tokens must be at least 1 number, got none.")
    return tuple(check_size("tokens", count, error=ValueError) for count in counts)


def _budget(shape: tuple[int, int], param_ratio: float | None, max_params: int | None) -> int:
    if param_ratio is None and max_params is None:
        raise BudgetError("search_topology needs a budget: param_ratio= or max_params=.")
    Budget(param_ratio=param_ratio)
    if max_params is not None:
        max_params = check_size("max_params", max_params, error=BudgetError)
    limits = [] if param_ratio is None else [int(param_ratio * shape[0] * shape[1])]
    return min([*limits, *([] if max_params is None else [max_params])])
