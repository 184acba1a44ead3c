"""Topology families: builders, decompositions and their registry."""

from tensornet.topologies.base import (
    Decomposition,
    TopologyFamily,
    register_topology,
    topology_family,
    topology_names,
)
from tensornet.topologies.block_tt import BlockTTFamily, block_tt
from tensornet.topologies.factored import FactoredFamily
from tensornet.topologies.kronecker import KroneckerFamily, kronecker
from tensornet.topologies.low_rank import LowRankFamily, low_rank
from tensornet.topologies.mpo import MPOFamily, mpo
from tensornet.topologies.tensor_ring import TensorRingFamily, tensor_ring
from tensornet.topologies.tucker import TuckerFamily, tucker

__all__ = [
    "BlockTTFamily",
    "Decomposition",
    "FactoredFamily",
    "KroneckerFamily",
    "LowRankFamily",
    "MPOFamily",
    "TensorRingFamily",
    "TopologyFamily",
    "TuckerFamily",
    "block_tt",
    "kronecker",
    "low_rank",
    "mpo",
    "register_topology",
    "tensor_ring",
    "topology_family",
    "topology_names",
    "tucker",
]
