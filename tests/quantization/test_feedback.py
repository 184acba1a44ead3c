"""The loops of one-sided and two-sided rounding against slow ones that are obviously right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from allocations import peak
from hypothesis import given
from hypothesis import strategies as st
from quantization.rounding_cases import (
    assert_nearest,
    fed_back,
    fed_back_by_gptq,
    moment,
    unit_upper,
    weight,
)

from tensornet.quantization import NumberFormat, feedback, round_weight
from tensornet.quantization.feedback import Grid, one_sided, round_with_feedback, two_sided
from tensornet.quantization.moments import Moment
from tensornet.quantization.parts import Integers
from tensornet.quantization.scales import search_scales

#: Zeros of grids: one for all, one for each element, or none, with a table of levels.
KINDS = st.sampled_from(["one", "each", "table"])


def grid_for(shape: tuple[int, int], seed: int, bits: int, kind: str = "one") -> Grid:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, *shape, generator=generator, dtype=torch.float64) + 0.2
    scale[0, seed % shape[0], seed % shape[1]] = 0
    zero: torch.Tensor | float = 2 ** (bits - 1) - 0.5
    if kind == "table":
        return Grid(scale / 32, 0.0, NumberFormat.parse("nl4").points)
    if kind == "each":
        zero = torch.randint(0, 2**bits, (1, *shape), generator=generator).double()
    return Grid(scale, zero, Integers(bits, 2 ** (bits - 1) - 0.5))


@given(st.integers(1, 70), st.integers(1, 70), st.integers(2, 5), KINDS, st.integers(0, 1000))
def test_both_sides_element_by_element(m: int, n: int, bits: int, kind: str, seed: int) -> None:
    matrix, grid = weight(m, n, seed), grid_for((m, n), seed, bits, kind)
    rows, columns = unit_upper(moment(m, seed)), unit_upper(moment(n, seed + 1))
    (codes,), (residual,) = two_sided(matrix[None], grid, rows.triu(1)[None], columns.triu(1)[None])
    assert_nearest(codes, fed_back(matrix, codes, grid, rows, columns), grid)
    error = matrix - grid.values(codes)[0]
    torch.testing.assert_close(residual, rows.T @ error @ columns, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(130, 20), (20, 150), (140, 133)], ids=str)
def test_blocks_exchange_feedback(shape: tuple[int, int]) -> None:
    assert max(shape) > feedback.BLOCK
    matrix, grid = weight(*shape, 0), grid_for(shape, 0, 3)
    rows, columns = unit_upper(moment(shape[0], 0)), unit_upper(moment(shape[1], 1))
    (codes,), (residual,) = two_sided(matrix[None], grid, rows.triu(1)[None], columns.triu(1)[None])
    assert_nearest(codes, fed_back(matrix, codes, grid, rows, columns), grid)
    error = matrix - grid.values(codes)[0]
    torch.testing.assert_close(residual, rows.T @ error @ columns, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 20), st.integers(1, 150), st.integers(2, 5), KINDS, st.integers(0, 1000))
def test_one_side_is_gptq(m: int, n: int, bits: int, kind: str, seed: int) -> None:
    matrix, grid = weight(m, n, seed), grid_for((m, n), seed, bits, kind)
    grid = replace(grid, scale=grid.scale + 0.01)  # published GPTQ knows no empty group
    columns = moment(n, seed) + 0.1 * torch.eye(n, dtype=torch.float64)
    upper = unit_upper(columns)
    kept = torch.linalg.solve(upper, columns).diagonal()[None]  # U D U^T = M, so U^-1 M = D U^T
    uncoupled = torch.zeros(1, m, m).double()
    codes, losses = one_sided(matrix.mT[None].clone(), grid.transposed(), upper.triu(1)[None], kept)
    for found in (codes.mT, two_sided(matrix[None], grid, uncoupled, upper.triu(1)[None])[0]):
        assert_nearest(found[0], fed_back_by_gptq(matrix, found[0], grid, columns), grid)
    error = matrix - grid.values(codes.mT)[0]
    torch.testing.assert_close(losses[0], (error @ columns * error).sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["int2:g32", "int4:g32", "int4:g32:s6:min", "nl4:g32"])
def test_groups_in_any_order_are_single_elements(name: str) -> None:
    """Scales of groups, with columns in the order of rounding, against scales of single elements."""
    size = 256 if name.endswith("min") else 150
    matrix, columns = weight(9, size, 0)[None], Moment(moment(size, 1)[None])
    number_format = NumberFormat.parse(name)
    scales, minima = search_scales(matrix, number_format)
    zeros = None if minima is None else number_format.ratios(scales.double(), minima.double())
    codes, losses = round_with_feedback(matrix, scales, zeros, number_format, None, columns)
    order = columns.order[0]
    matrix, codes = matrix[..., order], codes[..., order]
    scale = number_format.spread(scales.double(), size)[..., order]
    zero: torch.Tensor | float = number_format.points.center
    if zeros is not None:
        zero = number_format.spread(zeros, size)[..., order]
    grid = Grid(scale, zero, number_format.points)
    seen = columns.values[0][order][:, order]
    target = fed_back(matrix[0], codes[0], grid, torch.eye(9).double(), unit_upper(seen))
    assert_nearest(codes[0], target, grid)
    error = (matrix - grid.values(codes))[0]
    assert losses is not None
    error = (matrix - grid.values(codes))[0]
    torch.testing.assert_close(losses[0], (error @ seen * error).sum(1), rtol=1e-9, atol=1e-12)


def test_a_stack_is_its_matrices() -> None:
    """Eleven of them, so that the memory for tiles has to grow and is not filled."""
    matrices = torch.stack([weight(34, 40, k) for k in range(11)])
    rows = torch.stack([unit_upper(moment(34, k)).triu(1) for k in range(11)])
    columns = torch.stack([unit_upper(moment(40, k)).triu(1) for k in range(11)])
    grid = Grid(torch.full_like(matrices, 0.4), 4.0, Integers(3, 4.0))
    together, _ = two_sided(matrices, grid, rows, columns)
    side = one_sided(matrices.mT.contiguous(), grid.transposed(), columns, torch.ones(11, 40).double())[0].mT
    alone, no_rows = Grid(grid.scale[:1], 4.0, grid.points), torch.eye(34).double()
    for k in range(11):
        upper = columns[k] + torch.eye(40).double()
        for codes, left in ((together[k], rows[k] + no_rows), (side[k], no_rows)):
            assert_nearest(codes, fed_back(matrices[k], codes, alone, left, upper), alone)


def test_residuals_stay_within_half_a_step() -> None:
    """Without clamping the whitened error is the bare rounding residual."""
    matrix = weight(33, 50, 0)
    rows, columns = unit_upper(moment(33, 0)), unit_upper(moment(50, 1))
    grid = Grid(torch.full((1, 33, 50), 0.1, dtype=torch.float64), 2.0**20, Integers(21, 2.0**20))
    _, residuals = two_sided(matrix[None], grid, rows.triu(1)[None], columns.triu(1)[None])
    assert float(residuals.abs().max()) <= 0.05 * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_two_sided_rounding_needs_few_copies() -> None:
    """Of the weight and its moments; the stack that tiles are read from has the size of six weights."""
    matrix, known = weight(512, 512, 1).float(), moment(512, 2).float()

    def rounded() -> object:
        return round_weight(matrix, "int5:g32:s6:min", rows=known, columns=known, refits=0)

    rounded()  # fills caches
    assert peak(rounded) <= 24 * matrix.nbytes
