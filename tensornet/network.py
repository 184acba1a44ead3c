"""A topology with tensors in it: the operator itself."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tensornet.checks import check_input, check_size
from tensornet.contraction.cost import plan_seconds
from tensornet.contraction.lowering import lower_path
from tensornet.contraction.machine import CPU, Machine, default_machine
from tensornet.contraction.path import TOKENS, ContractionPlan, find_path, run
from tensornet.drawing import draw_topology
from tensornet.errors import ShapeError, TopologyError
from tensornet.topology import Topology

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Token count assumed where the actual one is not known, as in an exported program.
PLANNED_TOKENS = 256

#: Token counts for which the cheapest order is looked for; sweeps over the cores are tried besides.
_PATH_TOKENS = (1, 16, 256, 4096)


@dataclass(frozen=True)
class OperatorPlan:
    """The contractions of an operator, planned once.

    Args:
        topology: the operator.
        applies: candidates for `x: (tokens, padded in) -> (tokens, padded out)`; operands are x, then the
            cores. None builds the whole matrix. Which is fastest depends on the tokens and the machine.
        matrix: the padded matrix; operands are the cores.
        padded_shape: of the matrix before padding is cut off.
    """

    topology: Topology
    applies: tuple[ContractionPlan, ...]
    matrix: ContractionPlan
    padded_shape: tuple[int, int]

    def cheapest_apply(self, tokens: int, machine: Machine, itemsize: int = 4) -> int:
        """Position of the fastest candidate for that many tokens."""
        return min(
            range(len(self.applies)),
            key=lambda k: plan_seconds(self.applies[k], tokens, machine, itemsize),
        )


@lru_cache(maxsize=4096)
def plan_operator(topology: Topology, optimize: str = "auto") -> OperatorPlan:
    """Plan an operator; layers call this when they are built, never in `forward`.

    Args:
        topology: the operator.
        optimize: how orders are found, see `tensornet.contraction.path.Optimize`.
    """
    cores = [core.labels for core in topology.cores]
    operands = [(TOKENS, *topology.in_labels), *cores]
    output = (TOKENS, *topology.out_labels)
    applies: dict[tuple[tuple[int, int], ...], ContractionPlan] = {}
    for tokens, path in _candidate_paths(operands, output, topology, optimize):
        if tuple(path) not in applies and (len(cores) == 1 or not _builds_matrix(path)):
            sizes = {**topology.size_of, TOKENS: tokens}
            lowered = lower_path(operands, output, sizes, path)
            applies[tuple(path)] = replace(lowered, output_shape=(-1, topology.padded_shape[0]))
    return OperatorPlan(
        topology=topology,
        applies=tuple(applies.values()),
        matrix=replace(plan_matrix(topology, optimize), output_shape=topology.padded_shape),
        padded_shape=topology.padded_shape,
    )


@lru_cache(maxsize=4096)
def plan_matrix(topology: Topology, optimize: str = "auto") -> ContractionPlan:
    """Plan the padded matrix `(*out_dims, *in_dims)`: the cheapest of several orders."""
    cores = [core.labels for core in topology.cores]
    output = (*topology.out_labels, *topology.in_labels)
    return plan_cores(topology, cores, output, optimize)


def plan_cores(
    topology: Topology, operands: Sequence[tuple[str, ...]], output: tuple[str, ...], optimize: str = "auto"
) -> ContractionPlan:
    """Plan the contraction of some cores, given by their labels: the cheapest of several orders."""
    paths = [find_path(operands, output, topology.size_of, optimize), *_sweeps(len(operands))]
    distinct = dict.fromkeys(map(tuple, paths))
    plans = [lower_path(operands, output, topology.size_of, path) for path in distinct]
    return min(plans, key=lambda plan: plan_seconds(plan, 1, CPU))


def _candidate_paths(
    operands: list[tuple[str, ...]], output: tuple[str, ...], topology: Topology, optimize: str
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    for tokens in _PATH_TOKENS:
        yield tokens, find_path(operands, output, {**topology.size_of, TOKENS: tokens}, optimize)
    for path in _sweeps(len(operands)):
        yield _PATH_TOKENS[1], path


def _sweeps(count: int) -> tuple[list[tuple[int, int]], ...]:
    """Start with the first operand and take in the others one by one, in order or in reverse."""
    if count == 1:
        return ([],)
    forward = [(0, 1), *((0, left - 1) for left in range(count - 1, 1, -1))]
    backward = [(0, count - 1), *((left - 2, left - 1) for left in range(count - 1, 1, -1))]
    return forward, backward


def _builds_matrix(path: Sequence[tuple[int, int]]) -> bool:
    """Whether the input, operand 0, is only touched by the last step."""
    return all(0 not in step for step in path[:-1])


def contract_to_matrix(plan: OperatorPlan, cores: Sequence[Tensor]) -> Tensor:
    """Dense matrix of the operator, shape `(out_features, in_features)`, differentiable."""
    dense = run(plan.matrix, cores)
    topology = plan.topology
    if plan.padded_shape != topology.shape:
        dense = dense[: topology.out_features, : topology.in_features]
    return dense


def contract_with_input(
    plan: OperatorPlan,
    cores: Sequence[Tensor],
    x: Tensor,
    *,
    candidate: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply the operator core by core, without building its matrix.

    Args:
        plan: the planned operator.
        cores: tensors in the order of its topology.
        x: input, shape `(..., in_features)`.
        candidate: which of `plan.applies` to run.
        bias: shape `(out_features,)`.

    Returns:
        Output of shape `(..., out_features)`.

    Raises:
        ShapeError: the last dimension of `x` is another.
    """
    topology = plan.topology
    check_input(x, topology.in_features)
    padded_out, padded_in = plan.padded_shape
    flat = x if x.ndim == 2 else x.reshape(-1, topology.in_features)
    if padded_in != topology.in_features:
        flat = torch.nn.functional.pad(flat, (0, padded_in - topology.in_features))
    whole = padded_out == topology.out_features
    y = run(plan.applies[candidate], [flat, *cores], bias=bias if whole else None)
    if not whole:
        y = y[:, : topology.out_features]
        y = y if bias is None else y + bias.to(y.dtype)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], topology.out_features)


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
        dense = run(plan_matrix(self.topology), self.cores).reshape(self.topology.padded_shape)
        return dense[: self.shape[0], : self.shape[1]]

    def apply(self, x: Tensor) -> Tensor:
        """Apply to `x: (..., in_features)`, giving `(..., out_features)`, without building the matrix.

        Raises:
            ShapeError: no tensor, or its last dimension is another.
        """
        if not isinstance(x, Tensor) or x.ndim == 0:
            got = "a number without dimensions" if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(
                f"apply needs a torch.Tensor of shape (..., in_features={self.shape[1]}), got {got}."
            )
        plan, tokens = plan_operator(self.topology), max(x.numel() // max(x.shape[-1], 1), 1)
        core = self.cores[0]
        candidate = plan.cheapest_apply(tokens, default_machine(core.device), core.element_size())
        return contract_with_input(plan, self.cores, x, candidate=candidate)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of `apply` for that many tokens (a multiply-add counts as two).

        Raises:
            ValueError: `tokens` is negative or no integer.
        """
        check_size("tokens", tokens, least=0, error=ValueError)
        return 2 * min(plan.multiply_adds(tokens) for plan in plan_operator(self.topology).applies)

    def draw(self) -> "Figure":
        """A picture of the network, a `matplotlib.figure.Figure`. See `tensornet.drawing`."""
        return draw_topology(self.topology)

    def to(self, dtype: torch.dtype) -> "TensorNetwork":
        """A copy with every core cast to `dtype`."""
        return TensorNetwork(self.topology, [core.to(dtype) for core in self.cores])


def check_cores(topology: Topology, cores: Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Cores in the order of the topology, after comparing every shape, dtype and device.

    Raises:
        ShapeError: naming the core, what was expected and what was got.
        TopologyError: the first argument is no topology.
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
    """Gaussian cores such that each matrix element has mean 0 and variance `gain^2 / in_features`.

    An element of the matrix is a sum over `B = product of all bond sizes` products of `n` independent core
    elements, so with standard deviation `s` for every core its variance is `B * s^(2n)`; hence
    `s = (gain^2 / (in_features * B))^(1 / (2n))`.

    Args:
        topology: describes the cores.
        gain: factor on the standard deviation of the matrix, 1 keeps the variance of activations.
        generator: source of randomness; the global one if absent.
        dtype: dtype of the cores, torch's default if absent.
        device: device of the cores; that of the generator, or torch's default, if absent.
    """
    if device is None and generator is not None:
        device = generator.device
    bonds = math.prod(topology.bond_dims.values())
    std = (gain**2 / (topology.in_features * bonds)) ** (0.5 / len(topology.cores))
    return tuple(
        torch.randn(shape, generator=generator, dtype=dtype, device=device) * std
        for shape in topology.core_shapes.values()
    )
