"""Linear layers whose weight is a tensor network."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as transforms_active
from torch.compiler import is_compiling
from torch.nn.functional import linear

from tensornet._util import check_input, is_exporting
from tensornet.contraction.cost import default_machine
from tensornet.contraction.lowering import is_slow
from tensornet.contraction.plan import PLANNED_TOKENS, contract_with_input, plan_operator
from tensornet.decompose import decompose
from tensornet.errors import TargetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.encoding import PLAIN, Storage, decode, storage_entry, unpacked
from tensornet.nn.execution import CACHED
from tensornet.nn.fast_path import through_kernel, through_matrices, with_kept_matrix
from tensornet.nn.integer_product import (
    INT8_TOKENS,
    IntegerMatrix,
    has_int8_kernel,
    multiply,
    multiply_int8,
)
from tensornet.nn.kernel_keeper import KERNEL_BUFFERS, KernelKeeper
from tensornet.nn.kernel_layout import KERNEL_TOKENS, KernelMatrix, multiply_int4, multiply_int4_twice
from tensornet.nn.layer_kinds import kind_of, layer_bias, layer_kind, type_and_reason
from tensornet.nn.matrix_cache import Strategy
from tensornet.nn.module import require_linear_shape
from tensornet.quantization import Rounding
from tensornet.topologies import MPOFamily, TopologyFamily
from tensornet.topologies.structure import is_chain
from tensornet.topology import Topology


class TensorNetworkLinear(KernelKeeper):
    """Linear layer `y = x W^T + b` whose matrix `W: (out_features, in_features)` is a tensor network.

    Args:
        topology: describes `W`.
        bias: whether there is a bias of shape `(out_features,)`.
        source: `"linear"` or `"conv1d"`, the stock layer that `to_linear` returns to.
        strategy, cache_limit, optimize, storage: how to apply `W`; see `NetworkModule`.
        device, dtype: as in `nn.Linear`.

    A new layer has Gaussian cores with `Var(W) = 1 / in_features` (see `random_cores`) and a zero bias.

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
        cache_limit: int | None = None,
        optimize: str = "auto",
        storage: Storage = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            topology,
            source=source,
            strategy=strategy,
            cache_limit=cache_limit,
            optimize=optimize,
            storage=storage,
            device=device,
            dtype=dtype,
        )
        self.out_features, self.in_features = topology.shape
        zeros = torch.zeros(self.out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", nn.Parameter(zeros) if zeros is not None else None)

    def forward(self, input: Tensor) -> Tensor:
        """Map `input: (..., in_features)` to `(..., out_features)`; named as in `nn.Linear`."""
        if not is_compiling() and self._fast_path is not None:
            y = self._fast_path(input)
            if y is not None:
                return y
        check_input(input, self.in_features)
        if (integers := self._integers(input)) is not None:
            if not is_compiling():
                self._remember_kernel(integers)
            return multiply(input, integers, self.bias)
        if (matrix := self._trained_matrix(input)) is not None:
            return linear(input, matrix, self.bias)
        if self.topology.terms and self.storage.own_dtypes and (y := self._by_terms(input)) is not None:
            return y
        # A comparison with the token count would restrict an exported program to one side of it.
        tokens = PLANNED_TOKENS if is_exporting() else input.numel() // self.in_features
        route = self.route(tokens, on_cpu=input.is_cpu)
        if route >= 0:
            y = contract_with_input(self.plan, self.cores, input, candidate=route, bias=self.bias)
        else:
            y = linear(input, self.kept_matrix() if route == CACHED else self.to_matrix(), self.bias)
        if not is_compiling():
            self._remember(route, input)
        return y

    def _integers(self, input: Tensor) -> IntegerMatrix | KernelMatrix | None:
        """Return the integer matrix if multiplying by integers is the fastest route, else None."""
        number_format = self.integer_format if self.storage.own_dtypes else None
        if number_format is None or self.strategy not in ("auto", "factorized") or is_exporting():
            return None
        if input.dtype != self.compute_like.dtype or torch.is_autocast_enabled(input.device.type):
            return None
        if not is_compiling() and transforms_active():
            return None
        if input.dtype == torch.bfloat16 and input.is_cpu and not is_compiling():
            self.hold_for_kernel()
        if (matrix := self.kernel_matrix) is not None:
            return matrix
        name, tensors = self.topology.core_names[0], self.stored
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            return None
        codes, scales, zeros = (tensors.get(f"{part}_{name}") for part in ("core", "scale", "zero"))
        assert codes is not None
        assert scales is not None
        return IntegerMatrix(number_format, codes, scales, zeros, self.in_features)

    def _trained_matrix(self, input: Tensor) -> Tensor | None:
        """Round trained codes to values in the dtype of autocast, else None.

        Autocast would cast them in another pass over memory, and their gradients back in a third.
        """
        number_format, device, name = self.integer_format, input.device.type, self.topology.core_names[0]
        if f"core_{name}" not in self._parameters or number_format is None or self.strategy == "cached":
            return None
        if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
            return None
        dtype = torch.get_autocast_dtype(device)
        return unpacked(number_format, self.stored, name, self.in_features, dtype)

    def _remember_kernel(self, matrix: IntegerMatrix | KernelMatrix) -> None:
        """Build the fast path for few tokens, if a kernel reads the matrix as held."""
        if isinstance(matrix, KernelMatrix):
            kernel = multiply_int4 if matrix.products == 1 else multiply_int4_twice
            names, most = KERNEL_BUFFERS, KERNEL_TOKENS // matrix.products
        elif has_int8_kernel(matrix.number_format, matrix.shape) and matrix.scales.dtype == torch.bfloat16:
            name = self.topology.core_names[0]
            names, kernel, most = (f"core_{name}", f"scale_{name}"), multiply_int8, INT8_TOKENS
        else:
            return
        self._fast_path = through_kernel(self, names, matrix.shape, most, kernel)

    def _by_terms(self, input: Tensor) -> Tensor | None:
        """Apply a sum whose first term is an integer matrix, multiplied block by block; None if it is not."""
        (first, *_), *others = self.topology.parts
        name = self.topology.core_names[first[0]]
        number_format, tensors = self.storage.format_of(name), self.stored
        usable = self.strategy in ("auto", "factorized") and input.dtype == self.compute_like.dtype
        if len(first) > 1 or not number_format.is_integer or not usable or is_compiling():
            return None
        codes, scales = tensors[f"core_{name}"], tensors[f"scale_{name}"]
        trained = codes.is_floating_point() or (scales.requires_grad and torch.is_grad_enabled())
        padded = self.topology.shape != self.topology.padded_shape
        if trained or padded or transforms_active() or torch.is_autocast_enabled(input.device.type):
            return None
        zeros = tensors.get(f"zero_{name}")
        matrix = IntegerMatrix(number_format, codes, scales, zeros, self.in_features)
        cores = decode(self.topology, self.storage, tensors, self._gauge_axes, input.dtype, [name])
        machine, tokens = self.machine or default_machine(input.device), input.numel() // self.in_features
        y = multiply(input, matrix, self.bias)
        for positions, part in others:
            plan = plan_operator(part, self._optimize)
            route = plan.fastest(max(tokens, 1), machine, input.element_size(), rebuild=False)
            y = y + contract_with_input(plan, [cores[k] for k in positions], input, candidate=route)
        return y

    def _remember(self, route: int, input: Tensor) -> None:
        """Store a fast path for passes like that of this input, which took this route, if one exists."""
        if route == CACHED and self._cached is not None:
            self._fast_path = with_kept_matrix(self, self._cached)
        elif route >= 0 and self.storage.plain and self.strategy != "cached" and not is_slow(input):
            largest, first = self.routes(input.is_cpu, rebuild=self.strategy == "auto")[0]
            plan = self.plan
            if route == first and not plan.is_padded:
                self._fast_path = through_matrices(self, self._stored_names, plan.applies[route], largest)

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
        cache_limit: int | None = None,
        **options: Any,
    ) -> "TensorNetworkLinear":
        """Decompose a stock layer, which stays unchanged; the result shares no memory with it.

        Args:
            layer: an `nn.Linear` or a Hugging Face `Conv1D`.
            topology: a registered family or its name, which chooses dims and bonds; or a topology, which
                leaves no choice.
            max_bond, rel_error, param_ratio: budget, see `Budget`.
            strategy, cache_limit: how the new layer is applied, see `NetworkModule`.
            options: passed to the family, for example `sites=`, `out_dims=`, `in_dims=`.

        Raises:
            TargetError: the layer is of another type.
            BudgetError, NonFiniteError, TopologyError: from the decomposition.
        """
        kind = kind_of(layer)
        if kind is None or kind.name == "embedding":
            raise TargetError(
                f"from_linear takes nn.Linear or Conv1D, got {type_and_reason(layer)}; subclasses are "
                "refused because their own code may read the dense weight."
            )
        matrix = kind.matrix(layer)
        result = decompose(
            matrix, topology, max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio, **options
        )
        network = result.network.to(matrix.dtype)
        made = linear_from_network(network, bias=layer_bias(layer), source=kind.name, strategy=strategy)
        return made.configure(cache_limit=cache_limit)

    def to_linear(self) -> nn.Module:
        """Convert to the stock layer this layer was made from, with the rebuilt dense weight."""
        with torch.no_grad():
            bias = None if self.bias is None else self.bias.detach().clone()
            return layer_kind(self.source).build(self.own_matrix(), bias)

    def spec(self) -> dict[str, Any]:
        """Describe the layer, see `NetworkModule.spec`."""
        return {
            "type": "linear",
            "source": self.source,
            "bias": self.bias is not None,
            "topology": self.topology.to_dict(),
            **storage_entry(self.storage),
        }

    def __format__(self, spec: str) -> str:
        """Add a hint to the repr, since PEFT formats a layer that it cannot adapt into its error.

        >>> f"{tn.nn.TensorNetworkLinear.from_linear(torch.nn.Linear(4, 4), max_bond=1)}".partition(") (")[2]
        'adapters reach it by tensornet_hf.peft.lora_config and load_adapters)'
        """
        return f"{self!r} (adapters reach it by tensornet_hf.peft.lora_config and load_adapters)"

    def extra_repr(self) -> str:
        """Format the sizes for `print(model)`."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"topology={self.topology.family}, bonds={list(self.topology.bond_dims.values())}, "
            f"strategy={self.strategy}"
        )


class MPOLinear(TensorNetworkLinear):
    """Linear layer whose weight is a matrix product operator; drop-in for `nn.Linear`.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether there is a bias.
        out_dims, in_dims: leg sizes; balanced factors if absent.
        sites: number of cores where dims are absent, 3 by default.
        bond_dims: the inner bonds.
        max_bond: cap on every bond.
        topology: an MPO topology, instead of the five above.
        source, strategy, cache_limit, optimize, storage, device, dtype: see `TensorNetworkLinear`.

    Raises:
        TopologyError: the dims do not fit.
        ShapeError: `topology` describes another shape.

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
        source: str = "linear",
        strategy: Strategy = "auto",
        cache_limit: int | None = None,
        optimize: str = "auto",
        storage: Storage = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        require_linear_shape(topology, out_features, in_features)
        super().__init__(
            topology,
            bias=bias,
            source=source,
            strategy=strategy,
            cache_limit=cache_limit,
            optimize=optimize,
            storage=storage,
            device=device,
            dtype=dtype,
        )


def empty_linear(
    topology: Topology,
    *,
    bias: bool,
    source: str = "linear",
    strategy: Strategy = "auto",
    storage: Storage = PLAIN,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TensorNetworkLinear:
    """Build an uninitialized layer for a topology: `MPOLinear` for chains, else `TensorNetworkLinear`."""
    options: dict[str, Any] = {
        "bias": bias,
        "source": source,
        "strategy": strategy,
        "storage": storage,
        "device": device,
        "dtype": dtype,
    }
    if is_chain(topology):
        return MPOLinear(topology.in_features, topology.out_features, topology=topology, **options)
    return TensorNetworkLinear(topology, **options)


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
    """Build a layer from cores and a copy of the bias, in the dtype and on the device of the cores.

    `weighting` and `rounding` decide how cores are rounded, see `NetworkModule.set_cores`.
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
    topology: Topology, stored: Mapping[str, Tensor], *, source: str, storage: Storage, like: Tensor
) -> TensorNetworkLinear:
    """Build a layer without a bias from stored tensors, in the dtype and on the device of a tensor.

    See `NetworkModule.set_stored`.
    """
    layer = empty_linear(topology, bias=False, source=source, storage=storage, device="meta")
    layer.set_stored(stored, like)
    return layer
