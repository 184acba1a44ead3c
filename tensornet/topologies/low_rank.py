"""Plain low rank: the two-site matrix product operator with dims `(O, 1) x (1, I)`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tensornet.budget import Budget, caps_of_bonds, check_budget
from tensornet.checks import check_dense, check_size
from tensornet.errors import TopologyError
from tensornet.linalg.svd import Method, TruncatedSVD, truncated_svd
from tensornet.linalg.tt_svd import cap_bonds
from tensornet.network import TensorNetwork
from tensornet.topologies.base import Decomposition, TopologyFamily, check_topology, register_topology
from tensornet.topologies.factored import refuse_options
from tensornet.topologies.mpo import mpo
from tensornet.topology import Topology


def low_rank(*, out_features: int, in_features: int, rank: int | None = None) -> Topology:
    """Two cores `(1, out, 1, rank)` and `(rank, 1, in, 1)`.

    Args:
        out_features: rows.
        in_features: columns.
        rank: the bond; `min(out_features, in_features)` if absent or larger.

    Raises:
        TopologyError: a size is no integer of at least 1.
    """
    for name, size in (("out_features", out_features), ("in_features", in_features), ("rank", rank)):
        if size is not None:
            check_size(name, size)
    return mpo(out_dims=(out_features, 1), in_dims=(1, in_features), max_bond=rank, family="low_rank")


class LowRankFamily(TopologyFamily):
    """Truncated SVD. Singular values are split evenly, `U sqrt(S)` and `sqrt(S) Vh`."""

    name = "low_rank"

    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """See `low_rank`."""
        refuse_options(self.name, options)
        (rank,) = caps_of_bonds(max_bond, 1, TopologyError)
        return low_rank(out_features=out_features, in_features=in_features, rank=rank)

    def decompose(
        self, matrix: Tensor, budget: Budget, *, method: Method = "auto", **options: Any
    ) -> Decomposition:
        """Optimal in the Frobenius norm (Eckart-Young)."""
        refuse_options(self.name, options)
        check_budget(budget)
        check_dense(matrix, "Topology 'low_rank'", "a matrix of shape (out, in)", 2)
        rows, columns = matrix.shape
        caps, bound_by = cap_bonds((rows, columns), (rows, 1), (1, columns), budget)
        result = truncated_svd(matrix, max_rank=caps[0], rel_error=budget.rel_error, method=method)
        rank = result.S.numel()
        if rank < caps[0]:
            bound_by = "rel_error"
        return Decomposition(_network(result, rows, columns), result.error, bound_by)

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Truncated SVD at the rank of the topology."""
        check_topology(self.name, topology, matrix)
        rank = max(topology.bond_dims.values())
        result = truncated_svd(matrix, max_rank=rank)
        exact = rank == min(topology.shape)
        return Decomposition(
            _network(result, *topology.shape), result.error, "exact" if exact else "max_bond"
        )


def _network(result: TruncatedSVD, rows: int, columns: int) -> TensorNetwork:
    root = result.S.sqrt().to(result.U.dtype)
    cores = ((result.U * root)[None, :, None, :], (root[:, None] * result.Vh)[:, None, :, None])
    topology = low_rank(out_features=rows, in_features=columns, rank=result.S.numel())
    return TensorNetwork(topology, cores)


register_topology(LowRankFamily())
