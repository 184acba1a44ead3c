"""Stock modules that can be compressed: reading their matrices, and rebuilding them.

A module with one matrix has a `LayerKind`. A module with several matrices, or with one that is not applied as
`x W^T`, has a `CompoundKind`, which makes an equivalent module with one layer for each matrix, and converts
it back.

A layer kind is matched by its exact type. Subclasses are skipped on purpose, since their `forward` may
differ.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tensornet._util import import_optional
from tensornet.errors import TargetError


class LayerKind(ABC):
    """Abstract kind of stock layer; for a new kind, subclass this and call `register_layer_kind`.

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

    #: Name stored in files.
    name: str

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Return True if this kind describes the module."""

    @abstractmethod
    def matrix(self, module: nn.Module) -> Tensor:
        """Return the operator `(out_features, in_features)` of a layer, a view of the weight if possible."""

    @abstractmethod
    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        """Build a stock layer from a matrix and a bias, on their device and in their dtype."""

    def share(self, module: nn.Module, weight: nn.Parameter) -> None:
        """Let a stock layer use this parameter as its weight, so that tied layers stay tied."""
        module.weight = weight


def relatives(name: str, others: Iterable[str]) -> list[str]:
    """Select the layers whose statistics may be used for a layer that saw no data.

    These are layers whose names differ in the last number alone, such as other experts of the same mixture. A
    number is an index of a list, or the end of a key such as `expert_3`.

    Example:
        >>> from tensornet.nn.layer_kinds import relatives
        >>> relatives("experts.0.up", ["experts.1.up", "experts.1.down", "head"])
        ['experts.1.up']
    """
    path = _counted_path(name)
    return [] if path is None else [other for other in others if _counted_path(other) == path]


#: A part of a name that is the index of a module. Layers such as `w_1` and `w_2` are not relatives.
_COUNTED = re.compile(r"(.*_)?\d+")


def _counted_path(name: str) -> tuple[str, ...] | None:
    """Split a name into its parts, with the last number replaced by `#`; None if it has no number."""
    parts = name.split(".")
    for place in reversed(range(len(parts))):
        found = _COUNTED.fullmatch(parts[place])
        if found is not None and (parts[place].isdecimal() or place < len(parts) - 1):
            parts[place] = f"{found[1] or ''}#"
            return tuple(parts)
    return None


class CompoundKind(ABC):
    """Abstract kind of module with several matrices; register it with `register_compound_kind`.

    Example:
        >>> from tensornet.nn.layer_kinds import compound_of
        >>> kind = tn.nn.layer_kinds.compound_of(torch.nn.LSTM(8, 16))
        >>> kind.matches(torch.nn.GRU(8, 16)), tn.nn.layer_kinds.compound_of(torch.nn.Linear(8, 8))
        (True, None)
    """

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Return True if this kind describes the module."""

    @abstractmethod
    def unfuse(self, module: nn.Module, shared: dict[tuple[object, ...], nn.Parameter]) -> nn.Module:
        """Build a `tensornet.nn.unfuse.Compound` that computes the same from the same parameters.

        Args:
            module: the stock module; its parameters are viewed, not copied.
            shared: matrices of modules that are already unfused, so that tied parameters stay tied.
        """

    def reason_against(self, module: nn.Module) -> str | None:
        """Explain briefly, for reports, why a module of a known type cannot be unfused; None if it can."""
        return None


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
    """Layer kind of Hugging Face `Conv1D` (GPT-2): weight `(in, out)`, always a bias."""

    name = "conv1d"

    def matches(self, module: nn.Module) -> bool:
        # Compared by name, so that the core does not import transformers.
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

    Embeddings with `max_norm` are excluded, since `forward` changes the rows that it reads.
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


#: Types whose weight may be recomputed before each pass by a hook of `torch.nn.utils`.
_STOCK = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Reason why a layer stays dense under weight_norm, spectral_norm or prune.
RECOMPUTED = "weight recomputed by a hook"
#: Reason why a layer stays dense if its `forward` was replaced.
OWN_FORWARD = "forward set on the layer itself"

_KINDS: dict[str, LayerKind] = {}
_COMPOUNDS: list[CompoundKind] = []


def register_layer_kind(kind: LayerKind) -> LayerKind:
    """Register another kind of stock layer as compressible.

    Raises:
        TargetError: the name is taken.

    Example:
        >>> from tensornet.nn import LayerKind, register_layer_kind
        >>> class AnotherLinear(LayerKind):
        ...     name = "linear"
        ...     matches = matrix = build = None
        >>> register_layer_kind(AnotherLinear())
        Traceback (most recent call last):
        tensornet.errors.TargetError: A layer kind named 'linear' is already registered.
    """
    if kind.name in _KINDS:
        raise TargetError(f"A layer kind named {kind.name!r} is already registered.")
    _KINDS[kind.name] = kind
    return kind


def register_compound_kind(kind: CompoundKind) -> CompoundKind:
    """Register another kind of module with several matrices; later kinds take precedence over earlier ones.

    >>> class Nothing(tn.nn.layer_kinds.CompoundKind):
    ...     def matches(self, module):
    ...         return False
    ...     def unfuse(self, module, shared):
    ...         raise NotImplementedError
    >>> tn.nn.layer_kinds.compound_of(torch.nn.ReLU()) is tn.nn.layer_kinds.register_compound_kind(Nothing())
    False
    """
    _COMPOUNDS.insert(0, kind)
    return kind


def layer_kind(name: str) -> LayerKind:
    """Look up a layer kind by name.

    Raises:
        TargetError: an unknown name; the message lists the kinds.

    Example:
        >>> from tensornet.nn.layer_kinds import layer_kind
        >>> layer_kind("embedding").name
        'embedding'
    """
    if name not in _KINDS:
        raise TargetError(f"Unknown layer kind {name!r}; registered are {', '.join(sorted(_KINDS))}.")
    return _KINDS[name]


def kind_of(module: nn.Module) -> LayerKind | None:
    """Look up the `LayerKind` of a module; None if the module cannot be compressed.

    Example:
        >>> from tensornet.nn.layer_kinds import kind_of
        >>> kind_of(torch.nn.Linear(4, 4)).name, kind_of(torch.nn.LayerNorm(4))
        ('linear', None)
    """
    return next((kind for kind in _KINDS.values() if kind.matches(module)), None)


def compound_of(module: nn.Module) -> CompoundKind | None:
    """Find the kind of a module that owns several matrices; None for any other module.

    >>> tn.nn.layer_kinds.compound_of(torch.nn.LSTM(4, 4)) is None
    False
    """
    return next((kind for kind in _COMPOUNDS if kind.matches(module)), None)


def reason_against(module: nn.Module) -> str | None:
    """Explain briefly why a module of a known type is not compressed; None if its type is unknown.

    >>> reason_against(torch.nn.Conv1d(8, 8, 3, groups=8))
    'groups too small for low rank'
    """
    if isinstance(module, _STOCK) and not vars(module).keys().isdisjoint(("weight", "bias")):
        return RECOMPUTED
    if has_own_forward(module) and (kind_of(module) or compound_of(module)) is not None:
        return OWN_FORWARD
    reasons = (kind.reason_against(module) for kind in _COMPOUNDS)
    return next((reason for reason in reasons if reason is not None), None)


def type_and_reason(module: nn.Module) -> str:
    """Name the type of a module, with the reason why it is not compressed in brackets, if there is one.

    >>> type_and_reason(torch.nn.Conv1d(8, 8, 3, groups=8)), type_and_reason(torch.nn.LayerNorm(4))
    ('Conv1d (groups too small for low rank)', 'LayerNorm')
    """
    reason = reason_against(module)
    return type(module).__name__ if reason is None else f"{type(module).__name__} ({reason})"


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the parameters of a module that are not replaced by a parametrization or hook."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def is_plain(module: nn.Module) -> bool:
    """Return True if a layer computes with its parameters `weight` and `bias`, and has no others.

    False under `weight_norm`, `spectral_norm` or `prune` of `torch.nn.utils`: their hook overwrites the
    attribute `weight` before each pass, from parameters of other names.

    >>> is_plain(torch.nn.Linear(4, 4)), is_plain(torch.nn.utils.spectral_norm(torch.nn.Linear(4, 4)))
    (True, False)
    """
    names = own_parameters(module).keys()
    return "weight" in names and names <= {"weight", "bias"} and "bias" not in vars(module)


def layer_bias(module: nn.Module) -> Tensor | None:
    """Return the bias of a stock layer; None if absent, as in embeddings."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


#: Dictionaries of `nn.Module` with its forward and backward hooks. They have no public name, but without
#: copying them a replaced layer would lose its hooks.
_DICTIONARIES = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
)
#: Attributes in which accelerate stores its hook, and the `forward` that it wraps.
ACCELERATE = (HOOK, WRAPPED) = ("_hf_hook", "_old_forward")


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Copy the hooks of a module to the module that replaces it.

    Both modules share the dictionaries, so that the handles of earlier hooks still remove them.

    >>> old, new = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    >>> handle = old.register_forward_hook(lambda module, inputs, output: 0 * output)
    >>> carry_hooks(old, new)
    >>> bool(new(torch.ones(4)).any())
    False
    >>> handle.remove()
    >>> bool(new(torch.ones(4)).any())
    True
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
    # An empty hook first, since the real one would move the tensors, which are already in the right place.
    hooks.add_hook_to_module(new, hooks.ModelHook())
    new._hf_hook = hook


def has_own_forward(module: nn.Module) -> bool:
    """Return True if the `forward` of a module was replaced by another one than that of its class.

    >>> layer = torch.nn.Linear(4, 4)
    >>> layer.forward = lambda x: torch.zeros(4)
    >>> has_own_forward(layer), has_own_forward(torch.nn.Linear(4, 4))
    (True, False)
    """
    values = vars(module)
    forward = values.get(WRAPPED if HOOK in values else "forward")
    if forward is None:
        return False
    # Wrappers that were removed leave the bound method of the class.
    bound_to, function = getattr(forward, "__self__", None), getattr(forward, "__func__", None)
    return bound_to is not module or function is not type(module).forward


for _kind in (_Linear(), _Conv1D(), _Embedding()):
    register_layer_kind(_kind)
