"""Find the weights of a model that can be compressed; modules that share a weight form one target."""

import fnmatch
import re
import sys
import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from tensornet._util import check_type
from tensornet.errors import TargetError
from tensornet.nn.extension import dense_layers
from tensornet.nn.layer_kinds import (
    LayerKind,
    has_own_forward,
    kind_of,
    layer_bias,
    own_parameters,
)
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import Storage
from tensornet.nn.unfuse import (
    MORE_THAN_WEIGHT,
    OWN_FORWARD,
    RECOMPUTED,
    Compound,
    compound_of,
    reason_against,
)

ALL = "all"


@dataclass(frozen=True)
class LayerSelection:
    """Patterns that choose layers of a model by module name.

    Args:
        target_modules: patterns of the module names to select. A pattern matches a whole name, a suffix after
            a dot (`"c_fc"`), a glob (`"*.mlp.*"`), or, with the prefix `"re:"`, a regular expression for the
            whole name. None selects every linear layer except output heads; `"all"` selects embeddings and
            output heads too.
        exclude_modules: patterns of module names to skip.

    Raises:
        TargetError: a pattern is not a string.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            _check_patterns(name, value)
            if value is not None and not isinstance(value, str):  # options that were saved come back as lists
                object.__setattr__(self, name, tuple(value))


#: Reasons to skip a weight that could be compressed with another configuration.
EXCLUDED, HEAD, TABLE = "excluded by the configuration", "output head", "embedding"
#: Reasons to skip a weight that cannot be compressed; `unfuse.reason_against` and `list_weights` give others.
ADAPTER = "of an adapter"
UNSEEN = "never ran in calibration"
BIAS, UNKNOWN = "bias", "no layer kind"
#: The same for a stack of matrices that the plugin for transformers, which is not imported, would expose.
STACKED = "import tensornet_hf to compress it"


@dataclass(frozen=True)
class Target:
    """Weight of a model, with all modules that use it.

    Args:
        names: names of the modules that use the weight; the first identifies it in plans and reports. For a
            weight that is not the matrix of a layer, the name of the parameter.
        modules: the modules with these names; a module with several names appears several times.
        kinds: the layer kind of each module; empty for a weight that is not the matrix of a layer.
        owners: unfused modules (`Compound`) that contain these modules, by name.
        skip: short reason why the weight is not compressed; empty if it will be compressed.
        parameter: the weight if it is not the matrix of a layer, else None.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    kinds: tuple[LayerKind, ...]
    owners: Mapping[str, Compound] = field(default_factory=dict)
    skip: str = ""
    parameter: Tensor | None = None

    @property
    def name(self) -> str:
        """Name of the weight in plans and reports."""
        return self.names[0]

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names that patterns may match: those of the modules, and of unfused modules that contain them."""
        return (*self.names, *self.owners)

    @property
    def stack(self) -> str:
        """Name of the model's parameter in which this weight is stacked with others; empty if it is alone."""
        for owner, compound in self.owners.items():
            for stack in compound.stacks:
                if self.name.removeprefix(f"{owner}.") in stack.names:
                    return f"{owner}.{stack.parameter}"
        return ""

    @property
    def weight(self) -> Tensor:
        """The parameter itself, not transposed; `matrix` always has the shape `(out, in)`."""
        weight = self.modules[0].weight if self.parameter is None else self.parameter
        assert isinstance(weight, Tensor)
        return weight

    @property
    def type_name(self) -> str:
        """Type name of the module that owns the weight; reports count parameters by type."""
        return next((x.type_name for x in self.owners.values()), type(self.modules[0]).__name__)

    @property
    def matrix(self) -> Tensor:
        """Weight as a matrix of shape `(out_features, in_features)`."""
        return self.kinds[0].matrix(self.modules[0]).detach()

    @property
    def by_choice(self) -> bool:
        """True if the weight is skipped only because of the configuration."""
        return self.skip in (EXCLUDED, HEAD, TABLE)


def find_targets(model: nn.Module, config: LayerSelection) -> list[Target]:
    """List every weight of a model once, with a reason (`skip`) if it will not be compressed.

    Modules that share one weight form one target and stay tied, even if a pattern names only one of them. If
    the configuration selects layers that cannot be compressed, a warning names these layers.

    Args:
        model: any module; unfuse it first (`tensornet.nn.unfuse.unfused`) to find matrices that it stores in
            stacks.
        config: selects the layers to compress.

    Returns:
        Weights of layers in the order of the model, then all other parameters, which are always skipped.

    Raises:
        TargetError: a pattern matches no layer that can be compressed, no target is left, or a selected layer
            is wrapped by an adapter.
    """
    weights = list_weights(model)
    layers = [x for x in weights if x.kinds]
    included, excluded = _patterns(config.target_modules), _patterns(config.exclude_modules) or []
    _check_matching(model, layers, [*(included or []), *excluded])
    head = output_head(model)

    def choice(names: Collection[str], modules: Collection[nn.Module]) -> str:
        """Return the reason why the configuration does not select the modules; empty if it selects them."""
        if included is None and any(x is head for x in modules):
            return HEAD
        if included is None and any(map(_embeds, modules)):
            return TABLE
        matched = included is None or included == [ALL] or _matches_any(names, included)
        return "" if matched and not _matches_any(names, excluded) else EXCLUDED

    found = [replace(x, skip=x.skip or choice(x.all_names, x.modules)) for x in weights]
    selected = [x for x in found if not x.skip]
    # These layers are selected but cannot be compressed; the values are the reasons.
    dense = {x.name: x.skip for x in layers if x.skip and not choice(x.all_names, x.modules)}
    for name, module in model.named_modules():
        if (reason := reason_against(module)) in _REMEDIES and not choice([name], [module]):
            dense[name] = reason
    _, wrapped = split_by_adapters(model, (name for x in selected for name in x.names))
    refuse_wrapped(wrapped)
    if not selected:
        raise TargetError(
            f"Nothing to compress. Compressible layers: {summary(layers)}.{_compressed_before(model)}"
            f"{_skipped(dense)}{_unknown_layers(model)}{_own_rounding(model)}"
        )
    if dense:
        warnings.warn(f"Left dense:{_skipped(dense)}", stacklevel=2)
    return found


def list_weights(model: nn.Module) -> list[Target]:
    """List every weight of a model once, with a reason (`skip`) if it can never be compressed.

    Args:
        model: any module, unfused as for `find_targets`.

    Returns:
        Weights of layers in the order of the model, then all other parameters.
    """
    layers = all_targets(model)
    tied = users_outside(model, layers)
    adapters, _ = split_by_adapters(model, (name for layer in layers for name in layer.names))
    dense = dense_layers(model)
    found = []
    for layer in layers:
        if not adapters.isdisjoint(layer.names):
            skip = ADAPTER
        elif layer.name in tied:
            skip = f"tied to {type(model.get_submodule(tied[layer.name])).__name__}"
        else:
            skip = next((dense[name] for name in layer.names if name in dense), "")
        found.append(replace(layer, skip=skip))
    seen = {id(layer.weight) for layer in layers}
    biases = {id(layer_bias(module)) for layer in layers for module in layer.modules}
    for name, module in model.named_modules():
        for key, parameter in own_parameters(module).items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                bias = id(parameter) in biases or isinstance(module, Compound)
                stacked = parameter.ndim == 3 and type(module).__module__.startswith("transformers.")
                unknown = STACKED if stacked and "tensornet_hf" not in sys.modules else UNKNOWN
                skip = BIAS if bias else reason_against(module) or unknown
                full = f"{name}.{key}".lstrip(".")
                found.append(Target((full,), (module,), (), skip=skip, parameter=parameter))
    return found


def _embeds(module: nn.Module) -> bool:
    kind = kind_of(module)
    return isinstance(module, nn.Embedding) if kind is None else kind.name == "embedding"


def _check_matching(model: nn.Module, layers: Sequence[Target], patterns: Sequence[str]) -> None:
    """Check that every pattern matches a layer that can be compressed.

    Raises:
        TargetError: a pattern matches no such layer; the message lists the compressible layers, and says why
            matching modules stay dense.
    """
    for pattern in patterns:
        if pattern == ALL or any(_matches_any(layer.all_names, [pattern]) for layer in layers):
            continue
        named = [(name, module) for name, module in model.named_modules() if matches(name, pattern)]
        dense = {name: reason for name, module in named if (reason := reason_against(module)) is not None}
        raise TargetError(
            f"Pattern {pattern!r} matches no layer that can be compressed. Compressible layers: "
            f"{summary(layers)}. {PATTERN_RULES}"
            f"{_compressed_before(model)}{_skipped(dense)}"
        )


#: Maps the reason why a layer is skipped to the advice in messages.
_REMEDIES = {
    RECOMPUTED: "make it an ordinary parameter by remove_weight_norm, remove_spectral_norm or prune.remove "
    "of torch.nn.utils",
    MORE_THAN_WEIGHT: "compression would lose the others; register them on the module around the layer",
    OWN_FORWARD: "delete it to compress the layer (`del layer.forward`), or move its code into a hook, "
    "which compression keeps",
}
_TIED_REMEDY = "compression would untie them; tensornet.nn.register_layer_kind makes that type compressible"


def _skipped(dense: Mapping[str, str]) -> str:
    """Compose a message that says why layers are skipped and what to do.

    Args:
        dense: the reason for each skipped layer, by name.
    """
    hint = ""
    for why in dict.fromkeys(dense.values()):
        names = shortened([name for name, reason in dense.items() if reason == why])
        remedy = _REMEDIES.get(why, _TIED_REMEDY if why.startswith("tied") else "")
        hint += f" {names} ({why}{': ' if remedy else ''}{remedy})."
    return hint


def check_loaded(targets: Sequence[Target]) -> None:
    """Check that no weight is on the meta device, where it has no values.

    Raises:
        TargetError: a weight is on the meta device; the message names its layer.
    """
    for target in targets:
        if target.weight.is_meta:
            raise TargetError(
                f"The weight of layer {target.name!r} is on the meta device and has no values: the model was "
                "built without loading weights, or a device_map has offloaded parts of it. Load the whole "
                "model. If it does not fit into memory, compress its files, by tensornet compress SRC DST "
                "--workers 1."
            )


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head of a Hugging Face model (`get_output_embeddings`); None for other models."""
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
    """Check that the argument `name` is None, a pattern or a collection of patterns.

    Raises:
        TargetError: the argument has another type.
    """
    patterns = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(patterns, Collection) or not all(isinstance(x, str) for x in patterns):
        raise TargetError(
            f"{name} takes module names from model.named_modules(), or patterns of such names, as a "
            f"string or a list of strings; got {value!r}."
        )


#: Explanation of patterns for error messages.
PATTERN_RULES = (
    "Patterns match a whole name, a suffix after a dot, a glob such as '*.mlp.*', or, with the prefix "
    "'re:', a regular expression for the whole name, such as 're:.*\\.[0-9]\\.mlp\\..*'."
)


def _patterns(value: str | Sequence[str] | None) -> list[str] | None:
    return None if value is None else [value] if isinstance(value, str) else list(value)


def _matches_any(names: Collection[str], patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for name in names for pattern in patterns)


def all_targets(model: nn.Module) -> list[Target]:
    """List the weights of all layers that have a layer kind, in model order; list a shared weight once."""
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
            {
                x: m
                for x, m in reversed(compounds.items())
                if any(n.startswith(f"{x}.") for n, _, _ in members)
            },
        )
        for members in groups.values()
    ]


def users_outside(model: nn.Module, groups: Sequence[Target]) -> dict[str, str]:
    """Find weights that are tied to a module outside their target, such as a module of an unknown type.

    Args:
        model: any module.
        groups: the targets of this model.

    Returns:
        The name of such a module, by the name of the target.
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
    """Return a key that is equal for tensors that start at the same memory address.

    A tensor without plain memory, such as a meta tensor, has a key of its own.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0
    return (tensor.device, tensor.data_ptr()) if plain else id(tensor)


def check_model(model: Any) -> None:
    """Check that `model` is a module whose parameters have shapes.

    Raises:
        TargetError: a lazy module has not run yet, so that its parameters have no shape.
        TypeError: it is not a module; the message shows its type.
    """
    check_type("model", model, nn.Module, "load it first, for example with AutoModel.from_pretrained")
    lazy = (name for name, x in model.named_parameters() if isinstance(x, nn.UninitializedParameter))
    if (name := next(lazy, None)) is not None:
        raise TargetError(
            f"The parameter {name!r} of a lazy module has no shape yet. Run the model on a batch first."
        )


def check_holder(model: Any) -> None:
    """Check that a model is a module in which layers can be replaced.

    Raises:
        TypeError: `model` is not a module.
        TargetError: the model is itself a layer, so it has no parent in which it could be replaced.
    """
    check_model(model)
    if kind_of(model) is not None or compound_of(model) is not None:
        raise TargetError(
            f"The model is itself a {type(model).__name__}, and has no parent module in which it could be "
            "replaced. Put it into a module, such as torch.nn.ModuleList([layer]); to convert a single "
            "linear layer or embedding, use from_linear or from_embedding of the classes in tensornet.nn."
        )


def compressed_names(model: nn.Module) -> list[str]:
    """List the names of all tensor-network layers in a model."""
    return [name for name, module in model.named_modules() if isinstance(module, NetworkModule)]


def _compressed_before(model: nn.Module) -> str:
    """Compose a hint that some layers are compressed already; empty if none are."""
    names = compressed_names(model)
    if not names:
        return ""
    return (
        f" {len(names)} layers are compressed already, such as {names[0]}: compress the dense model, "
        "or make this one dense by tensornet.decompress(model)."
    )


def _unknown_layers(model: nn.Module) -> str:
    """Compose a hint that names the skipped subclasses of stock layers; empty if there are none."""
    stock = (nn.Linear, nn.Embedding)
    left = [m for m in model.modules() if isinstance(m, stock) and kind_of(m) is None]
    kinds = {type(m).__name__ for m in left if reason_against(m) is None}
    if not kinds:
        return ""
    return (
        f" Layers of the types {', '.join(sorted(kinds))} are skipped, since they may compute something else "
        "(subclasses, and embeddings with max_norm); "
        "tensornet.nn.register_layer_kind makes a type compressible."
    )


def _own_rounding(model: nn.Module) -> str:
    """Compose a hint that names modules with a method `quantize`, such as banks of experts; empty if none."""
    stored = (
        (name, m) for name, m in model.named_modules() if isinstance(getattr(m, "storage", None), Storage)
    )
    names = [name or "model" for name, m in stored if hasattr(m, "quantize")]
    return f" Round {shortened(names)} by their method quantize, as in quantize('int4')." if names else ""


def summary(groups: Sequence[Target], limit: int = 8) -> str:
    """Join the names of targets in one line, and count the names beyond a limit."""
    names = [group.name for group in groups]
    return shortened(names, limit) or "none (supported: nn.Linear, nn.Embedding, modules of several matrices)"


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """Join names in one line, and count the names beyond a limit."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


#: Name of the submodule in which an adapter (PEFT) stores the layer that it wraps.
BASE = "base_layer"


def adapter_names(model: nn.Module) -> list[str]:
    """List the names of the adapters inside a model, such as LoRA layers of PEFT."""
    modules = model.named_modules(remove_duplicate=False)
    return [x for x, m in modules if isinstance(getattr(type(m), "adapter_layer_names", None), tuple)]


def split_by_adapters(model: nn.Module, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Find the layers that belong to adapters, and the layers wrapped by adapters that cannot be merged.

    An adapter can be merged into cores if its class attribute `merges_into_cores` is true.

    Args:
        model: any module.
        names: names of the layers to consider.

    Returns:
        Names of layers that belong to adapters, and names of layers wrapped by an adapter that cannot be
        merged.
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
    """Check that no layer to compress is wrapped by an adapter that cannot be merged.

    Args:
        wrapped: names of such layers (see `split_by_adapters`).

    Raises:
        TargetError: `wrapped` is not empty.
    """
    if names := sorted(wrapped):
        others = f" ({len(names) - 1} other layers too)" if len(names) > 1 else ""
        raise TargetError(
            f"{names[0]} is wrapped by an adapter{others}, which could not be merged into cores. Merge the "
            "adapters first, by merge_and_unload() in PEFT; or compress first, and add adapters by "
            f"tensornet_hf.peft.lora_config; or leave such layers dense, by exclude_modules={BASE!r}."
        )
