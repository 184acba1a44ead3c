"""Plan a contraction once, and run it as pairwise matrix products.

`opt_einsum` finds the order, `lowering` converts it to permutations, reshapes and (batched) matrix products.
Calling opt_einsum inside `forward` would break `torch.compile(fullgraph=True)` and autocast; the lowered
steps do not. Indices of size 1 are removed before planning, so a low-rank layer is exactly two matmuls.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import opt_einsum
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensornet._util import check_input, import_optional, transforms_active
from tensornet.contraction.cost import CPU, Machine, dense_seconds
from tensornet.contraction.lowering import TOKENS, ContractionPlan, lower_path, plan_sum, run
from tensornet.errors import TopologyError
from tensornet.topology import Topology

# --- one contraction ------------------------------------------------------------------------------

#: How the order is found: a name for `opt_einsum.contract_path`, `"cotengra"`, a path optimizer of
#: `opt_einsum`, or an explicit pairwise path.
Optimize = str | Sequence[tuple[int, int]] | Callable[..., Any]


def plan_contraction(
    operands: Sequence[tuple[str, ...]],
    output: tuple[str, ...],
    size_of: Mapping[str, int],
    *,
    optimize: Optimize = "auto",
) -> ContractionPlan:
    """Plan `einsum(operands -> output)`.

    Args:
        operands: labels of each operand.
        output: labels of the result; every other label is summed.
        size_of: size of each label; that of `TOKENS` is the expected number of tokens.
        optimize: see `Optimize`. `"auto"` tries all orders for up to 4 operands, and fewer for more.

    Returns:
        A plan for `run`.

    Raises:
        TopologyError: the path is not pairwise, or `optimize` is an unknown name.
        MissingDependencyError: `optimize="cotengra"` without cotengra.
    """
    path = find_path(operands, output, size_of, optimize)
    return lower_path(operands, output, size_of, path)


def find_path(
    operands: Sequence[tuple[str, ...]],
    output: tuple[str, ...],
    size_of: Mapping[str, int],
    optimize: Optimize = "auto",
) -> list[tuple[int, int]]:
    """Find a pairwise contraction order with few multiply-adds, by the optimizer `optimize`."""
    if len(operands) == 1:
        return []
    squeezed = [tuple(x for x in labels if x == TOKENS or size_of[x] > 1) for labels in operands]
    kept = tuple(x for x in output if x == TOKENS or size_of[x] > 1)
    if optimize == "cotengra":
        cotengra = import_optional("cotengra", extra="interop", user='optimize="cotengra"')
        return _pairs(cotengra.array_contract_path(squeezed, kept, dict(size_of)))
    symbol: dict[str, str] = {}
    for labels in (*squeezed, kept):
        for label in labels:
            symbol.setdefault(label, opt_einsum.get_symbol(len(symbol)))
    terms = ["".join(symbol[x] for x in labels) for labels in squeezed]
    equation = ",".join(terms) + "->" + "".join(symbol[x] for x in kept)
    shapes = [tuple(size_of[x] for x in labels) for labels in squeezed]
    try:
        path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimize)
    except KeyError as error:  # opt_einsum has no optimizer of this name
        if not isinstance(optimize, str):
            raise
        raise TopologyError(
            f"Unknown optimize={optimize!r}; choose 'auto', 'optimal', 'dp', 'greedy', 'branch-2', "
            "'cotengra' or another name that opt_einsum knows, or pass one of its path optimizers."
        ) from error
    return _pairs(path)


def check_optimize(optimize: Optimize) -> None:
    """Raise early if `optimize` is invalid, since planning is delayed until the first forward pass.

    Raises:
        TopologyError: no optimizer has this name.
        MissingDependencyError: `optimize="cotengra"` without cotengra.
    """
    if optimize != "auto":
        find_path([("a", "b"), ("b", "c"), ("c", "d")], ("a", "d"), dict.fromkeys("abcd", 2), optimize)


def _pairs(path: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    if any(len(step) != 2 for step in path):
        raise TopologyError(f"A contraction path must be pairwise, got {path}; use another `optimize`.")
    return [(min(step), max(step)) for step in path]


# --- a linear operator: applied core by core, or with the matrix rebuilt first --------------------

#: Token count that is assumed if the actual one is unknown, as in an exported program.
PLANNED_TOKENS = 256

#: Token counts for which orders are optimized; sweeps over the cores are tried as well.
_PATH_TOKENS = (1, 16, 256, 4096)

#: A matrix is rebuilt in blocks of rows. Size of a block: about this fraction of the matrix, and at most this
#: number of elements, to fit a cache.
_BLOCK_PART, _BLOCK = 1 / 8, 2**18

#: Matrices with fewer elements are rebuilt in one block.
_SMALL = 2**16

#: The route that rebuilds the matrix; the others are positions in `OperatorPlan.applies`.
RECONSTRUCT = -1

#: `(largest token count, route)` in ascending order; the last entry holds for all larger counts.
Bounds = tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class OperatorPlan:
    """Contraction plans of an operator, one for each route.

    Args:
        topology: the operator.
        applies: candidate plans for `x: (tokens, padded in) -> (tokens, padded out)` that do not build the
            whole matrix; operands are x, then the cores. The fastest depends on the token count and the
            machine.
        matrix: plan of the padded matrix; operands are the cores.
        blocked: leading out-legs that are split into blocks, and how many of their indices are in a block.
        rows: plan of one block of rows; operands are the cores at these indices.
        shape: `(out_features, in_features)`.
        padded_shape: shape of the matrix including padding.
        is_padded: whether the two shapes differ (torch.compile before 2.13 cannot compare tuples for
            inequality).
    """

    topology: Topology
    applies: tuple[ContractionPlan, ...]
    matrix: ContractionPlan
    blocked: tuple[tuple[str, int], ...]
    rows: ContractionPlan
    shape: tuple[int, int]
    padded_shape: tuple[int, int]
    is_padded: bool

    def seconds(self, route: int, tokens: int, machine: Machine, itemsize: int = 4) -> float:
        """Predict the time for a token count; the route is a position in `applies` or `RECONSTRUCT`."""
        if route != RECONSTRUCT:
            return self.applies[route].seconds(tokens, machine, itemsize)
        dense = dense_seconds(*self.shape, tokens, machine, itemsize, from_memory=False)
        return dense + self.matrix.seconds(1, machine, itemsize)

    def fastest(self, tokens: int, machine: Machine, itemsize: int = 4, *, rebuild: bool = True) -> int:
        """Find the route with the least predicted time; `rebuild=False` excludes `RECONSTRUCT`."""
        routes = [*range(len(self.applies)), *([RECONSTRUCT] if rebuild else [])]
        return min(routes, key=lambda route: self.seconds(route, tokens, machine, itemsize))


@lru_cache(maxsize=4096)
def plan_operator(topology: Topology, optimize: str = "auto") -> OperatorPlan:
    """Plan the contractions of an operator; equal topologies share one plan.

    Args:
        topology: the operator.
        optimize: how orders are found, see `tensornet.contraction.plan.Optimize`.
    """
    applies = tuple(_applies(topology, optimize)) if not topology.terms else _applies_sum(topology, optimize)
    matrix = plan_matrix(topology, optimize)
    blocked = _blocked_legs(topology, matrix)
    rows = matrix if not blocked else _plan_matrix(topology, dict(blocked), optimize)
    shape, padded = topology.shape, topology.padded_shape
    return OperatorPlan(topology, applies, matrix, blocked, rows, shape, padded, shape != padded)


def _applies(topology: Topology, optimize: str) -> Iterator[ContractionPlan]:
    """Plan the application of one network in several orders."""
    cores = [core.labels for core in topology.cores]
    operands = [(TOKENS, *topology.in_labels), *cores]
    output = (TOKENS, *topology.out_labels)
    tried = [
        (tokens, find_path(operands, output, {**topology.size_of, TOKENS: tokens}, optimize))
        for tokens in _PATH_TOKENS
    ]
    tried += [(_PATH_TOKENS[1], path) for path in _sweeps(len(operands))]
    seen: set[tuple[tuple[int, int], ...]] = set()
    for tokens, path in tried:
        builds_matrix = all(0 not in step for step in path[:-1])  # the input is used in the last step only
        if tuple(path) not in seen and (len(cores) == 1 or not builds_matrix):
            seen.add(tuple(path))
            lowered = lower_path(operands, output, {**topology.size_of, TOKENS: tokens}, path)
            yield _with_shape(lowered, (-1, topology.padded_shape[0]))


def _applies_sum(topology: Topology, optimize: str) -> tuple[ContractionPlan, ...]:
    """Plan the application of a sum; for each token count every term has its cheapest order."""
    found: dict[tuple[int, ...], ContractionPlan] = {}
    terms = [(positions, list(_applies(part, optimize))) for positions, part in topology.parts]
    places = [(0, *(k + 1 for k in positions)) for positions, _ in terms]  # operand 0 is the input
    for tokens in _PATH_TOKENS:
        times = [[plan.seconds(tokens, CPU) for plan in plans] for _, plans in terms]
        routes = tuple(each.index(min(each)) for each in times)
        chosen = [plans[k] for (_, plans), k in zip(terms, routes, strict=True)]
        found.setdefault(routes, plan_sum(list(zip(places, chosen, strict=True))))
    return tuple(found.values())


@lru_cache(maxsize=4096)
def plan_matrix(topology: Topology, optimize: str = "auto") -> ContractionPlan:
    """Plan the contraction to the padded matrix, in the cheapest of several orders."""
    return _plan_matrix(topology, {}, optimize)


def _plan_matrix(topology: Topology, widths: Mapping[str, int], optimize: str) -> ContractionPlan:
    """Plan the contraction to the padded matrix, with some leading out-legs restricted to a block."""
    if topology.terms:
        parts = [(places, _plan_matrix(part, widths, optimize)) for places, part in topology.parts]
        return plan_sum(parts)
    cores = [core.labels for core in topology.cores]
    output = (*topology.out_labels, *topology.in_labels)
    sizes = {**topology.size_of, **widths}
    paths = [find_path(cores, output, sizes, optimize), *_sweeps(len(cores))]
    plans = [lower_path(cores, output, sizes, path) for path in dict.fromkeys(map(tuple, paths))]
    best = min(plans, key=lambda plan: plan.seconds(1, CPU))
    return _with_shape(best, (-1, topology.padded_shape[1]))


def _with_shape(plan: ContractionPlan, shape: tuple[int, ...]) -> ContractionPlan:
    return replace(plan, output=replace(plan.output, shape=shape))


def _blocked_legs(topology: Topology, matrix: ContractionPlan) -> tuple[tuple[str, int], ...]:
    """Choose blocks of leading out-legs that are just small enough; none if the matrix needs no copy."""
    if matrix.output_copy is None:
        return ()
    size, legs = math.prod(topology.padded_shape), []
    most = min(_BLOCK, int(size * _BLOCK_PART)) if size > _SMALL else size
    for label, count in zip(topology.out_labels, topology.out_dims, strict=True):
        if size <= most:
            break
        size //= count
        fitting = (w for w in range(min(count, most // size), 0, -1) if count % w == 0)
        legs.append((label, next(fitting, 1)))
    return tuple(legs)


def _sweeps(count: int) -> tuple[list[tuple[int, int]], ...]:
    """List the paths that start at the first operand and contract the others in order, or in reverse."""
    if count == 1:
        return ([],)
    forward = [(0, 1), *((0, left - 1) for left in range(count - 1, 1, -1))]
    backward = [(0, count - 1), *((left - 2, left - 1) for left in range(count - 1, 1, -1))]
    return forward, backward


@lru_cache(maxsize=4096)
def fastest_routes(plan: OperatorPlan, machine: Machine, itemsize: int, *, rebuild: bool = True) -> Bounds:
    """Tabulate the fastest route by token count; the limits between routes are accurate to a tenth.

    Args:
        plan: the operator.
        machine: the machine to predict for.
        itemsize: bytes of an element.
        rebuild: whether rebuilding the matrix is allowed.
    """

    def fastest(tokens: int) -> int:
        return plan.fastest(tokens, machine, itemsize, rebuild=rebuild)

    bounds: list[tuple[float, int]] = []
    for low, high in itertools.pairwise(_GRID):
        before, after = fastest(low), fastest(high)
        while before != after and high > 1.1 * low and high > low + 1:
            middle = round(math.sqrt(low * high))
            low, high = (middle, high) if fastest(middle) == before else (low, middle)
        if before != after:
            bounds.append((high - 1, before))
    return (*bounds, (math.inf, fastest(_GRID[-1])))


#: Token counts between which the fastest route is assumed to change at most once.
_GRID = tuple(4**k for k in range(9))


def choose(bounds: Bounds, tokens: int) -> int:
    """Look up the fastest route for a token count."""
    for largest, route in bounds[:-1]:
        if tokens <= largest:
            return route
    return bounds[-1][1]


def contract_to_matrix(plan: OperatorPlan, cores: Sequence[Tensor]) -> Tensor:
    """Contract the cores to the dense matrix, shape `(out_features, in_features)`, with gradient.

    If no gradients of the cores are recorded, it is built in blocks of rows, so that memory is needed only
    for the matrix and one block.
    """
    dense = _in_blocks(plan, cores) if plan.blocked and _may_write(cores) else run(plan.matrix, cores)
    if plan.is_padded:
        dense = dense[: plan.shape[0], : plan.shape[1]]
    return dense


def _in_blocks(plan: OperatorPlan, cores: Sequence[Tensor]) -> Tensor:
    size_of = plan.topology.size_of
    starts = [range(0, size_of[label], width) for label, width in plan.blocked]
    dense: Tensor | None = None
    for block, indices in enumerate(itertools.product(*starts)):
        at = {x: slice(k, k + width) for (x, width), k in zip(plan.blocked, indices, strict=True)}
        parts = [
            core[tuple(at.get(x, slice(None)) for x in spec.labels)] if at.keys() & set(spec.labels) else core
            for core, spec in zip(cores, plan.topology.cores, strict=True)
        ]
        rows = run(plan.rows, parts)
        if dense is None:  # allocated here, since autocast determines the dtype
            dense = rows.new_empty(math.prod(map(len, starts)), *rows.shape)
        dense[block] = rows
    assert dense is not None
    return dense.view(plan.padded_shape)


def _may_write(cores: Sequence[Tensor]) -> bool:
    """Return True if results may be written in place: neither autograd nor tracing is active."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_active():
        return False
    recording = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
    return not recording and forward_ad._current_level < 0


def contract_with_input(
    plan: OperatorPlan,
    cores: Sequence[Tensor],
    x: Tensor,
    *,
    candidate: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply the operator core by core, without building its matrix.

    Args:
        plan: the planned operator.
        cores: tensors in the order of its topology.
        x: input, shape `(..., in_features)`.
        candidate: index of the plan in `plan.applies`.
        bias: shape `(out_features,)`.

    Returns:
        Output of shape `(..., out_features)`.

    Raises:
        ShapeError: the last dimension of `x` is not `in_features`.
    """
    (out_features, in_features), (padded_out, padded_in) = plan.shape, plan.padded_shape
    check_input(x, in_features)
    flat = x if x.ndim == 2 else x.reshape(-1, in_features)
    if padded_in != in_features:
        flat = torch.nn.functional.pad(flat, (0, padded_in - in_features))
    whole = padded_out == out_features
    y = run(plan.applies[candidate], [flat, *cores], bias=bias if whole else None)
    if not whole:
        y = y[:, :out_features]
        y = y if bias is None else y + bias.to(y.dtype)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], out_features)
