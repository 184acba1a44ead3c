"""Fast paths of `forward` for one token, where choosing the route takes longer than the arithmetic.

After a pass that took the long way, a layer may remember how to answer without it. In doubt a fast path gives
None, and the long way is taken again. Nothing is held beyond what the layer holds anyway.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, bfloat16, float16, is_grad_enabled
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _get_tracing_state as tracing_state
from torch._C import _is_any_autocast_enabled as any_autocast
from torch.nn import Parameter
from torch.nn.functional import linear

from tensornet.contraction.lowering import ContractionPlan
from tensornet.nn.matrix_cache import CachedMatrix, MatrixKeeper

#: Gives the output of a layer for an input; None where the long way has to be taken.
FastPath = Callable[[Tensor], Tensor | None]


def through_matrices(
    layer: MatrixKeeper, names: Sequence[str], plan: ContractionPlan, largest: float
) -> FastPath | None:
    """Build a fast path that multiplies by the cores in turn; None if the plan has other steps.

    Args:
        layer: a layer whose strategy takes this plan for few tokens.
        names: of the parameters that are its cores.
        plan: one of `OperatorPlan.applies`.
        largest: token count up to which it takes it.
    """
    if len(plan.matrices) != 2:
        return None
    (first, first_shape), (second, second_shape) = plan.matrices
    first_name, second_name, in_features = names[first - 1], names[second - 1], first_shape[1]
    strategy, most = layer.strategy, largest * in_features
    # Reshaping takes as long as a small product: without gradients the reshaped parameters are remembered.
    known: tuple[Tensor, int, Tensor, Tensor, int, Tensor] | None = None

    def answer(x: Tensor) -> Tensor | None:
        nonlocal known
        if layer.strategy is not strategy:
            return None
        parameters = layer._parameters
        a, b = parameters.get(first_name), parameters.get(second_name)
        if a is None or b is None or "bias" not in parameters:  # one of them is parametrized
            return None
        if x.ndim == 0 or x.shape[-1] != in_features or x.numel() > most:
            return None
        if x.dtype is float16 and x.is_cpu:  # contracted in float32, see `steps.is_slow`
            return None
        if is_grad_enabled() or transforms_active() or tracing_state() is not None:
            return linear(linear(x, a.reshape(first_shape)), b.reshape(second_shape), parameters["bias"])
        if known is None or known[0] is not a or known[3] is not b:
            known = _reshaped(a, first_shape, b, second_shape)
        if known is None or known[1] != a.data_ptr() or known[4] != b.data_ptr():
            known = None
            return linear(linear(x, a.reshape(first_shape)), b.reshape(second_shape), parameters["bias"])
        return linear(linear(x, known[2]), known[5], parameters["bias"])

    return answer


def _reshaped(
    a: Tensor, first: tuple[int, int], b: Tensor, second: tuple[int, int]
) -> tuple[Tensor, int, Tensor, Tensor, int, Tensor] | None:
    """Return two plain parameters, each with its address and a view of it, None if one is not contiguous."""
    if any(type(x) is not Parameter or not x.is_contiguous() or x.is_meta for x in (a, b)):
        return None
    return a, a.data_ptr(), a.view(first), b, b.data_ptr(), b.view(second)


def with_kept_matrix(layer: MatrixKeeper, kept: CachedMatrix) -> FastPath | None:
    """Build a fast path that multiplies by the kept matrix while everything it depends on is unchanged."""
    if is_grad_enabled() or any_autocast():
        return None
    strategy, limit, matrix = layer.strategy, layer.cache_limit, kept.matrix
    in_features = matrix.shape[1]
    places = [(held, name) for held in (layer._parameters, layer._buffers) for name in held]
    found = {id(held[name]): (held, name) for held, name in places}
    cores = tuple((*found[id(core)], core, version, address) for core, version, address in kept.states)

    def answer(x: Tensor) -> Tensor | None:
        if layer.training or layer.strategy is not strategy or layer.cache_limit != limit:
            return None
        if is_grad_enabled() or transforms_active() or any_autocast() or tracing_state() is not None:
            return None
        parameters, shape = layer._parameters, x.shape
        for held, name, core, version, address in cores:
            if held.get(name) is not core or core._version != version or core.data_ptr() != address:
                return None
        if not shape or shape[-1] != in_features or "bias" not in parameters:
            return None
        return linear(x, matrix, parameters["bias"])

    return answer


def through_kernel(
    layer: MatrixKeeper,
    names: tuple[str, str],
    shape: tuple[int, int],
    most: int,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> FastPath:
    """Build a fast path that multiplies by a kernel of torch which reads integer codes, without gradients.

    Args:
        layer: whose buffers hold codes and scales.
        names: of the buffers of codes and of scales.
        shape: `(out, in)`.
        most: tokens for which the kernel is taken.
        kernel: of input `(tokens, in)`, codes and scales.
    """
    strategy, (out_features, in_features) = layer.strategy, shape
    codes_name, scales_name = names
    most_elements = most * in_features

    def answer(x: Tensor) -> Tensor | None:
        parameters, buffers = layer._parameters, layer._buffers
        codes, scales = buffers.get(codes_name), buffers.get(scales_name)
        if codes is None or scales is None or layer.strategy is not strategy or "bias" not in parameters:
            return None
        size = x.shape
        if x.dtype is not bfloat16 or not size or size[-1] != in_features or not x.is_cpu:
            return None
        if not 0 < x.numel() <= most_elements or (x.requires_grad and is_grad_enabled()):
            return None
        if any_autocast() or transforms_active() or tracing_state() is not None:
            return None
        y = kernel(x.reshape(-1, in_features).contiguous(), codes, scales).view(*size[:-1], out_features)
        bias = parameters["bias"]
        return y if bias is None else y + bias

    return answer
