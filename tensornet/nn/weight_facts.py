"""Placeholder for the dense weight of a compressed layer: it has a dtype, device and shape, but no values.

Code outside a layer may read the dtype, device or shape of `layer.weight`, and may cast other tensors to its
dtype and device. Any other use raises an error; `layer.to_matrix()` returns the dense matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext  # no public API tells whether torch.compile inspects a tensor

from tensornet.errors import TargetError

#: Properties and methods for which the placeholder returns the same as the dense weight.
_PROPERTIES = (
    *("dtype", "device", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "is_meta", "is_cpu"),
    *("is_cuda", "is_mps", "is_xpu", "is_quantized", "is_sparse", "is_nested", "shape", "ndim", "itemsize"),
)
_FREEZING = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
FACTS = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device, Tensor.__hash__),
    *(torch.is_floating_point, torch.is_complex, Tensor.__repr__),
    *(Tensor.new_tensor, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
    *_FREEZING,
}
#: Methods of other tensors that read only the dtype and device of their argument.
LIKE = {Tensor.to, Tensor.type_as}


class WeightReadError(TargetError):
    """Error for code that reads the weight values of a compressed layer; `layer` is this layer, if known."""

    layer: nn.Module | None = None


class WeightFacts(Tensor):
    """Tensor with the dtype, device and shape of a weight, but without values."""

    _trained: tuple[Tensor, ...] = ()
    _layer: nn.Module | None = None
    #: Tells transformers not to initialize the placeholder when a model is loaded.
    _is_hf_initialized = True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function that needs only dtype, device or shape of the weight.

        Raises:
            WeightReadError: the function needs the values.
        """
        known = function in FACTS or (function in LIKE and not isinstance(args[0], cls))
        # torch.compile inspects the arguments of a function before it traces the function.
        inspected = not torch.compiler.is_dynamo_compiling() and TracingContext.try_get() is not None
        if not known and not inspected:
            name = getattr(function, "__name__", str(function))
            # For a property, the function is `__get__` or `__set__`; its `__self__` has the property's name.
            name = function.__self__.__name__ if name in ("__get__", "__set__") else name
            error = WeightReadError(
                f"{name} was called on the weight of a compressed layer, which has only dtype, device and "
                "shape. Call the layer; or use layer.to_matrix(), which rebuilds the dense matrix; or leave "
                "the layer dense by exclude_modules."
            )
            values = [*args, *(kwargs or {}).values()]
            flat = [y for x in values for y in (x if isinstance(x, list | tuple) else [x])]
            error.layer = next((x._layer for x in flat if isinstance(x, cls)), None)
            raise error
        # This name is private, but PyTorch's guide to tensor subclasses documents it.
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
            if function in _FREEZING:  # freezing a weight freezes its cores
                for tensor in args[0]._trained:
                    tensor.requires_grad_(args[0].requires_grad)
        return found

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Show shape, dtype and device."""
        return f"WeightFacts(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __format__(self, spec: str) -> str:
        """Apply the format specification to `repr(self)`, since a placeholder has no values to format."""
        return format(repr(self), spec)


def weight_facts(
    like: Tensor, shape: Sequence[int], trained: Sequence[Tensor] = (), layer: nn.Module | None = None
) -> Tensor:
    """Make a placeholder for the weight of a layer; it takes the memory of one element.

    Args:
        like: tensor with the dtype and device of the weight.
        shape: shape of the weight.
        trained: parameters of the layer's cores; freezing the placeholder freezes them.
        layer: the layer, for the error message.
    """
    # The value is NaN: a trace that ignores tensor subclasses then computes NaN, not plausible wrong values.
    made = torch.full((), float("nan"), dtype=like.dtype, device=like.device).expand(*shape)
    if torch.compiler.is_dynamo_compiling():
        return made.as_subclass(WeightFacts)
    if type(made) is not Tensor:  # torch.export uses fake tensors
        return made
    facts = made.as_subclass(WeightFacts)
    with torch._C.DisableTorchFunctionSubclass():
        facts.requires_grad_(any(tensor.requires_grad for tensor in trained))
    facts._trained, facts._layer = tuple(trained), layer
    return facts
