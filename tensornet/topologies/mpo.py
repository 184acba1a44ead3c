"""Matrix product operators (tensor-train matrices): a chain of cores `(left, out, in, right)`."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tensornet.als import legs_of
from tensornet.budget import Budget
from tensornet.linalg.tt_svd import max_bonds, tt_svd
from tensornet.linalg.weighted_svd import Weighting
from tensornet.topologies.base import Decomposition, check_topology
from tensornet.topologies.factored import (
    Dims,
    FactoredFamily,
    check_bonds,
    clip_bonds,
    fitted_network,
    padded_shape,
    site_topology,
)
from tensornet.topologies.registry import register_topology
from tensornet.topology import Topology

#: Sizes of the small legs in unbalanced splits.
_SMALL = (2, 3)
#: Numbers of parameters, relative to the dense matrix, at which leg sizes are compared.
_FRACTIONS = (0.8, 0.5)


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
    """Build the topology of a chain with cores `"0" ... "n-1"` of shapes `(d_{k-1}, o_k, i_k, d_k)`.

    The end bonds are `d_0 = d_n = 1`.

    Args:
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, one for each out-leg.
        bond_dims: sizes of the `n - 1` inner bonds, clipped to the exact bonds; the exact bonds if absent.
        max_bond: limit for all bonds, or a sequence with a limit for each bond.
        out_features: number of rows without padding; the product of `out_dims` if absent.
        in_features: number of columns without padding; the product of `in_dims` if absent.
        family: name of the family of the topology.

    Raises:
        TopologyError: `out_dims` and `in_dims` differ in length, or a product is less than the number of
            features.

    Example:
        >>> tn.topologies.mpo(out_dims=(3, 4), in_dims=(2, 4), max_bond=4).core_shapes
        {'0': (1, 3, 2, 4), '1': (4, 4, 4, 1)}
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
    """Build the topology of an existing chain, like `mpo` but without clipping bonds.

    Sums and products of chains may have larger bonds than necessary until they are rounded.
    """
    cores = [(f"b{k}", f"o{k}", f"i{k}", f"b{k + 1}") for k in range(len(out_dims))]
    return site_topology(family, cores, [1, *bond_dims, 1], out_dims, in_dims, shape)


class MPOFamily(FactoredFamily):
    """Matrix product operators, decomposed by TT-SVD. See `mpo` and `tt_svd`."""

    name = "mpo"
    builder = mpo
    nested = True
    always_pivots = True

    def decompose_at(
        self,
        matrix: Tensor,
        out_dims: tuple[int, ...],
        in_dims: tuple[int, ...],
        budget: Budget,
        *,
        bond_dims: Sequence[int] | None = None,
    ) -> Decomposition:
        """Decompose a matrix by TT-SVD, and rescale the cores to equal norms so that training is easier."""
        if bond_dims is not None:
            full = max_bonds(out_dims, in_dims)
            check_bonds("bond_dims", bond_dims, len(full), "one for each bond", None)
            bond_dims = clip_bonds("bond_dims", bond_dims, full)
        cores, error, bound_by = tt_svd(matrix, out_dims, in_dims, budget, bonds=bond_dims)
        bonds = [core.shape[-1] for core in cores[:-1]]
        topology = chain(out_dims, in_dims, bonds, (matrix.shape[0], matrix.shape[1]), family=self.name)
        return Decomposition(fitted_network(topology, cores), error, bound_by)

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Decompose a matrix by TT-SVD into a chain with the bonds of `topology`."""
        check_topology(self.name, topology, matrix)
        bonds = list(topology.bond_dims.values())[1:-1]
        cores, error, bound_by = tt_svd(matrix, topology.out_dims, topology.in_dims, Budget(), bonds=bonds)
        return Decomposition(fitted_network(topology, cores), error, bound_by)

    def search_legs(
        self,
        matrix: Tensor,
        weighting: Weighting,
        num_params: Callable[[Topology], int],
        **options: Any,
    ) -> dict[str, Any]:
        """Choose between balanced leg sizes and those of `unbalanced_dims`, unless dims are given.

        The matrix is first transformed to coordinates in which the moment of every leg is the identity. Then
        the widest bond is truncated for two different numbers of parameters. The leg sizes with the smallest
        product of the two discarded fractions are chosen.
        """
        if options.get("out_dims") is not None or options.get("in_dims") is not None:
            return options
        rows, columns = matrix.shape
        balanced = self.choose_dims((rows, columns), None, None, options.get("sites"))
        others = list(unbalanced_dims(rows, columns, len(balanced[0])))

        def lost(dims: Dims) -> float:
            """Multiply the fractions of the squared norm that are lost at the widest bond, at two sizes."""
            # 1. Compute squared singular values at the widest bond, and the discarded fraction at each rank.
            outs, ins = dims
            sites, bonds = len(outs), max_bonds(outs, ins)
            widest = max(range(len(bonds)), key=bonds.__getitem__)
            work = legs_of(self.build(rows, columns, out_dims=outs, in_dims=ins), weighting).whitened_matrix(
                matrix
            )
            order = [axis for k in range(sites) for axis in (k, sites + k)]
            left = math.prod(outs[: widest + 1]) * math.prod(ins[: widest + 1])
            unfolded = work.reshape(*outs, *ins).permute(order).reshape(left, -1).float()
            gram = unfolded @ unfolded.T if left <= unfolded.shape[1] else unfolded.T @ unfolded
            energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
            tails = energies.flip(0).cumsum(0).flip(0) / energies.sum().clamp_min(1e-30)
            # 2. For each number of parameters, find the largest possible bond and the discarded fraction.
            result = 1.0
            for fraction in _FRACTIONS:
                low, high = 0, bonds[widest]
                while low < high:
                    middle = (low + high + 1) // 2
                    made = self.build(rows, columns, out_dims=outs, in_dims=ins, max_bond=middle)
                    fits = num_params(made) <= fraction * matrix.numel()
                    low, high = (middle, high) if fits else (low, middle - 1)
                result *= float(tails[low]) if low < len(tails) else 0.0
            return result

        outs, ins = min((balanced, *others), key=lost) if others else balanced
        kept = {key: value for key, value in options.items() if key != "sites"}
        return {**kept, "out_dims": outs, "in_dims": ins}


def unbalanced_dims(rows: int, columns: int, sites: int) -> Iterator[Dims]:
    """List leg sizes with one large out-leg on the first site and one large in-leg on the second site."""
    if sites < 2:
        return
    for p in _SMALL:
        for q in _SMALL:
            outs, ins = (p,) * (sites - 1), (q,) * (sites - 1)
            large_out, large_in = rows // math.prod(outs), columns // math.prod(ins)
            fits = large_out * math.prod(outs) == rows and large_in * math.prod(ins) == columns
            if fits and large_out >= p and large_in >= q:
                yield (large_out, *outs), (ins[0], large_in, *ins[1:])


register_topology(MPOFamily())
