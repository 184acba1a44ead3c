"""Splitting dimensions: products, padding, balance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensornet.errors import TopologyError
from tensornet.topologies.factored import MAX_PADDING, balanced_factors, choose_dims


@given(size=st.integers(1, 60_000), sites=st.integers(1, 6))
def test_factors_hold_the_size_with_little_padding(size: int, sites: int) -> None:
    factors = balanced_factors(size, sites)
    assert len(factors) == sites
    assert list(factors) == sorted(factors)
    assert min(factors) >= 1
    assert size <= math.prod(factors) <= max(math.floor(size * (1 + MAX_PADDING)), size + 1)


@pytest.mark.parametrize(
    ("size", "sites", "factors"),
    [
        (768, 3, (8, 8, 12)),
        (768, 2, (24, 32)),  # not 28 * 28: exact factors need no copies
        (3072, 2, (48, 64)),
        (4096, 3, (16, 16, 16)),
        (1, 3, (1, 1, 1)),
        (7, 1, (7,)),
        (7, 2, (1, 7)),
    ],
)
def test_known_splits(size: int, sites: int, factors: tuple[int, ...]) -> None:
    assert balanced_factors(size, sites) == factors


@pytest.mark.parametrize("size", [50257, 32128, 11008, 1733, 151936])
def test_awkward_vocabularies_become_balanced(size: int) -> None:
    for sites in (2, 3, 4):
        factors = balanced_factors(size, sites)
        assert factors[-1] <= 2 * factors[0]
        assert math.prod(factors) <= 1.02 * size


def test_given_dims_are_kept() -> None:
    assert choose_dims((12, 10), (3, 4), None, None) == ((3, 4), balanced_factors(10, 2)[::-1])
    assert choose_dims((12, 10), None, (5, 2), 2) == (balanced_factors(12, 2), (5, 2))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: balanced_factors(0, 1), "at least 1"),
        (lambda: balanced_factors(5, 0), "at least 1"),
        (lambda: choose_dims((12, 10), (3, 4), None, 3), "sites=3 contradicts"),
        (lambda: choose_dims((12, 10), (3, 4), (10,), None), "number of sites"),
        (lambda: choose_dims((12, 10), (), (), None), "at least one"),
        (lambda: choose_dims((12, 10), (3, 3), (5, 2), None), r"out_dims.*12"),
        (lambda: choose_dims((12, 10), (3, 4), (5, 1), None), r"in_dims.*10"),
        (lambda: choose_dims((12, 10), (12, 0), (5, 2), None), "got 0"),
    ],
)
def test_dims_that_do_not_fit_are_refused(call: Callable[[], object], word: str) -> None:
    with pytest.raises(TopologyError, match=word):
        call()
