"""Random weights and moments, and slow rounding element by element, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet.quantization.feedback import Grid


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


def price(error: Tensor, rows: Tensor, columns: Tensor) -> float:
    """`1/2 vec(E)^T (R kron C) vec(E)`, with the Kronecker product written out."""
    flat = error.double().flatten()
    return 0.5 * float(flat @ torch.kron(rows, columns) @ flat)


def unit_upper(matrix: Tensor) -> Tensor:
    """`U` of `M = U D U^T`, unit upper triangular."""
    lower = torch.linalg.cholesky(matrix.flip(0, 1))
    return (lower / lower.diagonal()).flip(0, 1)


def slow_nearest(target: Tensor, grid: Grid) -> Tensor:
    """Code, or level, of the nearest point, against all of them."""
    if grid.levels is None:
        return target.round().clamp(0, grid.top)
    return grid.levels.values[(target[..., None] - grid.levels.values).abs().argmin(-1)]


def slow_codes(matrix: Tensor, grid: Grid, rows: Tensor, columns: Tensor) -> Tensor:
    """Two-sided rounding by its definition: each element is `w + (U_R^T E U_C - E)` over what came before."""
    error, codes = torch.zeros_like(matrix), torch.zeros_like(matrix)
    scale = grid.scale[0]
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            coupled = rows[: i + 1, i] @ error[: i + 1, : j + 1] @ columns[: j + 1, j]  # E_ij is still 0
            divisor = scale[i, j] if scale[i, j] != 0 else torch.ones(())
            zero = grid.zero[0, i, j] if isinstance(grid.zero, Tensor) else grid.zero
            codes[i, j] = slow_nearest((matrix[i, j] + coupled) / divisor + zero, grid)
            error[i, j] = matrix[i, j] - (codes[i, j] - zero) * scale[i, j]
    return codes


def gptq(matrix: Tensor, grid: Grid, columns: Tensor) -> Tensor:
    """GPTQ as published: by the Cholesky factor of the inverse Hessian, updating the remaining weights."""
    work, codes = matrix.clone(), torch.zeros_like(matrix)
    upper = torch.linalg.cholesky(torch.linalg.inv(columns)).mT  # H^-1 = upper^T upper
    scale = grid.scale[0]
    for j in range(matrix.shape[1]):
        zero = grid.zero[0, :, j] if isinstance(grid.zero, Tensor) else grid.zero
        codes[:, j] = slow_nearest(work[:, j] / scale[:, j] + zero, grid)
        gone = (work[:, j] - (codes[:, j] - zero) * scale[:, j]) / upper[j, j]
        work[:, j:] -= gone[:, None] * upper[j, j:]
    return codes
