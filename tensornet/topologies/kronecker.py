"""Sums of Kronecker products, `W = sum_t A_t (x) B_t`."""

from collections.abc import Sequence

from torch import Tensor

from tensornet._util import check_sizes
from tensornet.budget import Budget
from tensornet.errors import TopologyError
from tensornet.linalg.tt_svd import max_bonds, tt_svd
from tensornet.network import TensorNetwork
from tensornet.topologies.base import Decomposition, check_topology
from tensornet.topologies.factored import (
    Dims,
    FactoredFamily,
    check_bonds,
    clip_bonds,
    fitted_network,
    padded_shape,
)
from tensornet.topologies.registry import register_topology
from tensornet.topology import CoreSpec, Topology


def kronecker(
    *,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    terms: int | None = None,
    max_bond: int | Sequence[int] | None = None,
    out_features: int | None = None,
    in_features: int | None = None,
) -> Topology:
    """Build a sum of Kronecker products with cores `left: (terms, o_0, i_0)`, `right: (terms, o_1, i_1)`.

    Args:
        out_dims: numbers of rows of `A` and of `B`.
        in_dims: numbers of columns of `A` and of `B`.
        terms: number of products, clipped to the number that an exact sum needs; that number if absent.
        max_bond: additional limit on the number of terms.
        out_features, in_features: shape without padding; the products of the dims if absent.

    Raises:
        TopologyError: there are not two out-dims and two in-dims, or they do not fit the features.

    Example:
        >>> tn.topologies.kronecker(out_dims=(3, 4), in_dims=(2, 4), terms=2).core_shapes
        {'left': (2, 3, 2), 'right': (2, 4, 4)}
    """
    if len(check_sizes("out_dims", out_dims)) != 2 or len(check_sizes("in_dims", in_dims)) != 2:
        raise TopologyError(
            f"A Kronecker product has two factors, got out_dims {tuple(out_dims)} and in_dims "
            f"{tuple(in_dims)}; for more factors use the topology 'mpo'."
        )
    shape = padded_shape(out_dims, in_dims, out_features, in_features)
    bonds = list(max_bonds(out_dims, in_dims))
    (cap,) = check_bonds("terms", None if terms is None else [terms], 1, "the number of terms", max_bond)
    if terms is not None:
        bonds = clip_bonds("terms", [terms], bonds)
    return Topology(
        family="kronecker",
        cores=(CoreSpec("left", ("t", "o0", "i0")), CoreSpec("right", ("t", "o1", "i1"))),
        sizes=(
            ("t", min(*bonds, cap or bonds[0])),
            *((f"o{k}", dim) for k, dim in enumerate(out_dims)),
            *((f"i{k}", dim) for k, dim in enumerate(in_dims)),
        ),
        out_labels=("o0", "o1"),
        in_labels=("i0", "i1"),
        out_features=shape[0],
        in_features=shape[1],
    )


class KroneckerFamily(FactoredFamily):
    """Sums of Kronecker products, decomposed optimally by an SVD of Van Loan's rearrangement.

    A Kronecker product whose elements are rearranged to the shape `(o_0 i_0, o_1 i_1)` has rank 1. So the
    best `t` terms are the `t` leading singular pairs, and the certified error is the exact error.

    Reference: Van Loan, Pitsianis 1993, "Approximation with Kronecker Products".
    """

    name = "kronecker"
    builder = kronecker

    def choose_dims(
        self,
        shape: tuple[int, int],
        out_dims: Sequence[int] | None,
        in_dims: Sequence[int] | None,
        sites: int | None,
    ) -> Dims:
        """Choose balanced factors for the dims that are not given: two for rows and two for columns.

        Raises:
            TopologyError: `sites` is not 2.
        """
        if sites not in (None, 2):
            raise TopologyError(f"A Kronecker product has two factors, got sites={sites}; leave sites out.")
        return super().choose_dims(shape, out_dims, in_dims, 2)

    def decompose_at(
        self,
        matrix: Tensor,
        out_dims: tuple[int, ...],
        in_dims: tuple[int, ...],
        budget: Budget,
    ) -> Decomposition:
        """Decompose a matrix within the budget, in which `max_bond` limits the number of terms."""
        cores, error, bound_by = tt_svd(matrix, out_dims, in_dims, budget)
        topology = self.build(*matrix.shape, out_dims=out_dims, in_dims=in_dims, terms=cores[0].shape[3])
        return Decomposition(_network(topology, cores), error, bound_by)

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Decompose a matrix into a sum of Kronecker products, with the number of terms of `topology`."""
        check_topology(self.name, topology, matrix)
        bonds = list(topology.bond_dims.values())
        cores, error, bound_by = tt_svd(matrix, topology.out_dims, topology.in_dims, Budget(), bonds=bonds)
        return Decomposition(_network(topology, cores), error, bound_by)


def _network(topology: Topology, cores: Sequence[Tensor]) -> TensorNetwork:
    return fitted_network(topology, (cores[0][0].permute(2, 0, 1), cores[1][..., 0]))


register_topology(KroneckerFamily())
