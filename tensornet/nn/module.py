"""Base class of all tensor-network layers: parameters, description, strategy."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.contraction.cost import Machine
from tensornet.contraction.plan import check_optimize, contract_to_matrix
from tensornet.errors import ShapeError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork, check_cores, random_cores
from tensornet.nn.encoding import PLAIN, Storage, decode, empty, encode, gauge_axes, hold, layout
from tensornet.nn.execution import RoutedModule
from tensornet.nn.fixed_dtypes import FixedDtypes
from tensornet.nn.integer_cost import IntegerCost, unpacking_cost
from tensornet.nn.matrix_cache import Strategy
from tensornet.nn.storage import kept_shapes
from tensornet.nn.weight_facts import weight_facts
from tensornet.quantization import NumberFormat, Rounding
from tensornet.topology import Topology


class NetworkModule(FixedDtypes, RoutedModule):
    """Abstract base: cores registered as parameters `core_<name>`, and a topology that describes them.

    With another than plain storage `tensornet.nn.encoding` derives the stored tensors from the cores:
    floating ones are parameters, integers are persistent buffers. Where number formats fix dtypes, `.to()`,
    `.half()` and the like move those tensors and keep their dtype, while the dtype of computing follows.

    Args:
        topology: the operator `(out_features, in_features)`.
        source: kind of stock layer that this replaces (see `layer_kinds`), to which `decompress` returns.
        strategy: `"factorized"` contracts the input with the cores, and may hold integers of 2 bits as 4 for
            a kernel of torch, `"reconstruct"` rebuilds the matrix for each call and frees it, `"auto"` takes
            the faster of both by the cost model, `"cached"` keeps the rebuilt matrix in eval while no
            gradient of a core is wanted (memory for speed). See `explain`.
        cache_limit: largest matrix to keep under `"cached"`, in bytes; None sets no limit, 0 keeps none. For
            a limit on a whole model see `set_strategy`.
        optimize: how contraction orders are found: `"auto"`, `"cotengra"`, or a name `opt_einsum` knows.
        storage: encoding of the cores.
        device: where the cores are allocated; `"meta"` allocates nothing.
        dtype: dtype of the cores.

    Raises:
        ValueError: unknown strategy, negative limit.

    Example:
        >>> layer = tn.nn.TensorNetworkLinear(tn.topologies.mpo(out_dims=(4, 4), in_dims=(4, 4), max_bond=4))
        >>> isinstance(layer, tn.nn.NetworkModule), [name for name, _ in layer.named_parameters()]
        (True, ['core_0', 'core_1', 'bias'])
    """

    def __init__(
        self,
        topology: Topology,
        *,
        source: str,
        strategy: Strategy = "auto",
        cache_limit: int | None = None,
        optimize: str = "auto",
        storage: Storage = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.topology = topology
        check_optimize(optimize)
        self.source = source
        self.storage = storage
        # Here and not in `forward`, which asks no registry.
        self._gauge_axes = gauge_axes(topology, storage)
        self._tensor_names = tuple(layout(topology, storage, torch.float32))
        if device is not None and torch.device(device).type == "meta":
            kept = empty(topology, storage, device=device, dtype=dtype)
        else:
            kept = encode(topology, storage, random_cores(topology, device=device, dtype=dtype))
        for name, tensor in kept.items():
            hold(self, name, tensor)
        if storage.own_dtypes:
            like = torch.empty(0, dtype=dtype or torch.get_default_dtype(), device=device)
            self.register_buffer("compute_like", like, persistent=False)
        self._start_routing(strategy, cache_limit, optimize)

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """Cores in the order of the topology; the parameters themselves if storage is plain."""
        return cores_of(self)

    @property
    def stored(self) -> dict[str, Tensor]:
        """Parameters and buffers that hold the cores, by name."""
        return {name: getattr(self, name) for name in self._tensor_names}

    def set_cores(
        self, cores: Sequence[Tensor], weighting: Weighting | None = None, rounding: Rounding = "two_sided"
    ) -> None:
        """Replace the core parameters by tensors, which keep their dtype and device.

        Tensors that are parameters already are shared, not copied: that is how tied layers stay tied.

        Args:
            cores: in the order of the topology.
            weighting: sensitivity of the loss, with which cores are rounded where they are kept as integers.
            rounding: as for `encode`.

        Raises:
            ShapeError: a core does not have the shape its topology says.
        """
        kept = encode(self.topology, self.storage, check_cores(self.topology, cores), weighting, rounding)
        for name, tensor in kept.items():
            # Contiguous, as they come back from a file: a pass reads them without a copy, to the same bits.
            hold(self, name, tensor if isinstance(tensor, nn.Parameter) else tensor.contiguous())
        self._compute_as(cores[0])
        self._forget_routes()

    def set_stored(self, stored: Mapping[str, Tensor], like: Tensor) -> None:
        """Replace the stored tensors, with the names and shapes of `layout`.

        Parameters and buffers are taken as they are, so that several layers may hold one of them.

        Args:
            stored: all tensors that hold the cores.
            like: tensor in whose dtype and on whose device the layer computes.

        Raises:
            ShapeError: a tensor is missing, or has another shape.
        """
        wanted = {name: shape for name, (shape, _) in layout(self.topology, self.storage, like.dtype).items()}
        found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if found != wanted:
            raise ShapeError(f"The layer stores tensors of shapes {wanted}, got {found}.")
        for name, tensor in stored.items():
            hold(self, name, tensor)
        self._compute_as(like)
        self._forget_routes()

    def share_cores(self, other: "NetworkModule") -> None:
        """Use the stored tensors of another module of the same topology and storage: tied weights.

        Raises:
            ShapeError: topology or storage differ.
        """
        if (self.topology, self.storage) != (other.topology, other.storage):
            raise ShapeError(
                "Only modules of the same topology and storage can share cores; got "
                f"{self.topology.family!r} of shape {self.topology.shape} stored as {self.storage} and "
                f"{other.topology.family!r} of shape {other.topology.shape} stored as {other.storage}."
            )
        for name, tensor in other.stored.items():
            hold(self, name, tensor)
        self._compute_as(other._computed_like())
        self._forget_routes()

    @property
    def network(self) -> TensorNetwork:
        """Operator as a network that shares this layer's parameters."""
        return TensorNetwork(self.topology, self.cores)

    @property
    def num_params(self) -> int:
        """Stored numbers, bias, scales and padding included; packed integers count one by one."""
        counts = self.stored_counts
        others = (*self.named_parameters(), *self.named_buffers())
        return sum(counts.values()) + sum(x.numel() for name, x in others if name not in counts)

    @property
    def weight(self) -> Tensor:
        """Stand-in with dtype, device and shape of the dense weight, for code that reads those.

        Any use of its numbers raises TargetError: the matrix would bring back what was compressed, and is
        what `to_matrix` returns.
        """
        # Not `stored`, which undoes the layout of kernels: some models ask for the dtype in every pass.
        kept = (self._parameters.get(name) for name in self._tensor_names)
        trained = [tensor for tensor in kept if tensor is not None]
        return weight_facts(self._computed_like(), self.topology.shape, trained)

    def _computed_like(self) -> Tensor:
        first = self.topology.core_names[0]
        if not self.storage.own_dtypes:
            stored = getattr(self, f"core_{first}")
            assert isinstance(stored, Tensor)
            return stored
        like, device = self.compute_like, self._held_device()
        # They part where stored tensors are put in place of those on the meta device.
        return like if like.device == device else torch.empty(0, dtype=like.dtype, device=device)

    def _held_device(self) -> torch.device:
        device: torch.device = getattr(self, f"core_{self.topology.core_names[0]}").device
        return device

    def _integer_costs(self, tokens: int, machine: Machine) -> dict[str, IntegerCost]:
        if not self.storage.quantized:
            return {}
        cost = unpacking_cost(self.topology, self.storage, machine, self._computed_like().element_size())
        return dict.fromkeys(("factorized", "reconstruct"), cost)

    def to_matrix(self) -> Tensor:
        """Contract to the dense matrix, shape `(out_features, in_features)`, differentiable."""
        return contract_to_matrix(self.plan, self.cores)

    def own_matrix(self) -> Tensor:
        """Contract to a contiguous matrix with memory of its own; `to_matrix` may return a view of a core."""
        matrix = self.to_matrix()
        if len(self.topology.cores) > 1 and matrix.untyped_storage().nbytes() == matrix.nbytes:
            return matrix.contiguous()
        return matrix.clone(memory_format=torch.contiguous_format)

    @property
    def fixed_dtypes(self) -> dict[str, torch.dtype]:
        """See `FixedDtypes`."""
        if not self.storage.own_dtypes:
            return {}
        kinds = layout(self.topology, self.storage, torch.float32)
        return {name: kind for name, (_, kind) in kinds.items() if self.storage.has_own_dtype(name)}

    @property
    def integer_cores(self) -> dict[str, tuple[NumberFormat, int]]:
        """See `FixedDtypes`."""
        return {
            f"core_{name}": (self.storage.format_of(name), view[-1])
            for name, view, _ in kept_shapes(self.topology, self.storage)
            if self.storage.format_of(name).is_integer
        }

    def _compute_as(self, tensor: Tensor) -> None:
        """Compute in the dtype and on the device of a tensor from now on."""
        if self.storage.own_dtypes:
            self.compute_like = tensor.new_empty(0)

    def spec(self) -> dict[str, Any]:
        """Describe the layer for `tensornet.nn.build_module`, JSON-ready."""
        raise TypeError(f"{type(self).__name__} must define spec().")


def cores_of(module: NetworkModule) -> tuple[Tensor, ...]:
    """Return the stored cores of a module, decoded."""
    if module.storage.plain:
        return tuple(getattr(module, f"core_{name}") for name in module.topology.core_names)
    dtype = module._computed_like().dtype if module.storage.own_dtypes else None
    return decode(module.topology, module.storage, module.stored, module._gauge_axes, dtype)


def require_linear_shape(topology: Topology, out_features: int, in_features: int) -> None:
    """Raise ShapeError unless a topology has the given shape.

    Raises:
        ShapeError: the shapes differ.
    """
    if topology.shape != (out_features, in_features):
        raise ShapeError(
            f"The topology describes a matrix of shape {topology.shape}, the layer has shape "
            f"{(out_features, in_features)} (out_features, in_features)."
        )
