"""Decomposing one weight at the prices that calibration found."""

from typing import TypeGuard

import torch
from torch import Tensor

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.network_fit import decompose_network
from tensornet.context import outside_autocast
from tensornet.errors import TargetError
from tensornet.linalg.svd import result_dtype
from tensornet.linalg.weighted_svd import (
    WeightedSVD,
    Weighting,
    damped,
    nearest_kronecker,
    times,
    weighted_svd,
)
from tensornet.network import TensorNetwork
from tensornet.nn.targets import Target
from tensornet.topologies import Decomposition, low_rank
from tensornet.topology import Topology

#: Damping of the input moment, as a share of its mean diagonal: only against rounding and dead inputs.
INPUT_DAMPING = 1e-4
#: Damping of gradient moments for the forecast of the loss. Decomposing is best with little damping, but what
#: it leaves out then looks cheaper than it is: on another text, and with all layers compressed at once,
#: errors also cost where this text's gradients are small. With 1 forecasts met measurements
#: (docs/quality.md).
FORECAST_DAMPING = 1.0
#: Least damping of gradient moments: errors in directions without gradients must keep a price.
_LEAST_DAMPING = 1e-6
#: Damping of token frequencies: rows that the calibration text never read must keep a price.
FREQUENCY_DAMPING = 0.1


def input_weighting(target: Target, stats: CalibrationStats) -> Weighting:
    """What the inputs alone say of errors in one weight, in the first of its uses that ran.

    Where all inputs were zero they say nothing, and the error of the weight itself must do.

    Raises:
        TargetError: the calibration text never ran any layer that uses this weight.
    """
    for name, kind in zip(target.names, target.kinds, strict=True):
        if kind.name == "embedding" and name in stats.rows:
            return Weighting(damped(stats.rows[name], FREQUENCY_DAMPING), None)
        if kind.name != "embedding" and name in stats.columns:
            columns = stats.columns[name]
            break
    else:
        _, columns = _of_relatives(target, stats)
    return Weighting(None, damped(columns, INPUT_DAMPING)) if _counts(columns) else Weighting()


def weighting_of(target: Target, stats: CalibrationStats, damping: float) -> Weighting | None:
    """Damped prices of errors in one weight, summed over all its uses.

    Args:
        target: the weight; uses that the calibration did not reach are left out.
        stats: what calibration collected.
        damping: share of the mean diagonal that is added to gradient moments.

    Returns:
        None where no gradient or no input but zeros arrived: the weight has no influence on the loss.

    Raises:
        TargetError: the calibration text never ran any layer that uses this weight.
    """
    terms = []
    damping = max(damping, _LEAST_DAMPING)
    for name, kind in zip(target.names, target.kinds, strict=True):
        if name not in stats.rows and name not in stats.columns:
            continue
        rows, columns = stats.rows.get(name), stats.columns.get(name)
        if kind.name == "embedding":
            row_damping, column_damping = FREQUENCY_DAMPING, damping
        else:
            row_damping, column_damping = damping, INPUT_DAMPING
        if _counts(rows) and _counts(columns):
            terms.append(Weighting(damped(rows, row_damping), damped(columns, column_damping)))
    if not terms and not any(name in stats.columns or name in stats.rows for name in target.names):
        rows, columns = _of_relatives(target, stats)
        if _counts(rows) and _counts(columns):
            terms.append(Weighting(damped(rows, damping), damped(columns, INPUT_DAMPING)))
    return nearest_kronecker(terms) if terms else None


def _counts(moment: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a moment is there and gives errors a price."""
    return moment is not None and bool(moment.any())


def _of_relatives(target: Target, stats: CalibrationStats) -> tuple[Tensor | None, Tensor]:
    """Mean moments of gradients and inputs over the relatives of a weight that itself never ran.

    Raises:
        TargetError: it has none, or they never ran either.
    """
    sides = tuple(target.matrix.shape)
    names = [
        name
        for name in target.kinds[0].relatives(target.name, stats.columns)
        if (len(stats.rows.get(name, target.matrix)), len(stats.columns[name])) == sides
    ]
    if not names:
        raise _never_ran(target)
    rows = [stats.rows[name] for name in names if name in stats.rows]
    mean = sum(rows[1:], start=rows[0].clone()) / len(names) if rows else None
    return mean, sum(
        (stats.columns[name] for name in names[1:]), start=stats.columns[names[0]].clone()
    ) / len(names)


def _never_ran(target: Target) -> TargetError:
    return TargetError(
        f"Layer {target.name!r} never ran during calibration, so nothing is known about its errors. "
        "Calibrate with data that reaches it, or exclude it."
    )


@outside_autocast
def decompose_weighted(matrix: Tensor, topology: Topology, weighting: Weighting) -> Decomposition:
    """Cores of a given topology with little weighted error; the least there is for low rank.

    The error that is reported is the relative Frobenius error, as of every decomposition.
    """
    if topology.family == "low_rank":
        return _low_rank(matrix, max(topology.bond_dims.values()), weighting)
    return decompose_network(matrix, topology, weighting)


def _low_rank(matrix: Tensor, rank: int, weighting: Weighting) -> Decomposition:
    result = weighted_svd(matrix, weighting)
    error = float(frobenius_errors(result, matrix)[rank])
    return Decomposition(low_rank_network(result, rank, matrix), error, "curvature")


def low_rank_network(result: WeightedSVD, rank: int, matrix: Tensor) -> TensorNetwork:
    """The factors of one rank, of equal size column by column, in the dtype of decompositions of `matrix`."""
    left, right = result.factors(rank)
    balance = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).sqrt()
    balance = torch.where(balance > 0, balance, torch.ones_like(balance))
    dtype = result_dtype(matrix.dtype)
    cores = (
        (left * balance)[None, :, None, :].to(dtype),
        (right / balance[:, None])[:, None, :, None].to(dtype),
    )
    topology = low_rank(out_features=matrix.shape[0], in_features=matrix.shape[1], rank=rank)
    return TensorNetwork(topology, cores)


def frobenius_errors(result: WeightedSVD, matrix: Tensor) -> Tensor:
    """Relative Frobenius error at every rank from 0 on, shape `(k + 1,)`, of the matrix that was decomposed.

    With a singular moment there are fewer values than the full rank: what lies where nothing has a price is
    left out at every rank, at right angles to the rest.
    """
    squares = 2 * tail_costs(result, Weighting())
    total = squares[0]
    if len(result.values) < min(matrix.shape):
        total = torch.maximum(total, matrix.to(squares).square().sum())
    return ((squares + (total - squares[0])) / total.clamp_min(1e-300)).sqrt()


def tail_costs(result: WeightedSVD, weighting: Weighting) -> Tensor:
    """`1/2 tr(R E C E^T)` of what every rank leaves out, under any weighting, shape `(k + 1,)`.

    Rank `r` leaves out `L_> Q_>`, the product of the trailing columns and rows, whose cost is half the sum of
    the trailing block of `(L^T R L) * (Q C Q^T)`, elementwise.
    """
    left, right = result.left, result.right
    overlaps = left.T @ times(weighting.rows, left) * (right @ times(weighting.columns, right.T))
    tails = overlaps.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0)
    return torch.cat([tails, tails.new_zeros(1)]) / 2
