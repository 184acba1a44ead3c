"""Find the dense feed-forward networks of a model, and recognize what they compute.

Most feed-forward networks are separate modules. A module is recognized as such a network by its output on
random tokens, which must equal the output that is computed from its matrices and its activation. In BERT,
BART and similar models, the matrices and the activation are parts of a larger layer. For the classes in
`INSIDE`, a mixture replaces the first matrix, and identities replace the activation and the second matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode
from tensornet.errors import TargetError
from tensornet.nn import register_module_type
from tensornet.nn.layer_kinds import kind_of, layer_bias
from tensornet.nn.targets import PATTERN_RULES, matches
from tensornet_moe import SharedCoreMoE
from tensornet_moe.ffn import ACTIVATIONS

DropoutPlace = Literal["hidden", "output", "none"]

#: Maps the names of a feed-forward network's matrices, in the order (gate,) up, down, to the place of its
#: dropout.
FORMS: dict[tuple[str, ...], DropoutPlace] = {
    ("wi_0", "wi_1", "wo"): "hidden",  # T5, gated
    ("wi", "wo"): "hidden",  # T5
    ("c_fc", "c_proj"): "output",  # GPT-2
    ("gate_proj", "up_proj", "down_proj"): "none",  # Llama and its relatives
    ("fc1", "fc2"): "none",  # CLIP, SigLIP, ViT; BART and its relatives
    ("up_proj", "down_proj"): "none",
    ("dense_h_to_4h", "dense_4h_to_h"): "none",  # GPT-NeoX, BLOOM
    ("intermediate.dense", "output.dense"): "none",  # BERT and its relatives
}
_BERT = ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
_BART = ("fc1", "activation_fn", "fc2")
#: Layer classes that contain a feed-forward network; paths of its first matrix, activation and second matrix.
INSIDE: dict[str, tuple[str, str, str]] = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "CamembertLayer": _BERT,
    "ElectraLayer": _BERT,
    "BartEncoderLayer": _BART,
    "BartDecoderLayer": _BART,
    "MBartEncoderLayer": _BART,
    "MBartDecoderLayer": _BART,
    "MarianEncoderLayer": _BART,
    "MarianDecoderLayer": _BART,
    "WhisperEncoderLayer": _BART,
    "WhisperDecoderLayer": _BART,
    "OPTDecoderLayer": _BART,
    "BloomMLP": ("dense_h_to_4h", "gelu_impl", "dense_4h_to_h"),
}
_ACTIVATION_NAMES = ("act", "act_fn", "activation", "activation_fn")
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class FeedForward:
    """Feed-forward network `W_down act(W_up x)`, or with a gate `W_down (act(W_gate x) * W_up x)`.

    Args:
        names: names of the module in the model; reports use the first name.
        module: the module that is the network, or that contains the network.
        paths: paths of the linear layers inside the module, in the order (gate,) up, down.
        activation: name of the activation in `tensornet_moe.ffn.ACTIVATIONS`.
        dropout: probability of the dropout.
        dropout_place: place of the dropout: after the activation (`"hidden"`), on the output, or nowhere.
        inside: None if the module is the network. Otherwise the paths of the submodules to replace: the first
            is replaced by the mixture, the others by identities.
    """

    names: tuple[str, ...]
    module: nn.Module
    paths: tuple[str, ...]
    activation: str
    dropout: float = 0.0
    dropout_place: DropoutPlace = "none"
    inside: tuple[str, ...] | None = None

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the network's matrices: the paths, with `_` in place of dots."""
        return tuple(path.replace(".", "_") for path in self.paths)

    @property
    def num_params(self) -> int:
        """Number of parameters of the linear layers."""
        return sum(p.numel() for path in self.paths for p in self.module.get_submodule(path).parameters())

    def layer(self, name: str) -> nn.Module:
        """Return the linear layer that contains the matrix with this name."""
        return self.module.get_submodule(self.paths[self.matrices.index(name)])

    def matrix(self, name: str) -> Tensor:
        """Return the matrix of this name, shape `(out_features, in_features)`."""
        kind = kind_of(self.layer(name))
        assert kind is not None
        return kind.matrix(self.layer(name)).detach()

    def bias(self, name: str) -> Tensor | None:
        """Return the bias of the layer that contains this matrix, shape `(out_features,)`, or None."""
        return layer_bias(self.layer(name))

    def replacements(self, mixture: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to put in place of the network and its parts, `{name in the model: module}`."""
        if self.inside is None:
            return dict.fromkeys(self.names, mixture)
        first, *others = self.inside
        parts = {first: mixture, **{path: DoneBefore() for path in others}}
        return {f"{name}.{path}": part for name in self.names for path, part in parts.items()}

    def compute(self, x: Tensor) -> Tensor:
        """Compute the output of the network from its matrices; `x` and the result are `(..., features)`."""
        first, *between, last = self.matrices
        hidden = ACTIVATIONS[self.activation](nn.functional.linear(x, self.matrix(first), self.bias(first)))
        for name in between:
            hidden = hidden * nn.functional.linear(x, self.matrix(name), self.bias(name))
        weight = self.matrix(last)  # T5 keeps this matrix in float32
        return nn.functional.linear(hidden.to(weight.dtype), weight, self.bias(last))


class DoneBefore(nn.Module):
    """Identity in place of a network's activation or last matrix; a mixture replaces its first matrix.

    Unlike `nn.Identity`, this module has a description, so that it is restored when a saved model is loaded.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the input unchanged."""
        return x

    def spec(self) -> dict[str, Any]:
        """Return the description as a dict for JSON (see `tensornet.nn.register_module_type`)."""
        return {"type": "done_before"}


register_module_type("done_before", lambda spec, device, dtype: DoneBefore())


def find_feed_forwards(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | None = None,
    matrices: Sequence[str] | None = None,
) -> list[FeedForward]:
    """Find the feed-forward networks of a model, and check what they compute.

    Args:
        model: any model.
        target_modules: patterns as in `CompressionConfig.target_modules`; None selects all networks that are
            recognized.
        matrices: names of the linear layers in the order (gate,) up, down; only needed for unusual names.

    Raises:
        TargetError: no network is found, a pattern matches no network, or a selected module computes
            something else or is an expert of a mixture.
    """
    forms = FORMS if matrices is None else {tuple(matrices): FORMS.get(tuple(matrices), "output")}
    looked_for = (
        f"Looked for modules with linear layers {', '.join('/'.join(form) for form in forms)} and an "
        "activation. If the layers have other names, name the module with target_modules=[...] and its "
        'layers with matrices=("up", "down").'
    )
    linear = {
        name
        for name, layer in model.named_modules(remove_duplicate=False)
        if (kind := kind_of(layer)) is not None and kind.name != "embedding"
    }
    candidates: dict[nn.Module, tuple[list[str], tuple[str, ...]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        form = next((x for x in forms if all(f"{prefix}{path}" in linear for path in x)), None)
        if form is not None:
            candidates.setdefault(module, ([], form))[0].append(name)
    known = [name for names, _ in candidates.values() for name in names]
    for pattern in target_modules or ():
        if not any(matches(name, pattern) for name in known):
            raise TargetError(
                f"Pattern {pattern!r} matches no feed-forward network. {PATTERN_RULES} {looked_for}"
            )
    found, refused = [], []
    for module, (names, form) in candidates.items():
        if target_modules is not None and not any(matches(n, p) for n in names for p in target_modules):
            continue
        try:
            if "expert" in names[0].lower():
                raise TargetError(f"{names[0]} is already an expert of a mixture")
            found.append(_recognize(tuple(names), module, form, forms[form]))
        except TargetError as error:
            if target_modules is not None:
                raise
            refused.append(f"{names[0]} ({error})")
    if not found:
        tried = f" These modules were checked and refused: {'; '.join(refused[:3])}." if refused else ""
        if mixtures := [name for name, m in model.named_modules() if isinstance(m, SharedCoreMoE)]:
            tried += (
                f" {len(mixtures)} networks are mixtures already; the first is "
                f"{mixtures[0] or 'the model itself'}."
            )
        raise TargetError(
            f"{type(model).__name__} has no feed-forward network that can become experts.{tried} {looked_for}"
        )
    return found


@torch.no_grad()
def _recognize(
    names: tuple[str, ...], module: nn.Module, paths: tuple[str, ...], place: DropoutPlace
) -> FeedForward:
    """Return the feed-forward network in a module that has the linear layers `paths`.

    Raises:
        TargetError: the module computes something else, or experts do not support the activation.
    """
    inside = (
        INSIDE.get(type(module).__name__) if type(module).__module__.startswith("transformers.") else None
    )
    if inside is not None and (inside[0], inside[2]) == paths:
        activation = _activation_name(module, module.get_submodule(inside[1]))
        return FeedForward(names, module, paths, activation, inside=(paths[0], inside[1], paths[1]))
    function = next((f for x in _ACTIVATION_NAMES if callable(f := getattr(module, x, None))), None)
    if function is None:
        raise TargetError(f"it has no activation named {', '.join(_ACTIVATION_NAMES)}")
    rate = getattr(module, "dropout", 0.0)
    rate = float(rate.p if isinstance(rate, nn.Dropout) else rate) if place != "none" else 0.0
    network = FeedForward(names, module, paths, _activation_name(module, function), rate, place)
    first = network.matrix(network.matrices[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PROBE_TOKENS, first.shape[1], generator=generator, device="cpu").to(first)
    with in_eval_mode(module):
        try:
            got = module(x)
        except Exception as error:  # an unknown module may raise any exception
            raise TargetError(f"it cannot be called with hidden states alone: {error}") from error
    wanted = network.compute(x)
    tolerance = 1e-3 if wanted.dtype in (torch.float32, torch.float64) else 0.05
    # If an output is NaN, this condition is false and the network is accepted. The decomposition then raises
    # an error that names the matrix.
    if (
        not isinstance(got, Tensor)
        or got.shape != wanted.shape
        or float((got - wanted).norm()) > tolerance * float(wanted.norm())
    ):
        raise TargetError(
            f"{names[0]} computes more than {' and '.join(paths)} with an activation, and "
            f"{type(module).__name__} is not a class whose network is known"
        )
    return network


def _activation_name(module: nn.Module, function: Callable[[Tensor], Tensor]) -> str:
    """Return the name of an activation function, recognized by its values on a grid."""
    grid = torch.linspace(-6, 6, 97, device=next(module.parameters()).device)
    values = function(grid)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(values, known(grid), atol=1e-6):
            return name
    raise TargetError(f"its activation is not one of {', '.join(ACTIVATIONS)}")
