"""Tensor rings: chains whose ends are joined by a bond."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tensornet._util import check_size
from tensornet.als import fit_network
from tensornet.budget import Budget, uniform_caps
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.svd import (
    allowed_energy,
    check_finite,
    energy,
    frobenius,
    is_single,
    result_dtype,
    rounding_error,
    safe_scale,
    scaled_back,
    working_dtype,
)
from tensornet.linalg.tt_svd import max_bonds, pad_matrix, split_block
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.topologies.base import Decomposition, check_topology
from tensornet.topologies.factored import (
    FactoredFamily,
    check_bonds,
    clip_bonds,
    fitted_network,
    pad_core,
    padded_shape,
    site_topology,
)
from tensornet.topologies.registry import register_topology
from tensornet.topology import Topology

#: Number of conjugate gradient steps for each core; for small bonds, one step is exact.
_STEPS = 2
#: Fitting stops after a sweep that lowers the squared error by less than this fraction.
_SETTLED = 2e-4
#: Sizes of the closing bond that are tried if `ring_bond` is absent; 1 gives an open chain.
RING_BONDS = (1, 2, 4, 8)


def tensor_ring(
    *,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    bond_dims: Sequence[int] | None = None,
    max_bond: int | Sequence[int] | None = None,
    out_features: int | None = None,
    in_features: int | None = None,
) -> Topology:
    """Build the topology of a ring of `n >= 2` cores `(b_{k-1}, o_k, i_k, b_k)` with `b_{-1} = b_{n-1}`.

    Args:
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, one for each out-leg.
        bond_dims: sizes of the `n` bonds, one to the right of each core; the closing bond is the last. If
            absent, all bonds are `max_bond`, clipped to the exact bonds of a chain; without `max_bond` the
            ring is the exact open chain.
        max_bond: limit for all bonds, or a sequence with a limit for each bond; the closing bond is the last.
        out_features, in_features: shape without padding; the products of the dims if absent.

    Raises:
        TopologyError: there are fewer than two sites, the dims do not fit, or the number of bonds is wrong.

    Example:
        >>> tn.topologies.tensor_ring(out_dims=(3, 4), in_dims=(2, 4), max_bond=3).core_shapes
        {'0': (3, 3, 2, 3), '1': (3, 4, 4, 3)}
    """
    shape = padded_shape(out_dims, in_dims, out_features, in_features)
    sites = len(out_dims)
    if sites < 2:
        raise TopologyError(f"A ring needs at least two sites, got {sites}; use the topology 'mpo'.")
    full = max_bonds(out_dims, in_dims)
    caps = check_bonds("bond_dims", bond_dims, sites, "the closing bond last", max_bond)
    if bond_dims is None:
        bond_dims = (*full, 1) if max_bond is None else (*full, min(full))
    # The closing bond need not be larger than the product of the other dimensions of either core that it
    # joins.
    ends = out_dims[0] * in_dims[0] * bond_dims[0], out_dims[-1] * in_dims[-1] * bond_dims[-2]
    closing = min(bond_dims[-1], *ends)
    bonds = clip_bonds("bond_dims", bond_dims, [*(f * closing for f in full), closing])
    bonds = [min(b, cap or b) for b, cap in zip(bonds, caps, strict=True)]
    bonds = [*(min(b, f * bonds[-1]) for b, f in zip(bonds, full, strict=False)), bonds[-1]]
    return _ring(out_dims, in_dims, bonds, shape)


def _ring(
    out_dims: Sequence[int], in_dims: Sequence[int], bonds: Sequence[int], shape: tuple[int, int]
) -> Topology:
    """Build the topology of existing cores, like `tensor_ring` but without clipping bonds."""
    sites = len(out_dims)
    cores = [(f"b{(k - 1) % sites}", f"o{k}", f"i{k}", f"b{k}") for k in range(sites)]
    return site_topology("tensor_ring", cores, bonds, out_dims, in_dims, shape)


class TensorRingFamily(FactoredFamily):
    """Tensor rings, decomposed by sequential SVD.

    The first SVD is truncated at the rank `ring_bond * bond`; the new index is then split into these two
    bonds. TT-SVD decomposes the rest. All left factors are orthonormal, so the certificate is
    `sqrt(sum of discarded squares) / |W|`. If `ring_bond` is absent, several values are tried and the best is
    kept, often 1 (an open chain).

    This decomposition is not optimal. `sweeps=` improves it by alternating least squares; the error is then
    measured, and need not decrease as the budget grows.

    Reference: Zhao, Zhou, Xie, Zhang, Cichocki 2016, "Tensor Ring Decomposition", algorithms 1 and 2.
    """

    name = "tensor_ring"
    builder = tensor_ring

    def decompose_at(
        self,
        matrix: Tensor,
        out_dims: tuple[int, ...],
        in_dims: tuple[int, ...],
        budget: Budget,
        *,
        ring_bond: int | None = None,
        sweeps: int = 0,
    ) -> Decomposition:
        """Find the ring with the smallest error or, if `rel_error` is given, the fewest parameters.

        Args:
            matrix: the matrix, shape `(out_features, in_features)`.
            out_dims, in_dims: sizes of the legs.
            budget: limits on bonds, error and parameters.
            ring_bond: size of the closing bond, at most `max_bond`; several are tried if absent. Values that
                are too large for the first SVD are clipped, with a warning.
            sweeps: largest number of sweeps of alternating least squares over all cores.
        """
        rows, columns = out_dims, in_dims
        if len(rows) < 2:
            raise TopologyError(f"A ring needs at least two sites, got {len(rows)}; use the topology 'mpo'.")
        check_size("sweeps", sweeps, least=0)
        closing_cap = budget.caps_of_bonds(len(rows))[-1]
        if ring_bond is not None:
            check_size("ring_bond", ring_bond)
            if closing_cap is not None and ring_bond > closing_cap:
                raise BudgetError(
                    f"ring_bond={ring_bond} is above max_bond={budget.max_bond}, which limits every bond; "
                    "lower ring_bond or raise max_bond."
                )
            (ring_bond,) = clip_bonds("ring_bond", [ring_bond], [max_bonds(rows, columns)[0]])
        found, refused = [], None
        for bond in RING_BONDS if ring_bond is None else (ring_bond,):
            if ring_bond is None and bond > min(closing_cap or bond, *max_bonds(rows, columns)):
                break
            try:
                made = _decompose(matrix, rows, columns, bond, budget)
                found.append(_refined(matrix, made, sweeps))
            except BudgetError as error:
                refused = refused or error
            if budget.unlimited:
                break  # the open chain is exact
        if not found:
            assert refused is not None
            raise refused
        kept = [x for x in found if budget.rel_error is not None and x.error <= budget.rel_error]
        nothing = rounding_error(matrix.dtype)
        best = min(kept or found, key=lambda x: (0 if kept else max(x.error, nothing), x.network.num_params))
        topology = replace(best.network.topology, family=self.name)
        return replace(best, network=fitted_network(topology, best.network.cores))

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Decompose a matrix by sequential SVD into a ring with the bonds of `topology`."""
        check_topology(self.name, topology, matrix)
        *bonds, closing = topology.bond_dims.values()
        made = _tr_svd(matrix, topology.out_dims, topology.in_dims, closing, bonds)
        return replace(made, network=fitted_network(topology, made.network.cores))


def _decompose(
    matrix: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    closing: int,
    budget: Budget,
) -> Decomposition:
    shape, legs = (matrix.shape[0], matrix.shape[1]), [o * i for o, i in zip(rows, columns, strict=True)]

    def ranks(caps: Sequence[int]) -> list[int]:
        """Compute the bonds of a sequential SVD without `rel_error`, limited only by `caps`."""
        right = math.prod(legs[1:])
        found = [min(caps[0], -(-min(legs[0], right) // closing))]
        for k in range(1, len(legs) - 1):
            right //= legs[k]
            found.append(min(caps[k], found[-1] * legs[k], right * closing))
        return found

    def params(caps: Sequence[int]) -> int:
        bonds = [closing, *ranks(caps), closing]
        return sum(bonds[k] * leg * bonds[k + 1] for k, leg in enumerate(legs))

    exact = ranks([math.prod(legs)] * (len(legs) - 1))
    open_bonds = replace(
        budget, max_bond=budget.max_bond[:-1] if isinstance(budget.max_bond, tuple) else budget.max_bond
    )
    caps, bound_by = uniform_caps(open_bonds, shape, exact, params, f"a ring closed by a bond of {closing}")
    made = _tr_svd(matrix, rows, columns, closing, caps, budget.rel_error, zeros=False)
    nothing = rounding_error(matrix.dtype)
    if budget.rel_error is None and bound_by != "exact" and made.error <= nothing:
        # The limits truncate nothing but rounding errors: reduce the bonds that they do not truncate, too.
        return replace(_tr_svd(matrix, rows, columns, closing, caps, nothing), bound_by="exact")
    return made if made.bound_by == "rel_error" else replace(made, bound_by=bound_by)


@torch.no_grad()
def _tr_svd(
    matrix: Tensor,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    closing: int,
    caps: Sequence[int],
    rel_error: float | None = None,
    *,
    zeros: bool = True,
) -> Decomposition:
    """Decompose a matrix by sequential SVD with limits on the bonds; the last core carries the norm.

    `zeros=False` discards singular values below rounding errors.
    """
    check_finite(matrix, "The matrix")
    sites, dtype, scale = len(out_dims), result_dtype(matrix.dtype), safe_scale(matrix)
    rest = pad_matrix(matrix.detach().to(dtype) / scale, math.prod(out_dims), math.prod(in_dims))
    pairs = [axis for k in range(sites) for axis in (k, sites + k)]
    rest = rest.reshape(*out_dims, *in_dims).permute(pairs)
    total = inside = energy(rest.reshape(1, -1))
    spent, left, cores, bound_by = torch.zeros_like(total), 1, [], "exact"
    for k in range(sites - 1):
        block = rest.reshape(left * out_dims[k] * in_dims[k], -1)
        cap = min(caps[k] * (closing if k == 0 else 1), *block.shape)
        bound_by = "max_bond" if cap < min(block.shape) and bound_by == "exact" else bound_by
        allowed = allowed_energy(rel_error, total, spent, sites - 1 - k)
        # The order of the columns in the closing bond affects later truncations. With descending singular
        # values, the columns for a smaller limit are the first columns for a larger limit.
        ordered = k == 0 and closing > 1
        zero = None if zeros else rounding_error(dtype) ** 2 * total
        split = split_block(block, inside, cap, allowed, single=is_single(dtype), ordered=ordered, zero=zero)
        bound_by = "rel_error" if allowed is not None and split.left.shape[1] < cap else bound_by
        spent, inside = spent + split.discarded, split.kept
        U, rest = split.left, split.rest
        if k == 0:
            left = -(-U.shape[1] // closing)
            U = pad_core(U, (U.shape[0], left * closing)).reshape(-1, left, closing)
            cores.append(U.permute(2, 0, 1).reshape(closing, out_dims[0], in_dims[0], left))
            rest = pad_core(rest, (left * closing, rest.shape[1])).reshape(left, closing, -1).transpose(1, 2)
        else:
            cores.append(U.reshape(left, out_dims[k], in_dims[k], -1))
            left = U.shape[1]
    cores.append(scaled_back(rest.reshape(left, out_dims[-1], in_dims[-1], closing), scale, dtype))
    error = float((spent / total).sqrt()) if float(total) > 0 else 0.0
    topology = _ring(out_dims, in_dims, [core.shape[3] for core in cores], (matrix.shape[0], matrix.shape[1]))
    return Decomposition(
        TensorNetwork(topology, [core.to(dtype).contiguous() for core in cores]), error, bound_by
    )


@torch.no_grad()
def _refined(matrix: Tensor, made: Decomposition, sweeps: int) -> Decomposition:
    if sweeps < 1 or made.error == 0:
        return made
    scale, double = safe_scale(matrix), working_dtype(matrix.dtype)
    target = matrix.detach().to(double) / scale
    *first, last = [core.to(double) for core in made.network.cores]
    start = TensorNetwork(made.network.topology, [*first, last / scale])
    fit = fit_network(target, start, Weighting(), sweeps=sweeps, steps=_STEPS, tolerance=_SETTLED)
    *first, last = fit.network.cores
    cores = zip([*first, last * scale], made.network.cores, strict=True)
    return replace(
        made,
        network=TensorNetwork(start.topology, [new.to(old.dtype).contiguous() for new, old in cores]),
        error=frobenius(target - fit.network.to_matrix()) / frobenius(target),
        iterations=fit.sweeps,
        converged=fit.converged,
    )


register_topology(TensorRingFamily())
