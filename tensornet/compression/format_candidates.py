"""The dense matrix of a layer as a candidate in every number format, with exact bytes and predicted loss.

From 4 bits on the loss is predicted from the moments alone; at 2 and 3 bits, where clamping and scales
decide, a part of the matrix is rounded, and the prediction is corrected by what that costs. Where scales are
too small for their dtype the whole matrix is rounded.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet._util import remembering
from tensornet.compression.candidates import LayerCandidates, relative_gap, round_trip
from tensornet.compression.config import DEFAULT_FORMATS
from tensornet.compression.latency import Clock
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import Weighting, times
from tensornet.network import TensorNetwork
from tensornet.nn.encoding import PLAIN, Storage
from tensornet.quantization import NumberFormat, predict_losses, round_weight
from tensornet.quantization.moments import DENSE_ROW_DAMPING
from tensornet.quantization.predict import group_ranges, spaced_rows
from tensornet.quantization.scales import scales_underflow, storable_formats
from tensornet.topologies import dense
from tensornet.topologies.dense import round_dense
from tensornet.topology import Topology

#: Fewest bits at which the loss of rounding is predicted instead of measured.
PREDICTED_BITS = 4
#: Rows whose residuals stand for those of all.
SAMPLED_ROWS = 128
#: Columns of those rows that are rounded to measure what predictions miss.
SAMPLED_COLUMNS = 512
#: Sweeps of descent on a part. With all that a matrix gets the part gains 2 to 3 % more than the whole does.
_SWEEPS = 1


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


@dataclass(frozen=True)
class Sample:
    """Part of a matrix that is rounded to few bits, and the sensitivity to errors of this part alone.

    Args:
        part: some rows and columns.
        seen: sensitivity to its errors.
        whole: the part is the whole matrix.
    """

    part: Tensor
    seen: Sensitivity
    whole: bool = False


@dataclass(frozen=True)
class MeasuredSample:
    """Sample of a matrix with its measured losses in each format of few bits."""

    sample: Sample
    losses: Mapping[NumberFormat, FormatLosses]


def dense_candidates(
    matrix: Tensor,
    sensitivity: Sensitivity,
    formats: Sequence[NumberFormat],
    clock: Clock | None,
    measured: MeasuredSample | None = None,
    names: Sequence[NumberFormat] | None = None,
) -> LayerCandidates:
    """Make one candidate of the dense matrix for each format, in their order; see `format_losses`.

    Candidates are found in `uniform` and `nearest` under the formats of `names`, for which those of `formats`
    stand in this layer; under their own if absent.
    """
    names = names or formats
    losses = format_losses(matrix, sensitivity, formats, measured)
    nearest = nearest_losses(matrix, sensitivity.forecast, formats)
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
        uniform={x.name: k for k, x in enumerate(names)},
        nearest={
            asked.name: nearest[kept.name]
            for asked, kept in zip(names, formats, strict=True)
            if kept.name in nearest
        },
    )


def format_losses(
    matrix: Tensor,
    sensitivity: Sensitivity,
    formats: Sequence[NumberFormat],
    measured: MeasuredSample | None = None,
) -> list[FormatLosses]:
    """Compute the losses of a matrix in each format; measure a part where predictions are inaccurate.

    Args:
        matrix: shape `(out, in)`.
        sensitivity: of the loss to its errors.
        formats: number formats.
        measured: from `measure_samples`, which takes less time for several matrices; measured here if absent.
    """
    coarse = [x for x in formats if scales_underflow(matrix, x, sensitivity.choice)]
    integers = [x for x in formats if x.is_integer and x not in coarse]
    found = {x: _measured(matrix, sensitivity, x) for x in formats if x not in integers}
    sample = spaced_rows(matrix, SAMPLED_ROWS)
    found |= dict(zip(integers, _predicted(matrix, sensitivity, integers, sample), strict=True))
    if few := few_bits(integers):
        known = measured or measure_samples([sample_of(matrix, sensitivity, few)], few)[0]
        expected = _predicted(known.sample.part, known.sample.seen, few)
        for x, losses in zip(few, expected, strict=True):
            found[x] = found[x].scaled(known.losses[x], losses)
    return [found[x] for x in formats]


def layer_formats(
    matrices: Sequence[Tensor], sensitivities: Sequence[Sensitivity], formats: Sequence[NumberFormat]
) -> tuple[NumberFormat, ...]:
    """Choose the formats of one layer, or of layers that share a core, from those that may be planned.

    Of the default ones those with 8-bit scales give way to those with 16-bit scales where theirs underflow.
    Formats that were asked for stay, and cost what they lose.
    """
    found = tuple(formats)
    if tuple(x.name for x in formats) == DEFAULT_FORMATS:
        for matrix, sensitivity in zip(matrices, sensitivities, strict=True):
            found = storable_formats(matrix, found, sensitivity.choice)
    return found


def few_bits(formats: Sequence[NumberFormat]) -> list[NumberFormat]:
    """List the formats with so few bits that predictions are corrected by measured losses."""
    return [x for x in formats if x.is_integer and (x.bits or 0) < PREDICTED_BITS]


def sample_of(matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat]) -> Sample:
    """Choose the rows and columns of a matrix that are rounded to formats of few bits."""
    rows = spaced_rows(matrix, SAMPLED_ROWS)
    if rows is None:
        rows = torch.arange(len(matrix), device=matrix.device)
    columns = _spaced_columns(matrix, formats)
    seen = [_of_block(x, rows, columns) for x in (sensitivity.choice, sensitivity.forecast)]
    part = matrix[rows][:, columns]
    return Sample(part, Sensitivity(*seen, sensitivity.rounding), part.shape == matrix.shape)


@torch.no_grad()
def measure_samples(samples: Sequence[Sample], formats: Sequence[NumberFormat]) -> list[MeasuredSample]:
    """Round samples of several matrices to formats of few bits, those of one shape in one stack.

    To explain why: rounding goes column by column, and for samples a call takes longer than its arithmetic.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, sample in enumerate(samples):
        chosen = sample.seen.choice
        full = all(moment is not None and moment.ndim == 2 for moment in (chosen.rows, chosen.columns))
        kind = (sample.part.shape, sample.part.dtype, sample.part.device, sample.whole)
        groups.setdefault(kind if full else index, []).append(index)
    found: list[dict[NumberFormat, FormatLosses]] = [{} for _ in samples]
    for places in groups.values():
        some = [samples[k] for k in places]
        weights, weighting = some[0].part, some[0].seen.choice
        if len(some) > 1:
            weights = torch.stack([x.part for x in some])
            weighting = Weighting(*(torch.stack(x) for x in _moments([y.seen.choice for y in some])))
        with remembering():  # moments are factorised once for all formats
            for number_format in formats:
                sweeps = None if some[0].whole else _SWEEPS
                made = round_dense(weights, number_format, weighting, sweeps, some[0].seen.rounding)
                kept = made.dequantize(weights.dtype)
                for k, sample, matrix in zip(places, some, kept.view(-1, *kept.shape[-2:]), strict=True):
                    found[k][number_format] = _losses(sample.part, matrix, sample.seen)
    return [MeasuredSample(sample, losses) for sample, losses in zip(samples, found, strict=True)]


def _moments(weightings: Sequence[Weighting]) -> tuple[list[Tensor], list[Tensor]]:
    """List the moments of rows and of columns of weightings that have both."""
    rows = [x.rows for x in weightings if x.rows is not None]
    return rows, [x.columns for x in weightings if x.columns is not None]


def _spaced_columns(matrix: Tensor, formats: Sequence[NumberFormat]) -> Tensor:
    """Choose whole groups of columns, evenly spaced; all columns where a group is a row."""
    size = matrix.shape[1]
    width = max(x.group or size for x in formats)
    blocks, count = -(-size // width), SAMPLED_COLUMNS // width
    every = torch.arange(size, device=matrix.device)
    if blocks <= max(1, count):
        return every
    kept = torch.linspace(0, size // width - 1, max(1, count)).long().tolist()
    return torch.cat([every[k * width : (k + 1) * width] for k in dict.fromkeys(kept)])


def _measured(matrix: Tensor, sensitivity: Sensitivity, number_format: NumberFormat) -> FormatLosses:
    """Measure the losses of a matrix by storing it in a format."""
    topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
    storage, network = Storage(number_format=number_format), TensorNetwork(topology, (matrix,))
    kept = round_trip(network, storage, matrix.dtype, sensitivity.choice, sensitivity.rounding).to_matrix()
    return _losses(matrix, kept, sensitivity)


def _losses(matrix: Tensor, kept: Tensor, sensitivity: Sensitivity) -> FormatLosses:
    """Compute the losses and the relative error of keeping one matrix in place of another."""
    error = matrix - kept
    if not bool(error.any()):
        return FormatLosses(0.0, 0.0, 0.0)
    return FormatLosses(
        sensitivity.choice.cost(error), sensitivity.forecast.cost(error), relative_gap(matrix, kept)
    )


def _predicted(
    matrix: Tensor,
    sensitivity: Sensitivity,
    formats: Sequence[NumberFormat],
    sample: Tensor | None = None,
) -> list[FormatLosses]:
    """Predict losses and errors of integer formats without rounding."""
    weightings = [sensitivity.choice, sensitivity.forecast, Weighting()]
    norm = float(matrix.square().sum(dtype=torch.float64).clamp_min(1e-300))
    found = predict_losses(
        matrix,
        formats,
        weightings,
        row_damping=DENSE_ROW_DAMPING,
        rounding=sensitivity.rounding,
        sample=sample,
    )
    return [
        FormatLosses(choice, forecast, (2 * plain / norm) ** 0.5)
        for choice, forecast, plain in found.tolist()
    ]


def _of_block(weighting: Weighting, rows: Tensor, columns: Tensor) -> Weighting:
    """Restrict a weighting to some rows and columns."""

    def some(moment: Tensor | None, places: Tensor) -> Tensor | None:
        if moment is None:
            return None
        return moment[places] if moment.ndim == 1 else moment[places][:, places]

    return Weighting(some(weighting.rows, rows), some(weighting.columns, columns))


def nearest_losses(matrix: Tensor, weighting: Weighting, formats: Sequence[NumberFormat]) -> dict[str, float]:
    """Predict the loss increase of rounding to nearest in each integer format: the baseline of every table.

    Some rows stand for all: the loss of each is scaled by the ranges of its groups, and rows of a larger
    matrix are taken to be rounded independently. Summed over three blocks of SmolLM2 the estimate is exact
    at 4 bits and 11 to 13 % low at 3 and 2.
    """
    sample = spaced_rows(matrix, SAMPLED_ROWS)
    if not any(x.is_integer for x in formats):
        return {}
    work = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    part = work if sample is None else work[sample]
    rows, columns = (
        _diagonal(weighting.rows, len(work), work),
        _diagonal(weighting.columns, work.shape[1], work),
    )
    integers = [x for x in formats if x.is_integer]
    errors = [
        part - round_weight(part, x, rounding="nearest", refits=0).dequantize(work.dtype) for x in integers
    ]
    if sample is None:
        return {x.name: weighting.cost(error) for x, error in zip(integers, errors, strict=True)}
    found = {}
    passed = times(weighting.columns, torch.cat([error.mT for error in errors], 1)).split(len(part), 1)
    for number_format, error, seen in zip(integers, errors, passed, strict=True):
        losses = (error * seen.mT).sum(1, dtype=torch.float64) * rows[sample]
        ranges = group_ranges(work[None], number_format)[0]
        known = ranges @ number_format.grouped(columns).sum(-1) * rows
        total = known[sample].sum()
        found[number_format.name] = 0.5 * float(losses.sum() * known.sum() / total) if total > 0 else 0.0
    return found


def _diagonal(moment: Tensor | None, size: int, like: Tensor) -> Tensor:
    """Return the diagonal of a moment; ones for the identity."""
    if moment is None:
        return like.new_ones(size)
    return (moment if moment.ndim == 1 else moment.diagonal()).to(like)
