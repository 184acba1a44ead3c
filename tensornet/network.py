"""A topology with tensors in it: the operator itself."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tensornet.contraction import TOKENS, ContractionPlan, plan_contraction, run
from tensornet.errors import ShapeError
from tensornet.topology import Topology

#: Token count that contraction orders are optimised for. The order seldom depends on it, the choice
#: between the strategies does, and that is made for the actual count.
PLANNED_TOKENS = 256


@dataclass(frozen=True)
class OperatorPlan:
    """Both contractions of an operator, planned once.

    Args:
        topology: the operator.
        apply: `x: (tokens, *in_dims) -> (tokens, *out_dims)`; operands are x, then the cores.
        matrix: the padded matrix `(*out_dims, *in_dims)`; operands are the cores.
    """

    topology: Topology
    apply: ContractionPlan
    matrix: ContractionPlan


@lru_cache(maxsize=4096)
def plan_operator(topology: Topology, tokens: int = PLANNED_TOKENS) -> OperatorPlan:
    """Plan an operator; layers call this when they are built, never in `forward`."""
    cores = [core.labels for core in topology.cores]
    sizes = {**topology.size_of, TOKENS: tokens}
    ins, outs = topology.in_labels, topology.out_labels
    return OperatorPlan(
        topology=topology,
        apply=plan_contraction([(TOKENS, *ins), *cores], (TOKENS, *outs), sizes),
        matrix=plan_contraction(cores, (*outs, *ins), sizes),
    )


def contract_to_matrix(plan: OperatorPlan, cores: Sequence[Tensor]) -> Tensor:
    """Dense matrix of the operator, shape `(out_features, in_features)`, differentiable."""
    topology = plan.topology
    dense = run(plan.matrix, cores).reshape(topology.padded_shape)
    if topology.padded_shape != topology.shape:
        dense = dense[: topology.out_features, : topology.in_features]
    return dense


def contract_with_input(plan: OperatorPlan, cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Apply the operator core by core, without building its matrix.

    Args:
        plan: the planned operator.
        cores: tensors in the order of its topology.
        x: input, shape `(..., in_features)`.

    Returns:
        Output of shape `(..., out_features)`.
    """
    topology = plan.topology
    flat = x.reshape(-1, topology.in_features)
    padded_out, padded_in = topology.padded_shape
    if padded_in != topology.in_features:
        flat = torch.nn.functional.pad(flat, (0, padded_in - topology.in_features))
    y = run(plan.apply, [flat, *cores]).reshape(-1, padded_out)
    if padded_out != topology.out_features:
        y = y[:, : topology.out_features]
    return y.reshape(*x.shape[:-1], topology.out_features)


class TensorNetwork:
    """A linear operator `(out_features, in_features)` stored as cores.

    Args:
        topology: the description.
        cores: tensors, either in the order of `topology.cores` or by name.

    Raises:
        ShapeError: a core is missing, surplus, or has another shape, dtype or device than the rest.
    """

    def __init__(self, topology: Topology, cores: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        self.topology = topology
        self.cores = check_cores(topology, cores)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{list(shape)}" for name, shape in self.topology.core_shapes.items())
        return (
            f"TensorNetwork({self.topology.family}, {self.shape}, {self.num_params:,} parameters: {shapes})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self.topology.shape

    @property
    def num_params(self) -> int:
        """Number of stored elements, padding included."""
        return self.topology.num_params

    def to_matrix(self) -> Tensor:
        """Dense matrix, shape `(out_features, in_features)`."""
        return contract_to_matrix(plan_operator(self.topology), self.cores)

    def apply(self, x: Tensor) -> Tensor:
        """Apply to `x: (..., in_features)`, giving `(..., out_features)`, without building the matrix."""
        return contract_with_input(plan_operator(self.topology), self.cores, x)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of `apply` for that many tokens (a multiply-add counts as two)."""
        return 2 * plan_operator(self.topology, max(tokens, 1)).apply.multiply_adds

    def to(self, dtype: torch.dtype) -> "TensorNetwork":
        """A copy with every core cast to `dtype`."""
        return TensorNetwork(self.topology, [core.to(dtype) for core in self.cores])


def check_cores(topology: Topology, cores: Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Cores in the order of the topology, after comparing every shape, dtype and device.

    Raises:
        ShapeError: naming the core, what was expected and what was got.
    """
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
    """Gaussian cores such that each matrix element has mean 0 and variance `gain^2 / in_features`.

    An element of the matrix is a sum over `B = product of all bond sizes` products of `n` independent core
    elements, so with standard deviation `s` for every core its variance is `B * s^(2n)`; hence
    `s = (gain^2 / (in_features * B))^(1 / (2n))`.

    Args:
        topology: describes the cores.
        gain: factor on the standard deviation of the matrix, 1 keeps the variance of activations.
        generator: source of randomness; the global one if absent.
        dtype: dtype of the cores, torch's default if absent.
        device: device of the cores.
    """
    bonds = math.prod(topology.bond_dims.values())
    std = (gain**2 / (topology.in_features * bonds)) ** (0.5 / len(topology.cores))
    return tuple(
        torch.randn(shape, generator=generator, dtype=dtype, device=device) * std
        for shape in topology.core_shapes.values()
    )
