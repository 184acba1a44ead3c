"""Integers plus low rank, and low rank in integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization.rounding_cases import moment, price, weight

from tensornet.errors import ShapeError
from tensornet.linalg.weighted_svd import Weighting, weighted_svd
from tensornet.quantization import fit_residual, round_factors, round_weight


def damped(matrix: torch.Tensor, amount: float) -> torch.Tensor:
    return matrix + amount * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


@given(st.integers(2, 20), st.integers(2, 70), st.integers(0, 1000), st.sampled_from(["int2", "int4"]))
def test_low_rank_never_adds(m: int, n: int, seed: int, name: str) -> None:
    matrix, rows, columns = weight(m, n, seed), moment(m, seed), moment(n, seed + 1)
    fit = fit_residual(matrix, name, 1, rows=rows, columns=columns)
    assert fit.loss_increase == min(fit.history) <= fit.history[0]
    plain = round_weight(matrix, name, rows=rows, columns=columns)
    assert fit.history[0] == pytest.approx(float(plain.loss_increase), rel=1e-6, abs=1e-12)
    error = matrix - fit.to_matrix()
    expected = price(error, damped(rows, 0.1), damped(columns, 0.01))
    assert fit.loss_increase == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_alternating_helps_and_full_rank_is_exact() -> None:
    matrix, rows, columns = weight(24, 64, 0), moment(24, 0), moment(64, 1)
    once, twice = (
        fit_residual(matrix, "int2", 4, rows=rows, columns=columns, alternations=k) for k in (1, 2)
    )
    assert twice.loss_increase < once.loss_increase
    assert len(twice.history) == 3
    full = fit_residual(matrix, "int2", 24, rows=rows, columns=columns, alternations=1)
    assert full.loss_increase < 1e-12 * full.history[0]


@pytest.mark.parametrize("moments", [True, False])
def test_factors_see_their_own_moments(moments: bool) -> None:
    matrix = weight(40, 96, 0)
    rows, columns = (moment(40, 0), moment(96, 1)) if moments else (None, None)
    weighting = Weighting(
        None if rows is None else damped(rows, 0.1), None if columns is None else damped(columns, 0.01)
    )
    a, b = weighted_svd(matrix, weighting).factors(16)
    got = round_factors(a, b, "int4", target=matrix, rows=rows, columns=columns)
    error = matrix - got.to_matrix(torch.float64)
    assert got.loss_increase == pytest.approx(weighting.cost(error), rel=1e-9)
    blind = round_weight(a, "int4").dequantize(torch.float64) @ round_weight(b, "int4").dequantize(
        torch.float64
    )
    floor = weighting.cost(matrix - a @ b)
    assert floor <= got.loss_increase < weighting.cost(matrix - blind)
    fine = round_factors(a, b, "int8", target=matrix, rows=rows, columns=columns)
    assert floor <= fine.loss_increase < floor + 0.1 * (got.loss_increase - floor)


def test_factors_stand_for_their_product() -> None:
    a, b = weight(10, 3, 0), weight(3, 70, 1)
    got = round_factors(a, b, "int8")
    assert got.loss_increase == pytest.approx(
        0.5 * float((a @ b - got.to_matrix(torch.float64)).square().sum())
    )


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"rank=7 is too large.*at most 4"):
        fit_residual(weight(4, 6, 0), "int4", 7)
    with pytest.raises(ShapeError, match="rank must be an integer of at least 1"):
        fit_residual(weight(4, 6, 0), "int4", 0)
    with pytest.raises(ShapeError, match=r"factors \(out, rank\) and \(rank, in\)"):
        round_factors(weight(4, 6, 0), weight(4, 6, 0), "int4")
    with pytest.raises(ShapeError, match="target= has shape"):
        round_factors(weight(4, 2, 0), weight(2, 6, 0), "int4", target=weight(6, 4, 0))
