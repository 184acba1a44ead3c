"""Topology families, such as MPO, low rank and Tucker, and their registry."""

from tensornet.budget import Budget
from tensornet.topologies.base import Decomposition, TopologyFamily, check_topology
from tensornet.topologies.block_tt import block_tt
from tensornet.topologies.dense import dense
from tensornet.topologies.factored import FactoredFamily, balanced_factors
from tensornet.topologies.kronecker import kronecker
from tensornet.topologies.low_rank import low_rank
from tensornet.topologies.mpo import mpo
from tensornet.topologies.registry import registered, topology_family, topology_names
from tensornet.topologies.residual import residual
from tensornet.topologies.tensor_ring import tensor_ring
from tensornet.topologies.tucker import tucker
from tensornet.topology import CoreSpec

__all__ = [
    "Budget",
    "CoreSpec",
    "Decomposition",
    "FactoredFamily",
    "TopologyFamily",
    "balanced_factors",
    "block_tt",
    "check_topology",
    "dense",
    "kronecker",
    "low_rank",
    "mpo",
    "registered",
    "residual",
    "tensor_ring",
    "topology_family",
    "topology_names",
    "tucker",
]
