"""Whitened low rank: against dense linear algebra, and as the plain SVD where moments say nothing."""

from __future__ import annotations

import pytest
import torch
from allocations import peak
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tensornet as tn
from tensornet.errors import NonFiniteError, ShapeError
from tensornet.linalg.weighted_svd import (
    Weighting,
    cholesky,
    closest_shift,
    damped,
    frobenius_errors,
    nearest_kronecker,
    other_tail_costs,
    root,
    tail_costs,
    weighted_svd,
)
from tensornet.topologies import topology_family

SHAPES = [(7, 11), (11, 7), (8, 8), (1, 5)]


def moment(size: int, rank: int | None = None, seed: int = 0) -> Tensor:
    sample = torch.randn(rank or 3 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    return sample.T @ sample / sample.shape[0]


def dense_cost(error: Tensor, rows: Tensor, columns: Tensor) -> float:
    """`1/2 vec(E)^T (R kron C) vec(E)`, with the Kronecker product written out."""
    flat = error.double().flatten()
    return 0.5 * float(flat @ torch.kron(rows, columns) @ flat)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("identity", ["none", "matrices", "diagonals"])
def test_identities_give_the_plain_svd(shape: tuple[int, int], identity: str) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    make = {"none": lambda n: None, "matrices": torch.eye, "diagonals": torch.ones}[identity]
    weighting = Weighting(*(None if make(n) is None else make(n).double() for n in shape))  # type: ignore[arg-type]
    result = weighted_svd(matrix, weighting)
    for rank in range(1, min(shape) + 1):
        plain = tn.truncated_svd(matrix, max_rank=rank)
        left, right = result.factors(rank)
        torch.testing.assert_close(left @ right, plain.U * plain.S @ plain.Vh)
        torch.testing.assert_close(result.values[:rank], plain.S)
        assert float(frobenius_errors(result, matrix)[rank]) == pytest.approx(plain.error, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "factor"), [(None, 1.0), (2, 0.5)])
def test_a_shift_of_the_diagonal_needs_no_products(
    shape: tuple[int, int], rank: int | None, factor: float
) -> None:
    matrix, shift = torch.randn(shape).double(), torch.rand(shape[0]).double()
    first = Weighting(damped(moment(shape[0], rank), 0.1), damped(moment(shape[1], rank, seed=1), 0.01))
    result = weighted_svd(matrix, first)
    second = Weighting(factor * first.rows + torch.diag(shift), first.columns)  # type: ignore[operator]
    torch.testing.assert_close(other_tail_costs(result, first, second), tail_costs(result, second))
    assert shape[0] == 1 or closest_shift(first.rows, second.rows)[2]  # type: ignore[arg-type]
    # Without a shift that is exact the products are computed.
    for other in (
        Weighting(first.rows, moment(shape[1], seed=2)),
        Weighting(moment(shape[0], seed=3), first.columns),
        Weighting(second.rows.diagonal(), first.columns),  # type: ignore[union-attr]
        Weighting(None, first.columns),
    ):
        torch.testing.assert_close(other_tail_costs(result, first, other), tail_costs(result, other))


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_weighted_cost_of_what_is_cut(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    weighting = Weighting(moment(shape[0]), moment(shape[1], seed=1))
    result = weighted_svd(matrix, weighting)
    for rank in range(1, min(shape) + 1):
        left, right = result.factors(rank)
        error = matrix - left @ right
        expected = dense_cost(error, weighting.rows, weighting.columns)  # type: ignore[arg-type]
        assert float(result.error[rank]) == pytest.approx(expected, abs=1e-8)
        assert weighting.cost(error) == pytest.approx(expected, abs=1e-8)
        relative = float(error.norm() / matrix.double().norm())
        assert float(frobenius_errors(result, matrix)[rank]) == pytest.approx(relative, abs=1e-6)
        other = Weighting(moment(shape[0], seed=5), torch.rand(shape[1]).double())
        assert float(tail_costs(result, other)[rank]) == pytest.approx(other.cost(error), rel=1e-6, abs=1e-9)


@given(
    st.integers(2, 9), st.integers(2, 9), st.integers(0, 10_000), st.sampled_from(["both", "rows", "columns"])
)
def test_no_low_rank_matrix_costs_less(rows: int, columns: int, seed: int, sides: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left_moment = damped(moment(rows, seed=seed), 0.01) if sides != "columns" else None
    right_moment = moment(columns, seed=seed + 1) if sides != "rows" else None
    weighting = Weighting(left_moment, right_moment)
    rank = min(rows, columns) - 1
    best = float(weighted_svd(matrix, weighting).error[rank])
    plain = tn.truncated_svd(matrix, max_rank=rank)
    assert best <= weighting.cost(matrix - plain.U * plain.S @ plain.Vh) * (1 + 1e-9) + 1e-12
    # A step away along the rank-constrained set cannot help either.
    left, right = weighted_svd(matrix, weighting).factors(rank)
    moved = (left + 1e-3 * torch.randn(left.shape, generator=generator).to(left)) @ right
    assert best <= weighting.cost(matrix - moved) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonals_are_diagonal_matrices(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    rows, columns = torch.rand(shape[0]).double() + 0.1, torch.rand(shape[1]).double() + 0.1
    short = weighted_svd(matrix, Weighting(rows, columns))
    full = weighted_svd(matrix, Weighting(torch.diag(rows), torch.diag(columns)))
    torch.testing.assert_close(short.values, full.values)
    torch.testing.assert_close(short.left @ short.right, full.left @ full.right)


@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_rank_deficient_inputs(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    seen = moment(shape[1], rank=3)
    weighting = Weighting(damped(moment(shape[0]), 0.1), seen)
    result = weighted_svd(matrix, weighting)
    left, right = result.factors(3)
    assert float(result.error[3]) == pytest.approx(0, abs=1e-9)
    assert weighting.cost(matrix - left @ right) == pytest.approx(0, abs=1e-9)
    assert torch.isfinite(left @ right).all()


def test_root_falls_back_to_eigenvectors() -> None:
    for matrix in (moment(5), moment(5, rank=2), torch.zeros(5, 5).double()):
        lower, inverse = root(matrix)
        torch.testing.assert_close(lower @ lower.T, matrix, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(lower @ inverse @ lower, lower, atol=1e-7, rtol=1e-7)
    half, inverse = root(torch.tensor([4.0, 0.0]))
    assert half.tolist() == [2, 0]
    assert inverse.tolist() == [0.5, 0]


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    matrix = torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    torch.testing.assert_close(damped(matrix, 0.1), matrix.double() + 0.2 * torch.eye(2).double())
    torch.testing.assert_close(damped(torch.tensor([1.0, 3.0]), 0.1), torch.tensor([1.2, 3.2]).double())
    assert matrix[0, 0] == 1  # not in place


def test_decomposition_is_a_network_of_that_rank() -> None:
    matrix = torch.randn(7, 11)
    weighting = Weighting(moment(7), moment(11, seed=1))
    topology = tn.topologies.low_rank(out_features=7, in_features=11, rank=3)
    result = topology_family(topology.family).fit(matrix, topology, weighting)
    assert result.network.topology == topology
    assert result.network.cores[0].dtype == torch.float32
    error = float((matrix - result.network.to_matrix()).norm() / matrix.norm())
    assert result.error == pytest.approx(error, rel=1e-5)
    assert weighting.cost(matrix - result.network.to_matrix()) == pytest.approx(
        float(weighted_svd(matrix, weighting).error[3]), rel=1e-4
    )


def test_nearest_product_is_nearer_than_any_term() -> None:
    term = Weighting(moment(4), moment(3, seed=1))
    double = nearest_kronecker([term, term])
    expected = 2 * torch.kron(term.rows, term.columns)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.kron(double.rows, double.columns), expected)  # type: ignore[arg-type]
    terms = [Weighting(moment(4, seed=s), moment(3, seed=s + 9)) for s in range(3)]
    total = sum(torch.kron(t.rows, t.columns) for t in terms)  # type: ignore[arg-type]
    found = nearest_kronecker(terms)
    distance = float((torch.kron(found.rows, found.columns) - total).norm())  # type: ignore[arg-type]
    for term in terms:
        product = torch.kron(term.rows, term.columns)  # type: ignore[arg-type]
        scale = float((product * total).sum() / product.square().sum())
        assert distance <= float((scale * product - total).norm()) + 1e-9
    assert float(torch.linalg.eigvalsh(found.rows)[0]) > 0  # type: ignore[arg-type]


def test_diagonal_and_full_terms_meet_as_diagonals() -> None:
    found = nearest_kronecker([Weighting(torch.rand(4), moment(3)), Weighting(moment(4), moment(3, seed=1))])
    assert found.rows is not None
    assert found.rows.shape == (4,)
    assert found.columns is not None
    assert found.columns.shape == (3, 3)


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"columns.*\(5, 5\)"):
        weighted_svd(torch.randn(7, 11), Weighting(None, torch.eye(5)))
    with pytest.raises(NonFiniteError, match="second moment"):
        weighted_svd(torch.randn(2, 3), Weighting(torch.full((2, 2), torch.nan)))
    with pytest.raises(NonFiniteError, match="The matrix"):
        weighted_svd(torch.full((2, 3), torch.inf), Weighting())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_cholesky_in_double_precision_needs_one_matrix() -> None:
    columns = torch.randn(4096, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns[:, 0] *= 100  # so that the later pivots are too small for single precision
    columns[:, 1:] += columns[:, :1]
    moments = (columns.T @ columns).float()[None]
    most = peak(lambda: cholesky(moments))
    assert most <= 2.1 * moments.nbytes
    lower, positive = cholesky(moments)
    assert positive
    assert lower.dtype == torch.float64
    torch.testing.assert_close(lower, torch.linalg.cholesky(moments.double()))
