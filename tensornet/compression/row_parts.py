"""Compress a large matrix in parts, each with some of its rows, so that several processes can share the work.

Without error feedback between the outputs, the rows of a dense matrix are rounded independently. The parts
depend only on the shape of the matrix, so the result does not depend on the number of processes.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tensornet.compression.plan import LayerPlan
from tensornet.linalg.svd import energy
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.linear import TensorNetworkLinear, linear_from_stored
from tensornet.nn.storage import PackedCore
from tensornet.quantization import Rounding
from tensornet.topologies import dense

#: Number of rows of a part. Every part factorizes the moment of the inputs again in its process; with so many
#: rows, this takes a few percent of the time of rounding.
ROWS = 4096


class Task(NamedTuple):
    """Arguments of `compress_layer`.

    Args:
        matrix: the weight, shape `(out, in)`.
        layer: its plan.
        weighting: sensitivity of the loss to errors of the weight.
        rounding: rounding method for integers.
    """

    matrix: Tensor
    layer: LayerPlan
    weighting: Weighting
    rounding: Rounding


def row_parts(task: Task) -> list[Task]:
    """Split a task into tasks for parts of the rows; return it alone if its rows depend on each other."""
    matrix, layer, weighting, rounding = task
    rows = weighting.rows
    rounded = layer.topology is not None and layer.topology.family == "dense" and layer.storage.quantized
    if not rounded or (rows is not None and rows.ndim == 2) or len(matrix) <= ROWS:
        return [task]
    return [
        Task(
            part,
            replace(
                layer,
                shape=(len(part), part.shape[1]),
                topology=dense(out_features=len(part), in_features=part.shape[1]),
            ),
            replace(weighting, rows=None if rows is None else rows[k * ROWS : (k + 1) * ROWS]),
            rounding,
        )
        for k, part in enumerate(matrix.split(ROWS))
    ]


def join_rows(
    task: Task, parts: Sequence[Task], made: Sequence[tuple[TensorNetworkLinear, float]]
) -> tuple[TensorNetworkLinear, float]:
    """Join the layers and relative errors that `compress_layer` returned for the parts of a task."""
    if len(parts) == 1:
        return made[0]
    assert task.layer.topology is not None
    cores = [layer.core_matrix for layer, _ in made]
    tensors = {name: torch.cat([core.tensors[name] for core in cores]) for name in cores[0].names}
    core = PackedCore(cores[0].number_format, task.matrix.shape, cores[0].columns, tensors)
    layer = linear_from_stored(
        task.layer.topology,
        {"core_matrix": core},
        source="linear",
        storage=task.layer.storage,
        like=made[0][0].compute_like,
    )
    energies = [float(energy(part.matrix)) for part in parts]
    squares = sum(error**2 * own for (_, error), own in zip(made, energies, strict=True))
    return layer, math.sqrt(squares / max(sum(energies), 1e-300))
