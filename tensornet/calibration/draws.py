"""Random numbers of calibration: the same in every run, without a change of the global generator."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

#: Generators of the innermost block by device; None outside.
_drawing: ContextVar[dict[torch.device, torch.Generator] | None] = ContextVar("drawing", default=None)


@contextmanager
def seeded_draws() -> Iterator[None]:
    """Let losses draw from generators of their own inside the block, which start at a fixed seed.

    One sequence runs through all batches, so that equal batches get different noise.

    Example:
        >>> from tensornet.calibration.draws import draws_on, seeded_draws
        >>> def two():
        ...     with seeded_draws():
        ...         return [float(torch.rand((), generator=draws_on(torch.device("cpu")))) for _ in range(2)]
        >>> first, second = two()
        >>> first != second, two() == [first, second]
        (True, True)
    """
    token = _drawing.set({})
    try:
        yield
    finally:
        _drawing.reset(token)


def draws_on(device: torch.device) -> torch.Generator | None:
    """Return the generator of a device; None outside of `seeded_draws`, where the global one draws."""
    known = _drawing.get()
    if known is None:
        return None
    if device not in known:
        known[device] = torch.Generator(device).manual_seed(0)
    return known[device]
