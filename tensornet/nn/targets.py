"""Targets of a compression: the modules to compress, grouped by the weight they share."""

import fnmatch
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tensornet._util import check_type, warn
from tensornet.errors import TargetError
from tensornet.nn.layer_kinds import (
    OWN_FORWARD,
    RECOMPUTED,
    LayerKind,
    compound_of,
    has_own_forward,
    kind_of,
    reason_against,
)
from tensornet.nn.module import NetworkModule
from tensornet.nn.unfuse import Compound
from tensornet.nn.weight_readers import weight_readers

ALL = "all"


@dataclass(frozen=True)
class LayerSelection:
    """Patterns that choose layers of a model by module name.

    Args:
        target_modules: patterns of module names to take. A pattern matches a whole name, a suffix after
            a dot (`"c_fc"`), a glob (`"*.mlp.*"`), or, with the prefix `"re:"`, a regular expression for the
            whole name. None takes every linear layer except output heads; `"all"` takes embeddings and
            heads too.
        exclude_modules: patterns of module names to leave out.

    Raises:
        TargetError: a pattern is not a string.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            _check_patterns(name, value)


@dataclass(frozen=True)
class Target:
    """Weight to compress, with all modules that use it.

    Args:
        names: module names that use the weight; the first stands for the group in plans and reports.
        modules: the modules, in the same order (one object may appear under several names).
        kinds: the layer kind of each module.
        owners: modules taken apart that hold them, by name.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    kinds: tuple[LayerKind, ...]
    owners: Mapping[str, Compound] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Representative name of the group."""
        return self.names[0]

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names that a pattern may match: of the layers, and of the modules that they were taken out of."""
        return (*self.names, *self.owners)

    @property
    def weight(self) -> Tensor:
        """Shared parameter, in the orientation of its layers."""
        weight = self.modules[0].weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def type_name(self) -> str:
        """Type of the module that holds the weight, by which reports count parameters."""
        return next((x.type_name for x in self.owners.values()), type(self.modules[0]).__name__)

    @property
    def matrix(self) -> Tensor:
        """Operator of shape `(out_features, in_features)`."""
        return self.kinds[0].matrix(self.modules[0]).detach()


def find_targets(model: nn.Module, selection: LayerSelection, readers: Iterable[str] = ()) -> list[Target]:
    """List the weights that a selection matches, in the order of the model.

    Modules that share one weight form one target, whichever of them a pattern names: they stay tied.
    A layer whose weight is read past the layer is left dense, with a warning. A weight that is also in a
    module of another kind, such as an embedding that scales, is left dense in any case: compressing a part of
    its places would untie them. So are layers of adapters, and layers that are changed from outside
    (`layer_kinds.reason_against`).

    Args:
        model: any module.
        config: what to select.
        readers: names of layers whose weight is known to be read past them, beside those that
            `weight_readers` finds.

    Raises:
        TargetError: a pattern matches no compressible module, or none whose weight is not read past it, or
            nothing is left to compress, or a layer lies under an adapter.
    """
    groups = all_targets(model)
    own, wrapped = split_by_adapters(model, (name for group in groups for name in group.names))
    choice = _Choice.of(model, selection)
    _check_matching(model, groups, choice)
    found = [group for group in groups if choice.takes(group.all_names, group.modules)]
    changed = {
        name: reason
        for name, module in model.named_modules()
        if (reason := reason_against(module)) in _CHANGED and choice.takes([name], [module])
    }
    outside = users_outside(model, groups)
    past = weight_readers(model).union(readers)
    beside = [group for group in found if not own.isdisjoint(group.names)]
    found = [group for group in found if group not in beside]
    tied = [group for group in found if group.name in outside]
    read = [group for group in found if group.name not in outside and not past.isdisjoint(group.all_names)]
    _check_readable(choice, found, read)
    chosen = [group for group in found if group not in tied and group not in read]
    if changed and chosen:
        warn(f"Left dense, because they are changed from outside.{_changed_layers(changed)}")
    if read:
        warn(
            f"Left dense, because their weights are read past the layers: {summary(read)}. "
            "The model computes with them itself, and compressed layers have no such weights.",
        )
    refuse_wrapped(name for group in chosen for name in group.names if name in wrapped)
    if beside:
        warn(f"Left dense, because they belong to adapters: {summary(beside)}.")
    owners = [outside[group.name] for group in tied]
    kinds = [type(model.get_submodule(owner)).__name__ for owner in owners]
    pairs = [f"{x.name} and {owner} ({kind})" for x, owner, kind in zip(tied, owners, kinds, strict=True)]
    shared = shortened(pairs, limit=4)
    if tied and chosen:
        warn(
            f"Left dense, because compressing one side alone would untie them: {shared}. "
            "tensornet.nn.register_layer_kind makes a type compressible.",
        )
    if not chosen:
        raise TargetError(
            f"Nothing to compress. Compressible layers: {summary(groups)}.{_made_of_cores(model)}"
            f"{f' Compressing would untie {shared}.' if tied else ''}{_unknown_layers(model)}"
            f"{_changed_layers(changed)}"
        )
    return chosen


@dataclass(frozen=True)
class _Choice:
    """Patterns of a selection, and the output head that is not taken without patterns."""

    included: list[str] | None
    excluded: list[str]
    head: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module, selection: LayerSelection) -> "_Choice":
        included, excluded = _patterns(selection.target_modules), _patterns(selection.exclude_modules)
        return cls(included, excluded or [], output_head(model))

    def takes(self, names: Collection[str], modules: Collection[nn.Module]) -> bool:
        """Return True if these modules, which share a weight, are selected by one of their names."""
        if self.included is None:
            chosen = not any(_embeds(x) or x is self.head for x in modules)
        else:
            chosen = self.included == [ALL] or _matches_any(names, self.included)
        return chosen and not _matches_any(names, self.excluded)


def _embeds(module: nn.Module) -> bool:
    kind = kind_of(module)
    return isinstance(module, nn.Embedding) if kind is None else kind.name == "embedding"


def _check_matching(model: nn.Module, groups: Sequence[Target], choice: _Choice) -> None:
    """Raise TargetError if a pattern matches no compressible layer.

    Raises:
        TargetError: the message lists the layers, and says why others stay dense.
    """
    for pattern in [*(choice.included or []), *choice.excluded]:
        if pattern == ALL or any(_matches_any(group.all_names, [pattern]) for group in groups):
            continue
        reasons = {n: reason_against(m) for n, m in model.named_modules() if matches(n, pattern)}
        raise TargetError(
            f"Pattern {pattern!r} matches no layer that can be compressed. Compressible layers: "
            f"{summary(groups)}. {pattern_help(pattern, [n for group in groups for n in group.names])}"
            f"{_made_of_cores(model)}{_changed_layers(reasons)}"
        )


def _check_readable(choice: _Choice, found: Sequence[Target], read: Sequence[Target]) -> None:
    """Raise TargetError if a pattern names nothing but layers whose weight is read past them.

    Raises:
        TargetError: the message names the layers.
    """
    for pattern in choice.included or []:
        named = [group for group in found if pattern == ALL or _matches_any(group.all_names, [pattern])]
        if pattern != ALL and named and all(group in read for group in named):
            raise TargetError(
                f"Pattern {pattern!r} names layers whose weights are read past them: {summary(named)}. The "
                "model computes with these weights itself, as a run of it has shown, and compressed layers "
                "have no such weights. Remove the pattern from target_modules."
            )


def check_loaded(targets: Sequence[Target]) -> None:
    """Raise TargetError for layers on the meta device, which hold no numbers.

    Raises:
        TargetError: a layer is on the meta device; the message names it.
    """
    for target in targets:
        if target.weight.is_meta:
            raise TargetError(
                f"Layer {target.name!r} has no numbers, its weight is on the meta device: the model was "
                "built empty, or a device_map has put parts of it elsewhere. Load it whole; a model that "
                "does not fit into memory is compressed from its files, by tensornet compress SRC DST "
                "--workers 1."
            )


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head of a model that can name it (Hugging Face), else None."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def matches(name: str, pattern: str) -> bool:
    """Return True if a module name matches one pattern (see `LayerSelection`).

    Raises:
        TargetError: the pattern is not a valid regular expression.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise TargetError(f"Pattern {pattern!r} is not a regular expression: {error}.") from error
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


def _check_patterns(name: str, value: Any) -> None:
    """Raise TargetError unless `patterns` is a pattern or a sequence of patterns.

    Raises:
        TargetError: another type; the message shows it.
    """
    patterns = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(patterns, Collection) or not all(isinstance(x, str) for x in patterns):
        raise TargetError(
            f"{name} takes names of modules as they are in model.named_modules(), or patterns of them: a "
            f"string or a list of strings; got {value!r}."
        )


def pattern_help(pattern: str, names: Sequence[str]) -> str:
    """Explain why patterns match no name, with an example of a matching pattern.

    Examples:
        >>> pattern_help("re:mlp", ["h.0.mlp.up", "h.0.attn"]).partition(". ")[2]
        "Expressions match whole names: 're:.*(?:mlp).*' would match h.0.mlp.up."
    """
    rules = (
        "Patterns match a whole name, a suffix after a dot, a glob such as '*.mlp.*', or, with the prefix "
        "'re:', a regular expression for the whole name, such as 're:.*\\.[0-9]\\.mlp\\..*'."
    )
    text = pattern.removeprefix("re:")
    for better in (f"re:{text}", f"re:.*(?:{text}).*"):
        try:
            found = next((name for name in names if matches(name, better)), None)
        except TargetError:  # a glob that is not a regular expression
            return rules
        if found is not None:
            whole = "Expressions match whole names: " if pattern.startswith("re:") else ""
            return f"{rules} {whole}{better!r} would match {found}."
    return rules


def _patterns(value: str | Sequence[str] | None) -> list[str] | None:
    return None if value is None else [value] if isinstance(value, str) else list(value)


def _matches_any(names: Collection[str], patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for name in names for pattern in patterns)


def all_targets(model: nn.Module) -> list[Target]:
    """List all weights of compressible layers in the order of the model; shared weights are one target."""
    groups: dict[Hashable, list[tuple[str, nn.Module, LayerKind]]] = {}
    compounds: dict[str, Compound] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Compound):
            compounds[name] = module
        kind = None if has_own_forward(module) else kind_of(module)
        if kind is not None:
            weight = kind.matrix(module)
            key = (_memory(module.weight), tuple(weight.shape), weight.stride())
            groups.setdefault(key, []).append((name, module, kind))
    return [
        Target(
            tuple(n for n, _, _ in members),
            tuple(m for _, m, _ in members),
            tuple(k for _, _, k in members),
            {x: compounds[x] for n, _, _ in members for x in _prefixes(n) if x in compounds},
        )
        for members in groups.values()
    ]


def users_outside(model: nn.Module, groups: Sequence[Target]) -> dict[str, str]:
    """Find modules that use the memory of a target without belonging to it, by name of the target.

    >>> model = nn.ModuleDict({"table": nn.Embedding(5, 4, max_norm=1.0), "head": nn.Linear(4, 5)})
    >>> model["head"].weight = model["table"].weight
    >>> users_outside(model, all_targets(model))
    {'head': 'table'}
    """
    places: dict[Hashable, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(_memory(parameter), []).append(name.rpartition(".")[0])
    found = {}
    for group in groups:
        others = [owner for owner in places.get(_memory(group.weight), []) if owner not in group.names]
        if others:
            found[group.name] = others[0]
    return found


def _memory(tensor: Tensor) -> Hashable:
    """Identify the memory of a tensor; the tensor itself if it has none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0
    return (tensor.device, tensor.data_ptr()) if plain else id(tensor)


def _prefixes(name: str) -> Iterator[str]:
    """List the names of a module's ancestors, innermost first, without the model."""
    while name := name.rpartition(".")[0]:
        yield name


def check_model(model: Any) -> None:
    """Raise TypeError unless `model` is a module.

    Raises:
        TypeError: another type; the message shows it.
    """
    check_type("model", model, nn.Module, "load it first, for example with AutoModel.from_pretrained")


def check_holder(model: Any) -> None:
    """Raise TargetError for a model whose layers cannot be replaced.

    Raises:
        TypeError: no module.
        TargetError: a layer itself, which nothing holds.
    """
    check_model(model)
    if kind_of(model) is not None or compound_of(model) is not None:
        raise TargetError(
            f"The model is a {type(model).__name__} itself, and nothing holds it in which another could take "
            "its place. Put it into a module, such as torch.nn.ModuleList([layer]); for a linear layer or an "
            "embedding alone there are from_linear and from_embedding in tensornet.nn."
        )


def compressed_names(model: nn.Module) -> list[str]:
    """List the names of the tensor-network layers."""
    return [name for name, module in model.named_modules() if isinstance(module, NetworkModule)]


def _made_of_cores(model: nn.Module) -> str:
    """Compose a hint that names layers compressed before."""
    names = compressed_names(model)
    if not names:
        return ""
    return (
        f" {len(names)} layers are made of cores already, {names[0]} for one: compress the dense model anew, "
        "or make this one dense by tensornet.decompress(model)."
    )


def _unknown_layers(model: nn.Module) -> str:
    """Compose a hint that names subclasses of stock layers: left alone, since their `forward` may differ."""
    stock = (nn.Linear, nn.Embedding)
    left = [m for m in model.modules() if isinstance(m, stock) and kind_of(m) is None]
    kinds = {type(m).__name__ for m in left if reason_against(m) is None}
    if not kinds:
        return ""
    return (
        f" Layers of the types {', '.join(sorted(kinds))} here may compute something else (subclasses, and "
        "embeddings with max_norm); "
        "tensornet.nn.register_layer_kind makes a type compressible."
    )


#: Reasons to leave a layer dense that its user may remove.
_CHANGED = {
    RECOMPUTED: "Before each pass a hook recomputes the weight of {}: make it an ordinary parameter by "
    "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils.",
    OWN_FORWARD: "Another forward was set on {}: delete it to compress the layer (`del layer.forward`), or "
    "put what it adds into a hook, which compression keeps.",
}


def _changed_layers(reasons: Mapping[str, str | None]) -> str:
    """Compose hints that name layers which are changed from outside, and say how to end that."""
    found = {reason: [name for name, why in reasons.items() if why == reason] for reason in _CHANGED}
    return "".join(f" {_CHANGED[why].format(shortened(names))}" for why, names in found.items() if names)


def summary(groups: Sequence[Target], limit: int = 8) -> str:
    """List the names of weights in one line, and count the names beyond a limit.

    >>> summary(all_targets(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), limit=1)
    '0, and 1 more'
    """
    names = [group.name for group in groups]
    return shortened(names, limit) or "none (supported: nn.Linear, nn.Embedding, what owns such matrices)"


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """Join names in one line, and count those beyond a limit.

    >>> shortened(["up", "down", "gate"], limit=2)
    'up, down, and 1 more'
    """
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


#: Under this name an adapter holds the layer that it wraps.
BASE = "base_layer"


def adapter_names(model: nn.Module) -> list[str]:
    """List the names of the adapters inside a model.

    >>> class Adapter(nn.Module):
    ...     adapter_layer_names = ("down",)
    >>> adapter_names(nn.Sequential(nn.Linear(4, 4), Adapter()))
    ['1']
    """
    return [name for name, x in model.named_modules(remove_duplicate=False) if _is_adapter(x)]


def split_by_adapters(model: nn.Module, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Select layers that belong to adapters, and layers that adapters wrap and could not merge into cores.

    An adapter that merges into cores says so by a true class attribute `merges_into_cores`.

    Args:
        model: any module.
        names: of layers inside it.

    Returns:
        The names of both kinds of layers.
    """
    adapters = {name: model.get_submodule(name) for name in adapter_names(model)}
    own, wrapped = set(), set()
    for name in names if adapters else ():
        parts = name.split(".")
        around = [(adapters.get(".".join(parts[:k])), part) for k, part in enumerate(parts)]
        inside = [(adapter, part) for adapter, part in around if adapter is not None]
        if any(part != BASE for _, part in inside):
            own.add(name)
        elif any(not getattr(adapter, "merges_into_cores", False) for adapter, _ in inside):
            wrapped.add(name)
    return own, wrapped


def refuse_wrapped(wrapped: Iterable[str]) -> None:
    """Raise TargetError if layers to compress lie under adapters.

    Args:
        wrapped: their names.

    Raises:
        TargetError: there are any.
    """
    if names := sorted(wrapped):
        others = f" ({len(names) - 1} other layers too)" if len(names) > 1 else ""
        raise TargetError(
            f"{names[0]} lies under an adapter{others}, which could not be merged into cores. Merge the "
            "adapters first, by merge_and_unload() in PEFT; or compress first, and add adapters by "
            f"tensornet_hf.peft.lora_config; or leave such layers dense, by exclude_modules={BASE!r}."
        )


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(getattr(type(module), "adapter_layer_names", None), tuple)
