"""Fitting the cores of any network to a matrix under a two-sided weighting, one core at a time.

The weighted error is quadratic in each core. Each step lowers it over one core by conjugate gradients, with
products instead of matrices, so that a core of any size can be fitted; the error never rises.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensornet.linalg.weighted_svd import Weighting, check_weighting
from tensornet.mpo_algebra import canonicalize
from tensornet.network import TensorNetwork, contract_to_matrix, plan_operator

#: Families whose cores are a chain `(left, out, in, right)` that can be made orthonormal around one of them.
CHAINS = ("mpo", "low_rank")
#: A sweep that lowers the error by less than this share is the last.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fit:
    """Result of `fit_network`.

    Args:
        network: fitted cores, in the dtype of the given ones.
        cost: weighted error `1/2 tr(R E C E^T)` after fitting.
        start: the same before.
        sweeps: how many were made.
        converged: whether the last one changed next to nothing.
    """

    network: TensorNetwork
    cost: float
    start: float
    sweeps: int
    converged: bool


@torch.no_grad()
def fit_network(
    matrix: Tensor,
    network: TensorNetwork,
    weighting: Weighting,
    *,
    sweeps: int = 2,
    steps: int = 8,
) -> Fit:
    """Lower the weighted error of a network by alternating least squares; never raises it.

    Args:
        matrix: the target, shape `(out, in)`.
        network: the start; any topology.
        weighting: prices of errors.
        sweeps: largest number of rounds over all cores.
        steps: conjugate gradient steps for each core.

    Raises:
        ShapeError: the weighting does not fit the matrix.
    """
    check_weighting(matrix, weighting)
    plan = plan_operator(network.topology)
    cores = [core.float() for core in network.cores]
    target = matrix.detach().float()
    rows, columns = (None if x is None else x.to(target) for x in (weighting.rows, weighting.columns))
    prices = Weighting(rows, columns)
    start = cost = _value(prices, target - contract_to_matrix(plan, cores))
    done, converged = 0, False
    chain = network.topology.family in CHAINS
    for _ in range(sweeps):
        before = cost
        for index in range(len(cores)):
            if chain:  # orthonormal neighbours: steps along all bonds are equally long
                cores = list(canonicalize(cores, index))
            cost = _improve(target, prices, network, cores, index, steps, cost)
        done += 1
        if before - cost <= _TOLERANCE * before:
            converged = True
            break
    fitted = TensorNetwork(
        network.topology, [c.to(o.dtype) for c, o in zip(cores, network.cores, strict=True)]
    )
    return Fit(fitted, weighting.cost(matrix - fitted.to_matrix()), start, done, converged)


def _weigh(prices: Weighting, error: Tensor) -> Tensor:
    """`R E C`."""
    for moment, transpose in ((prices.rows, False), (prices.columns, True)):
        if moment is not None:
            turned = error.T if transpose else error
            turned = moment[:, None] * turned if moment.ndim == 1 else moment @ turned
            error = turned.T if transpose else turned
    return error


def _value(prices: Weighting, error: Tensor) -> float:
    return 0.5 * float((error * _weigh(prices, error)).sum())


def _improve(
    target: Tensor,
    prices: Weighting,
    network: TensorNetwork,
    cores: list[Tensor],
    index: int,
    steps: int,
    cost: float,
) -> float:
    """Conjugate gradients on one core, in place; returns the new cost."""
    plan = plan_operator(network.topology)

    def operator(core: Tensor) -> Tensor:  # linear in the core
        return contract_to_matrix(plan, [*cores[:index], core, *cores[index + 1 :]])

    core = cores[index]
    linear: Any = torch.func.vjp(operator, core)
    made, adjoint = linear  # the adjoint of a linear map is the same at every point
    error = target - made
    weighed = _weigh(prices, error)
    (residual,) = adjoint(weighed)
    direction, norm = residual, float(residual.square().sum())
    for _ in range(steps):
        if norm == 0:
            break
        moved = operator(direction)
        pushed = _weigh(prices, moved)
        curvature = float((moved * pushed).sum())
        if curvature <= 0:
            break
        step = float((error * pushed).sum()) / curvature  # exact along the direction, whatever rounding did
        candidate, error, weighed = core + step * direction, error - step * moved, weighed - step * pushed
        value = 0.5 * float((error * weighed).sum())
        if not value < cost:
            break
        core, cost = candidate, value
        (residual,) = adjoint(weighed)
        new = float(residual.square().sum())
        direction, norm = residual + (new / norm) * direction, new
    cores[index] = core
    return cost
