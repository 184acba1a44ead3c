"""Layers whose integer matrix may lie in the layout of torch's int4 kernel, in place of its stored packing.

To explain how this works: in eval, computing in bfloat16 on the CPU, the layer swaps codes and scales for two
other buffers, by `eval()`, `.to()` or the next pass. Those of four bits are of nearly the same size; others
take up to `HELD_RATIO` times the stored bytes, or more under the strategy "factorized", as `explain` tells.
The layer swaps them back when the stored tensors are asked for by name or move, while state dicts and copies
get converted ones. The names differ, so that nobody takes one layout for the other. A compiler cannot swap:
it uses the kernel where the swap came before.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from typing_extensions import Self

from tensornet.contraction.cost import Machine
from tensornet.nn.integer_cost import IntegerCost, product_cost
from tensornet.nn.kernel_layout import KernelMatrix, from_kernel, has_layout, layout_bytes, to_kernel
from tensornet.nn.module import NetworkModule, cores_of
from tensornet.quantization import NumberFormat

#: Names of the buffers that hold codes and scales in the layout of the kernel.
KERNEL_BUFFERS = _CODES, _SCALES = "kernel_codes", "kernel_scales"


class KernelKeeper(NetworkModule):
    """Abstract base of layers that may hold an integer matrix in the layout of torch's kernel."""

    _kernel_block: int

    @property
    def integer_format(self) -> NumberFormat | None:
        """Number format of the matrix, if it is stored as one matrix of integers."""
        name = self.topology.core_names[0]
        number_format = self.storage.format_of(name)
        single = len(self.topology.cores) == 1 and self.topology.shape == self.topology.padded_shape
        return number_format if single and number_format.is_integer else None

    @property
    def kernel_matrix(self) -> KernelMatrix | None:
        """Matrix in the layout of the kernel; None while it is held in its stored form."""
        codes, scales = self._buffers.get(_CODES), self._buffers.get(_SCALES)
        if codes is None or scales is None or (number_format := self.integer_format) is None:
            return None
        return KernelMatrix(number_format, codes, scales, self._kernel_block)

    @property
    def stored(self) -> dict[str, Tensor]:
        """Parameters and buffers that hold the cores, by name; undoes `hold_for_kernel`."""
        self.hold_as_stored()
        return {name: getattr(self, name) for name in self._tensor_names}

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The cores, in the order of the topology: the parameters themselves if storage is plain."""
        if is_compiling() and (matrix := self.kernel_matrix) is not None:  # no swaps in a trace
            return (matrix.dense(self.compute_like.dtype),)
        return cores_of(self)

    @property
    def num_params(self) -> int:
        """Stored numbers, bias, scales and padding included; packed integers count one by one."""
        self.hold_as_stored()
        return super().num_params

    def hold_for_kernel(self) -> None:
        """Hold the matrix in the layout of the kernel, where it helps and nothing else holds the codes."""
        if self.training or not self.storage.own_dtypes or self.strategy not in ("auto", "factorized"):
            return
        if self.compute_like.dtype != torch.bfloat16:
            return
        number_format, shape = self.integer_format, self.topology.shape
        if number_format is None or not has_layout(number_format, shape, larger=self._may_be_larger):
            return
        core, scale, zero = (f"{part}_{self.topology.core_names[0]}" for part in ("core", "scale", "zero"))
        buffers = self._buffers
        if any(type(buffers.get(name)) is not Tensor for name in (core, scale)):
            return  # scales are trained, or the layout is there already
        # With a tied layer, or whoever else has them, the stored codes would stay beside the others.
        if any(sys.getrefcount(buffers[name]) > 2 for name in (core, scale)):
            return
        codes, scales = buffers[core], buffers[scale]
        assert codes is not None
        assert scales is not None
        if not codes.is_cpu or scales.dtype != number_format.scale_dtype:
            return
        with torch.inference_mode(False):
            made = to_kernel(number_format, codes, scales, buffers.get(zero), shape[1])
        self._kernel_block = made.block
        for new, old in ((made.codes, codes), (made.scales, scales)):
            new.__dict__.update(old.__dict__)  # attributes by which transformers knows what it loaded
        self.register_buffer(_SCALES, made.scales, persistent=False)
        self.register_buffer(_CODES, made.codes, persistent=False)
        del buffers[core], buffers[scale]

    def hold_as_stored(self) -> None:
        """Hold the matrix as it is stored: undo `hold_for_kernel`, without loss."""
        if self.kernel_matrix is None:
            return
        self.__dict__["_buffers"] = self._stored_buffers()
        self._non_persistent_buffers_set.difference_update(KERNEL_BUFFERS)
        self._fast_path = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode as `nn.Module` does; `eval()` puts integers into the layout of the kernel."""
        super().train(mode)
        self.hold_for_kernel() if not mode else self.hold_as_stored()
        return self

    def _stored_buffers(self) -> dict[str, Tensor | None]:
        """Return the buffers in their stored form and order, whatever layout holds the matrix now."""
        matrix = self.kernel_matrix
        if matrix is None:
            return self._buffers
        with torch.inference_mode(False):
            stored = from_kernel(matrix, self._buffers.get(f"zero_{self.topology.core_names[0]}"))
        for new, old in zip(stored, (matrix.codes, matrix.scales), strict=True):
            new.__dict__.update(old.__dict__)
        name = self.topology.core_names[0]
        found = dict(zip((f"core_{name}", f"scale_{name}"), stored, strict=True))
        return found | {key: x for key, x in self._buffers.items() if key not in KERNEL_BUFFERS}

    def _integer_costs(self, tokens: int, machine: Machine) -> dict[str, IntegerCost]:
        found, number_format = super()._integer_costs(tokens, machine), self.integer_format
        if number_format is not None and self.strategy in ("auto", "factorized"):
            itemsize, shape = self.compute_like.element_size(), self.topology.shape
            cost = product_cost(number_format, shape, tokens, machine, itemsize, larger=self._may_be_larger)
            if self.kernel_matrix is not None:
                cost = replace(cost, held_bytes=layout_bytes(number_format, shape))
            found["factorized"] = cost
        return found

    @property
    def _may_be_larger(self) -> bool:
        """True if the layout may take more than `HELD_RATIO` times the stored bytes."""
        return self.strategy == "factorized"

    def _held_device(self) -> torch.device:
        codes = self._buffers.get(_CODES)
        return super()._held_device() if codes is None else codes.device

    def configure(self, **options: Any) -> Self:
        """See `RoutedModule.configure`."""
        self.hold_as_stored()
        return super().configure(**options)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.hold_as_stored()
        super()._apply(fn, recurse)
        self.hold_for_kernel()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if keep_vars:
            self.hold_as_stored()
        held = self._buffers
        try:
            self.__dict__["_buffers"] = self._stored_buffers()
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self.__dict__["_buffers"] = held

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *rest: Any) -> None:
        self.hold_as_stored()
        super()._load_from_state_dict(state_dict, *rest)

    def __getstate__(self) -> dict[str, Any]:
        hidden = self._non_persistent_buffers_set.difference(KERNEL_BUFFERS)
        changed = {"_buffers": self._stored_buffers(), "_non_persistent_buffers_set": hidden}
        return {**super().__getstate__(), **changed}

    def __getattr__(self, name: str) -> Any:
        """Look up as `nn.Module` does; a stored tensor leaves the layout of the kernel first."""
        if _CODES in self.__dict__.get("_buffers", ()) and name in self._tensor_names:
            self.hold_as_stored()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if _CODES in self.__dict__.get("_buffers", ()) and name in self._tensor_names:
            self.hold_as_stored()
        super().__setattr__(name, value)
