"""Find the feed-forward networks of a model and recognize the function that they compute."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tensornet.errors import TargetError
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.targets import matches, pattern_help
from tensornet_hf.moe.feed_forward import DropoutPlace, FeedForward, check_reading, computes_inside
from tensornet_moe import SharedCoreMoE
from tensornet_moe.ffn import ACTIVATIONS

#: Names of the matrices in order (gate,) up, down, and where such a network drops out.
FORMS: tuple[tuple[tuple[str, ...], DropoutPlace], ...] = (
    (("wi_0", "wi_1", "wo"), "hidden"),  # T5, gated
    (("wi", "wo"), "hidden"),  # T5
    (("c_fc", "c_proj"), "output"),  # GPT-2
    (("gate_proj", "up_proj", "down_proj"), "none"),  # Llama and its kin
    (("fc1", "fc2"), "none"),  # CLIP, SigLIP
    (("up_proj", "down_proj"), "none"),
    (("dense_h_to_4h", "dense_4h_to_h"), "none"),  # GPT-NeoX, BLOOM
    (("intermediate.dense", "output.dense"), "none"),  # BERT and its kin
)
_ACTIVATION_NAMES = (
    "act",
    "act_fn",
    "activation",
    "activation_fn",
    "act_func",
    "gelu_impl",
    "intermediate_act_fn",
)


def find_feed_forwards(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | None = None,
    matrices: Sequence[str] | None = None,
) -> list[FeedForward]:
    """Find the feed-forward networks of a model, and check each by its outputs.

    Args:
        model: any model.
        target_modules: patterns as in `CompressionConfig.target_modules`; all that are recognised if absent.
        matrices: names of the two or three layers inside, (gate,) up, down, for networks of another form;
            dotted where they lie deeper, as `("intermediate.dense", "output.dense")`.

    Raises:
        TargetError: none is found, a pattern matches none, or a named module computes something else or is
            an expert of a mixture.
    """
    candidates: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _form(module, matrices) is not None:
            candidates.setdefault(id(module), ([], module))[0].append(name)
    routed = _experts(model, [name for names, _ in candidates.values() for name in names], matrices)
    found, refused = [], []
    for names, module in candidates.values():
        wanted = target_modules is None or any(matches(n, p) for n in names for p in target_modules)
        if not wanted:
            continue
        try:
            if mixture := next((routed[n] for n in names if n in routed), None):
                raise TargetError(f"{names[0]} is an expert of {mixture}, which is a mixture already")
            found.append(_read(tuple(names), module, matrices))
        except TargetError as error:
            if target_modules is not None:
                raise
            refused.append(f"{names[0]} ({error})")
    for pattern in target_modules or ():
        if not any(matches(n, pattern) for names, _ in candidates.values() for n in names):
            known = [name for names, _ in candidates.values() for name in names]
            raise TargetError(
                f"Pattern {pattern!r} matches no feed-forward network. {pattern_help(pattern, known)} "
                f"{_looked_for(matrices)}"
            )
    if not found:
        tried = f" Looked at, and not such a network: {'; '.join(refused[:3])}." if refused else ""
        if mixtures := [name for name, m in model.named_modules() if isinstance(m, SharedCoreMoE)]:
            tried += (
                f" {len(mixtures)} are mixtures already, the first is {mixtures[0] or 'the model itself'}."
            )
        raise TargetError(
            f"{type(model).__name__} has no feed-forward network that can become experts.{tried} "
            f"{_looked_for(matrices)}"
        )
    return found


def _looked_for(matrices: Sequence[str] | None) -> str:
    forms = [tuple(matrices)] if matrices is not None else [form for form, _ in FORMS]
    listed = ", ".join("/".join(form) for form in forms)
    return (
        f"Looked for modules with linear layers {listed} and an activation. For another form "
        'name the module with target_modules=[...] and its layers with matrices=("up", "down").'
    )


def _form(module: nn.Module, matrices: Sequence[str] | None) -> tuple[tuple[str, ...], DropoutPlace] | None:
    if matrices is not None:
        known = dict(FORMS)
        forms: Sequence[tuple[tuple[str, ...], DropoutPlace]] = (
            (tuple(matrices), known.get(tuple(matrices), "output")),
        )
    else:
        forms = FORMS
    for paths, place in forms:
        if all((layer := _part(module, path)) is not None and _is_linear(layer) for path in paths):
            return paths, place
    return None


def _experts(model: nn.Module, names: Sequence[str], matrices: Sequence[str] | None) -> dict[str, str]:
    """Find networks selected by a router, and the module that holds router and experts.

    Beside `n > 1` networks of one container lies a router: a weight `(n, features)`, in either order.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, str] = {}
    for container, members in groups.items():
        if len(members) == 1:
            continue
        module = model.get_submodule(members[0])
        form = _form(module, matrices)
        assert form is not None
        first: Any = _part(module, form[0][0])
        kind = kind_of(first)
        assert kind is not None
        router = {len(members), kind.matrix(first).shape[1]}
        for place in (container, container.rpartition(".")[0]):
            if _has_weight(model.get_submodule(place), router, [model.get_submodule(m) for m in members]):
                found |= dict.fromkeys(members, place or "the model itself")
                break
    return found


def _has_weight(module: nn.Module, sizes: set[int], without: Sequence[nn.Module]) -> bool:
    """Return True if a module has a matrix of these sizes outside some parts, embeddings and our mixtures."""
    ours = [
        part for part in module.modules() if isinstance(part, SharedCoreMoE)
    ]  # they have their own routers
    inside = {id(part) for root in (*without, *ours) for part in root.modules()}
    return any(
        parameter.ndim == 2 and set(parameter.shape) == sizes
        for part in module.modules()
        if id(part) not in inside and not isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    )


def _part(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _is_linear(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    return kind is not None and kind.name != "embedding"


def _read(names: tuple[str, ...], module: nn.Module, matrices: Sequence[str] | None) -> FeedForward:
    form = _form(module, matrices)
    assert form is not None
    paths, place = form
    path, activation = _activation(module, paths[0].rpartition(".")[0])
    rate = getattr(module, "dropout", 0.0)
    rate = float(rate.p if isinstance(rate, nn.Dropout) else rate) if place != "none" else 0.0
    network = FeedForward(names, module, paths, activation, rate, place)
    try:
        check_reading(network)
    except TargetError:
        if path is None or len(paths) != 2:
            raise
        # A larger layer drops out by itself.
        inside = FeedForward(names, module, paths, activation, 0.0, "none", (paths[0], path, paths[1]))
        if not computes_inside(inside):
            raise
        return inside
    return network


def _activation(module: nn.Module, beside: str) -> tuple[str | None, str]:
    """Return the path (None for a function) and the name of an activation, recognized by its values."""
    grid = torch.linspace(-6, 6, 97, device=next(module.parameters()).device)
    places = [(module, "")] + ([(module.get_submodule(beside), f"{beside}.")] if beside else [])
    found = [
        (getattr(where, name), f"{prefix}{name}")
        for where, prefix in places
        for name in _ACTIVATION_NAMES
        if callable(getattr(where, name, None))
    ]
    if not found:
        raise TargetError(f"it has no activation named {', '.join(_ACTIVATION_NAMES)}")
    function, path = found[0]
    values = function(grid)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(values, known(grid), atol=1e-6):
            return path if isinstance(function, nn.Module) else None, name
    raise TargetError(f"its activation is none of {', '.join(ACTIVATIONS)}")
