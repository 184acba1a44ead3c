"""Topology families: builders, decompositions and their registry."""

from tensornet.topologies.base import (
    Decomposition,
    TopologyFamily,
    register_topology,
    topology_family,
    topology_names,
)
from tensornet.topologies.low_rank import LowRankFamily, low_rank
from tensornet.topologies.mpo import MPOFamily, mpo

__all__ = [
    "Decomposition",
    "LowRankFamily",
    "MPOFamily",
    "TopologyFamily",
    "low_rank",
    "mpo",
    "register_topology",
    "topology_family",
    "topology_names",
]
