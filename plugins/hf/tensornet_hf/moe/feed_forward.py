"""Feed-forward networks, and a check that a module computes one.

Most are a module of their own. In BERT, OPT, BART and their kin the two matrices and the activation are parts
of a larger layer that does more; there a mixture takes the place of the first matrix, and nothing is left to
do at the places of the others.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode
from tensornet.compression.apply import set_submodule
from tensornet.errors import TargetError
from tensornet.nn.layer_kinds import LayerKind, kind_of, layer_bias
from tensornet_hf.moe.identity import DoneBefore
from tensornet_moe.ffn import ACTIVATIONS

DropoutPlace = Literal["hidden", "output", "none"]

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
        inside: None if the module is the network. Else the paths inside that are to be replaced: first by the
            network, the others by nothing.
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

    def matrix(self, name: str) -> Tensor:
        """Return one weight, shape `(out_features, in_features)`."""
        layer = self.layer(name)
        return _kind(layer).matrix(layer).detach()

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
        parts = self.inside_replacements(mixture)
        return {f"{name}.{path}": part for name in self.names for path, part in parts.items()}

    def inside_replacements(self, mixture: nn.Module) -> dict[str, nn.Module]:
        """Return the replacement modules by path in the larger layer that holds the network."""
        assert self.inside is not None
        first, *others = self.inside
        return {first: mixture, **{path: DoneBefore() for path in others}}

    def layer(self, name: str) -> nn.Module:
        """Return one of its layers."""
        return self.module.get_submodule(self.paths[self.matrices.index(name)])


@torch.no_grad()
def check_reading(network: FeedForward) -> None:
    """Compare a module with the feed-forward network that was recognized in it, on random tokens.

    Raises:
        TargetError: they differ, or the module does not take tokens alone.
    """
    if network.matrix(network.matrices[0]).is_meta:
        return
    x = _tokens(network)
    with in_eval_mode(network.module):
        try:
            got = network.module(x)
        except Exception as error:  # whatever a module of unknown kind does with one tensor
            raise TargetError(f"it does not take tokens alone: {error}") from error
    if not isinstance(got, Tensor) or not _close(got, _compute(network, x)):
        raise TargetError(f"{network.name} computes something else than {' and '.join(network.paths)} alone")


@torch.no_grad()
def computes_inside(network: FeedForward) -> bool:
    """Return True if a larger layer computes the same with the network in place of its first matrix."""
    if network.matrix(network.matrices[0]).is_meta:
        return False
    x = _tokens(network)
    with in_eval_mode(network.module):
        wanted = _call(network.module, x)
        if wanted is None:
            return False
        with _replaced(network.module, network.inside_replacements(_Whole(network))):
            got = _call(network.module, x)
    return got is not None and _close(got, wanted)


class _Whole(nn.Module):
    """The whole network as one module, which uses the layers in place."""

    def __init__(self, network: FeedForward) -> None:
        super().__init__()
        layers = [network.layer(name) for name in network.matrices]
        self._network = (network, layers)  # in a tuple: not registered

    def forward(self, x: Tensor) -> Tensor:
        network, (up, down) = self._network
        return down(ACTIVATIONS[network.activation](up(x)))


def _tokens(network: FeedForward) -> Tensor:
    first = network.matrix(network.matrices[0])
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, _PROBE_TOKENS, first.shape[1], generator=generator, device="cpu").to(first)


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


def _kind(layer: nn.Module) -> LayerKind:
    kind = kind_of(layer)
    assert kind is not None
    return kind


def _compute(network: FeedForward, x: Tensor) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        weight = network.matrix(name)
        return nn.functional.linear(value.to(weight.dtype), weight, network.bias(name))

    activate: Callable[[Tensor], Tensor] = ACTIVATIONS[network.activation]
    hidden = activate(linear(network.matrices[0], x))
    if len(network.matrices) == 3:
        hidden = hidden * linear(network.matrices[1], x)
    return linear(network.matrices[-1], hidden)
