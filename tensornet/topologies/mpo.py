"""Matrix product operators (tensor-train matrices): a chain of cores `(left, out, in, right)`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensornet.budget import Budget
from tensornet.dims import balanced_factors
from tensornet.errors import TopologyError
from tensornet.network import TensorNetwork
from tensornet.svd import Method
from tensornet.topologies.base import Decomposition, TopologyFamily, check_topology, register_topology
from tensornet.topology import CoreSpec, Topology
from tensornet.tt_svd import check_dims, max_bonds, tt_svd

DEFAULT_SITES = 3


def mpo(
    *,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    bond_dims: Sequence[int] | None = None,
    max_bond: int | None = None,
    out_features: int | None = None,
    in_features: int | None = None,
    family: str = "mpo",
) -> Topology:
    """Chain of `n` cores named `"0" ... "n-1"` with shapes `(d_{k-1}, o_k, i_k, d_k)`, `d_0 = d_n = 1`.

    Args:
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, as many.
        bond_dims: the `n - 1` inner bonds; the exact ones if absent. Values above them are clipped.
        max_bond: cap on every bond.
        out_features: rows before padding, the product of `out_dims` if absent.
        in_features: columns before padding, the product of `in_dims` if absent.
        family: name of the family that records itself as the builder.

    Raises:
        TopologyError: the dims do not fit each other or the features.
    """
    rows, columns = math.prod(out_dims), math.prod(in_dims)
    shape = (out_features or rows, in_features or columns)
    check_dims(shape, out_dims, in_dims)
    full = max_bonds(out_dims, in_dims)
    if bond_dims is not None and len(bond_dims) != len(full):
        raise TopologyError(f"bond_dims {tuple(bond_dims)} must have {len(full)} entries, one for each bond.")
    bonds = [min(b, f, max_bond or b) for b, f in zip(bond_dims or full, full, strict=True)]
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


def choose_dims(
    shape: tuple[int, int],
    out_dims: Sequence[int] | None,
    in_dims: Sequence[int] | None,
    sites: int | None,
    default_sites: int = DEFAULT_SITES,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Fill in what the caller left open: balanced dims, out ascending and in descending.

    Opposite orders keep the legs of each site, and so the bonds, balanced.

    Raises:
        TopologyError: `sites` contradicts the given dims, or the dims do not fit.
    """
    given = [len(dims) for dims in (out_dims, in_dims) if dims is not None]
    count = given[0] if given else (sites or default_sites)
    if sites is not None and sites != count:
        raise TopologyError(f"sites={sites} contradicts the given dims, which have {count} sites.")
    rows = tuple(out_dims) if out_dims is not None else balanced_factors(shape[0], count)
    columns = tuple(in_dims) if in_dims is not None else balanced_factors(shape[1], count)[::-1]
    check_dims(shape, rows, columns)
    return rows, columns


class MPOFamily(TopologyFamily):
    """Chains of any length, found by TT-SVD."""

    name = "mpo"

    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | None = None,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        bond_dims: Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """See `mpo`; dims are balanced where not given, with `sites` (default 3) cores."""
        refuse_options(self.name, options)
        rows, columns = choose_dims((out_features, in_features), out_dims, in_dims, sites)
        return mpo(
            out_dims=rows,
            in_dims=columns,
            bond_dims=bond_dims,
            max_bond=max_bond,
            out_features=out_features,
            in_features=in_features,
        )

    def decompose(
        self,
        matrix: Tensor,
        budget: Budget,
        *,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        bond_dims: Sequence[int] | None = None,
        method: Method = "auto",
        **options: Any,
    ) -> Decomposition:
        """See `tt_svd`; the norm is spread evenly over the cores, which is what training wants."""
        refuse_options(self.name, options)
        shape = (matrix.shape[0], matrix.shape[1])
        rows, columns = choose_dims(shape, out_dims, in_dims, sites)
        result = tt_svd(matrix, rows, columns, budget, bonds=bond_dims, method=method)
        topology = mpo(
            out_dims=rows,
            in_dims=columns,
            bond_dims=[core.shape[-1] for core in result.cores[:-1]],
            out_features=shape[0],
            in_features=shape[1],
        )
        return Decomposition(
            TensorNetwork(topology, balance_norms(result.cores)), result.error, result.bound_by
        )

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """TT-SVD at the bonds of the topology."""
        check_topology(self.name, topology, matrix)
        bonds = list(topology.bond_dims.values())[1:-1]
        result = tt_svd(matrix, topology.out_dims, topology.in_dims, Budget(), bonds=bonds)
        # TT-SVD keeps fewer than asked where an earlier cut left a block of smaller rank.
        shapes = topology.core_shapes.values()
        cores = [pad_core(core, shape) for core, shape in zip(result.cores, shapes, strict=True)]
        network = TensorNetwork(topology, balance_norms(cores))
        return Decomposition(network, result.error, result.bound_by)


def pad_core(core: Tensor, shape: Sequence[int]) -> Tensor:
    """Zero-pad every dimension of a core at its end."""
    padding = [amount for have, want in zip(core.shape, shape, strict=True) for amount in (want - have, 0)]
    return torch.nn.functional.pad(core, padding[::-1])


def balance_norms(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Rescale the cores to equal root-mean-square elements without changing the operator.

    A chain from TT-SVD keeps the whole norm in its last core; one learning rate would then not suit all.
    """
    scales = [float(core.norm()) / core.numel() ** 0.5 for core in cores]
    if min(scales) == 0:
        return tuple(cores)
    mean = 1.0
    for scale in scales:
        mean *= scale ** (1 / len(scales))
    return tuple(core * (mean / scale) for core, scale in zip(cores, scales, strict=True))


def refuse_options(name: str, options: dict[str, Any]) -> None:
    """Refuse options that a family does not know.

    Raises:
        TopologyError: naming them.
    """
    if unknown := sorted(key for key, value in options.items() if value is not None):
        raise TopologyError(f"Topology {name!r} does not know the options {', '.join(unknown)}.")


register_topology(MPOFamily())
