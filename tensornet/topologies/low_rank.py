"""Low-rank matrices: matrix product operators of two sites, with dims `(O, 1) x (1, I)`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensornet._util import check_size, remembered
from tensornet.budget import Budget, caps_of_bonds, uniform_caps
from tensornet.errors import TopologyError
from tensornet.linalg.svd import (
    TruncatedSVD,
    capped_svd,
    result_dtype,
    rounding_error,
    truncated_svd,
)
from tensornet.linalg.weighted_svd import (
    WeightedSVD,
    Weighting,
    frobenius_errors,
    other_tail_costs,
    weighted_svd,
)
from tensornet.network import TensorNetwork
from tensornet.quantization import RoundedWeight, round_product
from tensornet.quantization.predict import predict_product_losses
from tensornet.topologies.base import (
    Decomposition,
    Ladder,
    RoundTrip,
    TopologyFamily,
    check_options,
    check_request,
    check_topology,
)
from tensornet.topologies.mpo import mpo
from tensornet.topologies.registry import register_topology
from tensornet.topologies.rounded_cores import StoredCores
from tensornet.topology import Topology

#: Ranks at which factors are rounded, as fractions of the largest; losses at other ranks are interpolated.
_ENCODED = (0.1, 0.4, 1.0)


def low_rank(*, out_features: int, in_features: int, rank: int | None = None) -> Topology:
    """Build a low-rank topology with cores `(1, out, 1, rank)` and `(rank, 1, in, 1)`.

    Args:
        out_features: number of rows.
        in_features: number of columns.
        rank: size of the bond; `min(out_features, in_features)` if absent or larger.

    Raises:
        TopologyError: a size is not an integer of at least 1.

    Example:
        >>> tn.topologies.low_rank(out_features=12, in_features=8, rank=3).num_params
        60
    """
    for name, size in (("out_features", out_features), ("in_features", in_features), ("rank", rank)):
        if size is not None:
            check_size(name, size)
    return mpo(out_dims=(out_features, 1), in_dims=(1, in_features), max_bond=rank, family="low_rank")


class LowRankFamily(TopologyFamily):
    """Low-rank matrices, decomposed by truncated SVD into `U sqrt(S)` and `sqrt(S) Vh`."""

    name = "low_rank"
    always_pivots = True

    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """Build the low-rank topology; see `low_rank`."""
        check_options(self.name, options)
        (rank,) = caps_of_bonds(max_bond, 1, TopologyError)
        topology = low_rank(out_features=out_features, in_features=in_features, rank=rank)
        return replace(topology, family=self.name)

    def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        """Decompose a matrix by truncated SVD, which is optimal in the Frobenius norm (Eckart-Young)."""
        check_options(self.name, options)
        rows, columns = check_request(self.name, matrix, budget)
        shape, exact = (rows, columns), [min(rows, columns)]
        what = f"a network of the family {self.name!r}"
        caps, bound_by = uniform_caps(budget, shape, exact, lambda bonds: bonds[0] * (rows + columns), what)
        result = capped_svd(matrix, max_rank=caps[0], rel_error=budget.rel_error)
        rank = result.S.numel()
        if rank < caps[0]:
            bound_by = "rel_error"
        elif budget.rel_error is None and result.error <= (nothing := rounding_error(matrix.dtype)):
            # The limits truncate nothing but rounding errors, so the rank can be the numerical one.
            result = (
                capped_svd(matrix, max_rank=caps[0], rel_error=nothing) if bound_by != "exact" else result
            )
            bound_by = "exact"
        return Decomposition(self._balanced(result, rows, columns), result.error, bound_by)

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Decompose a matrix by an SVD that is truncated at the rank of `topology`."""
        check_topology(self.name, topology, matrix)
        rank = max(topology.bond_dims.values())
        result = truncated_svd(matrix, max_rank=rank)
        exact = rank == min(topology.shape)
        network = self._balanced(result, *topology.shape)
        return Decomposition(network, result.error, "exact" if exact else "max_bond")

    def fit(self, matrix: Tensor, topology: Topology, weighting: Weighting) -> Decomposition:
        """Minimize the weighted error at the rank of `topology` by an SVD of the whitened matrix."""
        if weighting == Weighting():
            return self.decompose_to(matrix, topology)
        check_topology(self.name, topology, matrix)
        rank = max(topology.bond_dims.values())
        result = weighted_svd(matrix, weighting)
        error = float(frobenius_errors(result, matrix)[rank])
        return Decomposition(self.whitened_network(result, rank, matrix), error, "curvature")

    def ladder(
        self,
        matrix: Tensor,
        weightings: Sequence[Weighting],
        *,
        max_bond: int | None = None,
        round_trip: RoundTrip | None = None,
        **options: Any,
    ) -> Ladder:
        """List the networks of all ranks; their predicted loss increases have a closed form.

        The increases due to truncation and due to rounding are added, since these errors are independent.
        """
        check_options(self.name, options)
        result = weighted_svd(matrix, weightings[0])
        tails = [result.error, *(other_tail_costs(result, weightings[0], other) for other in weightings[1:])]
        losses = torch.stack([tail[1:].cpu().double() for tail in tails])
        errors = frobenius_errors(result, matrix)[1:].cpu().double()
        if round_trip is not None:
            most = min(len(result.values), max_bond or len(result.values))
            added = self._encoding_losses(matrix, result, round_trip, [*weightings, Weighting()], most)
            losses = losses + torch.stack(added[:-1])
            energy = matrix.double().square().sum().cpu().clamp_min(1e-300)
            errors = (errors.square() + 2 * added[-1] / energy).sqrt()
        count = min(len(errors), max_bond or len(errors))  # `errors` is shorter if a moment is singular
        topologies = _every_rank(matrix.shape[0], matrix.shape[1], self.name)[:count]
        complete = count == len(errors)
        return Ladder(topologies, losses[:, :count], errors[:count], complete)

    def whitened_network(self, result: WeightedSVD, rank: int, matrix: Tensor) -> TensorNetwork:
        """Build the network of a given rank from the SVD of the whitened matrix; factors have equal norms."""
        left, right = self._whitened_factors(result, result_dtype(matrix.dtype))
        cores = left[None, :, None, :rank].contiguous(), right[:rank, None, :, None].contiguous()
        return TensorNetwork(self.build(matrix.shape[0], matrix.shape[1], max_bond=rank), cores)

    @staticmethod
    @remembered
    def _whitened_factors(result: WeightedSVD, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rescale both factors so that column `k` of the left and row `k` of the right have equal norms."""
        left, right = result.left, result.right
        balance = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).sqrt()
        balance = torch.where(balance > 0, balance, torch.ones_like(balance))
        return (left * balance).to(dtype), (right / balance[:, None]).to(dtype)

    def round_cores(self, stored: StoredCores, weighting: Weighting) -> dict[str, Tensor | RoundedWeight]:
        """Round both factors of `W = A B` to integers; see `round_product`."""
        left, right = stored.topology.core_names
        rank = max(stored.topology.bond_dims.values())
        a, b = stored.assemble(stored.tensors)
        made = round_product(
            a.reshape(-1, rank),
            b.reshape(rank, -1),
            stored.formats.get(left),
            stored.formats.get(right),
            weighting,
            order=stored.orders.get(left),
            rounding=stored.rounding,
        )
        done: dict[str, Tensor | RoundedWeight] = {}
        for name, factor in ((left, made.left), (right, made.right)):
            kept = stored.tensors[name]
            done[name] = factor.reshape(kept.shape).to(kept) if isinstance(factor, Tensor) else factor
        return done

    def with_rank(self, topology: Topology, rank: int) -> Topology:
        """Build the low-rank topology with `rank` added to the rank of `topology`."""
        return self.build(*topology.shape, max_bond=max(topology.bond_dims.values()) + rank)

    def _balanced(self, result: TruncatedSVD, rows: int, columns: int) -> TensorNetwork:
        root = result.S.sqrt().to(result.U.dtype)
        cores = ((result.U * root)[None, :, None, :], (root[:, None] * result.Vh)[:, None, :, None])
        return TensorNetwork(self.build(rows, columns, max_bond=result.S.numel()), cores)

    def _encoding_losses(
        self,
        matrix: Tensor,
        result: WeightedSVD,
        round_trip: RoundTrip,
        weightings: Sequence[Weighting],
        most: int,
    ) -> list[Tensor]:
        """Predict the loss increase of rounding the factors, for every rank and weighting.

        For integer formats, the increase is predicted from moments. For other formats, the factors of a few
        ranks up to `most` are rounded, and the increases of the other ranks are interpolated.
        """
        full = len(result.values)
        if round_trip.number_format is not None:
            a, b = self._whitened_factors(result, result_dtype(matrix.dtype))
            losses = predict_product_losses(a, b, round_trip.number_format, weightings, rank=most)
            return [torch.nn.functional.pad(x, (0, full - most), value=torch.inf) for x in losses.cpu()]
        tried = sorted({max(1, round(fraction * most)) for fraction in _ENCODED})
        found = []
        for rank in tried:
            network = self.whitened_network(result, rank, matrix)
            gap = (network.to_matrix() - round_trip(network).to_matrix()).double()
            found.append([weighting.cost(gap) for weighting in weightings])
        logs = np.log(np.maximum(np.array(found), 1e-300))
        ranks = np.arange(1, full + 1)
        return [torch.from_numpy(np.exp(np.interp(ranks, tried, column))) for column in logs.T]


@lru_cache(maxsize=256)
def _every_rank(rows: int, columns: int, family: str) -> tuple[Topology, ...]:
    ranks = range(1, min(rows, columns) + 1)
    made = (low_rank(out_features=rows, in_features=columns, rank=rank) for rank in ranks)
    return tuple(replace(topology, family=family) for topology in made)


register_topology(LowRankFamily())
