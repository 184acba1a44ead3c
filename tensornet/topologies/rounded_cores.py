"""Round the cores of any network to integers, each with its own moments.

The matrix of a network is linear in each core, so the loss increase is quadratic in the error of a core. Its
curvature is the covariance of the gradients `J^T vec(L_R Z L_C^T)` of the core, for random `Z` with
independent elements. A few such gradients give estimates of the row and column moments of the core, viewed as
a matrix. After a core is rounded, the remaining cores are refitted, which compensates a part of the rounding
error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensornet.als import fit_network
from tensornet.contraction.plan import plan_matrix, run
from tensornet.linalg.weighted_svd import Weighting, root, times
from tensornet.network import TensorNetwork
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.moments import ESTIMATE_DAMPING
from tensornet.quantization.rounding import RoundedWeight, Rounding, round_weight
from tensornet.topology import Topology

#: Number of random gradients for estimating the moments of a core.
_PROBES = 6
#: Conjugate gradient steps for each core that is refitted.
_STEPS = 4


def matrix_view(topology: Topology, name: str) -> tuple[int, int]:
    """View a core as a matrix; return its shape. Groups with one scale lie along the rows.

    The columns are the axes from the first in-leg on, or only the last axis if an in-leg comes first or there
    is none.
    """
    labels = next(core.labels for core in topology.cores if core.name == name)
    legs = [axis for axis, label in enumerate(labels) if label in topology.in_labels]
    split = legs[0] if legs and legs[0] > 0 else len(labels) - 1
    shape = topology.core_shapes[name]
    return math.prod(shape[:split]), math.prod(shape[split:])


@dataclass(frozen=True)
class StoredCores:
    """Cores during encoding, with the weighting of their matrix.

    Args:
        topology: topology of the network.
        tensors: by the name of the core, a matrix `(rows, columns)` if it will be integers, else the tensor
            that will be stored.
        formats: formats of the cores that will be integers, by name.
        orders: for pivoted cores, the position of every row in the identity followed by the stored rows.
        assemble: returns the full cores, in the order of the topology, for such tensors.
        rounding: largest amount of error feedback, see `round_weight`.
    """

    topology: Topology
    tensors: Mapping[str, Tensor]
    formats: Mapping[str, NumberFormat]
    orders: Mapping[str, Tensor]
    assemble: Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
    rounding: Rounding = "two_sided"

    def matrix(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Contract the network to the matrix `(out, in)`, with its tensors or the given ones."""
        cores = self.assemble(self.tensors if tensors is None else tensors)
        dense = run(plan_matrix(self.topology), cores)
        return dense[: self.topology.out_features, : self.topology.in_features]


def round_in_turn(stored: StoredCores, weighting: Weighting) -> dict[str, Tensor | RoundedWeight]:
    """Round one integer core after the other, with estimated moments, and refit the remaining cores.

    Args:
        stored: the cores of any network.
        weighting: sensitivity of the loss to errors of its matrix.
    """
    target, tensors, names = stored.matrix(), dict(stored.tensors), stored.topology.core_names
    done: dict[str, Tensor | RoundedWeight] = {}
    floating = [name for name in names if name not in stored.formats]
    waiting = list(stored.formats)

    def cost(name: str, rounded: RoundedWeight) -> float:
        made = stored.matrix({**tensors, name: rounded.dequantize(target.dtype)})
        return weighting.cost(target - made)

    while waiting:
        # 1. Round the next core with estimated moments, and to nearest; keep the one with the smaller exact
        # loss.
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
                row_damping=ESTIMATE_DAMPING,
                column_damping=ESTIMATE_DAMPING,
            )
            for rows, columns in moments
        ]
        losses = [cost(name, rounded) for rounded in tried]
        best = tried[losses.index(min(losses))]
        done[name], tensors[name] = best, best.dequantize(target.dtype)
        # 2. Refit the cores that are not yet integers. In pivoted cores only some rows are free.
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
    """Estimate the row and column moments for errors of one core, scaled to a mean diagonal of 1.

    Returns:
        The moments, of shapes `(rows, rows)` and `(columns, columns)`.
    """

    def matrix(core: Tensor) -> Tensor:  # affine in the core
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
