"""Prepare a model for inference: convert integers to a kernel's layout, and other cores to dense matrices.

Layers that save memory may cost time. Integer kernels need a layout that depends on the processor, and the
matrix of a network may be rebuilt in every pass. `prepare_for_inference` is the explicit step that trades
memory for speed. The modules that it puts into a model can be neither trained nor saved.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tensornet._util import outside_autocast
from tensornet.errors import TargetError
from tensornet.nn.int4_cpu import MAX_GROWTH, KernelMatrix, has_layout, to_kernel
from tensornet.nn.layer_kinds import carry_hooks
from tensornet.nn.storage import PackedCore


@outside_autocast
@torch.no_grad()
def prepare_for_inference(model: nn.Module, *, max_growth: float | None = None) -> nn.Module:
    """Convert layers to forms that run faster, such as dense matrices and the layout of integer kernels.

    - A layer that is one integer matrix is converted to the layout of torch's int4 kernel, if it computes in
      bfloat16 on the CPU. An embedding that is tied to a converted output head reads its rows from the
      converted matrix.
    - A network of floating-point cores becomes a dense layer. It is kept only if a pass of one token is
      predicted to be clearly faster with the cores, as for a low-rank matrix with half the parameters.
    - A bank of shared-core experts (`tensornet_moe`) of floating-point cores becomes a stack of dense
      matrices.

    All layers with the strategy `"reconstruct"` stay as they are, and so do networks and experts with the
    strategy `"factorized"`. Networks of several cores, some of them integers, and embeddings that are not
    tied also stay as they are.

    Args:
        model: any model; it is changed in place and set to eval mode. Training or saving it afterwards raises
            TargetError.
        max_growth: largest size of a converted layer, relative to its stored bytes. By default 1.75 for
            integer matrices (`int2` needs 2), and no limit for networks and experts.

    Returns:
        The same model; if the model itself is a single layer, the layer that replaces it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
        >>> config = tn.CompressionConfig(formats=("int4",), method="nearest")
        >>> _ = tn.compress(model, config, progress=False)
        >>> tn.nn.prepare_for_inference(model)(torch.ones(1, 64).bfloat16()).shape
        torch.Size([1, 64])
    """
    model.eval()
    _convert_integers(model, MAX_GROWTH if max_growth is None else max_growth)
    made: dict[nn.Module, nn.Module | None] = {}  # a module with several names is converted once
    for name, module in list(model.named_modules(remove_duplicate=False)):
        prepared = getattr(module, "prepared", None)
        if callable(prepared) and module not in made:
            made[module] = prepared(math.inf if max_growth is None else max_growth)
        if (new := made.get(module)) is not None:
            carry_hooks(module, new)
            if not name:
                return new
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model


def _convert_integers(model: nn.Module, max_growth: float) -> None:
    users: dict[PackedCore, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for name, core in module.named_children():
            if isinstance(core, PackedCore):
                users.setdefault(core, []).append((module, name))
    for core, places in users.items():
        # A core is converted only if every layer that uses it multiplies by it or, as an embedding, reads its
        # rows.
        multiplying = [x for x, _ in places if getattr(x, "integer_core", None) is core]
        reading = [x for x, _ in places if getattr(x, "source", "") == "embedding"]
        fits = bool(multiplying) and len(multiplying) + len(reading) == len(places)
        for layer in (*multiplying, *reading):
            fits &= layer.dtype == torch.bfloat16 and layer.strategy in ("auto", "factorized")
        if not fits or core.is_trained or core.device.type != "cpu":
            continue
        if not has_layout(core.number_format, (len(core.scales), core.columns), max_growth):
            continue
        made = Int4Core(
            to_kernel(core.number_format, core.codes, core.scale_values, core.columns), core.shape
        )
        for layer, name in places:
            setattr(layer, name, made)


def refuse_saving(module: nn.Module, *_: object) -> None:
    """Raise TargetError; this is a hook for `register_state_dict_pre_hook`, which runs before saving."""
    raise TargetError(
        "A model that was prepared for inference cannot be saved: its layers are dense, or in a "
        "layout of this processor. Save the model before prepare_for_inference, or load it again."
    )


def refuse_training(mode: bool) -> None:
    """Raise TargetError if `mode` is True."""
    if mode:
        raise TargetError(
            "A model that was prepared for inference cannot be trained: load or compress it again."
        )


class PreparedLinear(nn.Module):
    """Dense layer `y = x W^T + b` that replaces a network when a model is prepared for inference.

    Args:
        matrix: `W`, shape `(out_features, in_features)`; it is not copied.
        bias: shape `(out_features,)`, or None.
    """

    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.weight = nn.Parameter(matrix, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_state_dict_pre_hook(refuse_saving)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: (..., in_features)` to `(..., out_features)`."""
        return nn.functional.linear(x, self.weight, self.bias)

    def train(self, mode: bool = True) -> Self:
        """Set eval mode; raise TargetError if `mode` is True."""
        refuse_training(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Show sizes in `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int4Core(nn.Module):
    """Integer matrix that replaces a `PackedCore` when a layer is prepared for inference.

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
        self.register_buffer("scales", matrix.scales.view(torch.int16))  # `.half()` keeps integers
        self.register_state_dict_pre_hook(refuse_saving)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.codes.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by name."""
        return {"codes": self.codes, "scales": self.scales}

    @property
    def counts(self) -> dict[str, int]:
        """Number of values in each stored tensor; a packed code counts as one value."""
        rows, columns = self._matrix.shape
        return {"codes": rows * columns, "scales": rows * len(self.scales)}

    @property
    def integers(self) -> KernelMatrix:
        """Matrix to pass to `tensornet.nn.integer_matmul.multiply`."""
        if self._matrix.codes is not self.codes:
            self._matrix = replace(self._matrix, codes=self.codes, scales=self.scales.view(torch.bfloat16))
        return self._matrix

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """Unpack the core to a tensor of its shape, in float32 by default."""
        return self.integers.dense(dtype or torch.float32).reshape(self.shape)

    def matrix(self, dtype: torch.dtype, index: Tensor) -> Tensor:
        """Unpack the rows with the given indices, shape `(n,)`, to values of shape `(n, columns)`."""
        return self.integers.rows(index, dtype)

    def train(self, mode: bool = True) -> Self:
        """Set eval mode; raise TargetError if `mode` is True."""
        refuse_training(mode)
        return super().train(mode)
