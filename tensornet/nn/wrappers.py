"""Wrappers of PyTorch around a model: parallel training and `torch.compile`."""

from torch import nn


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
