"""Shortcuts through `forward` for few tokens, where choosing the route takes longer than the arithmetic.

After a pass that took the usual way, a layer may remember how to answer without the choice. A shortcut looks
only at what could have changed, and returns None in doubt: then the usual way is taken again. They read
`_parameters` and `_buffers` of the module, since looking attributes up takes as long as a small product.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, bfloat16, float16, is_grad_enabled, nn

# These have no public equal that is fast enough.
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _get_tracing_state as tracing_state
from torch._C import _is_any_autocast_enabled as any_autocast
from torch.nn.functional import linear

from tensornet.nn.integer_matmul import IntegerProduct
from tensornet.nn.strategy import KeptMatrix

#: Gives the output of a layer for an input; None where the usual way has to be taken.
QuickPath = Callable[[Tensor], Tensor | None]


def two_products(
    layer: Any, names: Sequence[str], products: Sequence[tuple[int, tuple[int, ...]]], most: float
) -> QuickPath:
    """Multiply by two cores in turn.

    Args:
        layer: whose strategy takes this way for few tokens.
        names: of the parameters that are its cores.
        products: `ContractionPlan.matrices`: number and shape of each of the two cores.
        most: token count up to which it does.
    """
    (first, first_shape), (second, second_shape) = products
    first_name, second_name, in_features = names[first - 1], names[second - 1], first_shape[1]
    strategy, most_elements = layer.strategy, most * in_features
    # Reshaping takes as long as a small product: without gradients the reshaped parameters are remembered.
    known: tuple[Any, ...] = (None,) * 6

    def answer(x: Tensor) -> Tensor | None:
        nonlocal known
        parameters = layer._parameters
        a, b = parameters.get(first_name), parameters.get(second_name)
        if a is None or b is None or "bias" not in parameters or layer.strategy is not strategy:
            return None  # one of them is parametrized, or the layer is to be applied otherwise
        if x.ndim == 0 or x.shape[-1] != in_features or x.numel() > most_elements:
            return None
        if x.dtype is float16 and x.is_cpu:  # contracted in float32
            return None
        if is_grad_enabled() or transforms_active() or tracing_state() is not None or type(a) is not type(b):
            known = (None,) * 6  # what was remembered may have moved meanwhile
            return linear(linear(x, a.reshape(first_shape)), b.reshape(second_shape), parameters["bias"])
        if known[0] is not a or known[1] is not b or known[2:4] != (a.data_ptr(), b.data_ptr()):
            if type(a) is not nn.Parameter or not (a.is_contiguous() and b.is_contiguous()) or a.is_meta:
                return None
            views = a.view(first_shape), b.view(second_shape)
            known = (a, b, a.data_ptr(), b.data_ptr(), *views)
        return linear(linear(x, known[4]), known[5], parameters["bias"])

    return answer


def kept_product(layer: Any, names: Sequence[str]) -> QuickPath:
    """Multiply by the kept matrix while everything that it depends on is unchanged.

    Args:
        layer: whose strategy is "cached".
        names: of the parameters that are its cores.
    """
    kept: KeptMatrix = layer.kept

    def answer(x: Tensor) -> Tensor | None:
        matrix = kept.matrix
        if matrix is None or layer.training or layer.strategy != "cached" or is_grad_enabled():
            return None
        if transforms_active() or any_autocast() or tracing_state() is not None:
            return None
        parameters = layer._parameters
        for name, (core, version, address) in zip(names, kept.states, strict=True):
            if parameters.get(name) is not core or core._version != version or core.data_ptr() != address:
                return None
        if x.ndim == 0 or x.shape[-1] != matrix.shape[1] or "bias" not in parameters:
            return None
        if x.dtype is not matrix.dtype:
            return None
        return linear(x, matrix, parameters["bias"])

    return answer


def kernel_product(layer: Any, core: nn.Module, matrix: IntegerProduct, most: int) -> QuickPath:
    """Multiply by a kernel of torch that reads integers, without gradients.

    Args:
        layer: whose only core holds the integers.
        core: that core.
        matrix: its integers.
        most: tokens for which the kernel is taken.
    """
    strategy, (out_features, in_features) = layer.strategy, matrix.shape
    name, most_elements, multiply = layer._core_names[0], most * in_features, matrix.by_kernel
    codes, scales = core._buffers.get("codes"), core._buffers.get("scales")

    def answer(x: Tensor) -> Tensor | None:
        parameters, buffers, size = layer._parameters, core._buffers, x.shape
        if buffers.get("codes") is not codes or buffers.get("scales") is not scales:
            return None
        if layer._modules.get(name) is not core or layer.strategy is not strategy or "bias" not in parameters:
            return None
        if x.dtype is not bfloat16 or not size or size[-1] != in_features or not x.is_cpu:
            return None
        if not 0 < x.numel() <= most_elements or (x.requires_grad and is_grad_enabled()):
            return None
        if any_autocast() or transforms_active() or tracing_state() is not None:
            return None
        if codes is None or not codes.is_cpu:
            return None
        y = multiply(x.reshape(-1, in_features).contiguous()).view(*size[:-1], out_features)
        bias = parameters["bias"]
        return y if bias is None else y + bias

    return answer
