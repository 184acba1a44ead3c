"""Modules in which some stored tensors keep a dtype of their own: packed integers, scales, bfloat16."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tensornet.errors import FormatError
from tensornet.nn.encoding import packed_codes, unpacked_codes
from tensornet.nn.matrix_cache import MatrixKeeper
from tensornet.quantization import NumberFormat, TrainedCodes


class FixedDtypes(MatrixKeeper):
    """Abstract base of modules that store cores in number formats.

    `.to()`, `.half()` and the like move such tensors and keep their dtype. Integers are persistent buffers,
    and so are scales, unless they are trained. Subclasses define `stored` and `fixed_dtypes`.
    """

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Parameters and buffers that hold the cores, by name."""
        raise TypeError(f"{type(self).__name__} must define stored.")

    @property
    def fixed_dtypes(self) -> Mapping[str, torch.dtype]:
        """Dtypes of the stored tensors that do not have the model's, by name."""
        raise TypeError(f"{type(self).__name__} must define fixed_dtypes.")

    @property
    def integer_cores(self) -> Mapping[str, tuple[NumberFormat, int]]:
        """Number format and columns of cores stored as packed integers, by the name of the tensor."""
        raise TypeError(f"{type(self).__name__} must define integer_cores.")

    @property
    def stored_counts(self) -> dict[str, int]:
        """Numbers in each stored tensor, by its name: every code and zero point is one, however packed."""
        found = {name: tensor.numel() for name, tensor in self.stored.items()}
        for name, (number_format, columns) in self.integer_cores.items():
            found[name] = math.prod(self.stored[name].shape[:-1]) * columns
            if number_format.zero_point:
                stem = name.partition("_")[2]
                found[f"zero_{stem}"] = found[f"scale_{stem}"]
        return found

    @property
    def trains_scales(self) -> bool:
        """True if scales, codes, or cores in bfloat16 are parameters at the moment; see `train_scales`."""
        return any(isinstance(self.stored[name], nn.Parameter) for name in self.fixed_dtypes)

    def train_scales(
        self, on: bool = True, shared: dict[int, Tensor] | None = None, *, codes: bool = False
    ) -> None:
        """Make scales, and cores in bfloat16, trainable parameters in float32; or store them as before.

        Args:
            on: whether they are parameters from now on.
            shared: tensors made for other modules, by the identity of those that they replace, which keeps
                tied modules tied.
            codes: whether integers are parameters too, `TrainedCodes` of 4 bytes each; when they are stored
                again, they are rounded.
        """
        shared = {} if shared is None else shared
        for name in self._trainable_names(codes if on else True):
            tensor = self.stored[name]
            if not on and not isinstance(tensor, nn.Parameter):
                continue
            if id(tensor) not in shared:
                shared[id(tensor)] = self._to_train(name, tensor) if on else self._to_store(name, tensor)
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            if on:
                self.register_parameter(name, shared[id(tensor)])  # type: ignore[arg-type]
            else:
                self.register_buffer(name, shared[id(tensor)])
        self.drop_cache()

    def _trainable_names(self, codes: bool) -> list[str]:
        """List the tensors that `train_scales` converts: scales of 8 bits would undo what is trained."""
        integers = self.integer_cores if codes else {}
        return [
            name
            for name, kind in self.fixed_dtypes.items()
            if name in integers or (kind.is_floating_point and kind.itemsize > 1)
        ]

    def _to_train(self, name: str, tensor: Tensor) -> nn.Parameter:
        if name not in self.integer_cores:
            return nn.Parameter(tensor.detach().float())
        number_format, columns = self.integer_cores[name]
        assert number_format.bits is not None
        return TrainedCodes(unpacked_codes(tensor, number_format.bits, columns).float())

    def _to_store(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.integer_cores:
            return tensor.detach().to(self.fixed_dtypes[name])
        number_format, _ = self.integer_cores[name]
        assert number_format.bits is not None
        codes = tensor.detach().round().clamp(0, number_format.top)
        return packed_codes(codes.to(torch.uint8), number_format.bits)

    def check_finite_scales(self, name: str) -> None:
        """Raise FormatError if a scale is NaN or infinite, as in a damaged file.

        Args:
            name: of this module in its model, for the message.
        """
        for part, tensor in self.stored.items():
            if part.startswith("scale_") and not bool(tensor.float().isfinite().all()):
                raise FormatError(
                    f"{name}.{part} holds NaN or infinite scales, so that the weight has no value. The file "
                    "is damaged: copy or download it again, or compress the model again."
                )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        stored = self.stored
        fixed = [stored[name] for name in self.fixed_dtypes]
        known = {id(x) for tensor in fixed for x in (tensor, tensor.grad) if x is not None}
        if not known:
            return super()._apply(fn, recurse)

        def keeping(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if id(tensor) not in known or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(keeping, recurse)
