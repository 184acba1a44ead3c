"""Scales and codes of integer cores as parameters during training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tensornet.nn.fixed_dtypes import FixedDtypes


@contextmanager
def trained_scales(model: nn.Module, *, codes: bool = False) -> Iterator[None]:
    """Convert scales and bfloat16 cores to float32 parameters inside the block, and back after it.

    Inside another such block nothing changes: optimizers hold the parameters of the outer one.

    Args:
        model: with compressed layers or experts; tied ones stay tied.
        codes: whether the integers are parameters as well, see `tensornet.quantization.TrainedCodes`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
        >>> _ = tn.compress(model, tn.CompressionConfig(formats=("int4",)), progress=False)
        >>> with tn.healing.trained_scales(model):
        ...     [name for name, _ in model.named_parameters()]
        ['0.scale_matrix']
        >>> [name for name, _ in model.named_parameters()]
        []
    """
    modules = [module for module in model.modules() if isinstance(module, FixedDtypes)]
    layers = [layer for layer in modules if layer.fixed_dtypes and not layer.trains_scales]
    try:
        shared: dict[int, Tensor] = {}
        for layer in layers:
            layer.train_scales(True, shared, codes=codes)
        yield
    finally:
        shared = {}
        for layer in layers:
            layer.train_scales(False, shared)
