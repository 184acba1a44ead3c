"""Packing: round trips of any shape and bits, tight, and wrong lengths refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet.errors import ShapeError
from tensornet.quantization import pack, packed_bytes, unpack


@given(st.integers(2, 8), st.lists(st.integers(0, 9), max_size=3), st.integers(0, 70), st.integers(0, 1000))
def test_round_trip(bits: int, lead: list[int], size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, size), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, packed_bytes(size, bits))
    assert torch.equal(unpack(packed, bits, size), codes)


@given(st.integers(2, 8), st.integers(0, 300))
def test_tight_up_to_one_set_of_segments(bits: int, size: int) -> None:
    assert 0 <= 8 * packed_bytes(size, bits) - bits * size < bits * 8
    if size % 8 == 0:
        assert 8 * packed_bytes(size, bits) == bits * size


@pytest.mark.parametrize("bits", range(2, 9))
def test_layout_is_that_of_the_docstring(bits: int) -> None:
    """Bit by bit: code `k` of all segments lies in byte `k` of the planes, little end first."""
    segments, planes = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    length = 5
    codes = torch.randint(0, 2**bits, (segments * length,), dtype=torch.uint8)
    packed = pack(codes, bits).tolist()
    for k in range(length):
        word = sum(int(codes[s * length + k]) << (s * bits) for s in range(segments))
        assert [packed[p * length + k] for p in range(planes)] == list(word.to_bytes(planes, "little"))


def test_rows_can_be_sliced_while_packed() -> None:
    codes = torch.randint(0, 8, (4, 6, 33), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 3)[1:3, 2], 3, 33), codes[1:3, 2])


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"code of 9; 3 bits hold 0 to 7"):
        pack(torch.tensor([9], dtype=torch.uint8), 3)
    with pytest.raises(ShapeError, match=r"torch\.uint8 with at least one dimension, got torch\.int64"):
        pack(torch.tensor([1]), 3)
    for bits in (1, 9, 4.0, True):
        with pytest.raises(ShapeError, match="2 to 8 bits"):
            pack(torch.zeros(8, dtype=torch.uint8), bits)  # type: ignore[arg-type]
    packed = pack(torch.zeros(2, 16, dtype=torch.uint8), 3)
    for size in (8, 17, 160):
        with pytest.raises(ShapeError, match=r"shape \(2, 6\).*damaged or belongs to another format"):
            unpack(packed, 3, size)
