"""Topology search: family, dims and bonds for a matrix and a parameter budget."""

from tensornet.search.result import SearchPoint, TopologySearch
from tensornet.search.search import search_topology

__all__ = ["SearchPoint", "TopologySearch", "search_topology"]
