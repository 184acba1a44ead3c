"""Search results: candidates with parameters, error and time, and their Pareto front."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tensornet._util import check_number
from tensornet.errors import BudgetError
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
        >>> point = tn.search_topology(torch.randn(32, 48), param_ratio=0.5).best()
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
        >>> found = tn.search_topology(torch.randn(32, 48), param_ratio=0.5)
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
