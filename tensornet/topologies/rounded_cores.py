"""Round the cores of any network to integers, using estimates of how errors of each core affect the loss.

The matrix of a network is linear in each core, so the loss increase is quadratic in the error of a core. The
curvature is the covariance of the gradients `J^T vec(L_R Z L_C^T)`. Here `J` is the derivative of the matrix
with respect to the core, and `L_R` and `L_C` are roots of the moments. `Z` is random with independent
elements. A few such gradients, viewed as matrices, give estimates of the row and column moments of the core.
After each core is rounded, the remaining cores are refitted to reduce the effect of its rounding error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensornet.als import fit_network
from tensornet.contraction.plan import plan_matrix, run
from tensornet.damping import ROW_DAMPING
from tensornet.linalg.weighted_svd import Weighting, root, times
from tensornet.network import TensorNetwork
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.rounding import RoundedWeight, Rounding, round_weight
from tensornet.topology import Topology

#: Number of random gradients from which the moments of a core are estimated.
_PROBES = 6
#: Number of conjugate gradient steps for each refitted core.
_STEPS = 4


def matrix_view(topology: Topology, name: str) -> tuple[int, int]:
    """Return the shape `(rows, columns)` of the matrix to which a core is reshaped for rounding.

    The columns are the axes from the first in-leg on. If the core has no in-leg, or if an in-leg is the first
    axis, the columns are the last axis.
    """
    labels = next(core.labels for core in topology.cores if core.name == name)
    legs = [axis for axis, label in enumerate(labels) if label in topology.in_labels]
    split = legs[0] if legs and legs[0] > 0 else len(labels) - 1
    shape = topology.core_shapes[name]
    return math.prod(shape[:split]), math.prod(shape[split:])


@dataclass(frozen=True)
class StoredCores:
    """Cores of a network that are about to be rounded.

    Args:
        topology: topology of the network.
        tensors: tensor of each core, by name: a matrix `(rows, columns)` if the core is rounded to integers,
            else the tensor that is stored. A core is pivoted if some of its rows form an identity matrix;
            these rows are not stored.
        formats: number format of each core that is rounded to integers, by name.
        orders: for each pivoted core, the position of each of its rows in a matrix that has the identity
            first and the stored rows below it.
        assemble: function that computes the full cores, in the order of the topology, from such a dictionary
            of `tensors`.
        rounding: rounding method; see `round_weight`.
    """

    topology: Topology
    tensors: Mapping[str, Tensor]
    formats: Mapping[str, NumberFormat]
    orders: Mapping[str, Tensor]
    assemble: Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
    rounding: Rounding = "two_sided"

    def matrix(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Contract `tensors`, by default `self.tensors`, to the matrix `(out, in)` of the network."""
        cores = self.assemble(self.tensors if tensors is None else tensors)
        dense = run(plan_matrix(self.topology), cores)
        return dense[: self.topology.out_features, : self.topology.in_features]


def round_in_turn(stored: StoredCores, weighting: Weighting) -> dict[str, Tensor | RoundedWeight]:
    """Round the cores that have an integer format one after another; after each, refit the remaining cores.

    Arguments and results are those of `TopologyFamily.round_cores`.
    """
    target, tensors, names = stored.matrix(), dict(stored.tensors), stored.topology.core_names
    done: dict[str, Tensor | RoundedWeight] = {}
    floating = [name for name in names if name not in stored.formats]
    waiting = list(stored.formats)

    def cost(name: str, rounded: RoundedWeight) -> float:
        made = stored.matrix({**tensors, name: rounded.dequantize(target.dtype)})
        return weighting.cost(target - made)

    while waiting:
        # 1. Round the next core once with estimated moments and once without; keep the better result.
        name = waiting.pop(0)
        number_format, matrix = stored.formats[name], tensors[name]
        moments: list[tuple[Tensor | None, Tensor | None]] = [(None, None)]
        if matrix.numel() > 0:
            moments.append(seen_moments(stored, tensors, name, weighting))
        tried = [
            round_weight(
                matrix,
                number_format,
                rows=rows,
                columns=columns,
                rounding=stored.rounding,
                row_damping=ROW_DAMPING,
                column_damping=ROW_DAMPING,
            )
            for rows, columns in moments
        ]
        losses = [cost(name, rounded) for rounded in tried]
        best = tried[losses.index(min(losses))]
        done[name], tensors[name] = best, best.dequantize(target.dtype)
        # 2. Refit the cores that are not rounded yet, except in pivoted networks, where some rows are fixed.
        left = [k for k, other in enumerate(names) if other in floating or other in waiting]
        if left and not stored.orders:
            start = TensorNetwork(stored.topology, tuple(stored.assemble(tensors)))
            fit = fit_network(target, start, weighting, sweeps=1, steps=_STEPS, only=left)
            for k in left:
                tensors[names[k]] = fit.network.cores[k].reshape(tensors[names[k]].shape)
    return done | {name: tensors[name] for name in floating}


def seen_moments(
    stored: StoredCores, tensors: Mapping[str, Tensor], name: str, weighting: Weighting
) -> tuple[Tensor, Tensor]:
    """Estimate the row moment and the column moment of one core, both scaled to diagonals with mean 1.

    Returns:
        The moments, of shapes `(rows, rows)` and `(columns, columns)`.
    """

    def matrix(core: Tensor) -> Tensor:  # an affine function of the core
        return stored.matrix({**tensors, name: core})

    core = tensors[name]
    linear: Any = torch.func.vjp(matrix, core)
    made, adjoint = linear
    roots = [None if x is None else root(x)[0].to(made) for x in (weighting.rows, weighting.columns)]
    generator = torch.Generator().manual_seed(0)
    rows, columns = core.new_zeros(core.shape[0], core.shape[0]), core.new_zeros(core.shape[1], core.shape[1])
    for _ in range(_PROBES):
        widths = [n if x is None else x.shape[-1] for n, x in zip(made.shape, roots, strict=True)]
        noise = torch.randn(widths, generator=generator, device="cpu").to(made)
        (gradient,) = adjoint(times(roots[1], times(roots[0], noise).mT).mT)
        rows.addmm_(gradient, gradient.mT)
        columns.addmm_(gradient.mT, gradient)
    means = [float(x.diagonal().mean()) for x in (rows, columns)]
    rows, columns = (x / mean if mean > 0 else x for x, mean in zip((rows, columns), means, strict=True))
    return rows, columns
