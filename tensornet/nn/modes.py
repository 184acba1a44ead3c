"""Models put into another mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in its own mode again.

    Fused paths that PyTorch's encoders take in eval are off, since they run past the layers that are watched.
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
    """Modules that `torch.compile` has wrapped run as they are written: hooks inside are Python's."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Blocks run several times on one batch, which a cache of keys and values would take for new tokens."""
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
