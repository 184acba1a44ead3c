"""Topology search: propose candidates, bound their errors, predict their times, decompose few."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tensornet._util import check_dense, check_size
from tensornet.budget import Budget
from tensornet.contraction.cost import dense_seconds
from tensornet.contraction.machine import Machine, check_machine, default_machine
from tensornet.contraction.operator import plan_operator
from tensornet.errors import BudgetError, ShapeError, TopologyError
from tensornet.linalg.cut_spectra import CutSpectra
from tensornet.linalg.svd import check_finite
from tensornet.search.result import SearchPoint, TopologySearch, pareto_front
from tensornet.topologies import Proposal, topology_family, topology_names
from tensornet.topology import Topology

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
        >>> found = tn.search_topology(torch.randn(32, 48), param_ratio=0.5, tokens=(1, 256))
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
