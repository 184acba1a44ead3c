"""Alternating least squares for a network of any topology, from a random start.

The matrix of a network is linear in each core. One sweep solves for every core in turn by conjugate gradients
on the least-squares problem (CGLS), which needs the contraction and its transpose only: no environment is
formed, and no step raises the error.

Reference: Björck 1996, "Numerical Methods for Least Squares Problems", section 7.4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensornet.linalg.svd import frobenius, working_dtype
from tensornet.network import contract_to_matrix, plan_operator, random_cores
from tensornet.topology import Topology

#: Random starts that are tried, and the sweeps after which the best of them goes on alone.
_STARTS, _TRIAL_SWEEPS = 3, 5
#: Conjugate gradient steps for one core in one sweep.
_STEPS = 16
#: A gradient this small, relative to that of the zero core, is rounding.
_SOLVED = 1e-14


@dataclass(frozen=True)
class Alternated:
    """Result of `alternate`.

    Args:
        cores: in the order of the topology, in double precision.
        error: relative Frobenius error, measured.
        sweeps: sweeps that were made.
        converged: whether the error settled before the sweep limit.
    """

    cores: tuple[Tensor, ...]
    error: float
    sweeps: int
    converged: bool


@torch.no_grad()
def alternate(
    matrix: Tensor, topology: Topology, *, max_sweeps: int = 200, tolerance: float = 1e-5, seed: int = 0
) -> Alternated:
    """Fit the cores of a topology to a matrix by alternating least squares, to a local minimum.

    Args:
        matrix: shape `(out, in)`, finite, elements of moderate size.
        topology: any network of that shape.
        max_sweeps: limit of sweeps over all cores.
        tolerance: stop when a sweep lowers the error by less than this share of it.
        seed: of the random starts.
    """
    target = matrix.detach().to(working_dtype(matrix.dtype))
    total = frobenius(target)
    generator = torch.Generator().manual_seed(seed)
    best = Alternated((), float("inf"), 0, False)
    for _ in range(_STARTS):
        cores = [core.to(target) for core in random_cores(topology, generator=generator, dtype=torch.float64)]
        error = 1.0
        for _ in range(_TRIAL_SWEEPS):
            cores, error = _sweep(target, topology, cores, total)
        if error < best.error:
            best = Alternated(tuple(cores), error, _TRIAL_SWEEPS, False)
    cores, error, sweeps, converged = list(best.cores), best.error, best.sweeps, False
    while sweeps < max_sweeps and not converged:
        before = error
        cores, error = _sweep(target, topology, cores, total)
        sweeps += 1
        converged = before - error <= tolerance * before or error < torch.finfo(torch.float64).eps ** 0.75
    return Alternated(tuple(cores), error, sweeps, converged)


def _sweep(
    target: Tensor, topology: Topology, cores: list[Tensor], total: float
) -> tuple[list[Tensor], float]:
    plan, cores, residual = plan_operator(topology), list(cores), target
    for k in range(len(cores)):

        def apply(core: Tensor, k: int = k) -> Tensor:
            return contract_to_matrix(plan, [*cores[:k], core, *cores[k + 1 :]])

        cores[k], residual = _least_squares(apply, cores[k], target)
        size = torch.linalg.vector_norm(cores[k])
        if float(size) > 0 and k + 1 < len(cores):  # one core after the other holds the norm
            cores[k + 1] = cores[k + 1] * size
            cores[k] = cores[k] / size
    return cores, frobenius(residual) / total if total > 0 else 0.0


def _least_squares(apply: Callable[[Tensor], Tensor], start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    linear: Any = torch.func.vjp(apply, start)
    made, pull = linear  # the adjoint of a linear map is the same at every point
    x, residual = start, target - made
    (gradient,) = pull(residual)
    direction, strength = gradient, float(gradient.abs().square().sum())
    floor = _SOLVED**2 * float(pull(target)[0].abs().square().sum())
    for _ in range(_STEPS):
        if strength <= floor:
            break
        image = apply(direction)
        length = float(image.abs().square().sum())
        if length == 0:
            break
        x = x + strength / length * direction
        residual = residual - strength / length * image
        (gradient,) = pull(residual)
        before, strength = strength, float(gradient.abs().square().sum())
        direction = gradient + strength / before * direction
    return x, residual
