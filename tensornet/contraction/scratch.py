"""Memory that a thread keeps for intermediate results of passes without gradients.

The allocator of the system gives large blocks back at once and zeroes fresh pages at the next request, which
takes longer than the arithmetic that a slice of a matrix needs. One block for each thread, shared by all
layers it runs, takes that away. Nothing in it outlives the call that borrowed it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: A thread keeps at most so many bytes; what needs more gets memory of its own.
LIMIT = 32 * 2**20


class _Kept(threading.local):
    block: Tensor | None = None


_kept = _Kept()


@contextmanager
def borrow(elements: int, like: Tensor) -> Iterator[Tensor]:
    """A flat tensor of so many elements with any content, valid inside the `with` block.

    Args:
        elements: how many.
        like: gives the dtype, and the device, on which memory is kept only for the CPU.
    """
    size = elements * like.element_size()
    # Taken, not looked up: whoever calls from within, a hook say, finds none and gets another.
    block, _kept.block = _kept.block, None
    if block is None or block.numel() < size or like.device.type != "cpu":
        with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
            block = torch.empty(size, dtype=torch.uint8, device=like.device)
    try:
        yield block[:size].view(like.dtype)
    finally:
        if size <= LIMIT and like.device.type == "cpu":
            _kept.block = block
