"""Prepare a compressed model for inference with the kernels of torch."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tensornet.errors import TargetError
from tensornet.nn.int4_cpu import MAX_GROWTH, KernelMatrix, has_layout, to_kernel
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.storage import PackedCore


class Int4Core(nn.Module):
    """Integer matrix of a layer that was prepared for inference; it replaces a `PackedCore`.

    Args:
        matrix: the matrix in the layout of the kernel.
        shape: shape of the core.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: KernelMatrix, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self._matrix = shape, matrix
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales.view(torch.int16))  # not changed by `.half()`
        self.register_state_dict_pre_hook(_refuse_saving)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.codes.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {"codes": self.codes, "scales": self.scales}

    @property
    def counts(self) -> dict[str, int]:
        """Number of elements in each tensor, before packing."""
        rows, columns = self._matrix.shape
        return {"codes": rows * columns, "scales": rows * len(self.scales)}

    @property
    def integers(self) -> KernelMatrix:
        """Matrix for `tensornet.nn.integer_matmul.multiply`."""
        if self._matrix.codes is not self.codes:
            self._matrix = replace(self._matrix, codes=self.codes, scales=self.scales.view(torch.bfloat16))
        return self._matrix

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """Unpack the core."""
        return self.integers.dense(dtype or torch.float32).reshape(self.shape)

    def train(self, mode: bool = True) -> Self:
        """Refuse training.

        Raises:
            TargetError: the mode is training.
        """
        if mode:
            raise TargetError(
                "A model that was prepared for inference cannot be trained: load or compress it again."
            )
        return super().train(mode)


def _refuse_saving(module: nn.Module, *_: object) -> None:
    raise TargetError(
        "A model that was prepared for inference cannot be saved: its layout belongs to this processor. Save "
        "the model before prepare_for_inference, or load it again."
    )


@torch.no_grad()
def prepare_for_inference(model: nn.Module, *, max_growth: float = MAX_GROWTH) -> nn.Module:
    """Convert integer layers to the layout of torch's int4 kernel for the CPU, if it is faster.

    A layer is converted if it is stored as one integer matrix, computes in bfloat16 on the CPU, and has the
    strategy `"auto"` or `"factorized"`. Other layers are not changed. A pass of one token then takes about as
    long as reading the weights.

    Args:
        model: changed in place and put in eval mode. Training and saving raise errors afterwards.
        max_growth: largest size of a converted layer, in units of its stored bytes; 2 allows `int2`.

    Returns:
        The model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
        >>> config = tn.CompressionConfig(formats=("int4",), objective="weight")
        >>> _ = tn.compress(model, config, progress=False)
        >>> tn.nn.prepare_for_inference(model)(torch.ones(1, 64).bfloat16()).shape
        torch.Size([1, 64])
    """
    model.eval()
    users: dict[PackedCore, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, core in module.named_children():
            if isinstance(core, PackedCore):
                users.setdefault(core, []).append((module, name))
    for core, places in users.items():
        layers = [layer for layer, _ in places if isinstance(layer, TensorNetworkLinear)]
        if len(layers) < len(places) or core.is_trained:
            continue
        if any(x.integer_core is not core or x._like().device.type != "cpu" for x in layers):
            continue
        shape = layers[0].topology.shape
        if any(x.dtype != torch.bfloat16 or x.strategy not in ("auto", "factorized") for x in layers):
            continue
        if not has_layout(core.number_format, shape, max_growth):
            continue
        zeros = core.tensors.get("zeros")
        matrix = to_kernel(core.number_format, core.codes, core.scale_values, zeros, shape[1])
        made = Int4Core(matrix, core.shape)
        for layer, name in places:
            setattr(layer, name, made)
    return model
