"""Topology search: compare networks for one matrix by their parameters, error and predicted time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tensornet._util import check_dense, check_number, check_size
from tensornet.budget import Budget
from tensornet.contraction.cost import Machine, check_machine, default_machine, dense_seconds
from tensornet.contraction.plan import plan_operator
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.svd import check_finite
from tensornet.topologies import TopologyFamily, topology_family, topology_names
from tensornet.topology import Topology

Objective = Literal["error", "time", "params"]
OBJECTIVES = ("error", "time", "params")

#: Families that are compared by default.
FAMILIES = ("low_rank", "mpo", "block_tt")

#: Parameter budgets for which the matrix is decomposed, as fractions of the given budget.
LEVELS = (1.0, 0.7, 0.5, 0.35)

#: Largest error that the objective `"time"` accepts, as a multiple of the smallest error.
TIME_SLACK = 1.25


@dataclass(frozen=True)
class SearchPoint:
    """Result of one decomposition in a topology search.

    Args:
        topology: topology of the network.
        params: number of parameters.
        error: certified relative Frobenius error.
        milliseconds: predicted time of a forward pass, the geometric mean over the token counts.
    """

    topology: Topology
    params: int
    error: float
    milliseconds: float

    @property
    def form(self) -> str:
        """Short description: family, dims (omitted if there is one out-leg and one in-leg) and bonds."""
        topology = self.topology
        bonds = "x".join(str(size) for size in topology.bond_dims.values() if size > 1) or "1"
        if (max(topology.out_dims), max(topology.in_dims)) == topology.shape:
            return f"{topology.family} {bonds}"
        dims = (f"({'x'.join(map(str, dims))})" for dims in (topology.out_dims, topology.in_dims))
        return f"{topology.family} {'x'.join(dims)} {bonds}"


@dataclass(frozen=True)
class TopologySearch:
    """Result of `search_topology`: iterate over the Pareto front, print it, or select the `best` point.

    Args:
        shape: shape `(out_features, in_features)` of the matrix.
        tokens: token counts for which times are predicted.
        max_params: largest number of parameters.
        dense_milliseconds: predicted time of a dense layer.
        points: all decompositions, in the order of increasing parameters.
    """

    shape: tuple[int, int]
    tokens: tuple[int, ...]
    max_params: int
    dense_milliseconds: float
    points: tuple[SearchPoint, ...]

    @property
    def front(self) -> tuple[SearchPoint, ...]:
        """Points of the Pareto front: no other point matches or beats them in parameters, error and time."""
        front: list[tuple[tuple[float, float, float], SearchPoint]] = []
        keys = [(point.params, point.error, point.milliseconds) for point in self.points]
        for key, point in sorted(zip(keys, self.points, strict=True), key=lambda entry: entry[0]):
            if not any(all(a <= b for a, b in zip(other, key, strict=True)) for other, _ in front):
                front.append((key, point))
        return tuple(point for _, point in front)

    def __iter__(self) -> Iterator[SearchPoint]:
        return iter(self.front)

    def __str__(self) -> str:
        lines = [
            f"{self.shape[0]} x {self.shape[1]}, at most {self.max_params:,} parameters, "
            f"{', '.join(map(str, self.tokens))} tokens: {len(self.points)} networks decomposed",
            f"  {'form':<44} {'parameters':>12} {'error':>10} {'ms':>10}",
            *(f"  {x.form:<44} {x.params:>12,} {x.error:>10.5f} {x.milliseconds:>10.4f}" for x in self.front),
            f"  {'dense':<44} {math.prod(self.shape):>12,} {'0':>10} {self.dense_milliseconds:>10.4f}",
        ]
        return "\n".join(lines)

    def best(
        self, objective: Objective = "error", *, max_error: float | None = None, max_ms: float | None = None
    ) -> SearchPoint:
        """Select the best point within limits on error and time.

        Args:
            objective: `"error"` for the smallest error, `"params"` for the fewest parameters, or `"time"` for
                the shortest time with an error of at most `max_error` or, if that is absent, 1.25 times the
                smallest error.
            max_error: largest allowed error.
            max_ms: largest allowed predicted time in milliseconds.

        Raises:
            ValueError: the objective is unknown.
            BudgetError: no point is within the limits, or a limit is not a number.
        """
        if objective not in OBJECTIVES:
            raise ValueError(f"Unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}.")
        for name, limit in (("max_error", max_error), ("max_ms", max_ms)):
            if limit is not None:
                check_number(name, limit)
        allowed = [
            point
            for point in self.points
            if (max_error is None or point.error <= max_error)
            and (max_ms is None or point.milliseconds <= max_ms)
        ]
        if not allowed:
            raise BudgetError(
                f"None of {len(self.points)} networks meets max_error={max_error}, max_ms={max_ms}; the "
                f"smallest error is {min(x.error for x in self.points):.4g}, the shortest time "
                f"{min(x.milliseconds for x in self.points):.4g} ms. Raise a limit or the budget."
            )
        if objective == "error":
            return min(allowed, key=lambda point: (point.error, point.milliseconds))
        if objective == "params":
            return min(allowed, key=lambda point: (point.params, point.error))
        least = min(point.error for point in allowed)
        close = [point for point in allowed if max_error is not None or point.error <= TIME_SLACK * least]
        return min(close, key=lambda point: (point.milliseconds, point.error))


@torch.no_grad()
def search_topology(
    matrix: Tensor,
    *,
    param_ratio: float | None = None,
    max_params: int | None = None,
    tokens: int | Sequence[int] = 256,
    families: str | Sequence[str] = FAMILIES,
    max_sites: int = 3,
    machine: Machine | None = None,
) -> TopologySearch:
    """Decompose a matrix by several families, numbers of sites and sizes, and compare the results.

    Families with the option `sites` are tried with 2 to `max_sites` sites and balanced dims. The predicted
    time assumes the faster of two ways: contracting the input with the cores, or rebuilding the matrix. (With
    the strategy `"cached"`, every layer takes the time of a dense layer in eval mode.)

    Args:
        matrix: the matrix, shape `(out_features, in_features)`.
        param_ratio: largest number of parameters as a fraction of the dense matrix.
        max_params: largest number of parameters; the smaller of the two limits applies.
        tokens: token count, or several token counts, for which times are predicted; the reported time is the
            geometric mean over them.
        families: names of registered families, or one name.
        max_sites: largest number of sites.
        machine: machine to predict for; built-in constants of the device if absent.

    Raises:
        BudgetError: no limit is given, a limit is out of range, or no network is small enough.
        NonFiniteError: the matrix contains NaN or infinity.
        ShapeError: the input is not a matrix.
        TopologyError: a family is unknown, or no family is given.
        TypeError: `machine` is neither a `Machine` nor None.
        ValueError: `tokens` is not an integer of at least 1, or `max_sites` not an integer of at least 2.
    """
    check_dense(matrix, "search_topology", "a matrix of shape (out, in)", 2)
    check_finite(matrix, "The matrix")
    if param_ratio is None and max_params is None:
        raise BudgetError("search_topology needs a budget: param_ratio= or max_params=.")
    Budget(param_ratio=param_ratio)
    budget = matrix.numel() if max_params is None else check_size("max_params", max_params, error=BudgetError)
    budget = budget if param_ratio is None else min(budget, int(param_ratio * matrix.numel()))
    counts = tuple(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else (tokens,)
    counts = tuple(check_size("tokens", count, error=ValueError) for count in counts)
    if not counts:
        raise ValueError("tokens must be at least 1 number, got none.")
    check_machine(machine)
    check_size("max_sites", max_sites, least=2, error=ValueError)
    names = (families,) if isinstance(families, str) else tuple(families or ())
    if not names:
        raise TopologyError(f"families is empty; name at least one of {', '.join(topology_names())}.")
    clock, itemsize = machine or default_machine(matrix.device), matrix.element_size()

    def milliseconds(topology: Topology) -> float:
        plan = plan_operator(topology)
        routes = ((plan.fastest(count, clock, itemsize), count) for count in counts)
        return _mean([plan.seconds(route, count, clock, itemsize) for route, count in routes])

    found: dict[Topology, SearchPoint] = {}
    for family in map(topology_family, names):
        for options in _forms(family, max_sites):
            for level in LEVELS:
                allowed = (int(level * budget) + 0.5) / matrix.numel()  # 0.5 guards against rounding errors
                try:
                    made = family.decompose(matrix, Budget(param_ratio=allowed), **options)
                except (BudgetError, TopologyError):  # the budget is too small, or `sites` is invalid
                    continue
                topology = made.network.topology
                if topology not in found:
                    params, time = topology.num_params, milliseconds(topology)
                    found[topology] = SearchPoint(topology, params, made.error, time)
    if not found:
        raise BudgetError(
            f"No network of the families {', '.join(names)} for shape {tuple(matrix.shape)} fits {budget:,} "
            f"parameters; raise the budget (plain low rank needs {sum(matrix.shape):,} at rank 1)."
        )
    rows, columns = matrix.shape
    dense = _mean([dense_seconds(rows, columns, count, clock, itemsize) for count in counts])
    points = tuple(sorted(found.values(), key=lambda point: point.params))
    return TopologySearch((rows, columns), counts, budget, dense, points)


def _forms(family: TopologyFamily, max_sites: int) -> list[dict[str, Any]]:
    return [{"sites": sites} for sites in range(2, max_sites + 1)] if "sites" in family.options else [{}]


def _mean(seconds: Sequence[float]) -> float:
    """Compute the geometric mean in milliseconds of times in seconds."""
    return 1e3 * math.exp(sum(map(math.log, seconds)) / len(seconds))
