"""Scales of integer cores as parameters during training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tensornet.nn.module import NetworkModule


@contextmanager
def trained_scales(model: nn.Module) -> Iterator[None]:
    """Convert scales and bfloat16 cores to float32 parameters inside the block, and back after it.

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
