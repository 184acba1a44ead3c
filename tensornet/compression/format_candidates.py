"""The dense matrix of a layer as a candidate in every number format, with exact bytes and predicted loss.

From 4 bits on the loss is predicted from the moments alone; at 2 and 3 bits, where clamping and scales
decide, the matrix is rounded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.compression.candidates import LayerCandidates, relative_gap, round_trip
from tensornet.compression.latency import Clock
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.encoding import PLAIN, Storage
from tensornet.quantization import NumberFormat, predict_loss_increase, round_weight
from tensornet.topologies import dense
from tensornet.topology import Topology

#: Fewest bits at which the loss of rounding is predicted instead of measured.
PREDICTED_BITS = 4


@dataclass(frozen=True)
class FormatLosses:
    """Losses and errors of a dense matrix in one format.

    Args:
        choice: predicted loss increase under the weighting that candidates are chosen by.
        forecast: the same under the weighting of forecasts.
        error: relative Frobenius error; estimated where nothing was rounded.
    """

    choice: float
    forecast: float
    error: float


def dense_candidates(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat], clock: Clock | None
) -> LayerCandidates:
    """Build one candidate of the dense matrix for each format, in their order."""
    losses = format_losses(matrix, sensitivity, formats)
    topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
    storages = [PLAIN if x == NumberFormat() else Storage(number_format=x) for x in formats]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def make(index: int) -> tuple[Topology | None, Storage]:
        return (None, PLAIN) if storages[index] == PLAIN else (topology, storages[index])

    time = 0.0 if clock is None else clock.dense((matrix.shape[0], matrix.shape[1]))
    return LayerCandidates(
        params=column([x.num_params(topology) for x in storages]),
        num_bytes=column([x.num_bytes(topology, matrix.dtype) for x in storages]),
        costs=column([x.choice for x in losses]),
        forecasts=column([x.forecast for x in losses]),
        errors=column([x.error for x in losses]),
        milliseconds=column([time] * len(formats)),
        make=make,
        uniform={x.name: k for k, x in enumerate(formats)},
        nearest=nearest_losses(matrix, sensitivity.forecast, formats),
    )


def format_losses(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat]
) -> list[FormatLosses]:
    """Compute the losses of a matrix in each format; round where predictions are not accurate.

    How much more the forecast costs than the choice depends on the layer and hardly on the format: it is
    taken from the smallest integer format, which is always rounded.
    """
    integers = [x for x in formats if x.bits is not None]
    rounded = {x for x in integers if x.bits is not None and x.bits < PREDICTED_BITS}
    if integers:
        rounded.add(min(integers, key=lambda x: x.nbytes(matrix.shape)))
    predicted = [x for x in integers if x not in rounded]
    topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
    network = TensorNetwork(topology, (matrix,))
    found: dict[NumberFormat, FormatLosses] = {}
    for number_format in formats:
        if number_format in predicted:
            continue
        storage = Storage(number_format=number_format)
        kept = round_trip(network, storage, matrix.dtype, sensitivity.choice).to_matrix()
        error = matrix.double() - kept.double()
        found[number_format] = FormatLosses(
            sensitivity.choice.cost(error), sensitivity.forecast.cost(error), relative_gap(matrix, kept)
        )
    if predicted:
        known = found[min(rounded, key=lambda x: x.nbytes(matrix.shape))]
        found |= _predicted(matrix, sensitivity.choice, predicted, known)
    return [found[x] for x in formats]


def _predicted(
    matrix: Tensor, weighting: Weighting, formats: Sequence[NumberFormat], known: FormatLosses
) -> Mapping[NumberFormat, FormatLosses]:
    """Predict losses of a matrix in each format, scaled where the matrix was rounded."""
    losses = predict_loss_increase(
        matrix, formats, rows=weighting.rows, columns=weighting.columns, row_damping=0.0
    )
    ratio = known.forecast / known.choice if known.choice > 0 else 1.0
    root = known.error / known.choice**0.5 if known.choice > 0 else 0.0
    return {
        number_format: FormatLosses(loss, loss * ratio, loss**0.5 * root)
        for number_format, loss in zip(formats, losses, strict=True)
    }


def nearest_losses(matrix: Tensor, weighting: Weighting, formats: Sequence[NumberFormat]) -> dict[str, float]:
    """Predict the loss increase of round to nearest in each integer format, the baseline of all tables."""
    found = {}
    for number_format in formats:
        if number_format.is_integer:
            kept = round_weight(matrix, number_format, method="nearest", refits=0).dequantize(torch.float64)
            found[number_format.name] = weighting.cost(matrix.double() - kept)
    return found
