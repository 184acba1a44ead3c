"""Explanation of a layer's strategy: the predicted cost of every strategy."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tensornet._util import check_size
from tensornet.contraction.cost import Machine, dense_seconds
from tensornet.contraction.plan import RECONSTRUCT, OperatorPlan
from tensornet.nn.integer_cost import IntegerCost


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
        kernel: how integers are read: `"int4 kernel"`, `"int4 kernel twice"` for 5 bits and more, `"int8
            kernel"` or `"unpacked"`; empty without any.
        unpacked: integers that are unpacked.
        read_bytes: bytes of integers that are read.
        held_bytes: bytes that the layer holds for them, in place of the stored ones.

    Example:
        >>> topology = tn.topologies.mpo(out_dims=(16, 16), in_dims=(16, 16), max_bond=16)
        >>> cost = tn.nn.TensorNetworkLinear(topology).explain(tokens=64).costs[0]
        >>> cost.strategy, cost.multiply_adds > 0
        ('factorized', True)
    """

    strategy: str
    milliseconds: float
    multiply_adds: int
    moved: int
    memory_bytes: int
    refused: str = ""
    kernel: str = ""
    unpacked: int = 0
    read_bytes: int = 0
    held_bytes: int = 0


@dataclass(frozen=True)
class Explanation:
    """Predicted costs of all strategies at one token count; print it.

    Args:
        description: shape and form of the operator.
        machine: whose constants were used.
        tokens: for which it was asked.
        costs: one for each strategy.
        choice: the strategy the layer takes now.
        dense_milliseconds: a dense layer of this shape, for comparison.

    Example:
        >>> topology = tn.topologies.mpo(out_dims=(16, 16), in_dims=(16, 16), max_bond=16)
        >>> explanation = tn.nn.TensorNetworkLinear(topology).explain(tokens=64)
        >>> explanation.tokens, explanation.choice in {cost.strategy for cost in explanation.costs}
        (64, True)
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
            held = f", {size_in_words(cost.held_bytes)} held" if cost.kernel else ""
            note = f"  {cost.kernel}, {size_in_words(cost.read_bytes)} read{held}" if cost.kernel else ""
            note += f", {cost.unpacked:,} integers unpacked" if cost.unpacked else ""
            note += f"  ({cost.refused})" if cost.refused else ""
            lines.append(
                f"{mark} {cost.strategy:<12} {cost.milliseconds:>10.3f} {cost.multiply_adds:>16,} "
                f"{cost.moved:>14,} {size_in_words(cost.memory_bytes):>12}{note}"
            )
        chosen = self[self.choice].milliseconds / self.dense_milliseconds
        lines.append(
            f"  {'dense layer':<12} {self.dense_milliseconds:>10.3f}  (* takes {chosen:.2f} times this)"
        )
        return "\n".join(lines)


def size_in_words(size: int) -> str:
    """Format bytes in the largest unit that leaves a digit before the point."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def explain(
    plan: OperatorPlan,
    tokens: int,
    machine: Machine,
    itemsize: int,
    *,
    choice: Callable[[], str],
    refused: Mapping[str, str],
    integers: Mapping[str, IntegerCost] | None = None,
) -> Explanation:
    """Compute the costs of an operator by every strategy.

    Args:
        plan: the planned operator.
        tokens: number of input vectors.
        machine: whose constants are used.
        itemsize: bytes of an element.
        choice: gives the strategy that is taken, once `tokens` is known to be a count.
        refused: why strategies are not taken, by name.
        integers: cost of reading integer cores, or of the whole product, by the name of the strategy.

    Raises:
        ValueError: `tokens` is not an integer of at least 1.
    """
    tokens = check_size("tokens", tokens, error=ValueError)
    topology, route = plan.topology, plan.fastest(tokens, machine, itemsize, rebuild=False)
    contraction, elements = plan.applies[route], topology.out_features * topology.in_features
    dense = dense_seconds(*topology.shape, tokens, machine, itemsize)
    seconds = {
        "factorized": plan.seconds(route, tokens, machine, itemsize),
        "reconstruct": plan.seconds(RECONSTRUCT, tokens, machine, itemsize),
        "cached": dense,
    }
    reading = integers or {}
    for name, read in reading.items():
        seconds[name] = read.seconds + (0.0 if read.multiplies else seconds[name])
    work = {
        "factorized": (
            contraction.multiply_adds(tokens),
            contraction.moved(tokens),
            contraction.largest_intermediate(tokens),
        ),
        "reconstruct": (
            plan.matrix.multiply_adds(1) + tokens * elements,
            plan.matrix.moved(1),
            math.prod(topology.padded_shape),
        ),
        "cached": (tokens * elements, 0, elements),
    }
    return Explanation(
        description=f"{topology.family} {topology.shape}, bonds {list(topology.bond_dims.values())}",
        machine=machine.name,
        tokens=tokens,
        costs=tuple(
            StrategyCost(
                name,
                1e3 * seconds[name],
                adds,
                moved,
                size * itemsize,
                refused.get(name, ""),
                *(reading[name].summary if name in reading else ()),
            )
            for name, (adds, moved, size) in work.items()
        ),
        choice=choice(),
        dense_milliseconds=1e3 * dense,
    )
