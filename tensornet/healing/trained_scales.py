"""Scales and codes of integer cores as parameters during training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tensornet.nn.storage import pack_after_training, unpack_for_training


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
        ['0.core_matrix.scales']
        >>> [name for name, _ in model.named_parameters()]
        []
    """
    cores = unpack_for_training(model, codes=codes)
    try:
        yield
    finally:
        pack_after_training(cores)
