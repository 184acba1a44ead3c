"""Dense family: the matrix itself as a network of one core, for plain quantization."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensornet._util import check_size
from tensornet.budget import Budget, caps_of_bonds
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.svd import check_finite, result_dtype
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.quantization import NumberFormat, RoundedWeight, Rounding, round_weight
from tensornet.quantization.moments import DENSE_ROW_DAMPING
from tensornet.topologies.base import (
    Decomposition,
    Ladder,
    RoundTrip,
    TopologyFamily,
    check_options,
    check_request,
    check_topology,
)
from tensornet.topologies.registry import register_topology
from tensornet.topologies.rounded_cores import StoredCores
from tensornet.topology import CoreSpec, Topology


def dense(*, out_features: int, in_features: int) -> Topology:
    """Build the topology of one core `matrix: (out, in)`.

    Args:
        out_features: rows.
        in_features: columns.

    Raises:
        TopologyError: a size is not an integer of at least 1.

    Example:
        >>> tn.topologies.dense(out_features=6, in_features=4).core_shapes
        {'matrix': (6, 4)}
    """
    for name, size in (("out_features", out_features), ("in_features", in_features)):
        check_size(name, size)
    return Topology(
        family="dense",
        cores=(CoreSpec("matrix", ("o0", "i0")),),
        sizes=(("o0", out_features), ("i0", in_features)),
        out_labels=("o0",),
        in_labels=("i0",),
        out_features=out_features,
        in_features=in_features,
    )


#: Sweeps of descent after rounding, by bits; with few bits descent gains more.
_SWEEPS = {3: 2, 2: 4}


def round_dense(
    matrix: Tensor,
    number_format: NumberFormat,
    weighting: Weighting,
    most_sweeps: int | None = None,
    rounding: Rounding = "two_sided",
) -> RoundedWeight:
    """Round a matrix with additional damping of its moments, and descend on the loss for few bits.

    The baselines are as in the literature: round to nearest uses no moments, one-sided rounding (GPTQ) uses
    the moment of the inputs alone, and neither is followed by descent.

    Args:
        matrix: shape `(out, in)`, or a stack `(stack, out, in)`.
        number_format: an integer format.
        weighting: sensitivity of the loss to errors; its full moments may be stacks as well.
        most_sweeps: largest number of sweeps of descent, to use fewer than usual.
        rounding: as for `round_weight`.
    """
    if rounding == "nearest":
        return round_weight(matrix, number_format, rounding=rounding, refits=0)
    if rounding == "one_sided":
        return round_weight(matrix, number_format, columns=weighting.columns, rounding=rounding)
    sweeps = _SWEEPS.get(number_format.bits or 0, 0)
    return round_weight(
        matrix,
        number_format,
        rows=weighting.rows,
        columns=weighting.columns,
        row_damping=DENSE_ROW_DAMPING,
        sweeps=sweeps if most_sweeps is None else min(sweeps, most_sweeps),
    )


class DenseFamily(TopologyFamily):
    """Family of one dense core, whose size depends only on the number format.

    Example:
        >>> found = tn.decompose(torch.randn(12, 8), "dense")
        >>> found.network.num_params, found.error
        (96, 0.0)
    """

    name = "dense"

    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """Build the topology, see `dense`; there is no bond to cap."""
        check_options(self.name, options)
        caps_of_bonds(max_bond, 0, TopologyError)
        made = dense(out_features=out_features, in_features=in_features)
        return replace(made, family=self.name)

    def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        """Copy the matrix.

        Raises:
            BudgetError: the budget allows fewer parameters than the matrix has.
        """
        check_options(self.name, options)
        shape = check_request(self.name, matrix, budget)
        if budget.param_ratio is not None and budget.param_ratio < 1:
            raise BudgetError(
                f"param_ratio={budget.param_ratio} allows fewer parameters than the {matrix.numel()} of the "
                f"matrix, and the topology {self.name!r} keeps them all; a number format makes it smaller, "
                "or take another topology."
            )
        return self.decompose_to(matrix, self.build(*shape))

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Copy the matrix."""
        check_topology(self.name, topology, matrix)
        check_finite(matrix, "The matrix")
        core = matrix.detach().to(result_dtype(matrix.dtype), copy=True).contiguous()
        return Decomposition(TensorNetwork(topology, (core,)), 0.0, "exact")

    def fit(self, matrix: Tensor, topology: Topology, weighting: Weighting) -> Decomposition:
        """Copy the matrix, for any weighting."""
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
        """List one candidate, whose loss is that of its number format."""
        check_options(self.name, options)
        topology = self.build(matrix.shape[0], matrix.shape[1])
        network = self.decompose_to(matrix, topology).network
        gap = torch.zeros_like(network.cores[0])
        if round_trip is not None:
            gap = network.cores[0] - round_trip(network).to_matrix()
        losses = torch.tensor([[weighting.cost(gap)] for weighting in weightings], dtype=torch.float64)
        error = float(gap.double().norm() / matrix.double().norm().clamp_min(1e-300))
        return Ladder((topology,), losses, torch.tensor([error], dtype=torch.float64), complete=True)

    def round_cores(self, stored: StoredCores, weighting: Weighting) -> dict[str, Tensor | RoundedWeight]:
        """Round the matrix two-sidedly with the moments of the weight."""
        return {
            name: round_dense(stored.tensors[name], number_format, weighting, rounding=stored.rounding)
            for name, number_format in stored.formats.items()
        }

    def with_rank(self, topology: Topology, rank: int) -> Topology:
        """Return the same topology, since the sum of two matrices is a matrix."""
        return topology


register_topology(DenseFamily())
