"""Placeholder for the dense weight of a compressed layer: it has dtype, device and shape, and no numbers.

Code around a layer may ask for the dtype, device or shape of `layer.weight`, and may cast to it. The matrix
itself is rebuilt by `layer.to_matrix()` alone, so any other use raises an error instead of computing with
numbers that are not those of the weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext  # the public `torch.compiler` does not tell when guards are made

from tensornet.errors import TargetError

#: Properties and calls that the placeholder answers as the dense weight would.
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
#: Calls that take dtype and device alone from another tensor.
LIKE = {Tensor.to, Tensor.type_as}


class WeightReadError(TargetError):
    """The numbers of a compressed layer's weight were asked for; `layer` is that layer."""

    layer: nn.Module | None = None


class WeightFacts(Tensor):
    """Tensor that has dtype, device and shape of a weight, and no numbers.

    >>> layer = tn.nn.MPOLinear(8, 4, max_bond=2)
    >>> layer.weight.dtype, tuple(layer.weight.shape), layer.weight.requires_grad
    (torch.float32, (4, 8), True)
    >>> layer.weight.norm()
    Traceback (most recent call last):
        ...
    tensornet.nn.weight_facts.WeightReadError: norm was called on the weight of a compressed layer, which ...
    """

    _trained: tuple[Tensor, ...] = ()
    _layer: nn.Module | None = None
    #: Transformers would initialize it when a model is loaded.
    _is_hf_initialized = True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is known.

        Raises:
            WeightReadError: any other function.
        """
        known = function in FACTS or (function in LIKE and not isinstance(args[0], cls))
        # torch.compile looks at the arguments of a function before it traces the function.
        inspected = not torch.compiler.is_dynamo_compiling() and TracingContext.try_get() is not None
        if not known and not inspected:
            name = getattr(function, "__name__", str(function))
            name = function.__self__.__name__ if name in ("__get__", "__set__") else name  # of a property
            error = WeightReadError(
                f"{name} was called on the weight of a compressed layer, which only has dtype, device and "
                "shape. Call the layer; or take layer.to_matrix(), which rebuilds the dense matrix; or leave "
                "the layer dense by exclude_modules."
            )
            values = [*args, *(kwargs or {}).values()]
            flat = [y for x in values for y in (x if isinstance(x, list | tuple) else [x])]
            error.layer = next((x._layer for x in flat if isinstance(x, cls)), None)
            raise error
        # As PyTorch's guide to subclasses does it: the name is private, but documented.
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
            if function in _FREEZING:  # a weight is frozen with what it is made of
                for tensor in args[0]._trained:
                    tensor.requires_grad_(args[0].requires_grad)
        return found

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Format what is known."""
        return f"WeightFacts(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __format__(self, spec: str) -> str:
        """Format what is known."""
        return format(repr(self), spec)


def weight_facts(
    like: Tensor, shape: Sequence[int], trained: Sequence[Tensor] = (), layer: nn.Module | None = None
) -> Tensor:
    """Make a placeholder for a weight, which takes the memory of one element.

    Args:
        like: gives dtype and device.
        shape: of the weight.
        trained: parameters that it is made of.
        layer: whose weight it is, for the error.
    """
    # NaN, since traces that record no subclasses compute with a plain tensor.
    made = torch.full((), float("nan"), dtype=like.dtype, device=like.device).expand(*shape)
    if torch.compiler.is_dynamo_compiling():
        return made.as_subclass(WeightFacts)
    if type(made) is not Tensor:  # under the fake tensors of torch.export
        return made
    facts = made.as_subclass(WeightFacts)
    with torch._C.DisableTorchFunctionSubclass():
        facts.requires_grad_(any(tensor.requires_grad for tensor in trained))
    facts._trained, facts._layer = tuple(trained), layer
    return facts
