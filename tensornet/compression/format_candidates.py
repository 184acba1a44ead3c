"""The dense matrix of a layer as a candidate in every number format, with exact bytes and predicted loss.

From 4 bits on the loss is predicted from the moments alone; at 2 and 3 bits, where clamping and scales
decide, some rows of the matrix are rounded, and the prediction is corrected by what they cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.compression.candidates import LayerCandidates, relative_gap, round_trip
from tensornet.compression.latency import Clock
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.encoding import PLAIN, Storage
from tensornet.quantization import NumberFormat, round_weight
from tensornet.quantization.expected_loss import expected_losses
from tensornet.topologies import dense
from tensornet.topology import Topology

#: Fewest bits at which the loss of rounding is predicted instead of measured.
PREDICTED_BITS = 4
#: Rows that are rounded to measure it.
SAMPLED_ROWS = 128


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

    def scaled(self, measured: "FormatLosses", expected: "FormatLosses") -> "FormatLosses":
        """Correct a prediction by the ratio of measured and expected values of a part of the matrix."""
        names = ("choice", "forecast", "error")
        values = [(getattr(self, n), getattr(measured, n), getattr(expected, n)) for n in names]
        return FormatLosses(*(x * found / known if known > 0 else found for x, found, known in values))


def dense_candidates(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat], clock: Clock | None
) -> LayerCandidates:
    """Make one candidate of the dense matrix for each format, in their order."""
    losses = format_losses(matrix, sensitivity, formats)
    topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
    storages = [PLAIN if x == NumberFormat() else Storage(number_format=x) for x in formats]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def make(index: int) -> tuple[Topology | None, Storage]:
        return (None, PLAIN) if storages[index] == PLAIN else (topology, storages[index])

    shape = (matrix.shape[0], matrix.shape[1])

    def time(number_format: NumberFormat) -> float:
        if clock is None:
            return 0.0
        return clock.integers(number_format, shape) if number_format.is_integer else clock.dense(shape)

    return LayerCandidates(
        params=column([x.num_params(topology) for x in storages]),
        num_bytes=column([x.num_bytes(topology, matrix.dtype) for x in storages]),
        costs=column([x.choice for x in losses]),
        forecasts=column([x.forecast for x in losses]),
        errors=column([x.error for x in losses]),
        milliseconds=column([time(x) for x in formats]),
        make=make,
        uniform={x.name: k for k, x in enumerate(formats)},
        nearest=nearest_losses(matrix, sensitivity.forecast, formats),
    )


def format_losses(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat]
) -> list[FormatLosses]:
    """Losses of a matrix in each format, corrected where predictions are not accurate."""
    integers = [x for x in formats if x.is_integer]
    found = {x: _measured(matrix, sensitivity, x) for x in formats if not x.is_integer}
    found |= dict(zip(integers, _predicted(matrix, sensitivity, integers), strict=True))
    few = [x for x in integers if (x.bits or 0) < PREDICTED_BITS]
    if few:
        rows = torch.linspace(0, len(matrix) - 1, min(SAMPLED_ROWS, len(matrix)), device=matrix.device).long()
        part = matrix[rows]
        seen = Sensitivity(_of_rows(sensitivity.choice, rows), _of_rows(sensitivity.forecast, rows))
        for x, expected in zip(few, _predicted(part, seen, few), strict=True):
            found[x] = found[x].scaled(_measured(part, seen, x), expected)
    return [found[x] for x in formats]


def _measured(matrix: Tensor, sensitivity: Sensitivity, number_format: NumberFormat) -> FormatLosses:
    """Losses of a matrix that is stored in a format."""
    topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
    storage, network = Storage(number_format=number_format), TensorNetwork(topology, (matrix,))
    kept = round_trip(network, storage, matrix.dtype, sensitivity.choice).to_matrix()
    error = matrix.double() - kept.double()
    return FormatLosses(
        sensitivity.choice.cost(error), sensitivity.forecast.cost(error), relative_gap(matrix, kept)
    )


def _predicted(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat]
) -> list[FormatLosses]:
    """Losses and errors of integer formats, predicted without rounding."""
    weightings = [sensitivity.choice, sensitivity.forecast, Weighting()]
    norm = float(matrix.double().square().sum().clamp_min(1e-300))
    return [
        FormatLosses(choice, forecast, (2 * plain / norm) ** 0.5)
        for choice, forecast, plain in expected_losses(matrix, formats, weightings).tolist()
    ]


def _of_rows(weighting: Weighting, rows: Tensor) -> Weighting:
    """Sensitivity to errors of some rows alone."""
    moment = weighting.rows
    if moment is not None:
        moment = moment[rows] if moment.ndim == 1 else moment[rows][:, rows]
    return Weighting(moment, weighting.columns)


def nearest_losses(matrix: Tensor, weighting: Weighting, formats: Sequence[NumberFormat]) -> dict[str, float]:
    """Predicted loss increase of rounding to nearest in each integer format: the baseline of every table."""
    found = {}
    for number_format in formats:
        if number_format.is_integer:
            kept = round_weight(matrix, number_format, method="nearest", refits=0)
            found[number_format.name] = weighting.cost(matrix - kept.dequantize(matrix.dtype))
    return found
