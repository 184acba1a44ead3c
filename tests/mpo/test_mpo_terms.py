"""Sums of local terms against sums of Kronecker products, and their smallest possible bonds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet as tn
from tensornet.errors import ShapeError

X, Y, Z = np.array([[0, 1], [1, 0]]), np.array([[0, -1j], [1j, 0]]), np.diag([1, -1])
PLUS, MINUS = np.array([[0, 0], [1, 0]]), np.array([[0, 1], [0, 0]])
MATRICES = {"I": np.eye(2), "X": X, "Y": Y, "Z": Z, "+": PLUS, "-": MINUS, "n": np.diag([0, 1])}


def dense(terms: list, dims: list[int]) -> np.ndarray:
    total = np.zeros((math.prod(dims),) * 2, dtype=complex)
    for coefficient, operators in terms:
        product = np.ones((1, 1))
        for site, dim in enumerate(dims):
            operator = operators.get(site, np.eye(dim))
            product = np.kron(product, MATRICES[operator] if isinstance(operator, str) else operator)
        total += coefficient * product
    return total


def bonds_of(matrix: np.ndarray, dims: list[int]) -> list[int]:
    """The ranks of the unfoldings: no chain of this matrix has smaller bonds."""
    sites = len(dims)
    tensor = matrix.reshape(*dims, *dims).transpose([axis for k in range(sites) for axis in (k, sites + k)])
    sizes = [math.prod(dims[:k]) ** 2 for k in range(1, sites)]
    return [int(np.linalg.matrix_rank(tensor.reshape(size, -1))) for size in sizes]


HAMILTONIANS = {
    "Ising": (
        [(-1, {k: "Z", k + 1: "Z"}) for k in range(5)] + [(-0.7, {k: "X"}) for k in range(6)],
        3,
    ),
    "Heisenberg": (
        [(0.5, {k: a, k + 1: b}) for k in range(5) for a, b in ("+-", "-+")]
        + [(0.25, {k: "Z", k + 1: "Z"}) for k in range(5)],
        5,
    ),
    "Hubbard": (  # modes: up and down of site 0, up and down of site 1, ...; Z strings are the signs
        [(-1, {k: a, k + 1: "Z", k + 2: b}) for k in range(4) for a, b in ("+-", "-+")]
        + [(4, {k: "n", k + 1: "n"}) for k in range(0, 6, 2)],
        7,
    ),
    "Coulomb": (
        [(1 / (j - i) ** 2, {i: "Z", j: "Z"}) for i in range(6) for j in range(i + 1, 6)],
        5,
    ),
    "complex": ([(1j, {0: "X", 3: "Y"}), (2, {2: "Y"}), (1 + 1j, {5: "+"})], 3),
}


@pytest.mark.parametrize(("terms", "largest"), HAMILTONIANS.values(), ids=HAMILTONIANS)
def test_hamiltonians_have_the_smallest_bonds(terms: list, largest: int) -> None:
    dims = [2] * 6
    dtype = None if any(isinstance(c, complex) for c, _ in terms) else torch.float64
    found = tn.MPO.from_terms(terms, dims, dtype=dtype)
    expected = dense(terms, dims)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-6 if dtype is None else 1e-13)
    assert list(found.bond_dims) == bonds_of(expected, dims)
    assert max(found.bond_dims) <= largest


@given(data=st.data())
def test_sums_of_any_terms(data: st.DataObject) -> None:
    dims = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    pool = [generator.standard_normal((dim, dim)) for dim in dims]
    terms = []
    for _ in range(data.draw(st.integers(0, 6))):
        sites = data.draw(st.sets(st.integers(0, len(dims) - 1)))
        choice = {site: data.draw(st.sampled_from((pool[site], np.eye(dims[site])))) for site in sites}
        terms.append((data.draw(st.sampled_from((1.0, -1.0, 2.5, 0.0))), choice))
    found = tn.MPO.from_terms(terms, dims, dtype=torch.float64)
    np.testing.assert_allclose(np.asarray(found), dense(terms, dims).real, atol=1e-12)


def test_terms_that_cancel_give_zero() -> None:
    found = tn.MPO.from_terms([(1, {0: "X"}), (-1, {0: X})], [2] * 3)
    assert found.bond_dims == (1, 1)
    assert not np.asarray(found).any()


def test_a_hundred_sites() -> None:
    terms = [(-1, {k: "Z", k + 1: "Z"}) for k in range(99)] + [(-1, {k: "X"}) for k in range(100)]
    ising = tn.MPO.from_terms(terms, [2] * 100, dtype=torch.float64)
    assert set(ising.bond_dims) == {3}
    up = tn.MPO.product_state([torch.tensor([1.0, 0])] * 100)
    assert float(up.expectation(ising)) == -99


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ((1, {3: "X"}), "Site 3"),
        ((1, {-1: "X"}), "Site -1"),
        ((1, {"0": "X"}), "Site '0'"),
        ((1, {0: "W"}), "Unknown operator 'W'"),
        ((1, {0: np.eye(3)}), r"shape \(3, 3\)"),
        ((1, {2: "X"}), r"shape \(2, 2\)"),
        (("Z", {0: "Z"}), "coefficient"),
        ((1, "Z"), "A term is"),
        ((1j, {0: "X"}), "complex"),
        ((1, {0: "Y"}), "complex"),
    ],
)
def test_wrong_terms_are_refused(term: tuple, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        tn.MPO.from_terms([term], [2, 2, 3], dtype=torch.float64)
