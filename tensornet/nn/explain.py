"""Why a layer is applied the way it is: the predicted cost of every strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensornet.checks import check_size
from tensornet.contraction.cost import dense_seconds
from tensornet.contraction.machine import default_machine
from tensornet.contraction.slicing import plan_slices
from tensornet.network import OperatorPlan
from tensornet.nn.matrix_cache import may_write_in_place
from tensornet.nn.strategy import CACHED, DEFAULT_CACHE_LIMIT, RECONSTRUCT, SLICED, choose, route_seconds

if TYPE_CHECKING:
    from tensornet.nn.execution import RoutedModule


@dataclass(frozen=True)
class StrategyCost:
    """Predicted cost of one forward pass.

    Args:
        strategy: `"factorized"`, `"reconstruct"` or `"cached"`.
        milliseconds: by the cost model.
        multiply_adds: arithmetic.
        moved: elements copied by permutations.
        memory_bytes: largest tensor made on the way, or the matrix that is kept.
        refused: why the layer does not use it now; empty if it may.
    """

    strategy: str
    milliseconds: float
    multiply_adds: int
    moved: int
    memory_bytes: int
    refused: str = ""


@dataclass(frozen=True)
class Explanation:
    """Costs of all strategies at one token count; print it.

    Args:
        description: shape and form of the operator.
        machine: whose constants were used.
        tokens: for which it was asked.
        costs: one for each strategy.
        choice: the strategy the layer takes now.
        dense_milliseconds: a dense layer of this shape, for comparison.
    """

    description: str
    machine: str
    tokens: int
    costs: tuple[StrategyCost, ...]
    choice: str
    dense_milliseconds: float

    def __getitem__(self, strategy: str) -> StrategyCost:
        for cost in self.costs:
            if cost.strategy == strategy:
                return cost
        raise KeyError(f"No strategy {strategy!r}; there are {[cost.strategy for cost in self.costs]}.")

    def __str__(self) -> str:
        lines = [
            f"{self.description}, {self.tokens} tokens, predicted for {self.machine}",
            f"  {'strategy':<12} {'ms':>10} {'multiply-adds':>16} {'moved':>14} {'memory':>12}",
        ]
        for cost in self.costs:
            mark = "*" if cost.strategy == self.choice else " "
            note = f"  ({cost.refused})" if cost.refused else ""
            lines.append(
                f"{mark} {cost.strategy:<12} {cost.milliseconds:>10.3f} {cost.multiply_adds:>16,} "
                f"{cost.moved:>14,} {size_in_words(cost.memory_bytes):>12}{note}"
            )
        lines.append(f"  {'dense layer':<12} {self.dense_milliseconds:>10.3f}")
        return "\n".join(lines)


def size_in_words(size: int) -> str:
    """Bytes in the unit that leaves something before the point."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def explain(layer: RoutedModule, tokens: int) -> Explanation:
    """Costs for a layer, and its choice in its present mode.

    Raises:
        ValueError: `tokens` is no integer of at least 1.
    """
    tokens = check_size("tokens", tokens, error=ValueError)
    plan, weight = layer.plan, layer.weight
    machine, itemsize = layer.machine or default_machine(weight.device), weight.element_size()
    factorized = choose(layer.dispatch.factorized, tokens)
    rebuilt = choose(layer.dispatch.rebuilt, tokens) if may_write_in_place() else RECONSTRUCT
    routes = {"factorized": factorized, "reconstruct": rebuilt, "cached": CACHED}
    seconds = {name: route_seconds(plan, route, tokens, machine, itemsize) for name, route in routes.items()}
    work = {"factorized": _factorized(plan, factorized, tokens), **_by_matrix(plan, rebuilt, tokens)}
    refused = dict.fromkeys(routes, "")
    refused["cached"] = _why_not_cached(layer)
    if layer.strategy in ("factorized", "reconstruct"):
        refused = {name: "" if name == layer.strategy else "not the strategy set" for name in routes}
    taken = layer.route(tokens)
    choice = "factorized" if taken >= 0 else "cached" if taken == CACHED else "reconstruct"
    topology = plan.topology
    return Explanation(
        description=f"{topology.family} {topology.shape}, bonds {list(topology.bond_dims.values())}",
        machine=machine.name,
        tokens=tokens,
        costs=tuple(
            StrategyCost(
                name,
                seconds[name] * 1e3,
                work[name][0],
                work[name][1],
                work[name][2] * itemsize,
                refused[name],
            )
            for name in routes
        ),
        choice=choice,
        dense_milliseconds=dense_seconds(*topology.shape, tokens, machine, itemsize) * 1e3,
    )


def _factorized(plan: OperatorPlan, route: int, tokens: int) -> tuple[int, int, int]:
    contraction = plan.applies[route]
    return (
        contraction.multiply_adds(tokens),
        contraction.moved(tokens),
        contraction.largest_intermediate(tokens),
    )


def _by_matrix(plan: OperatorPlan, rebuilt: int, tokens: int) -> dict[str, tuple[int, int, int]]:
    out_features, in_features = plan.topology.shape
    elements = out_features * in_features
    if rebuilt <= SLICED:
        sliced = plan_slices(plan.topology)[SLICED - rebuilt]
        work = (sliced.multiply_adds(tokens), sliced.moved, sliced.largest_intermediate)
    else:
        rebuild = plan.matrix.multiply_adds(1)
        largest = max(plan.matrix.largest_intermediate(1), elements)
        work = (rebuild + tokens * elements, plan.matrix.moved(1), largest)
    return {"reconstruct": work, "cached": (tokens * elements, 0, elements)}


def _why_not_cached(layer: RoutedModule) -> str:
    if layer.training:
        return "only in eval"
    if not layer.may_keep_matrix:
        limit = DEFAULT_CACHE_LIMIT if layer.cache_limit is None else layer.cache_limit
        return f"over cache_limit={size_in_words(limit)}"
    if layer.records_gradients():
        return "gradients of the cores are recorded; use torch.no_grad()"
    return ""
