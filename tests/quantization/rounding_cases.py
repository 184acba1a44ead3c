"""Random weights and moments, and slow rounding element by element, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet.quantization.feedback import Grid
from tensornet.quantization.parts import Levels


def moment(size: int, seed: int, *, tokens: int | None = None) -> Tensor:
    """Second moment of correlated samples whose sizes differ, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    mix *= torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    sample = torch.randn(tokens or 3 * size, size, generator=generator, dtype=torch.float64) @ mix
    return sample.T @ sample / len(sample)


def weight(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian matrix in double precision."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def predicted_loss(error: Tensor, rows: Tensor, columns: Tensor) -> float:
    """`1/2 tr(R E C E^T)`, equal to `1/2 vec(E)^T (R kron C) vec(E)`."""
    error = error.double()
    return 0.5 * float(torch.trace(rows @ error @ columns @ error.T))


def unit_upper(matrix: Tensor) -> Tensor:
    """`U` of `M = U D U^T`, unit upper triangular."""
    lower = torch.linalg.cholesky(matrix.flip(0, 1))
    return (lower / lower.diagonal()).flip(0, 1)


def assert_nearest(codes: Tensor, target: Tensor, grid: Grid) -> None:
    """Check that no point of the grid is nearer to its target, in steps, than the chosen one.

    Targets depend on all codes before. So the codes of two algorithms may differ after a tie within rounding,
    and this law still holds for both.
    """
    points = torch.arange(grid.points.top + 1).to(target)
    if isinstance(grid.points, Levels):
        points = torch.tensor(grid.points.numbers).to(target)
    assert bool(torch.isin(codes, points).all())
    nearest = (target[..., None] - points).abs().amin(-1)
    torch.testing.assert_close((target - codes).abs(), nearest, rtol=1e-9, atol=1e-9)


def fed_back(matrix: Tensor, codes: Tensor, grid: Grid, rows: Tensor, columns: Tensor) -> Tensor:
    """What each element was rounded from, in steps: `w + (U_R^T E U_C - E)`, with errors of those before."""
    error = matrix - grid.values(codes)[0]
    return ((matrix + rows.T @ error @ columns - error) / grid.divisor + grid.zero)[0]


def fed_back_by_gptq(matrix: Tensor, codes: Tensor, grid: Grid, columns: Tensor) -> Tensor:
    """The same for GPTQ as published: the Cholesky factor of the inverse Hessian updates what remains."""
    work, target = matrix.clone(), torch.zeros_like(matrix)
    upper = torch.linalg.cholesky(torch.linalg.inv(columns)).mT  # H^-1 = upper^T upper
    scale = grid.scale[0]
    for j in range(matrix.shape[1]):
        zero = grid.zero[0, :, j] if isinstance(grid.zero, Tensor) else grid.zero
        target[:, j] = work[:, j] / scale[:, j] + zero
        gone = (work[:, j] - (codes[:, j] - zero) * scale[:, j]) / upper[j, j]
        work[:, j:] -= gone[:, None] * upper[j, j:]
    return target
