"""Initial cores of experts that are upcycled from one dense matrix."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensornet.budget import Budget
from tensornet.decompose import decompose
from tensornet.errors import TopologyError
from tensornet.linalg.svd import frobenius
from tensornet.network import TensorNetwork, random_cores
from tensornet.topologies import TopologyFamily, topology_family
from tensornet.topology import Topology
from tensornet_moe.checks import check_noise, check_weights, check_whole
from tensornet_moe.joint_fit import stack_error
from tensornet_moe.stacked import enclosing_topology, resolve_shared


@dataclass(frozen=True)
class Start:
    """Topologies and initial cores from which a bank of experts is built.

    Args:
        topologies: one for each expert.
        shared: names of the shared cores.
        cores: a shared core as it is, a private one `(E, *shape)` or one tensor for each expert.
        error: relative Frobenius error against the given matrix or matrices.
    """

    topologies: tuple[Topology, ...]
    shared: tuple[str, ...]
    cores: Mapping[str, Tensor | Sequence[Tensor]]
    error: float


@torch.no_grad()
def start_from_dense(
    weight: Tensor,
    topology: Topology | Sequence[Topology] | str | TopologyFamily,
    budget: Budget,
    num_experts: int,
    shared: str | Sequence[str],
    noise: float,
    seed: int,
    options: Mapping[str, Any],
) -> Start:
    """Decompose a dense matrix into the initial cores of all experts; see `SharedCoreExperts.from_dense`."""
    check_weights(weight, "out", "in")
    check_noise(noise)
    check_whole(num_experts=num_experts)
    if isinstance(topology, str | TopologyFamily):
        result = topology_family(topology).decompose(weight, budget, **options)
        topologies = (result.network.topology,) * num_experts
    else:
        if not budget.unlimited or options:
            raise TopologyError(
                "An explicit topology fixes dims and bonds: drop max_bond, rel_error, param_ratio and "
                f"{', '.join(options) or 'family options'}, or give the name of a family instead."
            )
        topologies = (topology,) * num_experts if isinstance(topology, Topology) else tuple(topology)
        if len(topologies) != num_experts:
            raise ValueError(
                f"Got {len(topologies)} topologies for num_experts={num_experts}; give one for all, or one "
                "each."
            )
        result = decompose(weight, enclosing_topology(topologies))
    network = result.network
    names = resolve_shared(network.topology, shared)
    generator = torch.Generator().manual_seed(seed)
    cores: dict[str, Tensor | Sequence[Tensor]] = {}
    for name, core in zip(network.topology.core_names, network.cores, strict=True):
        if name in names:
            cores[name] = core
        else:
            pieces = [_leading(core, t.core_shapes[name]) for t in topologies]
            cores[name] = [with_noise(piece, noise, generator) for piece in pieces]
    error = result.error
    if topologies[0] != network.topology:
        error = _first_error(weight, topologies[0], network)
    return Start(topologies, names, cores, error)


def _leading(core: Tensor, shape: Sequence[int]) -> Tensor:
    return core[tuple(slice(size) for size in shape)]


def with_noise(core: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of standard deviation `noise` relative to the root mean square of the core."""
    if noise == 0:
        return core
    size = frobenius(core) / core.numel() ** 0.5  # no square vanishes, whatever the scale
    # On the CPU, so that every device starts alike.
    drawn = torch.randn(core.shape, generator=generator, device="cpu")
    return core + noise * size * drawn.to(core)


def _first_error(weight: Tensor, topology: Topology, network: TensorNetwork) -> float:
    cores = [
        _leading(core, shape)
        for core, shape in zip(network.cores, topology.core_shapes.values(), strict=True)
    ]
    return stack_error(weight[None], TensorNetwork(topology, cores).to_matrix()[None])


def initial_cores(
    topologies: Sequence[Topology],
    enclosing: Topology,
    shared: Sequence[str],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor | list[Tensor]]:
    """Draw Gaussian cores with `Var(W) = 1 / in_features` for every expert."""

    def draw(topology: Topology) -> dict[str, Tensor]:
        cores = random_cores(topology, device=device, dtype=dtype)
        return dict(zip(topology.core_names, cores, strict=True))

    def bonds(topology: Topology) -> int:
        return math.prod(topology.bond_dims.values())

    count, private = len(enclosing.cores), len(enclosing.cores) - len(shared)
    common = draw(enclosing)
    experts = [draw(topology) for topology in topologies]
    # random_cores gives every core of a network the standard deviation (in * bonds)^(-1/2n). A smaller expert
    # meets the shared cores of the enclosing network, and its private ones make up for the difference.
    gains = [
        (bonds(enclosing) / bonds(topology)) ** (len(shared) / (2 * count * max(private, 1)))
        for topology in topologies
    ]
    cores: dict[str, Tensor | list[Tensor]] = {}
    for name in enclosing.core_names:
        pieces = [expert[name] * gain for expert, gain in zip(experts, gains, strict=True)]
        same = len({piece.shape for piece in pieces}) == 1
        cores[name] = common[name] if name in shared else (torch.stack(pieces) if same else pieces)
    return cores
