"""Base class of all tensor-network layers: it stores the cores and chooses how to apply them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tensornet.contraction.cost import Machine, default_machine
from tensornet.contraction.plan import (
    PLANNED_TOKENS,
    RECONSTRUCT,
    Bounds,
    OperatorPlan,
    choose,
    contract_to_matrix,
    fastest_routes,
    plan_operator,
)
from tensornet.errors import FormatError, ShapeError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork, check_cores, random_cores
from tensornet.nn.storage import PLAIN, PackedCore, Storage, decode, empty, encode, put_core
from tensornet.nn.strategy import Explanation, Strategy, check_strategy, explain
from tensornet.nn.weight_facts import weight_facts
from tensornet.quantization import Rounding
from tensornet.registry import Registry
from tensornet.topology import Topology

R = TypeVar("R")


def _constant_in_traces(function: Callable[..., R]) -> Callable[..., R]:
    """Make torch.compile run a function once and use its result as a constant, instead of tracing it.

    This does the same as `torch.compiler.assume_constant_result`, which would import the compiler and delay
    the import of this package by two seconds. Without this mark, planning would cause a graph break.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class NetworkModule(nn.Module):
    """Abstract base class of layers whose weight matrix is a tensor network.

    Each core is a parameter or a `PackedCore` of the module, with the name `core_<name>`.

    Args:
        topology: topology of the weight matrix `(out_features, in_features)`.
        source: name of the layer kind that this module replaces (see `layer_kinds`); `decompress` restores a
            layer of this kind.
        strategy: `"factorized"` contracts the input with the cores. `"reconstruct"` rebuilds the matrix in
            each call and frees it afterwards. `"auto"` uses whichever of these two the cost model predicts to
            be faster. See `explain`, `set_strategy` and `prepare_for_inference`.
        storage: how the cores are stored.
        device: device of the cores; `"meta"` allocates nothing.
        dtype: dtype of the cores.

    Raises:
        ValueError: the strategy is unknown.
    """

    strategy: Strategy
    machine: Machine | None
    compute_like: Tensor

    def __init__(
        self,
        topology: Topology,
        *,
        source: str,
        strategy: Strategy = "auto",
        storage: Storage = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_strategy(strategy)
        self.topology, self.source, self.storage = topology, source, storage
        # These are copied to attributes, since every forward pass reads them.
        self._is_plain, self._has_own_dtypes = storage.plain, storage.own_dtypes
        self.strategy, self.machine = strategy, None
        self._quick: Callable[[Tensor], Tensor | None] | None = None
        # Contractions are planned in the first forward pass, so that loading a model is fast.
        self._plan: OperatorPlan | None = None
        self._routes: dict[tuple[object, ...], Bounds] = {}
        self._core_names = tuple(f"core_{name}" for name in topology.core_names)
        if device is not None and torch.device(device).type == "meta":
            self._put(empty(topology, storage, device=device, dtype=dtype))
        else:
            self._put(encode(topology, storage, random_cores(topology, device=device, dtype=dtype)))
        if storage.own_dtypes:
            like = torch.empty(0, dtype=dtype or torch.get_default_dtype(), device=device)
            self.register_buffer("compute_like", like, persistent=False)

    @property
    def stored_cores(self) -> tuple[Tensor | PackedCore, ...]:
        """Cores as they are stored (parameters or packed cores), in the order of the topology."""
        return tuple(getattr(self, name) for name in self._core_names)

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """Cores as tensors in the order of the topology; with plain storage, the parameters themselves."""
        cores = self.stored_cores
        return cores if self._is_plain else decode(cores, self.dtype)  # type: ignore[return-value]

    @property
    def stored(self) -> dict[str, Tensor]:
        """Parameters and buffers that store the cores, by their names in the state dict."""
        found: dict[str, Tensor] = {}
        for name, core in zip(self._core_names, self.stored_cores, strict=True):
            if isinstance(core, Tensor):
                found[name] = core
            else:
                found |= {f"{name}.{part}": tensor for part, tensor in core.named_parameters()}
                found |= {f"{name}.{part}": tensor for part, tensor in core.named_buffers()}
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the layer computes."""
        return self._like().dtype

    def _like(self) -> Tensor:
        """Return a tensor with the dtype and device of the computation."""
        first = getattr(self, self._core_names[0])
        if not self._has_own_dtypes:
            return first if isinstance(first, Tensor) else first.values
        like = self.compute_like
        device = first.device
        # The devices differ if loading has replaced tensors on the meta device.
        return like if like.device == device else torch.empty(0, dtype=like.dtype, device=device)

    def set_cores(
        self, cores: Sequence[Tensor], weighting: Weighting | None = None, rounding: Rounding = "two_sided"
    ) -> None:
        """Replace the cores of the layer by the given tensors, converted as the layer's storage requires.

        The layer adopts the dtype and device of the tensors. Tensors that are already parameters are shared,
        not copied, so that tied layers stay tied.

        Args:
            cores: cores in the order of the topology.
            weighting: sensitivity of the loss to errors of the matrix, for rounding cores to integers.
            rounding: rounding method for integer cores (see `tensornet.quantization.round_weight`).

        Raises:
            ShapeError: a core does not have the shape of the topology.
        """
        kept = encode(self.topology, self.storage, check_cores(self.topology, cores), weighting, rounding)
        # Tensors loaded from a file are contiguous. The cores are made contiguous too, so that a loaded layer
        # computes the same results as this one.
        self._put({n: x.contiguous() if type(x) is Tensor else x for n, x in kept.items()}, cores[0])

    def set_stored(self, stored: Mapping[str, Tensor | PackedCore], like: Tensor) -> None:
        """Replace the stored cores; the given parameters and packed cores are shared, not copied.

        Args:
            stored: all cores, by the names `core_<name>` that `encode` returns.
            like: tensor with the dtype and device in which the layer computes.

        Raises:
            ShapeError: a core is missing or does not have the shape in the topology.
        """
        wanted = {f"core_{name}": shape for name, shape in self.topology.core_shapes.items()}
        found = {name: tuple(core.shape) for name, core in stored.items()}
        if found != wanted:
            raise ShapeError(f"The layer stores cores of shapes {wanted}, got {found}.")
        self._put(stored, like)

    def share_cores(self, other: "NetworkModule") -> None:
        """Tie the weight to that of another module, by sharing the stored cores of that module.

        Raises:
            ShapeError: the modules differ in topology or storage.
        """
        if (self.topology, self.storage) != (other.topology, other.storage):
            raise ShapeError(
                "Only modules of the same topology and storage can share cores; got "
                f"{self.topology.family!r} of shape {self.topology.shape} stored as {self.storage} and "
                f"{other.topology.family!r} of shape {other.topology.shape} stored as {other.storage}."
            )
        self._put(dict(zip(other._core_names, other.stored_cores, strict=True)), other._like())

    def _put(self, cores: Mapping[str, Tensor | PackedCore], like: Tensor | None = None) -> None:
        for name, core in cores.items():
            put_core(self, name, core)
        if like is not None and self.storage.own_dtypes:
            self.compute_like = like.new_empty(0)

    @property
    def network(self) -> TensorNetwork:
        """Weight as a `TensorNetwork`; with plain storage, it shares this layer's parameters."""
        return TensorNetwork(self.topology, self.cores)

    @property
    def num_params(self) -> int:
        """Number of stored values, including bias, scales and padding; each packed integer counts as one."""
        cores = sum(x.numel() if isinstance(x, Tensor) else sum(x.counts.values()) for x in self.stored_cores)
        bias = getattr(self, "bias", None)
        return cores + (bias.numel() if isinstance(bias, Tensor) else 0)

    @property
    def weight(self) -> Tensor:
        """Placeholder with the dtype, device and shape of the dense weight, for code that reads only these.

        Any use of its values raises TargetError, since the layer does not store the dense matrix. Call
        `to_matrix` to compute this matrix.
        """
        trained = [tensor for tensor in self._tensors() if isinstance(tensor, nn.Parameter)]
        return weight_facts(self._like(), self.topology.shape, trained, self)

    def to_matrix(self) -> Tensor:
        """Compute the dense matrix `(out_features, in_features)` by contracting the cores, differentiably."""
        return contract_to_matrix(self.plan, self.cores)

    def own_matrix(self) -> Tensor:
        """Contract the cores to a contiguous matrix that never shares memory with them."""
        matrix = self.to_matrix()
        if len(self.topology.cores) > 1 and matrix.untyped_storage().nbytes() == matrix.nbytes:
            return matrix.contiguous()
        return matrix.clone(memory_format=torch.contiguous_format)

    def _tensors(self) -> list[Tensor]:
        """Return all stored tensors from which the matrix is built."""
        found: list[Tensor] = []
        for core in self.stored_cores:
            found += [core] if isinstance(core, Tensor) else core.tensors.values()
        return found

    def train(self, mode: bool = True) -> Self:
        """Set training or eval mode as in `nn.Module`, and discard the shortcut cached by earlier passes."""
        self._quick = None
        return super().train(mode)

    @property
    def plan(self) -> OperatorPlan:
        """Contraction plans of the layer; layers with equal topologies share them."""
        return self._planned()

    @_constant_in_traces
    def _planned(self) -> OperatorPlan:
        if self._plan is None:
            self._plan = plan_operator(self.topology)
        return self._plan

    def route(self, tokens: int, *, on_cpu: bool | None = None) -> int:
        """Choose how a pass is computed: by contracting the input with the cores, or with the rebuilt matrix.

        Args:
            tokens: number of input vectors.
            on_cpu: whether the pass runs on the CPU; by default, True if the cores are on the CPU.

        Returns:
            The position of a contraction in `plan.applies`, or `RECONSTRUCT`.
        """
        if self.strategy == "reconstruct":
            return RECONSTRUCT
        on_cpu = self._like().device.type == "cpu" if on_cpu is None else on_cpu
        return choose(self._bounds(on_cpu, self.strategy != "factorized"), tokens)

    @_constant_in_traces
    def _bounds(self, on_cpu: bool, rebuild: bool) -> Bounds:
        """Return the fastest route for each range of token counts (see `fastest_routes`).

        Args:
            on_cpu: whether the pass runs on the CPU.
            rebuild: whether rebuilding the matrix is allowed.
        """
        itemsize = self._like().element_size()
        key = (on_cpu, rebuild, itemsize, self.machine)
        bounds = self._routes.get(key)
        if bounds is None:
            machine = self.machine or default_machine("cpu" if on_cpu else "cuda")
            bounds = self._routes[key] = fastest_routes(self.plan, machine, itemsize, rebuild=rebuild)
        return bounds

    def explain(self, tokens: int = PLANNED_TOKENS) -> Explanation:
        """Predict the cost of each strategy for the given number of tokens, and say which the layer uses now.

        Raises:
            ValueError: `tokens` is not an integer of at least 1.
        """
        return explain(self, tokens)

    @property
    def integer_core(self) -> nn.Module | None:
        """The layer's only core if it stores the whole matrix as integers; None for all other layers."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None, "_routes": {}, "_quick": None}

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description from which `tensornet.nn.build_module` rebuilds the layer."""
        raise NotImplementedError


#: Function that makes an uninitialized module from its description: `(spec, device, dtype) -> module`.
Builder = Callable[[Mapping[str, Any], torch.device | str | None, torch.dtype | None], nn.Module]

_BUILDERS: Registry[Builder] = Registry(
    "module type", error=FormatError, hint="If a plugin defines this type, import the plugin first."
)


def register_module_type(name: str, builder: Builder) -> None:
    """Register the function with which `build_module` builds modules of one type.

    Args:
        name: the entry `"type"` of the description that `spec()` of these modules returns.
        builder: function `(spec, device, dtype) -> module`; the module may be uninitialized.

    Raises:
        FormatError: the name is already registered with another function.

    Example:
        >>> class Doubled(torch.nn.Identity):
        ...     def spec(self):
        ...         return {"type": "doubled"}
        >>> tn.nn.register_module_type("doubled", lambda spec, device, dtype: Doubled())
        >>> tn.nn.build_module({"type": "doubled"})
        Doubled()
    """
    _BUILDERS.add(name, builder)


def module_spec(module: nn.Module) -> dict[str, Any] | None:
    """Return the description `module.spec()` of a module of a registered type, and None for other modules.

    Example:
        >>> tn.nn.module_spec(tn.nn.MPOLinear(16, 32, max_bond=4))["type"]
        'linear'
        >>> tn.nn.module_spec(torch.nn.Linear(4, 4)) is None
        True
    """
    spec = getattr(module, "spec", None)
    described = spec() if callable(spec) else None
    return described if isinstance(described, dict) and _BUILDERS.get(described.get("type")) else None


def build_module(
    spec: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build an uninitialized module from its description (see `module_spec`).

    Args:
        spec: the description.
        device: device of the parameters; `"meta"` allocates nothing.
        dtype: dtype of the parameters.

    Raises:
        FormatError: the type is unknown, or the description is incomplete or inconsistent.

    Example:
        >>> layer = tn.nn.MPOLinear(16, 32, max_bond=4)
        >>> copy = tn.nn.build_module(tn.nn.module_spec(layer), device="meta")
        >>> copy.topology == layer.topology
        True
    """
    kind = spec.get("type")
    builder = _BUILDERS[kind]
    try:
        return builder(spec, device, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"Bad description of a {kind!r} module: {error}") from error
