"""What every layer made of cores shares: its parameters, its description, its strategy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.errors import ShapeError
from tensornet.network import TensorNetwork, check_cores, contract_to_matrix, plan_operator, random_cores
from tensornet.nn.strategy import STRATEGIES, Strategy
from tensornet.topology import Topology


class NetworkModule(nn.Module):
    """Abstract base: cores registered as parameters `core_<name>`, and a topology that describes them.

    Args:
        topology: the operator `(out_features, in_features)`.
        source: kind of stock layer this stands for (see `adapters`), to which `to_dense` returns.
        strategy: `"factorized"`, `"reconstruct"`, `"cached"` or `"auto"`.
        device: where the cores are allocated; `"meta"` allocates nothing.
        dtype: dtype of the cores.

    Raises:
        ValueError: unknown strategy.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        source: str,
        strategy: Strategy = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
        self.topology = topology
        self.plan = plan_operator(topology)  # planned here: opt_einsum in forward breaks torch.compile
        self.source = source
        self.strategy: Strategy = strategy
        for name, core in zip(
            topology.core_names, random_cores(topology, device=device, dtype=dtype), strict=True
        ):
            self.register_parameter(f"core_{name}", nn.Parameter(core))

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The core parameters, in the order of the topology."""
        return tuple(getattr(self, f"core_{name}") for name in self.topology.core_names)

    def set_cores(self, cores: Sequence[Tensor]) -> None:
        """Replace the core parameters, keeping dtype and device of the tensors given.

        Tensors that are parameters already are shared, not copied: that is how tied layers stay tied.

        Raises:
            ShapeError: a core does not have the shape its topology says.
        """
        for name, core in zip(self.topology.core_names, check_cores(self.topology, cores), strict=True):
            shared = core if isinstance(core, nn.Parameter) else nn.Parameter(core)
            self.register_parameter(f"core_{name}", shared)

    @property
    def network(self) -> TensorNetwork:
        """The operator, sharing this layer's parameters."""
        return TensorNetwork(self.topology, self.cores)

    @property
    def num_params(self) -> int:
        """Number of parameters, bias included."""
        return sum(p.numel() for p in self.parameters())

    @property
    def weight(self) -> Tensor:
        """The first core: a view of dtype and device for code that reads `layer.weight.dtype`.

        Never the dense matrix, which would bring back what was compressed; use `to_matrix` for that.
        """
        return self.cores[0]

    def to_matrix(self) -> Tensor:
        """Dense matrix, shape `(out_features, in_features)`, differentiable."""
        return contract_to_matrix(self.plan, self.cores)

    def spec(self) -> dict[str, Any]:
        """JSON-ready description from which `tensornet.nn.build_module` makes an empty twin."""
        raise TypeError(f"{type(self).__name__} must define spec().")


def require_linear_shape(topology: Topology, out_features: int, in_features: int) -> None:
    """Refuse a topology for another shape.

    Raises:
        ShapeError: the shapes differ.
    """
    if topology.shape != (out_features, in_features):
        raise ShapeError(
            f"The topology describes a matrix of shape {topology.shape}, the layer has shape "
            f"{(out_features, in_features)} (out_features, in_features)."
        )
