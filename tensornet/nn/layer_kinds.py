"""Layer kinds: how to read the matrix of a stock module such as `nn.Linear`, and how to rebuild the module.

A layer kind describes modules with one matrix `W` that is applied as `x W^T`, or whose rows are looked up.
For modules with several matrices see `tensornet.nn.unfuse`.

The kinds in this file match modules by their exact type. Subclasses are skipped on purpose, since their
`forward` may compute something else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tensornet._util import import_optional
from tensornet.errors import TargetError
from tensornet.registry import Registry


class LayerKind(ABC):
    """Abstract base class of layer kinds; for a new kind, subclass it and call `register_layer_kind`.

    Example:
        >>> from tensornet.nn import LayerKind
        >>> class Scaled(torch.nn.Linear):
        ...     pass
        >>> class ScaledKind(LayerKind):
        ...     name = "scaled"
        ...     def matches(self, module):
        ...         return type(module) is Scaled
        ...     def matrix(self, module):
        ...         return module.weight
        ...     def build(self, matrix, bias):
        ...         layer = Scaled(matrix.shape[1], matrix.shape[0], bias is not None)
        ...         layer.weight.data = matrix
        ...         if bias is not None:
        ...             layer.bias.data = bias
        ...         return layer
        >>> ScaledKind().matrix(Scaled(8, 4)).shape
        torch.Size([4, 8])
    """

    #: Name of the kind in saved models.
    name: str

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Return True if this kind describes the module."""

    @abstractmethod
    def matrix(self, module: nn.Module) -> Tensor:
        """Return the matrix `(out_features, in_features)` of a layer, as a view of its weight if possible."""

    @abstractmethod
    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        """Build a stock layer from a matrix and a bias, on their device and in their dtype."""

    def share(self, module: nn.Module, weight: nn.Parameter) -> None:
        """Make a stock layer use this parameter as its weight, so that tied layers stay tied."""
        module.weight = weight


class _Linear(LayerKind):
    name = "linear"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear and is_plain(module)

    def matrix(self, module: nn.Module) -> Tensor:
        return module.weight  # type: ignore[return-value]

    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = matrix.shape
        layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        return _fill(layer, weight=matrix, bias=bias)


class _Conv1D(LayerKind):
    """Layer kind of Hugging Face `Conv1D` (GPT-2), which has a weight `(in, out)` and always a bias."""

    name = "conv1d"

    def matches(self, module: nn.Module) -> bool:
        # The type is compared by name, so that the core does not import transformers.
        known = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
        return known and is_plain(module)

    def matrix(self, module: nn.Module) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.T

    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        utils = import_optional("transformers.pytorch_utils", extra="hf", user="Rebuilding a Conv1D layer")
        out_features, in_features = matrix.shape
        with torch.device("meta"):
            layer = utils.Conv1D(out_features, in_features)
        zeros = matrix.new_zeros(out_features)
        return _fill(layer, weight=matrix.T.contiguous(), bias=zeros if bias is None else bias)


class _Embedding(LayerKind):
    """Layer kind of `nn.Embedding`: row `v` of the matrix is the vector of token `v`.

    Embeddings with `max_norm` are excluded, since their `forward` changes the rows that it reads.
    """

    name = "embedding"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Embedding and module.max_norm is None and is_plain(module)

    def matrix(self, module: nn.Module) -> Tensor:
        return module.weight  # type: ignore[return-value]

    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        return _fill(nn.Embedding(matrix.shape[0], matrix.shape[1], device="meta"), weight=matrix, bias=None)


def _fill(layer: nn.Module, *, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


_KINDS: Registry[LayerKind] = Registry("layer kind", error=TargetError)


def register_layer_kind(kind: LayerKind) -> LayerKind:
    """Register a layer kind, so that modules of this kind can be compressed.

    Raises:
        TargetError: another kind of this name is already registered.

    Example:
        >>> from tensornet.nn import LayerKind, register_layer_kind
        >>> class AnotherLinear(LayerKind):
        ...     name = "linear"
        ...     matches = matrix = build = None
        >>> register_layer_kind(AnotherLinear())
        Traceback (most recent call last):
        tensornet.errors.TargetError: A layer kind named 'linear' is already registered...
    """
    _KINDS.add(kind.name, kind)
    return kind


def layer_kind(name: str) -> LayerKind:
    """Look up a layer kind by name.

    Raises:
        TargetError: the name is unknown; the message lists the registered kinds.
    """
    return _KINDS[name]


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the registered layer kind that matches a module, or None."""
    return next((kind for kind in _KINDS.values() if kind.matches(module)), None)


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return a module's own parameters by name, without those of submodules and parametrizations."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def is_plain(module: nn.Module) -> bool:
    """Return True if a layer has the parameter `weight`, possibly `bias`, and no other tensor or submodule.

    A layer that replaces it would lose other tensors. With `weight_norm`, `spectral_norm` or `prune` of
    `torch.nn.utils` this is False too: their hooks compute the attribute `weight` before each pass from
    parameters of other names.
    """
    names = own_parameters(module).keys()
    more = (*module.named_buffers(recurse=False), *module.named_children())
    return "weight" in names and names <= {"weight", "bias"} and "bias" not in vars(module) and not more


def layer_bias(module: nn.Module) -> Tensor | None:
    """Return the bias of a stock layer; None if it has none."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


#: Attributes of `nn.Module` that store its hooks. They are private, but a layer that replaces another would
#: lose the hooks if they were not copied.
_DICTIONARIES = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
)
#: Attributes in which accelerate stores its hook and the original `forward`.
ACCELERATE = (HOOK, WRAPPED) = ("_hf_hook", "_old_forward")


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Copy the hooks of a module to the module that replaces it.

    Both modules share the dictionaries of hooks, so that an existing handle can still remove its hook.
    """
    if old is new:
        return
    for name in _DICTIONARIES:
        setattr(new, name, getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook
    hook = vars(old).get(HOOK)
    if hook is None or vars(new).get(HOOK) is hook:
        return
    hooks = import_optional("accelerate.hooks", extra="hf", user="A layer with a hook of accelerate")
    # Adding the real hook would move the tensors, which are already on the right device. So an empty hook is
    # added and then replaced.
    hooks.add_hook_to_module(new, hooks.ModelHook())
    new._hf_hook = hook


def has_own_forward(module: nn.Module) -> bool:
    """Return True if a module has its own `forward` instead of the method of its class."""
    values = vars(module)
    forward = values.get(WRAPPED if HOOK in values else "forward")
    if forward is None:
        return False
    # After a wrapper has been removed, the module may still have the bound method of its class as an
    # attribute.
    bound_to, function = getattr(forward, "__self__", None), getattr(forward, "__func__", None)
    return bound_to is not module or function is not type(module).forward


for _kind in (_Linear(), _Conv1D(), _Embedding()):
    register_layer_kind(_kind)
