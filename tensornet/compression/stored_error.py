"""What a layer would really hold: cores in the dtype and the storage that they are kept in."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tensornet.compression.weighted import decompose_weighted, low_rank_network
from tensornet.linalg.weighted_svd import WeightedSVD, Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.encoding import Storage, decode, encode
from tensornet.topologies import Decomposition, topology_family
from tensornet.topology import Topology

#: Shares of the full rank at which rounding to eight bits is tried; between them it is interpolated.
_TRIED = (0.1, 0.4, 1.0)


def decompose_at(matrix: Tensor, topology: Topology, weighting: Weighting) -> Decomposition:
    """Cores of a given topology, as a plan with these prices is carried out.

    Raises:
        NonFiniteError, TopologyError: as `TopologyFamily.decompose_to`.
    """
    if weighting == Weighting():
        return topology_family(topology.family).decompose_to(matrix, topology)
    return decompose_weighted(matrix, topology, weighting)


def stored_network(network: TensorNetwork, storage: Storage, dtype: torch.dtype) -> TensorNetwork:
    """The network that is left of one when its cores are kept so."""
    kept = encode(network.topology, storage, network.to(dtype).cores)
    return TensorNetwork(network.topology, decode(network.topology, storage, kept))


def stored_error(matrix: Tensor, made: Decomposition, storage: Storage) -> float:
    """Relative Frobenius error of what is stored: certified for plain cores, measured for others."""
    if storage.plain:
        return made.error
    return relative_gap(matrix, stored_network(made.network, storage, matrix.dtype).to_matrix())


def relative_gap(matrix: Tensor, other: Tensor) -> float:
    """`|W - W'|_F / |W|_F`."""
    exact = matrix.double()
    gap = torch.linalg.vector_norm(exact - other.double())
    return float(gap / torch.linalg.vector_norm(exact).clamp_min(1e-300))


def rounding_costs(
    matrix: Tensor, result: WeightedSVD, storage: Storage, weightings: Sequence[Weighting]
) -> list[Tensor]:
    """What keeping the factors of a low rank so adds to the cost of its error, for every rank from 1 on.

    Rounding errors of single numbers are independent of what was cut, so that the two costs add.

    Args:
        matrix: shape `(out, in)`; its dtype is that of the scales.
        result: its decomposition.
        storage: of the factors.
        weightings: prices to take; one tensor `(ranks,)` is returned for each.
    """
    full = len(result.values)
    tried = sorted({max(1, round(share * full)) for share in _TRIED})
    found = []
    for rank in tried:
        network = low_rank_network(result, rank, matrix)
        gap = network.to_matrix() - stored_network(network, storage, matrix.dtype).to_matrix()
        found.append([weighting.cost(gap.double()) for weighting in weightings])
    ranks = np.arange(1, full + 1)
    logs = np.log(np.maximum(np.array(found), 1e-300))
    return [torch.from_numpy(np.exp(np.interp(ranks, tried, column))) for column in logs.T]
