"""Entropy-coded integers: encode and decode them, and round a matrix to a given number of coded bytes.

A value is `row_step_i * column_step_j * (code - 128)`. With the moments `R = U_R D_R U_R^T` and
`C = U_C D_C U_C^T` of `tensornet.quantization.feedback`, the loss increase of two-sided rounding is

    1/24 sum_ij D_R,i D_C,j (row_step_i column_step_j)^2,

and the entropy of a code falls by one bit if its step is doubled. So the best steps at a given entropy are
proportional to `D_R^-1/2` and `D_C^-1/2`, and a common factor sets the entropy.

Codes are written by a range coder, which assumes that they are rounded numbers of a normal distribution. The
variance of a code is the product of a factor for its row and a factor for its column; the factors are written
first. All numbers that select or describe a distribution are integers, so that decoding gives the same result
on all machines.

Reference:
    Lifar et al. 2026, "WaterSIC", arXiv:2603.04956 (a step for each column, entropy coding); Martin 1979,
    "Range encoding".
"""

import math
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tensornet._util import remembered, require
from tensornet.errors import FormatError
from tensornet.quantization.feedback import Grid, round_with_feedback
from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.moments import Moment, loss_increase

Integers = npt.NDArray[np.int64]

#: Each code has one of 128 distributions, called levels. Level `k` has the standard deviation
#: `2 ** ((k - _FIRST) / _OCTAVE)`.
_LEVELS, _FIRST, _OCTAVE = 128, 32, 8
#: Lower limit of mean squares of `code - 128`, to avoid divisions by zero.
_LEAST = 2.0**-8
#: Bytes before the coded words: a checksum, the mean levels of columns and rows, and the level with which the
#: levels themselves are coded.
_HEADER = 8
#: Bits per weight that may stay unused; number of roundings after which more may be unused; and number of
#: roundings after which the search fails.
_EMPTY, _ROUNDINGS, _MOST_ROUNDINGS = 0.004, 5, 50
#: Number of quantiles of rows and of columns, and number of common factors of steps, for which the entropy is
#: estimated.
_PLACES, _STEPS = 64, 64
#: Largest weight in units of its step. The codes reach 127, which leaves room for feedback.
_FARTHEST = 120


def require_coder(user: str) -> Any:
    """Import the package of the range coder; the error message says that `user` needs it.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    require(("constriction",), extra="entropy", user=user)
    import constriction

    return constriction.stream


# --- bytes ------------------------------------------------------------------------------------------


def encode(codes: Tensor) -> bytes:
    """Encode the codes of a matrix to bytes.

    Args:
        codes: codes around 128 in `torch.uint8`, shape `(out, in)`.

    Raises:
        MissingDependencyError: the package constriction is not installed.
    """
    stream = require_coder("Entropy coding")
    # 1. Fit the variances: first the factor of each column, then the factor of each row.
    values = codes.cpu().contiguous().numpy()
    energy = np.square(values.astype(np.float64) - 128)
    columns = _level_with(energy.mean(0)) - _FIRST
    left = energy / np.maximum(_energies()[columns + _FIRST], _LEAST)
    rows = np.rint(_OCTAVE / 2 * np.log2(left.mean(1) + _LEAST)).astype(np.int64)
    # 2. Write the levels, minus their means; then the codes, grouped by level.
    middle, least = int(np.rint(columns.mean())), int(np.rint(rows.mean()))
    levels = np.concatenate([columns - middle, rows - least]).clip(-128, 127)
    spread = int(_level_with(np.square(levels, dtype=np.float64).mean()))
    encoder, models = stream.queue.RangeEncoder(), _models()
    encoder.encode((levels + 128).astype(np.int32), models[spread])
    found = _level_of(levels + np.repeat([middle, least], values.shape[::-1]), values.shape)
    symbols = values.reshape(-1)[np.argsort(found, kind="stable")].astype(np.int32)
    ends = np.cumsum(np.bincount(found, minlength=_LEVELS))
    for level, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            encoder.encode(symbols[start:end], models[level])
    header = zlib.crc32(values.tobytes()).to_bytes(4, "little")
    header += bytes([middle + 128, least + 128, spread, 0])
    return header + encoder.get_compressed().astype("<u4").tobytes()


def decode(coded: bytes, shape: tuple[int, int]) -> Tensor:
    """Decode the codes of a matrix; this is the inverse of `encode`. Bytes after the end are ignored.

    Args:
        coded: bytes, as returned by `encode`.
        shape: shape `(out, in)` of the matrix.

    Returns:
        Codes in `torch.uint8`, shape `(out, in)`, on the CPU.

    Raises:
        FormatError: the bytes are damaged.
        MissingDependencyError: the package constriction is not installed.
    """
    stream = require_coder("An entropy-coded weight")
    rows, columns = shape
    if len(coded) < _HEADER:
        raise FormatError(_DAMAGED)
    middle, least, spread = coded[4] - 128, coded[5] - 128, coded[6]
    words = np.frombuffer(coded[_HEADER : len(coded) // 4 * 4], "<u4").astype(np.uint32)
    try:
        decoder, models = stream.queue.RangeDecoder(words), _models()
        levels = decoder.decode(models[spread], rows + columns).astype(np.int64) - 128
        found = _level_of(levels + np.repeat([middle, least], shape[::-1]), shape)
        symbols = [
            decoder.decode(models[level], int(count))
            for level, count in enumerate(np.bincount(found, minlength=_LEVELS))
            if count
        ]
    except (AssertionError, ValueError, IndexError) as error:  # raised by the coder for impossible bytes
        raise FormatError(f"{_DAMAGED} ({error!s:.80})") from error
    codes = np.empty(rows * columns, np.uint8)
    codes[np.argsort(found, kind="stable")] = np.concatenate(symbols) if symbols else codes
    if zlib.crc32(codes.tobytes()) != int.from_bytes(coded[:4], "little"):
        raise FormatError(_DAMAGED)
    return torch.from_numpy(codes.reshape(shape))


_DAMAGED = "the entropy-coded bytes are damaged, or another version of the coder wrote them"


def _level_with(energy: Any) -> Any:
    """For each element of `energy`, find the level whose mean square of `code - 128` is closest to it."""
    return np.rint(np.interp(energy, _energies(), np.arange(_LEVELS))).astype(np.int64)


def _level_of(levels: Integers, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Compute the levels of all elements, as one vector, from the levels of their columns and rows."""
    rows, columns = levels[shape[1] :], levels[: shape[1]]
    return (rows[:, None] + columns + _FIRST).clip(0, _LEVELS - 1).astype(np.uint8).reshape(-1)


@lru_cache(maxsize=1)
def tables() -> Integers:
    """Compute the probability of each code at each level, in units of `2**-22`, shape `(levels, 256)`."""
    edges = np.arange(-128, 129) - 0.5
    edges[0], edges[-1] = -math.inf, math.inf
    found = np.empty((_LEVELS, 256), np.int64)
    for level in range(_LEVELS):
        scale = 2.0 ** ((level - _FIRST) / _OCTAVE) * math.sqrt(2)
        below = np.array([0.5 * math.erfc(-edge / scale) for edge in edges])
        found[level] = np.rint(np.diff(below) * 2**22)
    return found


@lru_cache(maxsize=1)
def _energies() -> npt.NDArray[np.float64]:
    """Compute the mean square of `code - 128` at each level."""
    found: npt.NDArray[np.float64] = tables() @ np.square(np.arange(-128.0, 128)) / tables().sum(1)
    return found


@lru_cache(maxsize=1)
def _models() -> list[Any]:
    # Adding 1 makes every probability positive.
    categorical = require_coder("Entropy coding").model.Categorical
    return [categorical(each.astype(np.float32), perfect=False) for each in tables() + 1]


# --- steps and rounding -----------------------------------------------------------------------------


class Coded(NamedTuple):
    """Codes and steps of a matrix `(out, in)`.

    Args:
        codes: codes as floating-point numbers from 0 to 255.
        scales: steps of the rows in the dtype of the format, shape `(out, 1)`.
        column_scales: steps of the columns in the dtype of the format, shape `(in,)`.
        loss: loss increase, a 0-dimensional tensor.
    """

    codes: Tensor
    scales: Tensor
    column_scales: Tensor
    loss: Tensor


def round_to_rate(
    weight: Tensor,
    number_format: NumberFormat,
    rows: Moment | None,
    columns: Moment | None,
    fed_back: tuple[Moment | None, Moment | None],
) -> Coded:
    """Round a matrix with the smallest steps at which its coded bytes do not exceed the limit of the format.

    Args:
        weight: matrix, shape `(out, in)`.
        number_format: entropy-coded format.
        rows: moment of the gradients.
        columns: moment of the inputs.
        fed_back: moments for error feedback between rows and between columns; None for no feedback.

    Raises:
        FormatError: no steps are found, because the rate is too low for such a small matrix.
        MissingDependencyError: the package constriction is not installed.
    """
    limit, count = number_format.coded_bytes(weight.shape), weight.numel()
    across, along = _directions(weight, rows, columns)
    column_scales = along.to(number_format.column_dtype)
    exponent, lowest = (
        _exponent(weight, number_format, rows, columns),
        float(rate_curve(weight, rows, columns)[0][0]),
    )
    best, room = None, math.inf
    for attempt in range(_MOST_ROUNDINGS):
        scales = number_format.storable(across[:, None] * 2.0**exponent)
        steps = scales.to(weight.dtype) * column_scales.to(weight.dtype)
        grid = Grid(steps[None], number_format.center, number_format.top)
        codes = round_with_feedback(weight[None], grid, *fed_back)
        left = 8 * (limit - len(encode(codes[0].to(torch.uint8)))) / count
        if 0 <= left < room:
            room, best = left, (codes[0], scales, column_scales)
        if best is not None and (room <= _EMPTY or attempt >= _ROUNDINGS or exponent <= lowest):
            break
        # Doubling the step saves one bit per weight, or less if most codes are zero.
        exponent = max(exponent + _EMPTY / 2 - left, lowest)
    if best is None:
        raise FormatError(
            f"{number_format.name!r} allows {limit} bytes for the codes of a matrix of shape "
            f"{tuple(weight.shape)}, which is not enough; use a format with more bits."
        )
    codes, scales, column_scales = best
    error = weight - (codes - number_format.center) * scales.to(weight.dtype) * column_scales.to(weight.dtype)
    return Coded(codes, scales, column_scales, loss_increase(error[None], rows, columns)[0])


@remembered
def _directions(weight: Tensor, rows: Moment | None, columns: Moment | None) -> tuple[Tensor, Tensor]:
    """Compute `D^-1/2` of rows and columns, the step sizes up to a factor, with a geometric mean of 1."""
    found = []
    for moment, size in ((rows, weight.shape[0]), (columns, weight.shape[1])):
        sensitivity = weight.new_ones(1, size)
        if moment is not None and moment.full:
            sensitivity = moment.feedback[1].gather(1, moment.order.argsort(1))
        elif moment is not None:
            sensitivity = moment.diagonal
        logarithm = -0.5 * sensitivity[0].log2()
        found.append((logarithm - logarithm.mean()).clamp(-8, 8).exp2())
    return found[0], found[1]


def expected_steps(
    weight: Tensor, number_format: NumberFormat, rows: Moment | None, columns: Moment | None
) -> tuple[Tensor, Tensor]:
    """Estimate the step sizes of rows and columns that `round_to_rate` will find."""
    across, along = _directions(weight, rows, columns)
    return across * 2.0 ** _exponent(weight, number_format, rows, columns), along


def _exponent(
    weight: Tensor, number_format: NumberFormat, rows: Moment | None, columns: Moment | None
) -> float:
    """Estimate the binary logarithm of the common factor of all steps."""
    exponents, bits = rate_curve(weight, rows, columns)
    wanted = 8 * number_format.coded_bytes(weight.shape) / weight.numel()
    return float(np.interp(-wanted, -bits, exponents))


@remembered
def rate_curve(weight: Tensor, rows: Moment | None, columns: Moment | None) -> tuple[Any, Any]:
    """Estimate the bits per weight of a coded matrix at several step sizes, without rounding the matrix.

    Args:
        weight: matrix, shape `(out, in)`.
        rows: moment of the gradients.
        columns: moment of the inputs.

    Returns:
        Binary logarithms of factors that multiply all steps, ascending from the smallest factor that clamps
        no code; and the bits per weight at each factor.
    """
    # 1. Compute mean squares of the weights in units of their steps, for each row and column.
    across, along = _directions(weight, rows, columns)
    energy = (weight / across[:, None] / along).square().double()
    mean = float(energy.mean())
    if mean == 0:
        return np.array([0.0, 1.0]), np.array([1.0, 0.0])
    of_rows, of_columns = (_quantiles(energy.mean(axis)) for axis in (1, 0))
    # 2. Compute the variance of the feedback that is added before rounding.
    growth = [1.0 if x is None or not x.full else float(x.growth.mean()) for x in (rows, columns)]
    feedback = (growth[0] * growth[1] - 1) / 12
    # 3. Compute the mean entropy of a code for each common factor.
    widest = 0.5 * math.log2(float(energy.max()) / _FARTHEST**2)
    exponents = max(0.5 * math.log2(mean) - 5, widest) + np.linspace(0, 9, _STEPS)
    distributions = tables() / tables().sum(1, keepdims=True)
    entropies = -(distributions * np.log2(np.maximum(distributions, 1e-300))).sum(1)
    bits = []
    for exponent in exponents:
        seen = of_rows[:, None] * of_columns / mean * 4.0**-exponent + feedback
        levels = _OCTAVE / 2 * np.log2(seen + 1e-30) + _FIRST
        bits.append(np.interp(levels, np.arange(_LEVELS), entropies).mean())
    header = (4 * sum(weight.shape) + 8 * _HEADER) / weight.numel()
    return exponents, np.array(bits) + header


def _quantiles(values: Tensor) -> Any:
    ordered = values.sort().values.cpu().numpy()
    return ordered[np.linspace(0, len(ordered) - 1, min(len(ordered), _PLACES)).round().astype(int)]
