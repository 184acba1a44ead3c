"""Networks other than low rank at the prices that calibration found: a structured start, then fitting."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet.fitting import fit_network
from tensornet.network import TensorNetwork
from tensornet.topologies import Decomposition, topology_family
from tensornet.topology import Topology
from tensornet.tt_svd import pad_matrix
from tensornet.whitening import Weighting, damped, root

#: Damping of the factors of a moment: partial traces of a singular moment may be singular.
_FACTOR_DAMPING = 1e-4


@torch.no_grad()
def decompose_network(
    matrix: Tensor, topology: Topology, weighting: Weighting, *, sweeps: int = 1
) -> Decomposition:
    """Cores of a given topology with little weighted error, never more than those of the plain decomposition.

    Two starts are compared at the full weighting, the plain decomposition and the one that is optimal (as far
    as the family's own is) for moments replaced by Kronecker products over the legs; the better is fitted.

    Args:
        matrix: shape `(out, in)`.
        topology: of any family.
        weighting: prices of errors.
        sweeps: rounds of alternating least squares; 0 returns the start.
    """
    start = structured_start(matrix, topology, weighting)
    if sweeps > 0:
        fit = fit_network(matrix, start, weighting, sweeps=sweeps)
        start, sweeps = fit.network, fit.sweeps
    gap = torch.linalg.vector_norm(matrix.double() - start.to_matrix().double())
    error = float(gap / torch.linalg.vector_norm(matrix.double()).clamp_min(1e-300))
    return Decomposition(start, error, "curvature", iterations=sweeps)


def structured_start(matrix: Tensor, topology: Topology, weighting: Weighting) -> TensorNetwork:
    """The better of the plain and the leg-whitened decomposition, by the full weighting."""
    family = topology_family(topology.family)
    plain = family.decompose_to(matrix, topology).network
    if weighting == Weighting() or not _every_leg_on_one_core(topology):
        return plain
    whitened = _leg_whitened(matrix, topology, weighting)
    costs = [weighting.cost(matrix - network.to_matrix()) for network in (plain, whitened)]
    return plain if costs[0] <= costs[1] else whitened


def starts_of(matrix: Tensor, topologies: Sequence[Topology], weighting: Weighting) -> list[TensorNetwork]:
    """A start for each topology, which differ only in bonds.

    For chains one decomposition serves all: the leading slices of its bonds.
    """
    first = topologies[0]
    if first.family != "mpo":
        return [structured_start(matrix, topology, weighting) for topology in topologies]
    full = topology_family("mpo").build(*matrix.shape, out_dims=first.out_dims, in_dims=first.in_dims)
    exact = _leg_whitened(matrix, full, weighting)
    return [_sliced(exact, topology) for topology in topologies]


def _sliced(network: TensorNetwork, topology: Topology) -> TensorNetwork:
    """A chain cut to smaller bonds; the bonds of a fresh TT-SVD are sorted by importance."""
    sizes = topology.core_shapes.values()
    cut = [core[tuple(slice(n) for n in shape)] for core, shape in zip(network.cores, sizes, strict=True)]
    return TensorNetwork(topology, [core.contiguous() for core in cut])


def _leg_whitened(matrix: Tensor, topology: Topology, weighting: Weighting) -> TensorNetwork:
    """Whiten every leg with its own moment, decompose, undo in the cores: bonds are not affected."""
    sides = (
        (topology.out_labels, topology.out_dims, weighting.rows),
        (topology.in_labels, topology.in_dims, weighting.columns),
    )
    dims = (*topology.out_dims, *topology.in_dims)
    work = pad_matrix(matrix.double(), *topology.padded_shape).reshape(dims)
    undo: dict[str, Tensor] = {}
    axis = 0
    for labels, sizes, moment in sides:
        factors = None if moment is None else leg_moments(moment, sizes)
        for position, label in enumerate(labels):
            if factors is not None:
                lower, inverse = root(damped(factors[position], _FACTOR_DAMPING))
                work = torch.movedim(torch.tensordot(lower.T, work, ([1], [axis])), 0, axis)
                undo[label] = inverse.T
            axis += 1
    # As a matrix without padding: what was padded belongs to the legs now.
    full = Topology(
        topology.family,
        topology.cores,
        topology.sizes,
        topology.out_labels,
        topology.in_labels,
        *topology.padded_shape,
    )
    whitened = work.reshape(topology.padded_shape)
    cores = []
    network = topology_family(topology.family).decompose_to(whitened, full).network
    for spec, core in zip(topology.cores, network.cores, strict=True):
        for position, label in enumerate(spec.labels):
            if label in undo:
                core = torch.movedim(
                    torch.tensordot(undo[label], core.double(), ([1], [position])), 0, position
                )
        cores.append(core.to(matrix.dtype).contiguous())
    return TensorNetwork(topology, cores)


def leg_moments(moment: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """A moment `(n, n)` or `(n,)` as one matrix for each leg: partial traces, mean diagonal 1.

    Their Kronecker product is proportional to the moment where the moment is such a product. Legs may hold
    more than `n` indices; what exceeds it has no weight.
    """
    size = math.prod(dims)
    full = torch.diag(moment) if moment.ndim == 1 else moment
    full = pad_matrix(full, size, size).reshape(*dims, *dims)
    count = len(dims)
    found = []
    for leg in range(count):
        labels = [*range(count), *(count if k == leg else k for k in range(count))]
        trace = torch.einsum(full, labels, [leg, count])
        found.append(trace / trace.diagonal().mean().clamp_min(1e-300))
    return found


def _every_leg_on_one_core(topology: Topology) -> bool:
    legs = (*topology.out_labels, *topology.in_labels)
    return all(sum(label in core.labels for core in topology.cores) == 1 for label in legs)
