"""Block tensor trains: chains whose cores also depend on legs that they do not sum over."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet.budget import Budget, uniform_caps
from tensornet.linalg.svd import (
    allowed_energy,
    check_finite,
    energy,
    factorize,
    fix_signs,
    is_single,
    keep_rank,
    result_dtype,
    rounding_error,
    safe_scale,
    scaled_back,
    working_dtype,
)
from tensornet.linalg.tt_svd import pad_matrix
from tensornet.topologies.base import Decomposition, check_topology
from tensornet.topologies.factored import (
    FactoredFamily,
    check_bonds,
    clip_bonds,
    fitted_network,
    padded_shape,
    site_topology,
)
from tensornet.topologies.registry import register_topology
from tensornet.topology import Topology


def block_tt(
    *,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    bond_dims: Sequence[int] | None = None,
    max_bond: int | Sequence[int] | None = None,
    out_features: int | None = None,
    in_features: int | None = None,
) -> Topology:
    """Build a block tensor train; core `k` has the indices `(b_k, o_k ... o_{n-1}, i_0 ... i_k, b_{k+1})`.

    `W[o, i] = sum over bonds of prod_k core_k[b_k, o_k.., ..i_k, b_{k+1}]`, `b_0 = b_n = 1`. Core `k` maps
    `i_k` to `o_k`; its other legs select the matrix that does this. Applying the network to a token takes one
    multiply-add per parameter. Two cores with bond 1 are a Monarch matrix.

    Args:
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, one for each out-leg.
        bond_dims: sizes of the `n - 1` inner bonds, clipped to the exact bonds; the exact bonds if absent.
        max_bond: limit for all bonds, or a sequence with a limit for each bond.
        out_features, in_features: shape without padding; the products of the dims if absent.

    Raises:
        TopologyError: the dims differ in length or do not fit the features, or the number of bonds is wrong.

    Reference:
        Qiu, Potapczynski, Finzi, Goldblum, Wilson 2024, "Compute Better Spent: Replacing Dense Layers
        with Structured Matrices", section 3.

    Example:
        >>> tn.topologies.block_tt(out_dims=(4, 4), in_dims=(4, 4), max_bond=1).num_params  # a Monarch matrix
        128
    """
    shape = padded_shape(out_dims, in_dims, out_features, in_features)
    sites = len(out_dims)
    caps = check_bonds("bond_dims", bond_dims, sites - 1, "one for each bond", max_bond)
    wanted = [math.prod(out_dims) * math.prod(in_dims)] * (sites - 1)
    if bond_dims is not None:
        wanted = clip_bonds("bond_dims", bond_dims, _ranks(out_dims, in_dims, bond_dims))
    bonds = [1, *_ranks(out_dims, in_dims, [min(b, c or b) for b, c in zip(wanted, caps, strict=True)]), 1]
    outs, ins = [f"o{k}" for k in range(sites)], [f"i{k}" for k in range(sites)]
    cores = [(f"b{k}", *outs[k:], *ins[: k + 1], f"b{k + 1}") for k in range(sites)]
    return site_topology("block_tt", cores, bonds, out_dims, in_dims, shape)


class BlockTTFamily(FactoredFamily):
    """Block tensor trains, decomposed by one truncated SVD for each block of each bond.

    The cores on the two sides of a bond share some legs. For fixed values of these, the matrix over the other
    legs is called a block; it is a product of low rank. So for two cores, the leading singular pairs of each
    block are optimal. Further cores are split off one by one from the right. Right factors are orthonormal,
    so the certificate is `sqrt(sum of discarded squares) / |W|`.

    Reference: Dao et al. 2022, "Monarch", theorem 1, for two cores of bond 1.
    """

    name = "block_tt"
    default_sites = 2
    builder = block_tt

    def decompose_at(
        self,
        matrix: Tensor,
        out_dims: tuple[int, ...],
        in_dims: tuple[int, ...],
        budget: Budget,
    ) -> Decomposition:
        """Decompose a matrix within the budget, with the same rank for all blocks of a bond."""
        shape = (matrix.shape[0], matrix.shape[1])

        def at(bonds: Sequence[int]) -> Topology:
            return self.build(*shape, out_dims=out_dims, in_dims=in_dims, bond_dims=bonds)

        wanted, bound_by = uniform_caps(
            budget,
            shape,
            _ranks(out_dims, in_dims, [shape[0] * shape[1]] * (len(out_dims) - 1)),
            lambda bonds: at(_ranks(out_dims, in_dims, bonds)).num_params,
            f"a block tensor train {shape}",
        )
        caps = _ranks(out_dims, in_dims, wanted)
        nothing = rounding_error(matrix.dtype)
        within = nothing if budget.rel_error is None and bound_by != "exact" else budget.rel_error
        cores, error = _block_svd(matrix, out_dims, in_dims, caps, within)
        bonds = [core.shape[0] for core in cores[1:]]
        network = fitted_network(at(bonds), cores)
        if bonds != caps:
            bound_by = "rel_error" if budget.rel_error is not None else bound_by
        return Decomposition(network, error, bound_by if error > nothing or budget.rel_error else "exact")

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Decompose a matrix into a block tensor train with the bonds of `topology`."""
        check_topology(self.name, topology, matrix)
        bonds = list(topology.bond_dims.values())[1:-1]
        cores, error = _block_svd(matrix, topology.out_dims, topology.in_dims, bonds)
        exact = bonds == _ranks(topology.out_dims, topology.in_dims, [math.prod(topology.shape)] * len(bonds))
        bound_by = "exact" if exact else "max_bond"
        return Decomposition(fitted_network(topology, cores), error, bound_by)


def _ranks(out_dims: Sequence[int], in_dims: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Compute the largest useful bonds within limits: `b_k <= min(prod of o_m for m < k, i_k * b_{k+1})`."""
    ranks: list[int] = []
    right = 1
    for k in range(len(out_dims) - 1, 0, -1):
        right = min(caps[k - 1], math.prod(out_dims[:k]), in_dims[k] * right)
        ranks.insert(0, right)
    return ranks


@torch.no_grad()
def _block_svd(
    matrix: Tensor,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    caps: Sequence[int],
    rel_error: float | None = None,
) -> tuple[list[Tensor], float]:
    check_finite(matrix, "The matrix")
    sites, dtype, scale = len(out_dims), result_dtype(matrix.dtype), safe_scale(matrix)
    work = matrix.detach().to(working_dtype(matrix.dtype)) / scale
    rest = pad_matrix(work, math.prod(out_dims), math.prod(in_dims))
    total = energy(rest)
    cores: list[Tensor] = []
    spent, right = torch.zeros_like(total), 1
    for k in range(sites - 1, 0, -1):
        left, mine = math.prod(out_dims[:k]), in_dims[k]
        # rows: out-legs before k; columns: in-leg k and the bond; blocks: all other remaining legs
        blocks = rest.reshape(left, -1, math.prod(in_dims[:k]), mine * right).permute(1, 2, 0, 3)
        full = min(blocks.shape[-2:])
        found = factorize(blocks, full, None, single=is_single(dtype))
        energies = found.S.square().sum((0, 1))
        rank = keep_rank(energies, min(caps[k - 1], full), allowed_energy(rel_error, total, spent, k))
        spent = spent + energies[rank:].sum()
        U, Vh = fix_signs(found.U[..., :rank], found.Vh[..., :rank, :])
        # shape: (bond k, out-legs from k, in-legs up to k - 1, in-leg k, bond k + 1)
        core = Vh.movedim(2, 0).reshape(rank, *out_dims[k:], *in_dims[:k], mine, right)
        cores.insert(0, core)
        rest = (U * found.S[..., None, :rank]).permute(2, 0, 1, 3)  # shape: (left, outs, ins, rank)
        rest, right = rest.reshape(left * math.prod(out_dims[k:]), -1), rank
    cores.insert(0, scaled_back(rest.reshape(1, *out_dims, in_dims[0], right), scale, dtype))
    error = float((spent / total).sqrt()) if float(total) > 0 else 0.0
    return [core.to(dtype).contiguous() for core in cores], error


register_topology(BlockTTFamily())
