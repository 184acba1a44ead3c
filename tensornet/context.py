"""Results that do not depend on what a caller has switched on: autocast, another default device."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off in a function: products of singular vectors in 16 bits would break its bounds."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


def on_cpu_unless_said(function: Callable[P, R]) -> Callable[P, R]:
    """Make new tensors on the CPU in a function, whatever `torch.set_default_device` says.

    Prices and ranks are worked out there, beside weights on any device. Not for functions that run a model,
    which may rely on the default.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped
