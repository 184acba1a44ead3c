"""Tensor network: a topology together with its cores."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tensornet._util import check_size, html_table
from tensornet.contraction.machine import default_machine
from tensornet.contraction.operator import contract_with_input, plan_matrix, plan_operator
from tensornet.contraction.steps import run
from tensornet.drawing import draw_topology
from tensornet.errors import ShapeError, TopologyError
from tensornet.topology import Topology

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TensorNetwork:
    """Linear operator `(out_features, in_features)` stored as cores.

    Args:
        topology: the description.
        cores: tensors, either in the order of `topology.cores` or by name.

    Raises:
        ShapeError: a core is missing, surplus, or has another shape, dtype or device than the rest.

    Example:
        >>> topology = tn.topologies.low_rank(out_features=8, in_features=6, rank=2)
        >>> shapes = topology.core_shapes.values()
        >>> network = tn.TensorNetwork(topology, [torch.randn(shape) for shape in shapes])
        >>> network.apply(torch.randn(5, 6)).shape, network.to_matrix().shape
        (torch.Size([5, 8]), torch.Size([8, 6]))
    """

    def __init__(self, topology: Topology, cores: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        self.topology = topology
        self.cores = check_cores(topology, cores)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{list(shape)}" for name, shape in self.topology.core_shapes.items())
        return (
            f"TensorNetwork({self.topology.family}, {self.shape}, {self.num_params:,} parameters: {shapes})"
        )

    def _repr_html_(self) -> str:
        """Format as a table for notebooks."""
        rows, columns = self.shape
        caption = f"TensorNetwork, {self.topology.family}, {rows} x {columns}, {self.num_params:,} parameters"
        cores = zip(self.topology.cores, self.cores, strict=True)
        return html_table(
            caption,
            ("core", "indices", "shape", "parameters"),
            [
                (spec.name, " ".join(spec.labels), " x ".join(map(str, core.shape)), f"{core.numel():,}")
                for spec, core in cores
            ],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out_features, in_features)`."""
        return self.topology.shape

    @property
    def num_params(self) -> int:
        """Number of stored elements, padding included."""
        return self.topology.num_params

    def to_matrix(self) -> Tensor:
        """Contract the cores to the dense matrix, shape `(out_features, in_features)`."""
        dense = run(plan_matrix(self.topology), self.cores)
        return dense[: self.shape[0], : self.shape[1]]

    def apply(self, x: Tensor) -> Tensor:
        """Multiply `x: (..., in_features)` by the operator without building its matrix.

        Raises:
            ShapeError: not a tensor, or its last dimension is not `in_features`.
        """
        if not isinstance(x, Tensor) or x.ndim == 0:
            got = "a number without dimensions" if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(
                f"apply needs a torch.Tensor of shape (..., in_features={self.shape[1]}), got {got}."
            )
        plan, tokens = plan_operator(self.topology), max(x.numel() // max(x.shape[-1], 1), 1)
        core = self.cores[0]
        machine = default_machine(core.device)
        candidate = plan.fastest(tokens, machine, core.element_size(), rebuild=False)
        return contract_with_input(plan, self.cores, x, candidate=candidate)

    def flops(self, tokens: int) -> int:
        """Count the floating-point operations of `apply` for a token count (a multiply-add counts as two).

        Raises:
            ValueError: `tokens` is negative or not an integer.
        """
        check_size("tokens", tokens, least=0, error=ValueError)
        return 2 * min(plan.multiply_adds(tokens) for plan in plan_operator(self.topology).applies)

    def draw(self) -> "Figure":
        """Draw the network as a `matplotlib.figure.Figure`. See `tensornet.drawing`."""
        return draw_topology(self.topology)

    def to(self, dtype: torch.dtype) -> "TensorNetwork":
        """Copy the network with every core cast to `dtype`."""
        return TensorNetwork(self.topology, [core.to(dtype) for core in self.cores])


def check_cores(topology: Topology, cores: Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Order the cores as in the topology, and check their shapes, dtypes and devices.

    Raises:
        ShapeError: a core is missing, surplus or unfit; the message names the core and both shapes.
        TopologyError: the first argument is not a topology.
    """
    if not isinstance(topology, Topology):
        raise TopologyError(
            f"A network needs a Topology, got {topology!r}; make one with a builder such as topologies.mpo."
        )
    if isinstance(cores, Mapping):
        if missing := [name for name in topology.core_names if name not in cores]:
            raise ShapeError(f"Missing cores {missing}; the topology has {list(topology.core_names)}.")
        if surplus := sorted(cores.keys() - set(topology.core_names)):
            raise ShapeError(f"Surplus cores {surplus}; the topology has {list(topology.core_names)}.")
        ordered = tuple(cores[name] for name in topology.core_names)
    else:
        ordered = tuple(cores)
        if len(ordered) != len(topology.cores):
            raise ShapeError(f"Got {len(ordered)} cores, the topology has {list(topology.core_names)}.")
    for name, core in zip(topology.core_names, ordered, strict=True):
        expected = topology.core_shapes[name]
        if not isinstance(core, Tensor):
            raise ShapeError(f"Core {name!r} must be a torch.Tensor, got {type(core).__name__}.")
        if tuple(core.shape) != expected:
            raise ShapeError(f"Core {name!r} has shape {tuple(core.shape)}, its topology says {expected}.")
        if (core.dtype, core.device) != (ordered[0].dtype, ordered[0].device):
            raise ShapeError(
                f"Core {name!r} is {core.dtype} on {core.device}, the first core is "
                f"{ordered[0].dtype} on {ordered[0].device}; all cores must agree."
            )
    return ordered


def random_cores(
    topology: Topology,
    *,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, ...]:
    """Draw Gaussian cores such that each matrix element has mean 0 and variance `gain^2 / in_features`.

    An element of the matrix is a sum over `B = product of all bond sizes` products of `n` independent core
    elements, so with standard deviation `s` for every core its variance is `B * s^(2n)`; hence
    `s = (gain^2 / (in_features * B))^(1 / (2n))`. The terms of a sum have equal parts of the variance.

    Args:
        topology: describes the cores.
        gain: factor on the standard deviation of the matrix, 1 keeps the variance of activations.
        generator: source of randomness; the global one if absent.
        dtype: dtype of the cores, torch's default if absent.
        device: device of the cores; that of the generator, or torch's default, if absent.
    """
    if device is None and generator is not None:
        device = generator.device
    deviations = {}
    for positions, part in topology.parts:
        bonds = math.prod(part.bond_dims.values())
        variance = gain**2 / (topology.in_features * bonds * len(topology.parts))
        deviations.update(dict.fromkeys(positions, variance ** (0.5 / len(positions))))
    return tuple(
        torch.randn(shape, generator=generator, dtype=dtype, device=device) * deviations[k]
        for k, shape in enumerate(topology.core_shapes.values())
    )
