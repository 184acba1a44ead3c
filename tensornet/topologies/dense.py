"""Dense matrices as networks of one core, for plain quantization."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensornet._util import check_size
from tensornet.budget import Budget, caps_of_bonds
from tensornet.damping import DENSE_COLUMN_DAMPING, DENSE_ROW_DAMPING
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.svd import check_finite, result_dtype
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.quantization import NumberFormat, RoundedWeight, Rounding, round_weight
from tensornet.quantization.grids import recover
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
    """Build the topology of a dense matrix: one core named `matrix`, shape `(out, in)`.

    Args:
        out_features: number of rows.
        in_features: number of columns.

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


#: Number of sweeps of coordinate descent after rounding, by number of bits. With few bits it helps most. Each
#: sweep takes longer than rounding. A second one with 3 bits, or a third with 2, would lower the loss by 3 %.
_SWEEPS = {3: 1, 2: 2}
#: Number of sweeps with a codebook, if there is no feedback between rows. A second sweep would lower the loss
#: by 2 % and take half as long as the rest of the rounding. After two-sided feedback, one sweep would lower
#: it by 4 % and take twice as long as the rest.
_CODEBOOK_SWEEPS = 1


def round_dense(
    matrix: Tensor,
    number_format: NumberFormat,
    weighting: Weighting,
    most_sweeps: int | None = None,
    rounding: Rounding = "two_sided",
) -> RoundedWeight:
    """Round a dense matrix to integers, with damping and coordinate descent that suit dense matrices.

    As in the literature, rounding to nearest uses no moments, and one-sided rounding (GPTQ) uses only the
    moment of the inputs; neither is followed by coordinate descent. Scales are not refitted, since they are
    found for the residuals that feedback leaves. With feedback between rows, a matrix whose values are on the
    grid already is stored without any change.

    Args:
        matrix: matrix of shape `(out, in)`, or stack of shape `(stack, out, in)`.
        number_format: integer format.
        weighting: sensitivity of the loss to errors; full moments may be stacks too.
        most_sweeps: limit on the number of sweeps of descent; by default 1 with 3 bits, 2 with 2 bits, and
            with a codebook 1, or none if there is feedback between rows.
        rounding: rounding method; see `round_weight`.
    """
    if rounding == "nearest":
        return round_weight(matrix, number_format, rounding=rounding, refits=0)
    if rounding == "one_sided":
        return round_weight(
            matrix,
            number_format,
            columns=weighting.columns,
            rounding=rounding,
            column_damping=DENSE_COLUMN_DAMPING,
            refits=0,
        )
    if (exact := recover(matrix, number_format)) is not None:
        return exact
    sweeps = _SWEEPS.get(number_format.bits or 0, 0)
    if number_format.points.run > 1:
        sweeps = 0 if weighting.full else _CODEBOOK_SWEEPS
    return round_weight(
        matrix,
        number_format,
        rows=weighting.rows,
        columns=weighting.columns,
        row_damping=DENSE_ROW_DAMPING,
        refits=0,
        sweeps=sweeps if most_sweeps is None else min(sweeps, most_sweeps),
    )


class DenseFamily(TopologyFamily):
    """Dense matrices, stored as one core; they can be compressed only by their number format."""

    name = "dense"

    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """Build the dense topology, which has no bonds; see `dense`."""
        check_options(self.name, options)
        caps_of_bonds(max_bond, 0, TopologyError)
        made = dense(out_features=out_features, in_features=in_features)
        return replace(made, family=self.name)

    def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        """Copy the matrix into a network of one core.

        Raises:
            BudgetError: `param_ratio` is below 1.
        """
        check_options(self.name, options)
        shape = check_request(self.name, matrix, budget)
        if budget.param_ratio is not None and budget.param_ratio < 1:
            raise BudgetError(
                f"param_ratio={budget.param_ratio} is below 1, but the topology {self.name!r} keeps all "
                f"{matrix.numel()} parameters of the matrix; choose a number format with fewer bits, or "
                "another topology."
            )
        return self.decompose_to(matrix, self.build(*shape))

    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Copy the matrix into a network of one core."""
        check_topology(self.name, topology, matrix)
        check_finite(matrix, "The matrix")
        core = matrix.detach().to(result_dtype(matrix.dtype), copy=True).contiguous()
        return Decomposition(TensorNetwork(topology, (core,)), 0.0, "exact")

    def fit(self, matrix: Tensor, topology: Topology, weighting: Weighting) -> Decomposition:
        """Copy the matrix into a network of one core; the weighting has no effect."""
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
        """Return the only candidate, with the loss increase predicted for rounding the matrix."""
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
        """Round the matrix to integers so that its weighted error is small; see `round_dense`."""
        return {
            name: round_dense(stored.tensors[name], number_format, weighting, rounding=stored.rounding)
            for name, number_format in stored.formats.items()
        }

    def with_rank(self, topology: Topology, rank: int) -> Topology:
        """Return the same topology: a dense matrix plus a low-rank matrix is a dense matrix."""
        return topology


register_topology(DenseFamily())
