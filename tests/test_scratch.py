"""Memory kept for intermediate results: one block a thread, never lent twice, given up beyond a limit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tensornet as tn
from tensornet.contraction import scratch
from tensornet.contraction.scratch import borrow
from tensornet.contraction.slicing import plan_slices, run_in_slices
from tensornet.network import random_cores
from tensornet.topologies import mpo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_the_same_memory_serves_call_after_call(dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)
    with borrow(1000, like) as first:
        assert (first.shape, first.dtype, first.is_contiguous()) == ((1000,), dtype, True)
        address = first.data_ptr()
    with borrow(10, like) as second:
        assert second.numel() == 10
        assert second.data_ptr() == address


def test_whoever_borrows_while_it_is_lent_gets_other_memory() -> None:
    like = torch.zeros(1)
    with borrow(100, like) as outer:
        outer.fill_(1)
        with borrow(100, like) as inner:
            inner.fill_(2)
        assert outer.eq(1).all()


def test_much_memory_is_not_kept() -> None:
    like = torch.zeros(1)
    with borrow(scratch.LIMIT // 4, like):
        pass
    assert scratch._kept.block is not None
    with borrow(scratch.LIMIT // 4 + 1, like):
        assert scratch._kept.block is None
    assert scratch._kept.block is None


def test_it_is_given_back_after_an_error() -> None:
    like = torch.zeros(1)
    with pytest.raises(KeyError), borrow(100, like) as block:
        raise KeyError
    assert scratch._kept.block is not None
    assert scratch._kept.block.data_ptr() == block.data_ptr()


def test_inference_mode_leaves_nothing_that_others_could_not_write() -> None:
    scratch._kept.block = None
    like = torch.zeros(1)
    with torch.inference_mode(), borrow(100, like) as block:
        block.fill_(1)
    with torch.no_grad(), borrow(100, like) as block:
        block.fill_(2)
        assert not block.is_inference()


def test_threads_do_not_write_into_each_others() -> None:
    topology = mpo(out_dims=(48, 16), in_dims=(16, 24), max_bond=16)
    plan = plan_slices(topology)[0]
    networks = [tn.TensorNetwork(topology, random_cores(topology)) for _ in range(4)]
    x = torch.randn(40, 384)

    @torch.no_grad()
    def largest_error(network: tn.TensorNetwork) -> float:
        expected = x @ network.to_matrix().T
        return max(float((run_in_slices(plan, network.cores, x) - expected).abs().max()) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(largest_error, networks)) < 1e-4
