"""Strategies: apply a layer by contracting its cores or by rebuilding its matrix, and predict both costs."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tensornet._util import check_size
from tensornet.contraction.cost import Machine, check_machine, default_machine, dense_seconds
from tensornet.contraction.plan import RECONSTRUCT
from tensornet.errors import TargetError
from tensornet.nn.int4_cpu import KERNEL_TOKENS, has_layout, layout_bytes, products_of
from tensornet.nn.integer_matmul import INT8_TOKENS, WIDE_TOKENS, has_int8_kernel, is_int8_per_row
from tensornet.nn.storage import PackedCore, Storage, kept_shapes
from tensornet.quantization import NumberFormat
from tensornet.topology import Topology

#: How a layer is applied (see `tensornet.nn.module.NetworkModule`).
Strategy = Literal["auto", "factorized", "reconstruct"]
STRATEGIES = ("auto", "factorized", "reconstruct")


def check_strategy(strategy: str) -> None:
    """Check that `strategy` is the name of a strategy.

    Raises:
        ValueError: the strategy is unknown.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")


def set_strategy(
    model: nn.Module, strategy: Strategy | None = None, *, machine: Machine | None = None
) -> None:
    """Set the strategy and cost model of all tensor-network layers and shared-core expert banks in a model.

    Args:
        model: any module.
        strategy: the strategy of all layers; None leaves their strategies unchanged.
        machine: constants of the cost model, for example from `tensornet.contraction.cost.measure_machine()`;
            None leaves the constants unchanged.

    Raises:
        TargetError: the model has no tensor-network layer.
        TypeError: `machine` is not a `Machine`.
        ValueError: the strategy is unknown.

    Example:
        >>> model = torch.nn.Sequential(tn.nn.MPOLinear(64, 64, max_bond=4))
        >>> tn.nn.set_strategy(model, "reconstruct")
        >>> model[0].strategy
        'reconstruct'
    """
    layers: list[Any] = [x for x in model.modules() if {"strategy", "machine"} <= vars(x).keys()]
    if not layers:
        raise TargetError(
            f"{type(model).__name__} has no compressed layer. Compress it first, or check that you passed "
            "the compressed model."
        )
    check_machine(machine)
    if strategy is not None:
        check_strategy(strategy)
    for layer in layers:
        layer.strategy = strategy or layer.strategy
        layer.machine = machine or layer.machine


# --- predicted time of products with integer matrices ------------------------------------------------

#: Maps the number of kernel calls for one product to the name of the int4 kernel in explanations.
INT4_KERNELS = {1: "int4 kernel", 2: "int4 kernel twice"}
INT8_KERNEL, UNPACKED = "int8 kernel", "unpacked"


def integer_seconds(
    number_format: NumberFormat,
    shape: tuple[int, int],
    tokens: int,
    machine: Machine,
    itemsize: int,
    *,
    prepared: bool = True,
) -> tuple[str, float]:
    """Predict how `tensornet.nn.integer_matmul` multiplies by an integer matrix, and how long this takes.

    Args:
        number_format: format of the matrix.
        shape: shape of the matrix, `(out, in)`.
        tokens: number of input vectors.
        machine: constants of the cost model.
        itemsize: bytes of an element of the input; torch's kernels need elements of 2 bytes.
        prepared: True to assume that `prepare_for_inference` was called.

    Returns:
        One of `INT4_KERNELS`, `"int8 kernel"` or `"unpacked"`, and the time in seconds.
    """
    elements, size = shape[0] * shape[1], number_format.nbytes(shape)
    prepared = prepared and has_layout(number_format, shape)
    kernels = machine.kernel_peak > 0 and itemsize == 2
    if kernels and prepared:
        products = products_of(number_format)
        if tokens <= KERNEL_TOKENS // products:
            seconds = products * (machine.overhead + tokens * elements / machine.kernel_peak)
            return INT4_KERNELS[products], seconds + layout_bytes(number_format, shape) / machine.bandwidth
    elif kernels and tokens <= INT8_TOKENS and has_int8_kernel(number_format, shape):
        seconds = machine.overhead + tokens * elements / machine.kernel_peak
        return INT8_KERNEL, seconds + size / machine.bandwidth
    wide = 4 if itemsize == 2 and tokens <= WIDE_TOKENS else itemsize
    passes = unpack_passes(number_format, wide)
    if kernels and prepared:
        passes = unpack_passes(number_format, 4)  # unpacking to 2 bytes takes as long as to 4 bytes
    elif is_int8_per_row(number_format, shape[1]):
        passes = 1.0  # only the codes are converted; the outputs are scaled
    seconds = size / machine.bandwidth + machine.overhead + elements * machine.unpack_pass * passes
    return UNPACKED, seconds + dense_seconds(*shape, tokens, machine, wide, from_memory=False)


def unpacking_seconds(topology: Topology, storage: Storage, machine: Machine, itemsize: int) -> float:
    """Predict the seconds for unpacking the integer cores of a network; 0 if it has no integer cores.

    Args:
        topology: topology of the network.
        storage: how its cores are stored.
        machine: constants of the cost model.
        itemsize: bytes of an element of the unpacked cores.
    """
    seconds = 0.0
    for name, shape, _ in kept_shapes(topology, storage):
        number_format = storage.format_of(name)
        if number_format.is_integer:
            passes = unpack_passes(number_format, itemsize)
            seconds += machine.overhead + math.prod(shape) * machine.unpack_pass * passes
    return seconds


def unpack_passes(number_format: NumberFormat, itemsize: int) -> float:
    """Estimate how many passes unpacking makes over the elements; a pass over single bytes counts as half.

    Args:
        number_format: format of the codes.
        itemsize: bytes of an unpacked element.
    """
    bits = number_format.bits or 8
    passes = 2.0 + (0.0 if bits == 8 else 1.0 if 8 % bits == 0 else 2.5)
    passes += 0.0 if number_format.points.equal_steps else 2.5  # looking up levels
    return passes + (1.0 if itemsize == 2 else 0.0)


# --- predicted cost of every strategy ----------------------------------------------------------------


@dataclass(frozen=True)
class StrategyCost:
    """Predicted cost of one forward pass with one strategy.

    Args:
        strategy: `"factorized"` or `"reconstruct"`.
        milliseconds: predicted time.
        multiply_adds: number of multiply-adds.
        moved: number of elements that permutations copy.
        memory_bytes: size of the largest intermediate tensor.
        refused: reason why the layer cannot use this strategy now; empty if it can.
        integers: how integer cores are read: `"unpacked"` or the name of a kernel; empty without such cores.
    """

    strategy: str
    milliseconds: float
    multiply_adds: int
    moved: int
    memory_bytes: int
    refused: str = ""
    integers: str = ""


@dataclass(frozen=True)
class Explanation:
    """Predicted cost of every strategy of a layer; `print` shows it as a table.

    Args:
        description: topology, shape and bonds of the weight.
        machine: name of the machine whose constants were used.
        tokens: number of input vectors.
        costs: the cost of each strategy.
        choice: the strategy that the layer uses now.
        dense_milliseconds: time of a dense layer of this shape, for comparison.
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
            size = cost.memory_bytes
            memory = f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.2f} KiB"
            lines.append(
                f"{'*' if cost.strategy == self.choice else ' '} {cost.strategy:<12} "
                f"{cost.milliseconds:>10.3f} {cost.multiply_adds:>16,} {cost.moved:>14,} {memory:>12}"
                + (f"  integers: {cost.integers}" if cost.integers else "")
                + (f"  ({cost.refused})" if cost.refused else "")
            )
        chosen = self[self.choice].milliseconds / self.dense_milliseconds
        lines.append(
            f"  {'dense layer':<12} {self.dense_milliseconds:>10.3f}  (* takes {chosen:.2f} times this)"
        )
        return "\n".join(lines)


def explain(layer: Any, tokens: int) -> Explanation:
    """Predict the cost of every strategy of a layer (see `tensornet.nn.module.NetworkModule.explain`).

    Raises:
        ValueError: `tokens` is not an integer of at least 1.
    """
    tokens = check_size("tokens", tokens, error=ValueError)
    plan, topology, storage, like = layer.plan, layer.topology, layer.storage, layer._like()
    machine, itemsize = layer.machine or default_machine(like.device), like.element_size()
    route = plan.fastest(tokens, machine, itemsize, rebuild=False)
    contraction = plan.applies[route]
    unpacking = unpacking_seconds(topology, storage, machine, itemsize)
    choice = "reconstruct" if layer.route(tokens) == RECONSTRUCT else "factorized"
    integers = kernel = UNPACKED if storage.quantized else ""
    factorized = plan.seconds(route, tokens, machine, itemsize) + unpacking
    core = layer.integer_core
    if core is not None and layer.strategy in ("auto", "factorized"):
        number_format, prepared = storage.format_of(topology.core_names[0]), not isinstance(core, PackedCore)
        kernel, factorized = integer_seconds(
            number_format, topology.shape, tokens, machine, itemsize, prepared=prepared
        )
        choice = "factorized"
    fixed = layer.strategy if layer.strategy != "auto" else ""
    refused = {x: f'the layer has strategy="{fixed}"' for x in STRATEGIES if fixed and x != fixed}
    dense = dense_seconds(topology.out_features, topology.in_features, tokens, machine, itemsize)
    rebuilt = plan.seconds(RECONSTRUCT, tokens, machine, itemsize) + unpacking
    costs = (
        StrategyCost(
            "factorized",
            1e3 * factorized,
            contraction.multiply_adds(tokens),
            contraction.moved(tokens),
            contraction.largest_intermediate(tokens) * itemsize,
            refused.get("factorized", ""),
            kernel,
        ),
        StrategyCost(
            "reconstruct",
            1e3 * rebuilt,
            plan.matrix.multiply_adds(1) + tokens * math.prod(topology.shape),
            plan.matrix.moved(1),
            math.prod(topology.padded_shape) * itemsize,
            refused.get("reconstruct", ""),
            integers,
        ),
    )
    description = f"{topology.family} {topology.shape}, bonds {list(topology.bond_dims.values())}"
    return Explanation(description, machine.name, tokens, costs, choice, 1e3 * dense)
