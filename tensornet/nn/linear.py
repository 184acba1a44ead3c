"""Linear layers whose weight is a tensor network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear

from tensornet._util import check_input, is_exporting, transforms_active
from tensornet.contraction.cost import default_machine, dense_seconds
from tensornet.contraction.plan import PLANNED_TOKENS, RECONSTRUCT, contract_with_input, plan_operator
from tensornet.decompose import decompose
from tensornet.errors import ShapeError, TargetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.integer_matmul import PackedMatrix, StoredMatrix, multiply
from tensornet.nn.layer_kinds import kind_of, layer_bias, layer_kind
from tensornet.nn.module import NetworkModule, register_module_type
from tensornet.nn.prepare import PreparedLinear
from tensornet.nn.storage import PLAIN, PackedCore, Storage, decode, storage_entry
from tensornet.nn.strategy import Strategy
from tensornet.nn.unfuse import type_and_reason
from tensornet.quantization import Rounding
from tensornet.topologies import TopologyFamily
from tensornet.topologies.mpo import MPOFamily
from tensornet.topology import Topology

#: `prepare_for_inference` keeps a network if its predicted time for one token is at most this fraction of the
#: time of a dense layer. The margin favors the dense layer, since the predicted times of chains of several
#: cores are often too short.
_CLEARLY_FASTER = 2 / 3


class TensorNetworkLinear(NetworkModule):
    """Linear layer `y = x W^T + b` whose matrix `W: (out_features, in_features)` is a tensor network.

    A new layer has Gaussian cores with `Var(W) = 1 / in_features` (see `random_cores`) and a zero bias.

    Args:
        topology: topology of `W`.
        bias: whether the layer has a bias, shape `(out_features,)`.
        source: `"linear"` or `"conv1d"`, the kind of stock layer that `to_linear` returns.
        strategy, storage: how `W` is applied and stored (see `NetworkModule`).
        device, dtype: device and dtype of the parameters, as in `nn.Linear`.

    Example:
        >>> topology = tn.topologies.tucker(out_dims=(16, 16), in_dims=(8, 16), max_bond=8)
        >>> layer = tn.nn.TensorNetworkLinear(topology)  # random cores, to train from scratch
        >>> layer(torch.randn(4, 128)).shape
        torch.Size([4, 256])
    """

    bias: Tensor | None

    def __init__(
        self,
        topology: Topology,
        *,
        bias: bool = True,
        source: str = "linear",
        strategy: Strategy = "auto",
        storage: Storage = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            topology,
            source=source,
            strategy=strategy,
            storage=storage,
            device=device,
            dtype=dtype,
        )
        self.out_features, self.in_features = topology.shape
        # An integer core is multiplied in its stored form if it is the whole matrix, or one term of a sum.
        (positions, _), *self._other_terms = topology.parts
        name = topology.core_names[positions[0]]
        whole = len(positions) == 1 and topology.shape == topology.padded_shape
        self._integer_name = f"core_{name}" if whole and storage.format_of(name).is_integer else None
        self._integers: PackedMatrix | None = None
        zeros = torch.zeros(self.out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", nn.Parameter(zeros) if zeros is not None else None)

    def forward(self, input: Tensor) -> Tensor:
        """Map `input: (..., in_features)` to `(..., out_features)`."""
        # 1. Repeat the previous pass by a shortcut, if possible: for few tokens, choosing how to multiply
        # takes longer than multiplying.
        if self._quick is not None and not is_compiling() and (y := self._quick(input)) is not None:
            return y
        check_input(input, self.in_features)
        # 2. Multiply by integers in their stored form, if possible.
        if self._integer_name is not None and (y := self._by_integers(input)) is not None:
            return y
        # 3. Contract the input with the cores or rebuild the matrix, whichever the strategy selects. An
        # exported program does the same for all token counts.
        tokens = PLANNED_TOKENS if is_exporting() else input.numel() // self.in_features
        route = self.route(tokens, on_cpu=input.is_cpu)
        if route == RECONSTRUCT:
            return linear(input, self.to_matrix(), self.bias)
        products = self.plan.applies[route].matrices
        if len(products) == 2 and self._is_plain and not self.plan.is_padded and not is_compiling():
            largest, fastest = self._bounds(input.is_cpu, self.strategy != "factorized")[0]
            if route == fastest and self.strategy in ("auto", "factorized"):
                self._quick = _two_products(self, products, largest)
        return contract_with_input(self.plan, self.cores, input, route=route, bias=self.bias)

    @property
    def integer_core(self) -> nn.Module | None:
        """The layer's only core if it stores the whole matrix as integers; None for all other layers."""
        return getattr(self, self._integer_name) if self._integer_name and not self._other_terms else None

    def _by_integers(self, input: Tensor) -> Tensor | None:
        """Compute the output directly from stored integers; return None if this is not possible."""
        if self.strategy == "reconstruct":
            return None
        core, device = getattr(self, self._integer_name), input.device.type  # type: ignore[arg-type]
        lowered = torch.is_autocast_enabled(device)
        if isinstance(core, PackedCore) and core.is_trained:
            # The values are unpacked directly to the autocast dtype. Casting them later would take two
            # more passes over memory: one for the values and one for their gradients.
            if self._other_terms or not lowered or input.dtype == torch.float64:
                return None
            if not core.codes.is_floating_point():
                return None
            return linear(input, core.matrix(torch.get_autocast_dtype(device)), self.bias)
        if lowered or is_exporting() or input.dtype != self.compute_like.dtype:
            return None
        if bool(self._other_terms) if is_compiling() else transforms_active():
            return None
        matrix = self._integers_of(core)
        y = multiply(input, matrix, self.bias)
        if not self._other_terms:
            if matrix.kernel_tokens and not is_compiling():
                self._quick = _kernel_product(self, core, matrix)
            return y
        machine, tokens = self.machine or default_machine(input.device), input.numel() // self.in_features
        for positions, part in self._other_terms:
            plan = plan_operator(part)
            route = plan.fastest(max(tokens, 1), machine, input.element_size(), rebuild=False)
            cores = decode((getattr(self, self._core_names[k]) for k in positions), input.dtype)
            y = y + contract_with_input(plan, cores, input, route=route)
        return y

    def _integers_of(self, core: nn.Module) -> StoredMatrix:
        if not isinstance(core, PackedCore):
            return core.integers  # type: ignore[return-value]
        known = self._integers
        if known is None or known.codes is not core.codes or known.scale_bits is not core.scales:
            known = PackedMatrix.of(core)
            # Scales that are computed from stored integers are not cached, since the integers may change.
            computed = core.number_format.scales.count > 1
            self._integers = None if computed or is_compiling() else known
        return known

    def prepared(self, max_growth: float) -> PreparedLinear | None:
        """Return a dense layer if it should generate faster than this network (see `prepare_for_inference`).

        Args:
            max_growth: largest size of the matrix, relative to the stored bytes of the network.

        Returns:
            The dense layer; None if the network should stay as it is.
        """
        like, shape = self._like(), self.topology.shape
        stored = sum(tensor.nbytes for tensor in self._tensors())
        too_large = shape[0] * shape[1] * like.element_size() > max_growth * stored
        stays = len(self.topology.cores) == 1 or self.storage.quantized or self.strategy != "auto"
        if too_large or stays:
            return None
        machine, itemsize = self.machine or default_machine(like.device), like.element_size()
        fastest = self.plan.seconds(self.plan.fastest(1, machine, itemsize), 1, machine, itemsize)
        if fastest <= _CLEARLY_FASTER * dense_seconds(*shape, 1, machine, itemsize):
            return None
        return PreparedLinear(self.own_matrix(), self.bias)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        *,
        topology: str | TopologyFamily | Topology = "mpo",
        max_bond: int | None = None,
        rel_error: float | None = None,
        param_ratio: float | None = None,
        strategy: Strategy = "auto",
        **options: Any,
    ) -> "TensorNetworkLinear":
        """Decompose the weight of a stock layer into a new layer that shares no memory with the stock layer.

        Args:
            layer: an `nn.Linear` or a Hugging Face `Conv1D`; it is not changed.
            topology: a topology family (or its registered name), which chooses dims and bonds; or a topology,
                which fixes all dims and bonds.
            max_bond, rel_error, param_ratio: limits of the decomposition (see `Budget`).
            strategy: how the new layer is applied (see `NetworkModule`).
            options: options of the family, for example `sites=`, `out_dims=`, `in_dims=`.

        Raises:
            TargetError: the layer has another type.
            BudgetError, NonFiniteError, TopologyError: see `tensornet.decompose`.
        """
        kind = kind_of(layer)
        if kind is None or kind.name == "embedding":
            raise TargetError(
                f"from_linear takes nn.Linear or Conv1D, got {type_and_reason(layer)}; subclasses are "
                "not accepted, because their own code may read the dense weight."
            )
        matrix = kind.matrix(layer)
        result = decompose(
            matrix, topology, max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio, **options
        )
        network = result.network.to(matrix.dtype)
        return linear_from_network(network, bias=layer_bias(layer), source=kind.name, strategy=strategy)

    def to_linear(self, matrix: Tensor | None = None) -> nn.Module:
        """Convert to a stock layer of the kind `source`, with this layer's bias.

        Args:
            matrix: weight of the stock layer, shape `(out_features, in_features)`; by default, the matrix
                rebuilt from the cores.
        """
        with torch.no_grad():
            bias = None if self.bias is None else self.bias.detach().clone()
            return layer_kind(self.source).build(self.own_matrix() if matrix is None else matrix, bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_integers": None}

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready description of the layer (see `NetworkModule.spec`)."""
        return {
            "type": "linear",
            "source": self.source,
            "bias": self.bias is not None,
            "topology": self.topology.to_dict(),
            **storage_entry(self.storage),
        }

    def extra_repr(self) -> str:
        """Show sizes, topology and bonds in `print(model)`."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"topology={self.topology.family}, bonds={list(self.topology.bond_dims.values())}, "
            f"strategy={self.strategy}"
        )


# Shortcuts: functions that repeat the previous pass for another input, or return None if the layer or the
# kind of input has changed.


def _two_products(
    layer: TensorNetworkLinear, products: Sequence[tuple[int, tuple[int, ...]]], most: float
) -> Callable[[Tensor], Tensor | None]:
    """Make a function that multiplies by two cores one after the other, as a shortcut for later passes.

    Args:
        layer: the layer.
        products: position and shape of each core (see `ContractionPlan.matrices`).
        most: largest number of tokens for which this is the fastest route.
    """
    (first, first_shape), (second, second_shape) = products
    first_name, second_name = layer._core_names[first - 1], layer._core_names[second - 1]
    strategy, in_features, most_elements = layer.strategy, layer.in_features, most * layer.in_features
    # Reshaping takes as long as a small product, so without gradients the reshaped parameters are cached.
    known: tuple[Any, ...] = (None,) * 6

    def answer(x: Tensor) -> Tensor | None:
        nonlocal known
        a, b = getattr(layer, first_name), getattr(layer, second_name)
        if layer.strategy is not strategy or not (type(a) is type(b) is nn.Parameter):
            return None  # the strategy has changed, or a core is parametrized or sharded
        if x.ndim == 0 or x.shape[-1] != in_features or x.numel() > most_elements:
            return None
        if x.dtype is torch.float16 and x.is_cpu:  # `contract_with_input` computes in float32
            return None
        if torch.is_grad_enabled() or transforms_active() or torch.jit.is_tracing():
            known = (None,) * 6  # the cached tensors may be out of date
            return linear(linear(x, a.reshape(first_shape)), b.reshape(second_shape), layer.bias)
        if known[0] is not a or known[1] is not b or known[2:4] != (a.data_ptr(), b.data_ptr()):
            if not (a.is_contiguous() and b.is_contiguous()) or a.is_meta:
                return None
            known = a, b, a.data_ptr(), b.data_ptr(), a.view(first_shape), b.view(second_shape)
        return linear(linear(x, known[4]), known[5], layer.bias)

    return answer


def _kernel_product(
    layer: TensorNetworkLinear, core: nn.Module, matrix: StoredMatrix
) -> Callable[[Tensor], Tensor | None]:
    """Make a function that uses a torch kernel to multiply by the layer's only core, without gradients."""
    strategy, (out_features, in_features) = layer.strategy, matrix.shape
    name, most_elements = layer._core_names[0], matrix.kernel_tokens * in_features
    codes, scales = core.codes, core.scales

    def answer(x: Tensor) -> Tensor | None:
        size = x.shape
        if getattr(layer, name) is not core or layer.strategy is not strategy:
            return None
        if core.codes is not codes or core.scales is not scales:
            return None
        if x.dtype is not torch.bfloat16 or not size or size[-1] != in_features or not x.is_cpu:
            return None
        if not 0 < x.numel() <= most_elements or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if torch.is_autocast_enabled("cpu") or transforms_active() or not codes.is_cpu:
            return None
        y = matrix.by_kernel(x.reshape(-1, in_features).contiguous()).view(*size[:-1], out_features)
        return y if layer.bias is None else y + layer.bias

    return answer


class MPOLinear(TensorNetworkLinear):
    """Linear layer whose weight is a matrix product operator; a drop-in replacement for `nn.Linear`.

    Args:
        in_features: size of each input vector.
        out_features: size of each output vector.
        bias: whether the layer has a bias.
        out_dims, in_dims: out-leg and in-leg size of each core; by default, balanced factors of the sizes.
        sites: number of cores if dims are absent, 3 by default.
        bond_dims: size of each bond between two cores.
        max_bond: largest size of a bond.
        topology: an MPO topology, in place of `out_dims`, `in_dims`, `sites`, `bond_dims` and `max_bond`.
        options: further arguments of `TensorNetworkLinear`.

    Raises:
        TopologyError: the dims do not fit the sizes.
        ShapeError: `topology` describes a matrix of another shape.

    Example:
        >>> layer = torch.nn.Linear(256, 512)
        >>> small = tn.nn.MPOLinear.from_linear(layer, sites=3, max_bond=16)
        >>> small(torch.randn(4, 256)).shape, small.topology.out_dims, small.topology.in_dims
        (torch.Size([4, 512]), (8, 8, 8), (8, 8, 4))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        bond_dims: Sequence[int] | None = None,
        max_bond: int | None = None,
        topology: Topology | None = None,
        **options: Any,
    ) -> None:
        if topology is None:
            topology = MPOFamily().build(
                out_features,
                in_features,
                out_dims=out_dims,
                in_dims=in_dims,
                sites=sites,
                bond_dims=bond_dims,
                max_bond=max_bond,
            )
        if topology.shape != (out_features, in_features):
            raise ShapeError(
                f"The topology describes a matrix of shape {topology.shape}, the layer has shape "
                f"{(out_features, in_features)} (out_features, in_features)."
            )
        super().__init__(topology, bias=bias, **options)


def empty_linear(topology: Topology, **options: Any) -> TensorNetworkLinear:
    """Build an uninitialized layer for a topology: `MPOLinear` for a chain, else `TensorNetworkLinear`."""
    if _is_chain(topology):
        return MPOLinear(topology.in_features, topology.out_features, topology=topology, **options)
    return TensorNetworkLinear(topology, **options)


def _is_chain(topology: Topology) -> bool:
    """Return True if the cores, labelled `(left, out, in, right)`, form a chain with end bonds of size 1."""
    legs = list(zip(topology.out_labels, topology.in_labels, strict=False))
    if not len(legs) == len(topology.out_labels) == len(topology.in_labels) == len(topology.cores):
        return False
    right: str | None = None
    for core, pair in zip(topology.cores, legs, strict=True):
        if len(core.labels) != 4 or core.labels[1:3] != pair or right not in (None, core.labels[0]):
            return False
        right = core.labels[3]
    ends = topology.cores[0].labels[0], topology.cores[-1].labels[3]
    return all(topology.size_of[x] == 1 for x in ends) and ends[0] != ends[1]


def linear_from_network(
    network: TensorNetwork,
    *,
    bias: Tensor | None,
    source: str,
    strategy: Strategy = "auto",
    storage: Storage = PLAIN,
    weighting: Weighting | None = None,
    rounding: Rounding = "two_sided",
) -> TensorNetworkLinear:
    """Build a layer from the cores of a network, in their dtype and on their device.

    Args:
        network: topology and cores of the weight.
        bias: bias of shape `(out_features,)`, which is copied, or None.
        source, strategy, storage: arguments of `TensorNetworkLinear`.
        weighting, rounding: how cores are rounded to integers (see `NetworkModule.set_cores`).
    """
    layer = empty_linear(
        network.topology,
        bias=bias is not None,
        source=source,
        strategy=strategy,
        storage=storage,
        device="meta",
    )
    layer.set_cores(network.cores, weighting, rounding)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(network.cores[0].dtype).clone())
    return layer


def linear_from_stored(
    topology: Topology,
    stored: Mapping[str, Tensor | PackedCore],
    *,
    source: str,
    storage: Storage,
    like: Tensor,
) -> TensorNetworkLinear:
    """Build a layer without a bias from stored cores; for the arguments see `NetworkModule.set_stored`."""
    layer = empty_linear(topology, bias=False, source=source, storage=storage, device="meta")
    layer.set_stored(stored, like)
    return layer


def _build(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> TensorNetworkLinear:
    return empty_linear(
        Topology.from_dict(spec["topology"]),
        bias=bool(spec["bias"]),
        source=spec["source"],
        storage=Storage.from_dict(spec.get("storage", {})),
        device=device,
        dtype=dtype,
    )


register_module_type("linear", _build)
