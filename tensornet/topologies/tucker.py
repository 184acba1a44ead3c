"""Tucker networks: one factor matrix for each leg, joined by a core tensor."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet.budget import Budget, uniform_caps
from tensornet.linalg.svd import (
    allowed_energy,
    check_finite,
    energy,
    is_single,
    result_dtype,
    rounding_error,
    safe_scale,
    scaled_back,
)
from tensornet.linalg.tt_svd import pad_matrix, split_block
from tensornet.network import TensorNetwork
from tensornet.topologies.base import Decomposition, check_topology
from tensornet.topologies.factored import (
    FactoredFamily,
    balance_norms,
    check_bonds,
    clip_bonds,
    pad_core,
    padded_shape,
)
from tensornet.topologies.registry import register_topology
from tensornet.topology import CoreSpec, Topology


def tucker(
    *,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    ranks: Sequence[int] | None = None,
    max_bond: int | Sequence[int] | None = None,
    out_features: int | None = None,
    in_features: int | None = None,
) -> Topology:
    """Build a Tucker topology: a core `(r_0, ..., r_{2n-1})` and a factor `(leg, rank)` per truncated leg.

    `W[o_0.., i_0..] = sum over ranks of core[...] * prod_k out_k[o_k, p_k] * prod_k in_k[i_k, q_k]`. A leg
    with full rank has no factor; the core itself has this leg.

    Args:
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, one for each out-leg.
        ranks: rank of each out-leg, then of each in-leg, clipped to the leg sizes; full ranks if absent.
        max_bond: limit for all ranks, or a sequence with a limit for each leg.
        out_features, in_features: shape without padding; the products of the dims if absent.

    Raises:
        TopologyError: the dims do not fit each other or the features, or the number of ranks is wrong.

    Example:
        >>> tn.topologies.tucker(out_dims=(3, 4), in_dims=(2, 4), max_bond=2).core_shapes
        {'core': (2, 2, 2, 2), 'out0': (3, 2), 'out1': (4, 2), 'in1': (4, 2)}
    """
    shape = padded_shape(out_dims, in_dims, out_features, in_features)
    legs = (*out_dims, *in_dims)
    caps = check_bonds("ranks", ranks, len(legs), "one for each leg", max_bond)
    kept = list(legs) if ranks is None else clip_bonds("ranks", ranks, legs)
    kept = [min(rank, cap or rank) for rank, cap in zip(kept, caps, strict=True)]
    names = [f"{side}{k}" for side in ("out", "in") for k in range(len(out_dims))]
    labels = [f"{side}{k}" for side in ("o", "i") for k in range(len(out_dims))]
    bonds = [label if r == leg else f"r{label}" for label, r, leg in zip(labels, kept, legs, strict=True)]
    cut = [k for k in range(len(legs)) if kept[k] < legs[k]]
    return Topology(
        family="tucker",
        cores=(
            CoreSpec("core", tuple(bonds)),
            *(CoreSpec(names[k], (labels[k], bonds[k])) for k in cut),
        ),
        sizes=(*zip(labels, legs, strict=True), *((bonds[k], kept[k]) for k in cut)),
        out_labels=tuple(labels[: len(out_dims)]),
        in_labels=tuple(labels[len(out_dims) :]),
        out_features=shape[0],
        in_features=shape[1],
    )


class TuckerFamily(FactoredFamily):
    """Tucker networks, decomposed by sequentially truncated higher-order SVD.

    The legs are projected one after another onto their leading subspaces. The discarded parts are orthogonal,
    so the certificate `sqrt(sum of discarded squares) / |W|` is the exact error.

    Reference: Vannieuwenhoven, Vandebril, Meerbergen 2012, "A New Truncation Strategy for the
    Higher-Order Singular Value Decomposition".
    """

    name = "tucker"
    default_sites = 2
    builder = tucker

    def decompose_at(
        self,
        matrix: Tensor,
        out_dims: tuple[int, ...],
        in_dims: tuple[int, ...],
        budget: Budget,
    ) -> Decomposition:
        """Decompose a matrix within the budget; `param_ratio` becomes a common limit for all ranks."""
        shape, legs = (matrix.shape[0], matrix.shape[1]), (*out_dims, *in_dims)

        def at(ranks: Sequence[int]) -> Topology:
            return self.build(*shape, out_dims=out_dims, in_dims=in_dims, ranks=ranks)

        caps, bound_by = uniform_caps(
            budget, shape, legs, lambda ranks: at(ranks).num_params, f"a Tucker network {shape}"
        )
        core, factors, error = st_hosvd(matrix, out_dims, in_dims, caps, budget.rel_error)
        if budget.rel_error is None and bound_by != "exact" and error <= rounding_error(matrix.dtype):
            # The limits truncate nothing but rounding errors, so the ranks can be the numerical ones.
            bound_by = "exact"
            core, factors, error = st_hosvd(matrix, out_dims, in_dims, caps, rounding_error(matrix.dtype))
        ranks = [factor.shape[1] for factor in factors]
        if ranks != caps and budget.rel_error is not None:
            bound_by = "rel_error"
        # A factor can have more parameters than its lower rank saves in the core. In that case, only legs
        # with a rank limit keep their factors; all others are not truncated.
        whole = [leg if cap == leg else rank for rank, cap, leg in zip(ranks, caps, legs, strict=True)]
        topology = at(ranks)
        if at(whole).num_params < topology.num_params:
            topology = at(whole)
            core, factors, error = st_hosvd(matrix, out_dims, in_dims, whole)
        return Decomposition(_network(topology, core, factors), error, bound_by)

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Decompose a matrix into a Tucker network with the ranks of `topology`."""
        check_topology(self.name, topology, matrix)
        caps = topology.core_shapes["core"]
        core, factors, error = st_hosvd(matrix, topology.out_dims, topology.in_dims, caps)
        bound_by = "exact" if len(topology.cores) == 1 else "max_bond"
        return Decomposition(_network(topology, core, factors), error, bound_by)


@torch.no_grad()
def st_hosvd(
    matrix: Tensor,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    caps: Sequence[int],
    rel_error: float | None = None,
) -> tuple[Tensor, list[Tensor], float]:
    """Compute the sequentially truncated higher-order SVD of a matrix reshaped to one axis for each leg.

    Args:
        matrix: the matrix, shape `(out, in)`; padded with zeros to the products of the dims.
        out_dims, in_dims: sizes of the legs.
        caps: largest rank of each leg, out-legs first.
        rel_error: largest relative error; the part that one leg does not use is available to the next legs.

    Returns:
        The core tensor, an orthonormal factor `(leg, rank)` for each leg, and the certified relative error.

    Raises:
        NonFiniteError: the matrix contains NaN or infinity.
    """
    check_finite(matrix, "The matrix")
    dtype, scale = result_dtype(matrix.dtype), safe_scale(matrix)
    core = pad_matrix(matrix.detach().to(dtype) / scale, math.prod(out_dims), math.prod(in_dims))
    core = core.reshape(*out_dims, *in_dims)
    total = inside = energy(core.reshape(1, -1))
    spent, factors, single = torch.zeros_like(total), [], is_single(dtype)
    for axis, cap in enumerate(caps):
        block = core.movedim(axis, 0).flatten(1)
        allowed = allowed_energy(rel_error, total, spent, len(caps) - axis)
        # The rank cannot exceed the sides of the block. Without `rel_error`, factors are padded to `cap`.
        split = split_block(block, inside, min(cap, *block.shape), allowed, single=single)
        spent, inside = spent + split.discarded, split.kept
        rank = split.left.shape[1] if rel_error is not None else cap
        factors.append(pad_core(split.left, (block.shape[0], rank)))
        rest = pad_core(split.rest, (rank, block.shape[1]))
        core = rest.reshape(rank, *core.shape[:axis], *core.shape[axis + 1 :]).movedim(0, axis)
    error = float((spent / total).sqrt()) if float(total) > 0 else 0.0
    return scaled_back(core, scale, dtype), [factor.to(dtype) for factor in factors], error


def _network(topology: Topology, core: Tensor, factors: Sequence[Tensor]) -> TensorNetwork:
    """Build a Tucker network; factors that the topology does not have are multiplied into the core."""
    kept = []
    for axis, (label, factor) in enumerate(
        zip((*topology.out_labels, *topology.in_labels), factors, strict=True)
    ):
        if label in topology.cores[0].labels:
            core = torch.tensordot(factor, core, dims=([1], [axis])).movedim(0, axis)
        else:
            kept.append(factor)
    return TensorNetwork(topology, balance_norms([core.contiguous(), *kept]))


register_topology(TuckerFamily())
