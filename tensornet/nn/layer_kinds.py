"""Layer kinds: how to read the matrix of a stock module such as `nn.Linear`, and how to rebuild the module.

A layer kind describes modules with one matrix `W` that is applied as `x W^T`, or whose rows are looked up.
For modules with several matrices see `tensornet.nn.unfuse`.

The kinds in this file match modules by their exact type. Subclasses are skipped on purpose, since their
`forward` may compute something else. Exceptions are embeddings that multiply their rows by a constant, as
those of Gemma and BART do: the code of their `forward` is read, not the names of their classes.
"""

import ast
import inspect
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

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


class Scale(NamedTuple):
    """Constant by which an embedding multiplies the rows that it looks up.

    Args:
        factor: the constant.
        rounded: whether the constant is rounded to the dtype of the rows before the product. Gemma does this;
            BART does not.
    """

    factor: float
    rounded: bool

    def times(self, rows: Tensor) -> Tensor:
        """Multiply rows by the constant, exactly as the embedding does in the dtype of the rows."""
        return rows * (rows.new_full((), self.factor) if self.rounded else self.factor)


class ScaledEmbedding(nn.Embedding):
    """Embedding that multiplies its rows by a constant.

    `tensornet.decompress` restores every such embedding as this class. The class that a model had before,
    such as `Gemma3TextScaledWordEmbedding`, computes the same.

    Args:
        num_embeddings, embedding_dim, options: as for `nn.Embedding`.
        scale: the constant, and whether it is rounded to the dtype of the weight first.

    Example:
        >>> from tensornet.nn.layer_kinds import Scale
        >>> table = tn.nn.ScaledEmbedding(10, 4, Scale(2.0, rounded=False))
        >>> torch.equal(table(torch.tensor(3)), 2 * table.weight[3])
        True
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: Scale, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self.scale = scale

    @property
    def embed_scale(self) -> Tensor:
        """The constant as transformers names it; adapters of PEFT multiply their output by it."""
        return self.weight.new_tensor(self.scale.factor)

    def forward(self, input: Tensor) -> Tensor:
        """Map token indices `input: (...)` to vectors `(..., embedding_dim)`."""
        return self.scale.times(super().forward(input))


def embedding_scale(module: nn.Module) -> Scale | None:
    """Return the constant by which an embedding multiplies its rows; None if it does not multiply them.

    Raises:
        TargetError: the constant is on the meta device, where it has no value.
    """
    if isinstance(module, ScaledEmbedding):
        return module.scale
    if not isinstance(module, nn.Embedding) or (found := _scale_attribute(module)) is None:
        return None
    name, rounded = found
    value = getattr(module, name)
    if isinstance(value, Tensor) and value.is_meta:
        raise TargetError(
            f"{name} of {type(module).__name__} is on the meta device and has no value. Load the model first."
        )
    return Scale(float(value), rounded)


def _scale_attribute(module: nn.Embedding) -> tuple[str, bool] | None:
    """Find the constant of an embedding whose `forward` is `super().forward(ids) * self.constant`.

    Returns:
        The name of the attribute, and whether it is rounded first (see `Scale`); None if `forward` may
        compute anything else, or if the constant is trained or saved, so that a new layer would lose it.
    """
    forwards = [vars(x)["forward"] for x in type(module).__mro__ if "forward" in vars(x)]
    found = _product(forwards[0]) if forwards[1] is nn.Embedding.forward else None
    if found is None:
        return None
    value = getattr(module, found[0], None)
    constant = (
        value.numel() == 1 and value.ndim == 0 if isinstance(value, Tensor) else type(value) in (int, float)
    )
    alone = module.state_dict(keep_vars=True).keys() == own_parameters(module).keys() == {"weight"}
    others = [*module.children(), *(name for name, _ in module.named_buffers() if name != found[0])]
    return found if constant and alone and not others else None


#: Code of a `forward` that multiplies looked up rows by a constant.
_PRODUCT = re.compile(
    r"return super\(\)\.forward\((?P<ids>\w+)\) \* self\.(?P<constant>\w+)"
    r"(?P<cast>\.to\(self\.weight\.dtype\))?"
)


@lru_cache(maxsize=256)
def _product(forward: Callable[..., Tensor]) -> tuple[str, bool] | None:
    """Return the constant by which `forward` multiplies rows, and whether it is cast; None for other code."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # the code is not at hand, or a part of a line
        return None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    match = _PRODUCT.fullmatch("\n".join(map(ast.unparse, body)))
    if match is None or forward.__code__.co_varnames != ("self", match["ids"]):
        return None
    return match["constant"], match["cast"] is not None


class _Embedding(LayerKind):
    """Layer kind of embeddings: row `v` of the matrix is the vector of token `v`, up to a constant factor.

    The factor (see `embedding_scale`) does not belong to the matrix, which may be that of an output head too.
    Embeddings with `max_norm` are excluded, since their `forward` changes the rows that it reads.
    """

    name = "embedding"

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            return False
        if type(module) in (nn.Embedding, ScaledEmbedding):
            return is_plain(module)
        return _scale_attribute(module) is not None

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
