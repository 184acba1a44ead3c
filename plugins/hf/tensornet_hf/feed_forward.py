"""Finding the feed-forward networks of a model and reading off what they compute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tensornet.compression.targets import matches
from tensornet.errors import TargetError
from tensornet.nn.adapters import LayerKind, kind_of, layer_bias
from tensornet_moe import SharedCoreMoE
from tensornet_moe.ffn import ACTIVATIONS

DropoutPlace = Literal["hidden", "output", "none"]

#: Names of the matrices in order (gate,) up, down, and where such a network drops out.
FORMS: tuple[tuple[tuple[str, ...], DropoutPlace], ...] = (
    (("wi_0", "wi_1", "wo"), "hidden"),  # T5, gated
    (("wi", "wo"), "hidden"),  # T5
    (("c_fc", "c_proj"), "output"),  # GPT-2
    (("gate_proj", "up_proj", "down_proj"), "none"),  # Llama and its kin
    (("fc1", "fc2"), "none"),  # CLIP, SigLIP
    (("up_proj", "down_proj"), "none"),
    (("dense_h_to_4h", "dense_4h_to_h"), "none"),  # GPT-NeoX
)
_ACTIVATION_NAMES = ("act", "act_fn", "activation", "activation_fn", "act_func")
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class FeedForward:
    """One network `W_down act(W_up x)`, gated `W_down (act(W_gate x) * W_up x)`.

    Args:
        names: where the module is used in the model; the first stands for all.
        module: the module itself.
        matrices: names of its layers, in order.
        activation: a name in `tensornet_moe.ffn.ACTIVATIONS`.
        dropout: probability.
        dropout_place: after the activation, on the output, or nowhere.
    """

    names: tuple[str, ...]
    module: nn.Module
    matrices: tuple[str, ...]
    activation: str
    dropout: float
    dropout_place: DropoutPlace

    @property
    def name(self) -> str:
        """Name that stands for the module."""
        return self.names[0]

    def matrix(self, name: str) -> Tensor:
        """One weight, shape `(out_features, in_features)`."""
        layer = getattr(self.module, name)
        return _kind(layer).matrix(layer).detach()

    def bias(self, name: str) -> Tensor | None:
        """One bias, shape `(out_features,)`."""
        return layer_bias(getattr(self.module, name))


def find_feed_forwards(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | None = None,
    matrices: Sequence[str] | None = None,
) -> list[FeedForward]:
    """Feed-forward networks of a model, each checked to compute what was read off it.

    Args:
        model: any model.
        target_modules: patterns as in `CompressionConfig.target_modules`; all that are recognised if absent.
        matrices: names of the two or three layers inside, (gate,) up, down, for networks of another form.

    Raises:
        TargetError: none is found, a pattern matches none, or a named module computes something else.
    """
    candidates: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _form(module, matrices) is not None:
            candidates.setdefault(id(module), ([], module))[0].append(name)
    found, refused = [], []
    for names, module in candidates.values():
        wanted = target_modules is None or any(matches(n, p) for n in names for p in target_modules)
        if not wanted:
            continue
        try:
            found.append(_read(tuple(names), module, matrices))
        except TargetError as error:
            if target_modules is not None:
                raise
            refused.append(f"{names[0]} ({error})")
    for pattern in target_modules or ():
        if not any(matches(n, pattern) for names, _ in candidates.values() for n in names):
            raise TargetError(f"Pattern {pattern!r} matches no feed-forward network. {_looked_for(matrices)}")
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
    children = dict(module.named_children())
    if matrices is not None:
        known = dict(FORMS)
        forms: Sequence[tuple[tuple[str, ...], DropoutPlace]] = (
            (tuple(matrices), known.get(tuple(matrices), "output")),
        )
    else:
        forms = FORMS
    for names, place in forms:
        if all(name in children and _is_linear(children[name]) for name in names):
            return names, place
    return None


def _is_linear(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    return kind is not None and kind.name != "embedding"


def _kind(layer: nn.Module) -> LayerKind:
    kind = kind_of(layer)
    assert kind is not None
    return kind


def _read(names: tuple[str, ...], module: nn.Module, matrices: Sequence[str] | None) -> FeedForward:
    form = _form(module, matrices)
    assert form is not None
    layers, place = form
    activation = _activation(module)
    rate = getattr(module, "dropout", 0.0)
    rate = float(rate.p if isinstance(rate, nn.Dropout) else rate) if place != "none" else 0.0
    network = FeedForward(names, module, layers, activation, rate, place)
    _check_reading(network)
    return network


def _activation(module: nn.Module) -> str:
    """Name of the activation, recognised by its values."""
    found = [getattr(module, name) for name in _ACTIVATION_NAMES if callable(getattr(module, name, None))]
    if not found:
        raise TargetError(f"it has no activation named {', '.join(_ACTIVATION_NAMES)}")
    grid = torch.linspace(-6, 6, 97)
    values = found[0](grid)
    for name, function in ACTIVATIONS.items():
        if torch.allclose(values, function(grid), atol=1e-6):
            return name
    raise TargetError(f"its activation is none of {', '.join(ACTIVATIONS)}")


@torch.no_grad()
def _check_reading(network: FeedForward) -> None:
    """Compare the module with what was read off it, on random tokens.

    Raises:
        TargetError: they differ, or the module does not take tokens alone.
    """
    first = network.matrix(network.matrices[0])
    if first.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PROBE_TOKENS, first.shape[1], generator=generator).to(first)
    training = network.module.training
    try:
        got = network.module.eval()(x)
    except Exception as error:  # whatever a module of unknown kind does with one tensor
        raise TargetError(f"it does not take tokens alone: {error}") from error
    finally:
        network.module.train(training)
    wanted = _compute(network, x)
    same = isinstance(got, Tensor) and got.shape == wanted.shape
    tolerance = 1e-3 if first.dtype in (torch.float32, torch.float64) else 0.05
    if not same or float((got - wanted).norm()) > tolerance * float(wanted.norm()):
        raise TargetError(
            f"{network.name} computes something else than {' and '.join(network.matrices)} alone"
        )


def _compute(network: FeedForward, x: Tensor) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        weight = network.matrix(name)
        return nn.functional.linear(value.to(weight.dtype), weight, network.bias(name))

    activate: Callable[[Tensor], Tensor] = ACTIVATIONS[network.activation]
    hidden = activate(linear(network.matrices[0], x))
    if len(network.matrices) == 3:
        hidden = hidden * linear(network.matrices[1], x)
    return linear(network.matrices[-1], hidden)
