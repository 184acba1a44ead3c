"""Topology families: builders, decompositions and their registry."""

from tensornet.topologies.base import TopologyFamily, check_topology
from tensornet.topologies.block_tt import BlockTTFamily, block_tt
from tensornet.topologies.dense import DenseFamily, dense
from tensornet.topologies.factored import FactoredFamily, balanced_factors
from tensornet.topologies.kronecker import KroneckerFamily, kronecker
from tensornet.topologies.low_rank import LowRankFamily, low_rank
from tensornet.topologies.mpo import MPOFamily, mpo
from tensornet.topologies.registry import (
    register_topology,
    registered,
    topology_family,
    topology_names,
)
from tensornet.topologies.residual import ResidualFamily, residual
from tensornet.topologies.results import Decomposition, Ladder, Proposal
from tensornet.topologies.tensor_ring import TensorRingFamily, tensor_ring
from tensornet.topologies.tucker import TuckerFamily, tucker

__all__ = [
    "BlockTTFamily",
    "Decomposition",
    "DenseFamily",
    "FactoredFamily",
    "KroneckerFamily",
    "Ladder",
    "LowRankFamily",
    "MPOFamily",
    "Proposal",
    "ResidualFamily",
    "TensorRingFamily",
    "TopologyFamily",
    "TuckerFamily",
    "balanced_factors",
    "block_tt",
    "check_topology",
    "dense",
    "kronecker",
    "low_rank",
    "mpo",
    "register_topology",
    "registered",
    "residual",
    "tensor_ring",
    "topology_family",
    "topology_names",
    "tucker",
]
