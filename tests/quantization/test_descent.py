"""Descent after rounding: never dearer, codes in range, and a local optimum where it stops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization.rounding_cases import moment, predicted_loss, weight

from tensornet.quantization import NumberFormat, descent, round_weight
from tensornet.quantization.descent import descend, sweep_codes, sweep_scales, times_rows
from tensornet.quantization.feedback import Grid
from tensornet.quantization.parts import Integers, Levels


@given(st.integers(1, 16), st.integers(1, 80), st.integers(0, 1000), st.integers(2, 4))
def test_sweeps_never_raise_the_loss(m: int, n: int, seed: int, bits: int) -> None:
    matrix, rows, columns = weight(m, n, seed), moment(m, seed, tokens=2), moment(n, seed + 1)
    number_format, top = NumberFormat.parse(f"int{bits}:g32"), 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, top + 1, (m, n), generator=generator).double()
    scales = torch.rand(m, number_format.groups(n), generator=generator).double()
    zero = top / 2

    def cost(codes: torch.Tensor, scales: torch.Tensor) -> float:
        return predicted_loss(matrix - (codes - zero) * scales.repeat_interleave(32, 1)[:, :n], rows, columns)

    before = cost(codes, scales)
    refitted = sweep_scales(
        matrix[None], (codes - zero)[None], scales[None], number_format, rows[None], columns[None]
    )[0]
    between = cost(codes, refitted)
    assert between <= before * (1 + 1e-9) + 1e-12
    grid = Grid(refitted.repeat_interleave(32, 1)[None, :, :n], zero, Integers(bits, zero))
    moved, change = (x[0] for x in sweep_codes(matrix[None], codes[None], grid, rows[None], columns[None]))
    assert cost(moved, refitted) <= between * (1 + 1e-9) + 1e-12
    assert between + float(change) == pytest.approx(cost(moved, refitted), rel=1e-6, abs=1e-9)
    assert 0 <= float(moved.min()) <= float(moved.max()) <= top


@pytest.mark.parametrize("name", ["int2", "nl4"])
def test_no_single_move_helps_in_the_end(name: str) -> None:
    matrix, rows, columns = weight(6, 12, 0), moment(6, 0), moment(12, 1)
    grid, units = Grid(torch.full_like(matrix, 0.8)[None], 2.0, Integers(2, 2.0)), torch.arange(4.0)
    if name == "nl4":
        levels = NumberFormat.parse(name).points
        assert isinstance(levels, Levels)
        grid, units = Grid(grid.scale / 30, 0.0, levels), torch.tensor(levels.numbers)
    codes = torch.full_like(matrix, float(units[2]))
    for _ in range(60):
        codes = sweep_codes(matrix[None], codes[None], grid, rows[None], columns[None])[0][0]
    best = predicted_loss(matrix - grid.values(codes)[0], rows, columns)
    for i in range(6):
        for j in range(12):
            for code in units:
                other = codes.clone()
                other[i, j] = code
                assert predicted_loss(matrix - grid.values(other)[0], rows, columns) >= best - 1e-9


def test_one_group_of_scales_is_solved_exactly() -> None:
    """Two rows, since conjugate gradient steps are exact if they are as many as the rows."""
    matrix, rows, columns = weight(2, 32, 0), moment(2, 0), moment(32, 1)
    points = torch.randint(-2, 3, (2, 32)).double()
    scales = sweep_scales(
        matrix[None],
        points[None],
        torch.ones(1, 2, 1).double(),
        NumberFormat.parse("int3:row"),
        rows[None],
        columns[None],
    )[0]
    gradient = (points * (rows @ (matrix - points * scales) @ columns)).sum(1)
    assert float(gradient.abs().max()) < 1e-6


def test_scales_do_not_depend_on_the_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, rows, columns = weight(6, 112, 0), moment(6, 0), moment(112, 1)
    points, scales = torch.randint(-2, 3, matrix.shape).double(), torch.ones(6, 7).double()
    given = (
        matrix[None],
        points[None],
        scales[None],
        NumberFormat.parse("int3:g16"),
        rows[None],
        columns[None],
    )
    found = []
    for block in (16, 48, 256):
        monkeypatch.setattr(descent, "_SCALE_BLOCK", block)
        found.append(sweep_scales(*given))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_of_many_changes_the_best_are_made() -> None:
    """All 100 rows want to change in each column, more than are changed together."""
    matrix, rows, columns = weight(100, 32, 0), moment(100, 0), moment(32, 1)
    grid = Grid(torch.full_like(matrix, 0.5)[None], 3.5, Integers(3, 3.5))
    codes = torch.zeros_like(matrix)
    losses = [predicted_loss(matrix - grid.values(codes)[0], rows, columns)]
    for _ in range(3):
        codes, change = (
            x[0] for x in sweep_codes(matrix[None], codes[None], grid, rows[None], columns[None])
        )
        losses.append(predicted_loss(matrix - grid.values(codes)[0], rows, columns))
        assert losses[-2] + float(change) == pytest.approx(losses[-1], rel=1e-6)
    assert losses[-1] < 0.5 * losses[0]
    assert losses == sorted(losses, reverse=True)


def test_scales_are_kept_where_eight_bits_make_the_exact_ones_worse() -> None:
    """Both exact scales are 1.1; of coupled rows the scales 1 and 1.25 are better, whose errors cancel."""
    number_format, zero = NumberFormat.parse("int3:g32:float8"), 4.0
    codes = torch.full((2, 1), 7.0, dtype=torch.float64)
    matrix = torch.full_like(codes, 3 * 1.1)
    rows = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    scales = torch.tensor([[1.0], [1.25]]).to(number_format.scales.dtype)
    kept = descend(
        matrix[None],
        codes[None],
        scales[None],
        zero,
        number_format,
        rows[None],
        torch.ones(1, 1, 1).double(),
        1,
        refit=True,
        loss=torch.tensor(
            [predicted_loss(matrix - 3 * scales.double(), rows, torch.ones(1, 1).double())]
        ).double(),
    )
    assert torch.equal(kept[0][0], codes)
    assert torch.equal(kept[1][0].float(), scales.float())


@given(st.integers(1, 12), st.integers(1, 70), st.integers(0, 1000), st.integers(2, 4))
def test_a_diagonal_is_that_matrix(m: int, n: int, seed: int, bits: int) -> None:
    """Rows that are independent: one vector moves what its matrix moves."""
    matrix, columns, number_format = (
        weight(m, n, seed),
        moment(n, seed + 1),
        NumberFormat.parse(f"int{bits}:g32"),
    )
    rows = moment(m, seed, tokens=2).diagonal()
    codes = torch.full_like(matrix, 2.0)
    scales = torch.full((m, number_format.groups(n)), 0.7, dtype=matrix.dtype)
    loss = torch.tensor([predicted_loss(matrix - 0.5 * 0.7, rows.diag(), columns)], dtype=torch.float64)
    known = matrix[None], codes[None], scales[None], 1.5, number_format
    given_both = [
        descend(*known, side[None], columns[None], 2, loss.clone(), refit=True)
        for side in (rows, rows.diag())
    ]
    losses = [
        predicted_loss(matrix - (c[0] - 1.5) * s[0].repeat_interleave(32, 1)[:, :n], rows.diag(), columns)
        for c, s, _ in given_both
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-9)
    for cost, (_, _, loss) in zip(losses, given_both, strict=True):
        assert float(loss) == pytest.approx(cost, rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_a_vocabulary_takes_no_square_matrix() -> None:
    """A full moment of 100,000 rows would take 40 gigabytes."""
    matrix = weight(100_000, 32, 0).float()
    rounded = [
        round_weight(matrix, "int3", rows=torch.rand(100_000), columns=moment(32, 1), sweeps=sweeps)
        for sweeps in (0, 1)
    ]
    assert float(rounded[1].loss_increase) < float(rounded[0].loss_increase)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_stack_descends_as_its_matrices_do(bits: int, diagonal: bool) -> None:
    """Matrices of a stack differ in how many moves they keep, and in when their scales are solved."""
    m, n, count = 20, 70, 5
    matrices = torch.stack([(k + 1) * weight(m, n, k) for k in range(count)])
    rows = torch.stack([moment(m, k, tokens=60) for k in range(count)])
    rows = rows.diagonal(dim1=1, dim2=2) if diagonal else rows
    columns = torch.stack([moment(n, k + 1, tokens=200) for k in range(count)])
    number_format = NumberFormat.parse(f"int{bits}:g32")
    codes = torch.full_like(matrices, 2.0)
    scales = matrices.abs().amax((1, 2))[:, None, None].expand(-1, m, number_format.groups(n)) / 2
    error = matrices - 0.5 * number_format.spread(scales, n)
    loss = 0.5 * (error * times_rows(rows, error @ columns)).sum((1, 2))
    together = descend(matrices, codes, scales, 1.5, number_format, rows, columns, 3, loss, refit=True)
    for k in range(count):
        one = slice(k, k + 1)
        given_one = matrices[one], codes[one], scales[one], 1.5, number_format, rows[one], columns[one]
        alone = descend(*given_one, 3, loss[one], refit=True)
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[one], y)
