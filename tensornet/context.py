"""Context managers and decorators that fix autocast, default device, eval mode, compilation and caches."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Disable autocast in a function, whose error bounds products in 16 bits would break."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


def on_cpu_unless_said(function: Callable[P, R]) -> Callable[P, R]:
    """Create new tensors on the CPU in a function, whatever `torch.set_default_device` says.

    Sensitivities and ranks are computed there, beside weights on any device. Not for functions that run a
    model, which may rely on the default.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":  # inside the context every operation takes twice as long
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode inside the block and restore the mode of every module after it.

    The fused paths of PyTorch's encoders are disabled, since they bypass the hooks of layers.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run modules that `torch.compile` has wrapped eagerly, so that hooks on their parts are called."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disable the key/value cache of a model, which no pass over whole texts reads.

    Where blocks run several times on one batch, it would take every further run for new tokens.
    """
    found = (getattr(module, "config", None) for module in model.modules())  # stacks may have copies
    configs: list[Any] = [*{id(x): x for x in found if getattr(x, "use_cache", None) is not None}.values()]
    flags = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, flag in zip(configs, flags, strict=True):
            config.use_cache = flag


def unwrapped(model: nn.Module) -> nn.Module:
    """Unwrap a model from `DataParallel`, `DistributedDataParallel` and `torch.compile`.

    >>> type(unwrapped(nn.DataParallel(nn.Linear(4, 4)))).__name__
    'Linear'
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_exporting() -> bool:
    """Return True during `torch.export`, and False inside `torch.compile`.

    `torch.compiler.is_exporting` reads the same flag, but compilers before torch 2.12 take it for True.

    Example:
        >>> from tensornet.context import is_exporting
        >>> is_exporting()
        False
    """
    return bool(torch.compiler._is_exporting_flag)
