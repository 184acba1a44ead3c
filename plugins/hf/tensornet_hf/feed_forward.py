"""Feed-forward networks of a model: find them, and check that they compute what their parts suggest.

Most are a module of their own. In BERT, OPT, BART and similar models the two matrices and the activation are
parts of a larger layer that does more. There a mixture takes the place of the first matrix, and modules that
do nothing take the places of the activation and the second.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode
from tensornet.compression.apply import set_submodule
from tensornet.errors import TargetError
from tensornet.nn import register_module_type
from tensornet.nn.layer_kinds import kind_of, layer_bias
from tensornet.nn.targets import matches, pattern_help
from tensornet_moe import SharedCoreMoE
from tensornet_moe.ffn import ACTIVATIONS

DropoutPlace = Literal["hidden", "output", "none"]

#: Names of the matrices in order (gate,) up, down, and where such a network drops out.
FORMS: dict[tuple[str, ...], DropoutPlace] = {
    ("wi_0", "wi_1", "wo"): "hidden",  # T5, gated
    ("wi", "wo"): "hidden",  # T5
    ("c_fc", "c_proj"): "output",  # GPT-2
    ("gate_proj", "up_proj", "down_proj"): "none",  # Llama and its relatives
    ("fc1", "fc2"): "none",  # CLIP, SigLIP
    ("up_proj", "down_proj"): "none",
    ("dense_h_to_4h", "dense_4h_to_h"): "none",  # GPT-NeoX, BLOOM
    ("intermediate.dense", "output.dense"): "none",  # BERT and its relatives
}
_ACTIVATION_NAMES = (
    "act",
    "act_fn",
    "activation",
    "activation_fn",
    "act_func",
    "gelu_impl",
    "intermediate_act_fn",
)
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class FeedForward:
    """One network `W_down act(W_up x)`, gated `W_down (act(W_gate x) * W_up x)`.

    Args:
        names: where the module is used in the model; the first stands for all.
        module: the module that is the network, or has it inside.
        paths: its layers inside the module, in order.
        activation: a name in `tensornet_moe.ffn.ACTIVATIONS`.
        dropout: probability.
        dropout_place: after the activation, on the output, or nowhere.
        inside: None if the module is the network. Else the paths inside that are to be replaced: the first by
            the network, the others by modules that do nothing.
    """

    names: tuple[str, ...]
    module: nn.Module
    paths: tuple[str, ...]
    activation: str
    dropout: float
    dropout_place: DropoutPlace
    inside: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """Representative name of the network."""
        return self.names[0]

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices of the network, in order, with `_` in place of dots."""
        return tuple(path.replace(".", "_") for path in self.paths)

    def layer(self, name: str) -> nn.Module:
        """Return one of its layers."""
        return self.module.get_submodule(self.paths[self.matrices.index(name)])

    def matrix(self, name: str) -> Tensor:
        """Return one weight, shape `(out_features, in_features)`."""
        kind = kind_of(self.layer(name))
        assert kind is not None
        return kind.matrix(self.layer(name)).detach()

    def bias(self, name: str) -> Tensor | None:
        """Return one bias, shape `(out_features,)`."""
        return layer_bias(self.layer(name))

    @property
    def num_params(self) -> int:
        """Parameters of its layers."""
        return sum(p.numel() for name in self.matrices for p in self.layer(name).parameters())

    def replacements(self, mixture: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that replace the network, by name in the model."""
        if self.inside is None:
            return dict.fromkeys(self.names, mixture)
        first, *others = self.inside
        parts = {first: mixture, **{path: DoneBefore() for path in others}}
        return {f"{name}.{path}": part for name in self.names for path, part in parts.items()}

    def compute(self, x: Tensor) -> Tensor:
        """Compute the network from its matrices, `x: (..., features)`."""

        def linear(name: str, value: Tensor) -> Tensor:
            weight = self.matrix(name)
            return nn.functional.linear(value.to(weight.dtype), weight, self.bias(name))

        first, *between, last = self.matrices
        hidden = ACTIVATIONS[self.activation](linear(first, x))
        for name in between:
            hidden = hidden * linear(name, x)
        return linear(last, hidden)


class DoneBefore(nn.Module):
    """Identity in place of a part of a feed-forward network whose work an earlier mixture does.

    Unlike `nn.Identity` it has a description, so that a saved model is built again with it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready description, see `tensornet.nn.register_module_type`."""
        return {"type": "done_before"}


register_module_type("done_before", lambda spec, device, dtype: DoneBefore())


# --- finding --------------------------------------------------------------------------------------------


def find_feed_forwards(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | None = None,
    matrices: Sequence[str] | None = None,
) -> list[FeedForward]:
    """Find the feed-forward networks of a model, and check each by its outputs.

    Args:
        model: any model.
        target_modules: patterns as in `CompressionConfig.target_modules`; all that are recognized if absent.
        matrices: names of the two or three layers inside, (gate,) up, down, for networks of another form;
            dotted where they lie deeper, as `("intermediate.dense", "output.dense")`.

    Raises:
        TargetError: none is found, a pattern matches none, or a named module computes something else or is
            an expert of a mixture.
    """
    forms = FORMS if matrices is None else {tuple(matrices): FORMS.get(tuple(matrices), "output")}
    looked_for = (
        f"Looked for modules with linear layers {', '.join('/'.join(form) for form in forms)} and an "
        "activation. For another form name the module with target_modules=[...] and its layers with "
        'matrices=("up", "down").'
    )
    candidates: dict[int, tuple[list[str], nn.Module, tuple[str, ...]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        form = next((x for x in forms if all(_is_linear(_part(module, path)) for path in x)), None)
        if form is not None:
            candidates.setdefault(id(module), ([], module, form))[0].append(name)
    known = [name for names, _, _ in candidates.values() for name in names]
    for pattern in target_modules or ():
        if not any(matches(name, pattern) for name in known):
            raise TargetError(
                f"Pattern {pattern!r} matches no feed-forward network. {pattern_help(pattern, known)} "
                f"{looked_for}"
            )
    routed = _experts(model, {name: (x[1], x[2]) for x in candidates.values() for name in x[0]})
    found, refused = [], []
    for names, module, form in candidates.values():
        if target_modules is not None and not any(matches(n, p) for n in names for p in target_modules):
            continue
        try:
            if mixture := next((routed[n] for n in names if n in routed), None):
                raise TargetError(f"{names[0]} is an expert of {mixture}, which is a mixture already")
            found.append(_recognize(tuple(names), module, form, forms[form]))
        except TargetError as error:
            if target_modules is not None:
                raise
            refused.append(f"{names[0]} ({error})")
    if not found:
        tried = f" Looked at, and not such a network: {'; '.join(refused[:3])}." if refused else ""
        if mixtures := [name for name, m in model.named_modules() if isinstance(m, SharedCoreMoE)]:
            tried += (
                f" {len(mixtures)} are mixtures already, the first is {mixtures[0] or 'the model itself'}."
            )
        raise TargetError(
            f"{type(model).__name__} has no feed-forward network that can become experts.{tried} {looked_for}"
        )
    return found


def _experts(model: nn.Module, candidates: dict[str, tuple[nn.Module, tuple[str, ...]]]) -> dict[str, str]:
    """Find networks selected by a router, and the module that holds router and experts.

    Where a container has `n > 1` networks, a router is a weight `(n, features)` in the module around them.
    """
    groups: dict[str, list[str]] = {}
    for name in candidates:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, str] = {}
    for container, members in groups.items():
        module, form = candidates[members[0]]
        first = _part(module, form[0])
        kind = kind_of(first) if first is not None else None
        if len(members) == 1 or kind is None or first is None:
            continue
        router = {len(members), kind.matrix(first).shape[1]}
        for place in (container, container.rpartition(".")[0]):
            around = model.get_submodule(place)
            ours = [part for part in around.modules() if isinstance(part, SharedCoreMoE)]
            roots = [*(candidates[name][0] for name in members), *ours]
            inside = {id(part) for root in roots for part in root.modules()}
            if any(
                parameter.ndim == 2 and set(parameter.shape) == router
                for part in around.modules()
                if id(part) not in inside and not isinstance(part, nn.Embedding)
                for parameter in part.parameters(recurse=False)
            ):
                found |= dict.fromkeys(members, place or "the model itself")
                break
    return found


def _part(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else dict(found.named_children()).get(name)
    return found


def _is_linear(layer: nn.Module | None) -> bool:
    kind = None if layer is None else kind_of(layer)
    return kind is not None and kind.name != "embedding"


# --- recognizing ----------------------------------------------------------------------------------------


@torch.no_grad()
def _recognize(
    names: tuple[str, ...], module: nn.Module, paths: tuple[str, ...], place: DropoutPlace
) -> FeedForward:
    """Recognize the network in a module, and compare it with the module on random tokens.

    Raises:
        TargetError: the module computes something else, or has an activation that experts do not.
    """
    path, activation = _activation(module, paths[0].rpartition(".")[0])
    rate = getattr(module, "dropout", 0.0)
    rate = float(rate.p if isinstance(rate, nn.Dropout) else rate) if place != "none" else 0.0
    network = FeedForward(names, module, paths, activation, rate, place)
    first = network.matrix(network.matrices[0])
    if first.is_meta:
        return network
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PROBE_TOKENS, first.shape[1], generator=generator, device="cpu").to(first)
    with in_eval_mode(module):
        try:
            got: Any = module(x)
            why = f"{network.name} computes something else than {' and '.join(paths)} alone"
        except Exception as error:  # whatever a module of unknown kind does with one tensor
            got, why = None, f"it does not take tokens alone: {error}"
        if isinstance(got, Tensor) and _close(got, network.compute(x)):
            return network
        if path is None or len(paths) != 2:
            raise TargetError(why)
        # A larger layer with the network inside. It drops out by itself.
        inside = FeedForward(names, module, paths, activation, 0.0, "none", (paths[0], path, paths[1]))
        wanted = _call(module, x)
        with _replaced(module, {paths[0]: _Whole(inside), path: DoneBefore(), paths[1]: DoneBefore()}):
            got = None if wanted is None else _call(module, x)
    if got is None or wanted is None or not _close(got, wanted):
        raise TargetError(why)
    return inside


def _activation(module: nn.Module, inner: str) -> tuple[str | None, str]:
    """Return the path (None for a function) and the name of an activation, recognized by its values."""
    grid = torch.linspace(-6, 6, 97, device=next(module.parameters()).device)
    places = [(module, "")] + ([(module.get_submodule(inner), f"{inner}.")] if inner else [])
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


class _Whole(nn.Module):
    """The whole network as one module, for a comparison."""

    def __init__(self, network: FeedForward) -> None:
        super().__init__()
        weights = [(network.matrix(name), network.bias(name)) for name in network.matrices]
        self._computed = (ACTIVATIONS[network.activation], weights)

    def forward(self, x: Tensor) -> Tensor:
        activate, (up, down) = self._computed
        return nn.functional.linear(activate(nn.functional.linear(x, *up)), *down)


def _call(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Call a transformer layer with tokens alone; None if it needs other arguments."""
    parameters = list(inspect.signature(layer.forward).parameters.values())
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    for rest in (None, x):  # a mask that may be None, a residual that may not
        try:
            output = layer(x, **{p.name: rest for p in required})
        except Exception:  # whatever a layer of unknown kind does; the caller says that it is not understood
            continue
        output = output[0] if isinstance(output, tuple) else output
        return output if isinstance(output, Tensor) else None
    return None


def _close(got: Tensor, wanted: Tensor) -> bool:
    tolerance = 1e-3 if wanted.dtype in (torch.float32, torch.float64) else 0.05
    # Not "smaller than": NaN differs from nothing here, and the decomposition says in which matrix it is.
    return got.shape == wanted.shape and not float((got - wanted).norm()) > tolerance * float(wanted.norm())


@contextmanager
def _replaced(module: nn.Module, parts: dict[str, nn.Module]) -> Iterator[None]:
    before = {path: module.get_submodule(path) for path in parts}
    for path, part in parts.items():
        set_submodule(module, path, part)
    try:
        yield
    finally:
        for path, part in before.items():
            set_submodule(module, path, part)
