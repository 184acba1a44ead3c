"""Strategies: apply a layer with its cores or with the rebuilt matrix, and predict the cost of each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet._util import check_size, transforms_active
from tensornet.contraction.cost import Machine, check_machine, default_machine, dense_seconds
from tensornet.contraction.plan import RECONSTRUCT
from tensornet.errors import TargetError
from tensornet.nn.int4_cpu import KERNEL_TOKENS, has_layout, layout_bytes, products_of
from tensornet.nn.integer_matmul import INT8_TOKENS, WIDE_TOKENS, has_int8_kernel, scales_by_row
from tensornet.nn.storage import PackedCore, Storage, kept_shapes
from tensornet.quantization import NumberFormat
from tensornet.topology import Topology

#: How a layer is applied, see `tensornet.nn.module.NetworkModule`.
Strategy = Literal["auto", "factorized", "reconstruct", "cached"]
STRATEGIES = ("auto", "factorized", "reconstruct", "cached")
#: The route that uses a cached matrix; `OperatorPlan.seconds` defines all other routes.
CACHED = -2


class KeptMatrix:
    """Cache for the dense matrix of a layer with the strategy "cached".

    The matrix is valid while the tensors from which it was built are the same objects with the same addresses
    and versions. PyTorch increases the version of a tensor at every in-place change, so optimizer steps,
    `copy_` and `load_state_dict` are detected. Writing into `parameter.data` is not detected: call `train()`
    and `eval()` after it.

    The matrix is not saved with its layer, nor copied, nor moved to another device.
    """

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.states: list[tuple[Tensor, int, int]] = []
        self._aliases: list[Tensor] = []  # kept alive, so that no other tensor gets the same address

    @property
    def nbytes(self) -> int:
        """Size of the cached matrix in bytes, or 0 before a matrix is cached."""
        return 0 if self.matrix is None else self.matrix.nbytes

    def drop(self) -> None:
        """Free the matrix; the next pass that needs it rebuilds it."""
        self.matrix, self.states, self._aliases = None, [], []

    def get(self, tensors: Sequence[Tensor], like: Tensor, build: Callable[[], Tensor]) -> Tensor:
        """Return the matrix, rebuilt if it is absent or out of date. Call this only if `may_keep` is true.

        Args:
            tensors: tensors from which the matrix is built.
            like: tensor with the dtype and device of the module; autocast may lower the dtype.
            build: function that rebuilds the matrix.
        """
        dtype = compute_dtype(like)
        matrix = self.matrix
        if matrix is not None and matrix.dtype == dtype and len(tensors) == len(self.states):
            for tensor, (known, version, address) in zip(tensors, self.states, strict=True):
                if tensor is not known or known._version != version or known.data_ptr() != address:
                    break
            else:
                return matrix
        self.drop()  # frees the old matrix before the new one is built
        # Inference tensors could not be used in a later pass that records gradients of the layer's input.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            matrix = build().to(dtype).contiguous()
        self.matrix = matrix
        self.states = [(x, x._version, x.data_ptr()) for x in tensors]
        self._aliases = [x.detach() for x in tensors]
        return matrix

    def __reduce__(self) -> tuple[type["KeptMatrix"], tuple[()]]:
        return KeptMatrix, ()


def may_keep(module: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Return True if a module with the strategy "cached" may use a cached matrix now.

    This is the case in eval mode if no gradients of the cores are recorded. Inside a trace or a `torch.func`
    transform the result is False, since their tensors must not be stored.

    Args:
        module: the layer or bank.
        tensors: tensors from which the matrix is built.
    """
    if module.training or torch.compiler.is_compiling() or transforms_active() or torch.jit.is_tracing():
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() or tensor.is_meta:
            return False
        if recording and tensor.requires_grad:
            return False
    return True


def compute_dtype(core: Tensor) -> torch.dtype:
    """Return the dtype in which a core is multiplied: the autocast dtype if enabled, else its own dtype."""
    kind = core.device.type
    if not torch.is_autocast_enabled(kind) or core.dtype == torch.float64 or core.is_complex():
        return core.dtype
    return torch.get_autocast_dtype(kind)


def check_strategy(strategy: str) -> None:
    """Check the name of a strategy.

    Raises:
        ValueError: the strategy is unknown.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")


def set_strategy(
    model: nn.Module,
    strategy: Strategy | None = None,
    *,
    cache_limit: int | None = None,
    machine: Machine | None = None,
) -> dict[str, int]:
    """Set the strategy and the cost model of every tensor-network layer and bank of shared-core experts.

    `"cached"` saves time but needs memory for the matrices; all other strategies store only the cores.

    Args:
        model: any module.
        strategy: the strategy of all layers; None leaves every layer as it is.
        cache_limit: limit on the total bytes of cached matrices. The layers that save most time per byte in
            a pass of one token are cached first, and layers that do not fit get `"auto"`. None sets no limit.
        machine: constants of the cost model, for example from `tensornet.contraction.cost.measure_machine()`;
            None leaves them as they are.

    Returns:
        Bytes of the cached matrix of each layer, by name.

    Raises:
        TargetError: the model has no tensor-network layer.
        TypeError: `machine` is not a `Machine`.
        ValueError: the strategy is unknown, or the limit is negative.

    Example:
        >>> model = torch.nn.Sequential(tn.nn.MPOLinear(64, 64, max_bond=4))
        >>> tn.nn.set_strategy(model, "cached")
        {'0': 16384}
    """
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if _kept_by(module) is not None
    }
    if not layers:
        raise TargetError(
            f"{type(model).__name__} has no compressed layer. Compress it first, or check that you passed "
            "the compressed model."
        )
    check_machine(machine)
    if strategy is not None:
        check_strategy(strategy)
    if cache_limit is not None and (not isinstance(cache_limit, Integral) or cache_limit < 0):
        raise ValueError(f"cache_limit must be a number of bytes of at least 0, got {cache_limit!r}.")
    for layer in layers.values():
        layer.strategy = strategy or layer.strategy
        layer.machine = machine or layer.machine
        layer.kept.drop()
    cached = [layer for layer in layers.values() if layer.strategy == "cached"]
    if cache_limit is not None:
        gains = {id(layer): layer.seconds_saved / layer.matrix_bytes for layer in cached}
        for layer in sorted(cached, key=lambda layer: gains[id(layer)], reverse=True):
            fits = layer.matrix_bytes <= cache_limit
            cache_limit -= layer.matrix_bytes if fits else 0
            layer.strategy = "cached" if fits else "auto"
    return {name: layer.matrix_bytes for name, layer in layers.items() if layer.strategy == "cached"}


def cached_bytes(model: nn.Module) -> int:
    """Count the bytes of all cached matrices of a model; 0 unless the strategy is `"cached"`.

    Example:
        >>> tn.nn.cached_bytes(tn.nn.MPOLinear(64, 64, max_bond=4))
        0
    """
    return sum(kept.nbytes for module in model.modules() if (kept := _kept_by(module)) is not None)


def _kept_by(module: nn.Module) -> KeptMatrix | None:
    kept = vars(module).get("kept")
    return kept if isinstance(kept, KeptMatrix) else None


# --- predicted time of products with integer matrices ------------------------------------------------

#: Name of the int4 kernel in explanations, keyed by the number of kernel calls for one product.
INT4_KERNELS = {1: "int4 kernel", 2: "int4 kernel twice"}
INT8_KERNEL, UNPACKED = "int8 kernel", "unpacked"


def product_seconds(
    number_format: NumberFormat,
    shape: tuple[int, int],
    tokens: int,
    machine: Machine,
    itemsize: int,
    *,
    prepared: bool = True,
) -> tuple[str, float]:
    """Predict how `tensornet.nn.integer_matmul` multiplies by an integer matrix, and the time it takes.

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
        passes = unpack_passes(number_format, 4)  # 2-byte elements take as long as 4-byte elements
    elif scales_by_row(number_format, shape[1]):
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
    passes += 2.5 if number_format.table else 0.0  # looking up levels
    return passes + (1.0 if itemsize == 2 else 0.0)


# --- predicted cost of every strategy ----------------------------------------------------------------


@dataclass(frozen=True)
class StrategyCost:
    """Predicted cost of one forward pass.

    Args:
        strategy: `"factorized"`, `"reconstruct"` or `"cached"`.
        milliseconds: predicted time.
        multiply_adds: number of multiply-adds.
        moved: number of elements that permutations copy.
        memory_bytes: size of the largest intermediate tensor, or of the cached matrix.
        refused: why the layer does not use this strategy now; empty if it can use it.
        integers: how integer cores are read, `"unpacked"` or the name of a kernel; empty if there are none.
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
    """Predict the cost of every strategy of a layer, see `tensornet.nn.module.NetworkModule.explain`.

    Raises:
        ValueError: `tokens` is not an integer of at least 1.
    """
    tokens = check_size("tokens", tokens, error=ValueError)
    plan, topology, storage, like = layer.plan, layer.topology, layer.storage, layer._like()
    machine, itemsize = layer.machine or default_machine(like.device), like.element_size()
    route = plan.fastest(tokens, machine, itemsize, rebuild=False)
    contraction, elements = plan.applies[route], topology.out_features * topology.in_features
    unpacking = unpacking_seconds(topology, storage, machine, itemsize)
    choice = {RECONSTRUCT: "reconstruct", CACHED: "cached"}.get(layer.route(tokens), "factorized")
    integers = kernel = UNPACKED if storage.quantized else ""
    factorized = plan.seconds(route, tokens, machine, itemsize) + unpacking
    core = layer.integer_core
    if core is not None and layer.strategy in ("auto", "factorized"):
        number_format, prepared = storage.format_of(topology.core_names[0]), not isinstance(core, PackedCore)
        kernel, factorized = product_seconds(
            number_format, topology.shape, tokens, machine, itemsize, prepared=prepared
        )
        choice = "factorized"
    refused = {}
    if layer.strategy in ("factorized", "reconstruct"):
        refused = {x: f'the layer has strategy="{layer.strategy}"' for x in STRATEGIES if x != layer.strategy}
    elif layer.strategy == "auto":
        refused["cached"] = 'needs memory for the matrix; enable it by strategy="cached"'
    elif layer.training:
        refused["cached"] = "only in eval"
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in layer._tensors()):
        refused["cached"] = "gradients of the cores are recorded; use torch.no_grad()"
    dense = dense_seconds(topology.out_features, topology.in_features, tokens, machine, itemsize)
    rebuilt = plan.seconds(RECONSTRUCT, tokens, machine, itemsize) + unpacking
    products = tokens * elements
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
            plan.matrix.multiply_adds(1) + products,
            plan.matrix.moved(1),
            math.prod(topology.padded_shape) * itemsize,
            refused.get("reconstruct", ""),
            integers,
        ),
        StrategyCost("cached", 1e3 * dense, products, 0, elements * itemsize, refused.get("cached", "")),
    )
    description = f"{topology.family} {topology.shape}, bonds {list(topology.bond_dims.values())}"
    return Explanation(description, machine.name, tokens, costs, choice, 1e3 * dense)
