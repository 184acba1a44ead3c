"""How a layer is applied: core by core, by rebuilding its matrix, or with a kept one; what is fastest when.

The decision for every token count is made once, when a layer is built or moved; `forward` only compares
the number of tokens with a few bounds, which compilers can trace.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import Literal

import torch

from tensornet.contraction.cost import dense_seconds, plan_seconds
from tensornet.contraction.machine import Machine
from tensornet.contraction.slicing import plan_slices
from tensornet.network import OperatorPlan

Strategy = Literal["auto", "factorized", "reconstruct", "cached"]
STRATEGIES = ("auto", "factorized", "reconstruct", "cached")

#: Under `"auto"` a layer keeps its matrix in eval only up to this many bytes, unless told otherwise:
#: a 4096 x 4096 matrix in single precision.
DEFAULT_CACHE_LIMIT = 64 * 2**20

#: Routes that are not a candidate of `OperatorPlan.applies`. `SLICED - k` rebuilds the matrix in slices, by
#: the k-th plan of `plan_slices`.
RECONSTRUCT, CACHED, SLICED = -1, -2, -3

#: `(largest token count, route)` in ascending order; the last entry holds for all larger counts.
Bounds = tuple[tuple[float, int], ...]

ALWAYS_RECONSTRUCT: Bounds = ((math.inf, RECONSTRUCT),)
ALWAYS_CACHED: Bounds = ((math.inf, CACHED),)

#: A kept matrix is preferred to a contraction that is predicted to be this much faster at most: the dense
#: product is the one cost that is known exactly.
_CACHED_PREFERENCE = 1.1

#: A contraction must beat the kept matrix even where that happens to be in a cache, which delivers it so many
#: times faster than memory: a layer shall not be slower than dense in a model that is small.
_CACHE_OVER_MEMORY = 4


@dataclass(frozen=True)
class Dispatch:
    """Fastest route for every token count.

    Args:
        factorized: among the contractions with the input.
        uncached: those and rebuilding the matrix.
        cached: those and a matrix that is there already.
        rebuilt: rebuilding the matrix, whole or in slices.
        inference: all but a matrix that is there already.
    """

    factorized: Bounds
    uncached: Bounds
    cached: Bounds
    rebuilt: Bounds
    inference: Bounds


def check_options(strategy: str, cache_limit: int | None) -> None:
    """Refuse options no layer knows.

    Raises:
        ValueError: unknown strategy, or a limit that is no number of bytes.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    if cache_limit is not None and (not isinstance(cache_limit, Integral) or cache_limit < 0):
        raise ValueError(
            f"cache_limit must be a number of bytes of at least 0, got {cache_limit!r}; 0 keeps no matrix."
        )


def route_seconds(plan: OperatorPlan, route: int, tokens: int, machine: Machine, itemsize: int) -> float:
    """Predicted seconds of one forward pass by a route."""
    out_features, in_features = plan.topology.shape
    if route >= 0:
        return plan_seconds(plan.applies[route], tokens, machine, itemsize)
    if route <= SLICED:
        return plan_slices(plan.topology)[SLICED - route].seconds(tokens, machine, itemsize)
    cached = route == CACHED
    dense = dense_seconds(out_features, in_features, tokens, machine, itemsize, from_memory=cached)
    return dense if cached else dense + plan_seconds(plan.matrix, 1, machine, itemsize)


@lru_cache(maxsize=4096)
def dispatch(plan: OperatorPlan, machine: Machine, itemsize: int, *, slices: bool = True) -> Dispatch:
    """Compare all routes over a grid of token counts.

    Args:
        plan: the operator.
        machine: whose time counts.
        itemsize: bytes of an element.
        slices: whether a matrix may be rebuilt in slices, which is for machines that launch products at once.
    """
    candidates = range(len(plan.applies))
    rebuilding = [RECONSTRUCT, *(SLICED - k for k in range(len(plan_slices(plan.topology)) if slices else 0))]

    warm = replace(machine, bandwidth=_CACHE_OVER_MEMORY * machine.bandwidth)

    def fastest(routes: Sequence[int], machine: Machine) -> Bounds:
        chosen = []
        for tokens in _GRID:
            seconds = {
                route: route_seconds(plan, route, tokens, machine, itemsize)
                / (_CACHED_PREFERENCE if route == CACHED else 1)
                for route in routes
            }
            chosen.append(min(seconds, key=lambda route: seconds[route]))
        return _bounds(chosen)

    return Dispatch(
        factorized=fastest(candidates, machine),
        uncached=fastest([*candidates, RECONSTRUCT], machine),
        cached=fastest([*candidates, CACHED], warm),
        rebuilt=fastest(rebuilding, machine),
        inference=fastest([*candidates, *rebuilding], machine),
    )


def choose(bounds: Bounds, tokens: int) -> int:
    """The route for that many tokens."""
    for largest, route in bounds[:-1]:
        if tokens <= largest:
            return route
    return bounds[-1][1]


def _grid() -> tuple[int, ...]:
    sizes = {round(2 ** (k / 2)) for k in range(33)}
    return tuple(sorted(sizes | set(range(1, 9))))


_GRID = _grid()


def _bounds(chosen: Sequence[int]) -> Bounds:
    """Run-length form; between two grid points the bound is their geometric mean."""
    bounds: list[tuple[float, int]] = []
    for k, route in enumerate(chosen):
        last = k + 1 == len(chosen)
        if last or chosen[k + 1] != route:
            largest = math.inf if last else math.floor(math.sqrt(_GRID[k] * _GRID[k + 1]))
            bounds.append((largest, route))
    return tuple(bounds)


def is_exporting() -> bool:
    """Whether a program is being exported, where a comparison with the token count would restrict it."""
    check = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # from torch 2.7 on
    return bool(check())
