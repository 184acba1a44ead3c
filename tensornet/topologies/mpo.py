"""Matrix product operators (tensor-train matrices): a chain of cores `(left, out, in, right)`."""

from collections.abc import Sequence

from torch import Tensor

from tensornet.budget import Budget
from tensornet.linalg.svd import Method
from tensornet.linalg.tt_svd import max_bonds, tt_svd
from tensornet.topologies.base import Decomposition, register_topology
from tensornet.topologies.factored import (
    FactoredFamily,
    check_bonds,
    clip_bonds,
    fitted_network,
    padded_shape,
)
from tensornet.topology import CoreSpec, Topology


def mpo(
    *,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    bond_dims: Sequence[int] | None = None,
    max_bond: int | Sequence[int] | None = None,
    out_features: int | None = None,
    in_features: int | None = None,
    family: str = "mpo",
) -> Topology:
    """Chain of `n` cores named `"0" ... "n-1"` with shapes `(d_{k-1}, o_k, i_k, d_k)`, `d_0 = d_n = 1`.

    Args:
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, as many.
        bond_dims: the `n - 1` inner bonds; the exact ones if absent. Values above them are clipped.
        max_bond: cap on every bond, or one for each.
        out_features: rows before padding, the product of `out_dims` if absent.
        in_features: columns before padding, the product of `in_dims` if absent.
        family: name of the family that records itself as the builder.

    Raises:
        TopologyError: the dims do not fit each other or the features.
    """
    shape = padded_shape(out_dims, in_dims, out_features, in_features)
    full = max_bonds(out_dims, in_dims)
    caps = check_bonds("bond_dims", bond_dims, len(full), "one for each bond", max_bond)
    bonds = full if bond_dims is None else clip_bonds("bond_dims", bond_dims, full)
    bonds = [min(bond, cap or bond) for bond, cap in zip(bonds, caps, strict=True)]
    return chain(out_dims, in_dims, bonds, shape, family=family)


def chain(
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    bond_dims: Sequence[int],
    shape: tuple[int, int],
    *,
    family: str = "mpo",
) -> Topology:
    """The topology of an existing chain: as `mpo`, but bonds are taken as they are.

    Sums and products of chains have bonds above the largest useful ones until they are rounded.
    """
    bonds, sites = [1, *bond_dims, 1], len(out_dims)
    sizes = {f"b{k}": bonds[k] for k in range(sites + 1)}
    sizes |= {f"o{k}": out_dims[k] for k in range(sites)} | {f"i{k}": in_dims[k] for k in range(sites)}
    return Topology(
        family=family,
        cores=tuple(CoreSpec(str(k), (f"b{k}", f"o{k}", f"i{k}", f"b{k + 1}")) for k in range(sites)),
        sizes=tuple(sizes.items()),
        out_labels=tuple(f"o{k}" for k in range(sites)),
        in_labels=tuple(f"i{k}" for k in range(sites)),
        out_features=shape[0],
        in_features=shape[1],
    )


class MPOFamily(FactoredFamily):
    """Chains of any length, found by TT-SVD. See `mpo` and `tt_svd`."""

    name = "mpo"
    builder = mpo
    decompose_options = ("bond_dims",)

    def decompose_at(
        self,
        matrix: Tensor,
        out_dims: tuple[int, ...],
        in_dims: tuple[int, ...],
        budget: Budget,
        *,
        method: Method,
        bond_dims: Sequence[int] | None = None,
    ) -> Decomposition:
        """TT-SVD; the norm is spread evenly over the cores, which is what training wants."""
        if bond_dims is not None:
            full = max_bonds(out_dims, in_dims)
            check_bonds("bond_dims", bond_dims, len(full), "one for each bond", None)
            bond_dims = clip_bonds("bond_dims", bond_dims, full)
        result = tt_svd(matrix, out_dims, in_dims, budget, bonds=bond_dims, method=method)
        bonds = [core.shape[-1] for core in result.cores[:-1]]
        topology = chain(out_dims, in_dims, bonds, (matrix.shape[0], matrix.shape[1]))
        return Decomposition(fitted_network(topology, result.cores), result.error, result.bound_by)

    def decompose_into(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """TT-SVD at the bonds of the topology."""
        bonds = list(topology.bond_dims.values())[1:-1]
        result = tt_svd(matrix, topology.out_dims, topology.in_dims, Budget(), bonds=bonds)
        return Decomposition(fitted_network(topology, result.cores), result.error, result.bound_by)


register_topology(MPOFamily())
