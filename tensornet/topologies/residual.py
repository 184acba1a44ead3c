"""Residual networks: a dense matrix, usually rounded to integers, plus a low-rank fit of the rounding error.

A few singular values of the whitened rounding error are much larger than the others. A low-rank matrix with
factors of eight bits or more corrects this part with fewer bytes than one more bit for the dense matrix would
need. The two matrices are fitted alternately: round the weight minus the low-rank matrix, then fit the
low-rank matrix to the rounding error.

Reference:
    Zhang et al. 2024, "LQER"; Guo et al. 2024, "LQ-LoRA" (alternating, input moments only).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensornet.budget import Budget, caps_of_bonds, uniform_caps
from tensornet.errors import TopologyError
from tensornet.linalg.svd import check_finite, result_dtype
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.quantization import NumberFormat, RoundedWeight, round_product
from tensornet.topologies.base import (
    Decomposition,
    Ladder,
    RoundTrip,
    TopologyFamily,
    check_options,
    check_request,
    check_topology,
)
from tensornet.topologies.dense import round_dense
from tensornet.topologies.low_rank import LowRankFamily, low_rank
from tensornet.topologies.registry import register_topology
from tensornet.topologies.rounded_cores import StoredCores
from tensornet.topology import CoreSpec, Topology

#: Name of the core with the dense matrix.
BASE = "base"
#: Largest number of bits of the dense matrix, and smallest number of bits of the factors.
_BASE_BITS, _FACTOR_BITS = 4, 8
#: Step between the ranks of candidates, and the ratio of the matrix's shorter side to the largest rank.
_STEP, _PART = 8, 4
#: Rank at which one candidate is rounded; losses at other ranks are predicted from its rounding error.
_TRIED = 16
#: Number of alternations; each one rounds the dense matrix and then fits the low-rank matrix.
_ALTERNATIONS = 2

_LOW_RANK = LowRankFamily()


def residual(*, out_features: int, in_features: int, rank: int | None = None) -> Topology:
    """Build the topology of a sum: a dense core `base` plus a low-rank matrix.

    Args:
        out_features: number of rows.
        in_features: number of columns.
        rank: rank of the low-rank matrix; the full rank if absent or larger.

    Raises:
        TopologyError: a size is not an integer of at least 1.

    Example:
        >>> tn.topologies.residual(out_features=6, in_features=4, rank=2).core_shapes
        {'base': (6, 1, 1, 4), '0': (1, 6, 1, 2), '1': (2, 1, 4, 1)}
    """
    network = low_rank(out_features=out_features, in_features=in_features, rank=rank)
    base = CoreSpec(BASE, (*network.out_labels, *network.in_labels))
    return replace(
        network,
        family="residual",
        cores=(base, *network.cores),
        terms=(("dense", (BASE,)), (network.family, network.core_names)),
    )


class ResidualFamily(TopologyFamily):
    """Sums of a dense and a low-rank matrix, useful if the dense matrix is stored in few bits."""

    name = "residual"

    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """Build the residual topology; see `residual`."""
        check_options(self.name, options)
        (rank,) = caps_of_bonds(max_bond, 1, TopologyError)
        return replace(
            residual(out_features=out_features, in_features=in_features, rank=rank), family=self.name
        )

    def encodings(
        self, formats: Sequence[NumberFormat]
    ) -> list[tuple[NumberFormat, dict[str, NumberFormat]]]:
        """Pair each dense format of at most 4 bits with the smallest factor format of at least 8 bits."""
        formats = [x for x in formats if x.for_networks]
        accurate = [x for x in formats if x.bits is None or x.bits >= _FACTOR_BITS]
        if not accurate:
            return []
        factors = min(accurate, key=lambda x: x.nbytes((64, 64)))
        return [(factors, {BASE: x}) for x in formats if x.bits is not None and x.bits <= _BASE_BITS]

    def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        """Copy the matrix, and add a zero matrix in low-rank form with the largest rank within the budget.

        Raises:
            BudgetError: the budget allows fewer parameters than a dense matrix plus rank 1.
        """
        check_options(self.name, options)
        shape = check_request(self.name, matrix, budget)

        def params(bonds: Sequence[int]) -> int:
            return matrix.numel() + bonds[0] * sum(shape)

        what = f"a network of the family {self.name!r}"
        caps, bound_by = uniform_caps(budget, shape, [min(shape)], params, what)
        if budget.rel_error is not None:  # every rank is exact, so the smallest is sufficient
            caps, bound_by = [1], "rel_error"
        return replace(self.decompose_to(matrix, self.build(*shape, max_bond=caps)), bound_by=bound_by)

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Copy the matrix, and add a low-rank matrix whose right factor is zero, as in a new LoRA adapter."""
        check_topology(self.name, topology, matrix)
        check_finite(matrix, "The matrix")
        _, part = topology.parts[1]
        left, right = _LOW_RANK.decompose_to(matrix, part).network.cores
        base = matrix.detach().to(result_dtype(matrix.dtype), copy=True)
        cores = base.reshape(topology.core_shapes[BASE]).contiguous(), left, torch.zeros_like(right)
        return Decomposition(TensorNetwork(topology, cores), 0.0, "exact")

    def fit(self, matrix: Tensor, topology: Topology, weighting: Weighting) -> Decomposition:
        """Copy the matrix as `decompose_to` does; the low-rank matrix is fitted later, in `round_cores`."""
        return self.decompose_to(matrix, topology)

    def ladder(
        self,
        matrix: Tensor,
        weightings: Sequence[Weighting],
        *,
        max_bond: int | None = None,
        round_trip: RoundTrip | None = None,
        **options: Any,
    ) -> Ladder:
        """List candidates with ranks in steps of eight; their losses are predicted from a single rounding.

        The matrix is rounded at one rank, and low-rank approximations of its rounding error give the loss at
        all ranks. This neglects that factors are rounded, and that the rounding error depends on the rank. So
        all losses are multiplied by a common factor, which makes the loss at this one rank equal to the
        measured loss.
        """
        check_options(self.name, options)
        shape = (matrix.shape[0], matrix.shape[1])
        top = max(1, min(max_bond or min(shape), min(shape) // _PART))
        ranks = sorted({*range(_STEP, top + 1, _STEP), top})
        topologies = tuple(self.build(*shape, max_bond=rank) for rank in ranks)
        if round_trip is None:
            nothing = torch.zeros(len(ranks), dtype=torch.float64)
            return Ladder(topologies, torch.stack([nothing] * len(weightings)), nothing, complete=False)
        place = min(range(len(ranks)), key=lambda k: abs(ranks[k] - _TRIED))
        kept = round_trip(self.decompose_to(matrix, topologies[place]).network)
        rest = matrix.double() - kept.cores[0].reshape(shape).double()
        error = matrix.double() - kept.to_matrix().double()
        found = _LOW_RANK.ladder(rest, (*weightings, Weighting()), max_bond=top)
        # If a moment is singular, there are fewer candidates than ranks.
        chosen = [min(rank, len(found.topologies)) - 1 for rank in ranks]
        rows = []
        for weighting, losses in zip((*weightings, Weighting()), found.losses, strict=True):
            predicted, measured = losses[chosen], weighting.cost(error)
            rows.append(predicted * (measured / predicted[place]) if predicted[place] > 0 else predicted)
        energy = matrix.double().square().sum().cpu().clamp_min(1e-300)
        return Ladder(topologies, torch.stack(rows[:-1]), (2 * rows[-1] / energy).sqrt(), complete=False)

    def round_cores(self, stored: StoredCores, weighting: Weighting) -> dict[str, Tensor | RoundedWeight]:
        """Alternately round the matrix and fit a low-rank matrix to the error, and return the best result."""
        target, formats = stored.matrix(), stored.formats
        _, part = stored.topology.parts[1]
        left, right = part.core_names
        rank = part.core_shapes[right][0]

        def as_stored(name: str, core: Tensor | RoundedWeight) -> Tensor | RoundedWeight:
            kept = stored.tensors[name]
            return core.reshape(kept.shape).to(kept) if isinstance(core, Tensor) else core

        def rounded(a: Tensor, b: Tensor) -> tuple[dict[str, Tensor | RoundedWeight], Tensor]:
            """Round the factors that have an integer format, and return both factors and their product."""
            made: list[Tensor | RoundedWeight] = [a.reshape(-1, rank), b.reshape(rank, -1)]
            if left in formats or right in formats:
                product = round_product(
                    a.reshape(-1, rank),
                    b.reshape(rank, -1),
                    formats.get(left),
                    formats.get(right),
                    weighting,
                    rounding=stored.rounding,
                )
                made = [product.left, product.right]
            values = [x if isinstance(x, Tensor) else x.dequantize(target.dtype) for x in made]
            factors = {name: as_stored(name, x) for name, x in zip((left, right), made, strict=True)}
            return factors, values[0].to(target) @ values[1].to(target)

        if BASE not in formats:  # a floating-point matrix can compensate for the rounding of the factors
            factors, product = rounded(stored.tensors[left], stored.tensors[right])
            return {**factors, BASE: as_stored(BASE, target - product)}

        # Keep the best result of all alternations: rounding the factors may increase the loss again.
        best: tuple[float, dict[str, Tensor | RoundedWeight]] | None = None
        product = torch.zeros_like(target)
        for _ in range(_ALTERNATIONS):
            base = round_dense(target - product, formats[BASE], weighting, rounding=stored.rounding)
            rest = target - base.dequantize(target.dtype)
            factors, product = rounded(*_LOW_RANK.fit(rest, part, weighting).network.to(target.dtype).cores)
            loss = weighting.cost(rest - product)
            if best is None or loss < best[0]:
                best = loss, {BASE: base, **factors}
        assert best is not None
        return best[1]

    def gauge_bonds(self, topology: Topology) -> dict[str, str]:
        """Return no bonds: the factors are small, and they are fitted only after the matrix is rounded."""
        return {}

    def with_rank(self, topology: Topology, rank: int) -> Topology:
        """Build the residual topology with `rank` added to the rank of its low-rank matrix."""
        return self.build(*topology.shape, max_bond=topology.bond_dims["b1"] + rank)


register_topology(ResidualFamily())
