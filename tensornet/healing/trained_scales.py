"""Scales of integer cores as parameters, while they are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tensornet.nn.module import NetworkModule


@contextmanager
def trained_scales(model: nn.Module) -> Iterator[None]:
    """Make scales and cores in bfloat16 parameters in float32 inside a block; then store them as before.

    Args:
        model: with compressed layers; tied ones stay tied.
    """
    modules = [module for module in model.modules() if isinstance(module, NetworkModule)]
    layers = [layer for layer in modules if layer.storage.own_dtypes]
    try:
        shared: dict[int, Tensor] = {}
        for layer in layers:
            layer.train_scales(True, shared)
        yield
    finally:
        shared = {}
        for layer in layers:
            layer.train_scales(False, shared)
