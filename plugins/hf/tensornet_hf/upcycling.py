"""Upcycling: replace dense feed-forward networks by mixtures of experts that share cores.

Most feed-forward networks are separate modules; the output of the module is compared with that of its
matrices and activation, on random tokens. In BERT, BART and similar models the two matrices and the
activation are parts of a larger layer. For the classes in `INSIDE` a mixture replaces the first matrix, and
identities replace the activation and the second matrix.
"""

# ruff: noqa: RUF009 (`option` returns a `dataclasses.field`)

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel

from tensornet._util import check_size, in_eval_mode
from tensornet.budget import Budget
from tensornet.compression.apply import set_submodule
from tensornet.compression.config import option
from tensornet.errors import BudgetError, NonFiniteError, ShapeError, TargetError, TopologyError
from tensornet.nn import register_module_type
from tensornet.nn.extension import structure_changed
from tensornet.nn.layer_kinds import carry_hooks, kind_of, layer_bias
from tensornet.nn.targets import PATTERN_RULES, matches
from tensornet.topologies import TopologyFamily, topology_family
from tensornet.topologies.registry import fixed_topologies, topology_of_shape
from tensornet.topology import Topology
from tensornet_hf.quantizer import OWNERS, put_owners
from tensornet_moe import (
    ExpertBank,
    ExpertFFN,
    ExpertPool,
    LowRankDeltaExperts,
    Router,
    SharedCoreExperts,
    SharedCoreMoE,
    SharedCores,
    TopKRouter,
    share_across_layers,
)
from tensornet_moe.bank import check_not_negative
from tensornet_moe.ffn import ACTIVATIONS
from tensornet_moe.mixtures import SHARES, Share, check_group, experts_from
from tensornet_moe.pool import BALANCES, Balance
from tensornet_moe.routers import COMBINE, Combine, check_capacity, router_kind

DropoutPlace = Literal["hidden", "output", "none"]

#: Names of the matrices in the order (gate,) up, down, and the place of the dropout.
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
#: Classes of transformers with such a network inside: paths of its first matrix, activation, second matrix.
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
_BUDGETS = ("max_bond", "rel_error", "param_ratio")
_ROUTER_OPTIONS = ("jitter", "combine", "normalize", "bias_rate")
#: Words of `tensornet_moe.mixture` for options of `MoEConfig` with other names.
_WORDS = {"experts": "num_experts", "balance_coef": "aux_loss_coef"}


@dataclass(frozen=True)
class MoEConfig:
    """Options of `upcycle`: experts, router, shared cores and auxiliary losses.

    The variants of the paper's comparison: `shared="center"` is MPOE; `sites=1, shared="none"` gives every
    expert its own dense matrices (Switch); `shared="none"` alone gives every expert its own cores;
    `max_bond=` truncates. `share=` chooses topology and cores as `tensornet_moe.mixture` does.

    With `pool=` several layers use the experts of one `ExpertPool`, which the model owns. Expert `e` of the
    pool of `g` layers starts as the network of layer `e % g`. With `share="none"` the model then computes the
    same as before, since the router of each layer chooses the copies of its own network, for any token: the
    rows for the other experts are zero, and the own ones have a bias above `1 / others`, which the
    probability of another expert cannot exceed. With `share="center"` or `"base"` different networks are
    fitted by one center or one base. That is far from exact (see the errors in the report), so the model must
    be trained.

    Which experts a layer uses after training depends on `balance`. `"layer"`: the biases fade by `bias_rate`
    in each step until each layer uses all experts evenly. `"pool"`: the load is even already, so a layer uses
    those of other layers only for tokens whose router prefers them by more than the bias.

    Args:
        num_experts: number of experts of each network, or of each pool.
        top_k: number of experts that process each token.
        router: kind of the routers: switch (one expert for each token), topk, expert_choice; auto takes
            switch for one expert a token, else topk. `"expert_choice"` is for encoders only, since it uses
            later tokens. A router of your own has the name given to `tensornet_moe.register_router`.
        shared: cores that all experts share: center, ends, none, all, or names of cores.
        share_across_layers: also share these cores between all layers of one shape; such a model must be
            trained. One core cannot fit unrelated layers, so the model starts far from the dense model;
            see `tensornet_moe.share_across_layers`.
        topology: family of the decomposition. The name of a family, or topologies, one for each shape of
            matrix in the networks.
        sites: number of cores of a chain (default: 5, as in the paper).
        model_dims: factors of the model's width, the same for every matrix.
        hidden_dims: factors of the width of the hidden layer.
        max_bond: largest bond dimension of each matrix (default: no truncation).
        rel_error: largest relative error of each matrix (Frobenius norm).
        param_ratio: share of the parameters of a matrix that the cores of one expert may have, such as 0.5.
        noise: relative noise on the private cores, which makes the experts differ.
        aux_loss_coef: weight of the load-balancing loss (default: 0.01, or 0 with a bias rate).
        z_loss_coef: weight of the router z-loss.
        capacity_factor: slots of each expert relative to an even load (default: no limit). With
            `"expert_choice"`: average number of experts for each token, 1 if absent.
        jitter: relative noise on the inputs of the routers in training.
        combine: weights of the chosen experts. Only with `"unit"` the model initially computes the same as
            the dense model; see `tensornet_moe.Router`.
        target_modules: networks to replace: a name, the end of a name, a glob, or re:REGEX (default: all
            feed-forward networks).
        matrices: names of the layers in networks whose names are not known, in the order (gate,) up, down.
        seed: seed of the routers and the noise.
        share: what experts share, in place of `shared` and a topology. See `tensornet_moe.mixture`; it is
            `"none"` if absent in a pool.
        pool: use one pool of experts for all layers, or for each N neighbouring layers. `num_experts` is
            then the size of a pool, at least `N * top_k`.
        balance: where the load of a pool is balanced: over all its layers together, or in each layer. See
            `ExpertPool`.
        bias_rate: step of the router biases that balance the load without a loss (default: 0.001 with a
            pool, else 0). A pool needs it. See `tensornet_moe.update_biases`, and `RouterBiasCallback` for
            `Trainer`.
        normalize: normalize the logits of the routers. See `tensornet_moe.Router`.

    Raises:
        ValueError, BudgetError: an option is out of its range, or two options exclude one another.

    Example:
        >>> th.MoEConfig(num_experts=4, router="topk", top_k=2).top_k
        2
    """

    num_experts: int = option(8, "experts", "integer", name="experts")
    top_k: int = option(1, "experts", "integer")
    router: str = option("auto", "routing", "text")
    shared: str | Sequence[str] = option("center", "advanced", "names")
    share_across_layers: bool = option(False, "advanced", "flag")
    topology: str | TopologyFamily | Topology | Sequence[Topology] = option("mpo", "advanced", "text")
    sites: int | None = option(None, "advanced", "integer")
    model_dims: Sequence[int] | None = None
    hidden_dims: Sequence[int] | None = None
    max_bond: int | None = option(None, "advanced", "integer")
    rel_error: float | None = option(None, "advanced", "number")
    param_ratio: float | None = option(None, "advanced", "share")
    noise: float = option(0.0, "experts", "number")
    aux_loss_coef: float | None = option(None, "routing", "number")
    z_loss_coef: float = option(0.0, "routing", "number")
    capacity_factor: float | None = option(None, "routing", "number")
    jitter: float = option(0.0, "routing", "number")
    combine: Combine = option("unit", "advanced", choices=COMBINE)
    target_modules: Sequence[str] | None = option(None, "layers", "patterns", name="target")
    matrices: Sequence[str] | None = None
    seed: int = option(0, "experts", "integer")
    share: Share | None = option(None, "experts", choices=SHARES)
    pool: Literal["all"] | int | None = option(None, "experts", "pool")
    balance: Balance = option("pool", "routing", choices=BALANCES)
    bias_rate: float | None = option(None, "routing", "number")
    normalize: bool = option(False, "routing", "flag")

    def __post_init__(self) -> None:
        Budget(max_bond=self.max_bond, rel_error=self.rel_error, param_ratio=self.param_ratio)
        for name in ("num_experts", "top_k", "sites"):
            if (size := getattr(self, name)) is not None:
                check_size(name, size, error=ValueError)
        if isinstance(self.topology, TopologyFamily):
            object.__setattr__(self, "topology", topology_family(self.topology).name)
        elif not isinstance(self.topology, str):
            if not (fixed := fixed_topologies(self.topology)):
                raise TopologyError(
                    "topology must be the name of a family, a registered family, a Topology or a list of "
                    f"topologies; got {self.topology!r:.200}."
                )
            choosing = ("sites", "model_dims", "hidden_dims", "max_bond", "rel_error", "param_ratio")
            if given := [name for name in choosing if getattr(self, name) is not None]:
                raise TopologyError(
                    f"A topology fixes all dims and bonds: drop {', '.join(given)}, or give the name of a "
                    "family."
                )
            object.__setattr__(self, "topology", fixed)
        if self.router == "auto":
            object.__setattr__(self, "router", "switch" if self.top_k == 1 else "topk")
        kind = router_kind(self.router)
        self._check_sharing(kind)
        if self.bias_rate is None:
            object.__setattr__(self, "bias_rate", 0.0 if self.pool is None else 0.001)
        if self.aux_loss_coef is None:
            object.__setattr__(self, "aux_loss_coef", 0.0 if self.bias_rate else 0.01)
        if self.combine not in COMBINE:
            raise ValueError(f"Unknown combine={self.combine!r}; choose one of {', '.join(COMBINE)}.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} with num_experts={self.num_experts}: a token can go to at least 1 "
                "and at most num_experts experts."
            )
        if self.top_k != 1 and "top_k" not in kind.options:
            raise ValueError(f'top_k={self.top_k} needs router="topk"; {self.router!r} has no top_k.')
        for name in ("aux_loss_coef", "z_loss_coef", "noise", "bias_rate"):
            check_not_negative(**{name: getattr(self, name)})
        check_capacity(self.capacity_factor)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {self.jitter}.")
        lists = ("model_dims", "hidden_dims", "matrices", "target_modules")
        for name in lists:
            given = getattr(self, name)
            if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
                raise ValueError(f"{name} must be a list, got {given!r}; write {name}=[{given!r}, ...].")
        if self.model_dims and self.hidden_dims and len(self.model_dims) != len(self.hidden_dims):
            raise ValueError(
                f"model_dims={self.model_dims} and hidden_dims={self.hidden_dims} must have one factor for "
                "each site, so equally many; use 1 where a site has none."
            )
        if self.share_across_layers and self.shared in ("none", (), []):
            raise ValueError('share_across_layers=True with shared="none" shares nothing.')
        if self.share_across_layers and (self.rel_error is not None or self.param_ratio is not None):
            raise ValueError(
                "share_across_layers=True fits all layers by the same bonds: limit them with max_bond, not "
                "with rel_error or param_ratio, which would choose other bonds for each layer."
            )

    def _check_sharing(self, kind: type[Router]) -> None:
        """Raise ValueError unless `share` and `pool` fit the other options."""
        if self.share not in (None, *SHARES):
            raise ValueError(f"Unknown share={self.share!r}; choose one of {', '.join(SHARES)}.")
        if self.pool is not None and self.share is None:
            object.__setattr__(self, "share", "none")
        if self.share is not None:
            chosen = {"shared": "center", "topology": "mpo", "share_across_layers": False}
            chosen |= dict.fromkeys(("sites", "model_dims", "hidden_dims", *_BUDGETS))
            if given := [name for name, default in chosen.items() if getattr(self, name) != default]:
                raise ValueError(
                    f"share={self.share!r} chooses cores and dims (it is 'none' if absent with a pool): drop "
                    f"{', '.join(given)}, or drop share and pool."
                )
            if self.share == "base" and self.noise:
                raise ValueError('noise is for private cores: with share="base" the deltas differ already.')
        if self.balance not in BALANCES:
            raise ValueError(f"Unknown balance={self.balance!r}; choose one of {', '.join(BALANCES)}.")
        if self.pool is None:
            return
        if self.pool != "all":
            check_size('pool (or "all")', self.pool, least=2, error=ValueError)
        if not issubclass(kind, TopKRouter) or self.bias_rate == 0:
            raise ValueError(
                'A pool needs router="switch" or "topk" and a bias_rate above 0: with its biases each layer '
                "chooses its own experts at the start."
            )

    def make_router(self, num_features: int, *, seed: int) -> Router:
        """Build a router with weights drawn from `seed`, in float32 on the CPU."""
        kind = router_kind(self.router)
        options = {key: getattr(self, key, None) for key in (*_ROUTER_OPTIONS, *kind.options)}
        given = {key: value for key, value in options.items() if value is not None}
        with torch.device("cpu"):
            router = kind(num_features, self.num_experts, **given)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            router.weight.normal_(0, 0.1 / num_features**0.5, generator=generator)
        return router


@dataclass(frozen=True)
class UpcycledLayer:
    """Entry of the report for one network that was replaced by a mixture.

    Args:
        name: name of the module.
        dense_params: parameters before.
        params: parameters after, router included; without those that several layers share.
        shared_params: parameters that all experts share.
        error: largest relative Frobenius error among its matrices; in a pool, over all experts of the pool.
    """

    name: str
    dense_params: int
    params: int
    shared_params: int
    error: float


@dataclass(frozen=True)
class UpcycleReport:
    """Result of `upcycle`.

    Args:
        layers: one entry for each network.
        num_experts: experts of each network, or of each pool.
        across_params: parameters that several layers share, those of pools included.
        pools: number of pools.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path())
        >>> report = th.upcycle(model, th.MoEConfig(num_experts=2))
        >>> report.num_experts, report.dense_experts_ratio < 1
        (2, True)
    """

    layers: tuple[UpcycledLayer, ...]
    num_experts: int
    across_params: int = 0
    pools: int = 0

    @property
    def dense_params(self) -> int:
        """Parameters of the networks before."""
        return sum(layer.dense_params for layer in self.layers)

    @property
    def params(self) -> int:
        """Parameters of the mixtures; cores shared by several layers count once."""
        return sum(layer.params for layer in self.layers) + self.across_params

    @property
    def dense_experts_ratio(self) -> float:
        """Parameters relative to a mixture whose experts are all dense."""
        return self.params / (self.num_experts * self.dense_params)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        totals = ("num_experts", "pools", "dense_params", "params", "across_params", "dense_experts_ratio")
        layers = [asdict(layer) for layer in self.layers]
        return {name: getattr(self, name) for name in totals} | {"layers": layers}

    def __str__(self) -> str:
        worst = max(layer.error for layer in self.layers)
        pools = f" in {self.pools} pool{'s' * (self.pools > 1)}" if self.pools else " each"
        return (
            f"{len(self.layers)} feed-forward networks became {self.num_experts} experts{pools}: "
            f"{self.dense_params:,} -> {self.params:,} parameters, {self.dense_experts_ratio:.3f} of dense "
            f"experts; largest relative error {worst:.2e}"
        )


# --- recognizing feed-forward networks ------------------------------------------------------------------


@dataclass(frozen=True)
class FeedForward:
    """One network `W_down act(W_up x)`, gated `W_down (act(W_gate x) * W_up x)`.

    Args:
        names: names of the module in the model; reports use the first.
        module: the module that is the network, or contains it.
        paths: its layers inside the module, in order.
        activation: a name in `tensornet_moe.ffn.ACTIVATIONS`.
        dropout: probability.
        dropout_place: after the activation, on the output, or nowhere.
        inside: None if the module is the network. Otherwise the paths of the submodules to replace: the first
            by the network, the others by identities.
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
        """Names of the matrices of the network, in order, with `_` in place of dots."""
        return tuple(path.replace(".", "_") for path in self.paths)

    def layer(self, name: str) -> nn.Module:
        """Return a layer by the name of its matrix."""
        return self.module.get_submodule(self.paths[self.matrices.index(name)])

    def matrix(self, name: str) -> Tensor:
        """Return one weight, shape `(out_features, in_features)`."""
        kind = kind_of(self.layer(name))
        assert kind is not None
        return kind.matrix(self.layer(name)).detach()

    def bias(self, name: str) -> Tensor | None:
        """Return one bias, shape `(out_features,)`."""
        return layer_bias(self.layer(name))

    def replacements(self, mixture: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that replace the network, by name in the model."""
        if self.inside is None:
            return dict.fromkeys(self.names, mixture)
        first, *others = self.inside
        parts = {first: mixture, **{path: DoneBefore() for path in others}}
        return {f"{name}.{path}": part for name in self.names for path, part in parts.items()}

    def compute(self, x: Tensor) -> Tensor:
        """Compute the network from its matrices, `x: (..., features)`."""
        first, *between, last = self.matrices
        hidden = ACTIVATIONS[self.activation](nn.functional.linear(x, self.matrix(first), self.bias(first)))
        for name in between:
            hidden = hidden * nn.functional.linear(x, self.matrix(name), self.bias(name))
        weight = self.matrix(last)  # float32 in T5
        return nn.functional.linear(hidden.to(weight.dtype), weight, self.bias(last))


class DoneBefore(nn.Module):
    """Identity in place of a part of a feed-forward network that a mixture before it already computes.

    Unlike `nn.Identity` it has a description, so that it is restored when a saved model is loaded.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def spec(self) -> dict[str, Any]:
        """Return the JSON-ready description, see `tensornet.nn.register_module_type`."""
        return {"type": "done_before"}


register_module_type("done_before", lambda spec, device, dtype: DoneBefore())


def find_feed_forwards(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | None = None,
    matrices: Sequence[str] | None = None,
) -> list[FeedForward]:
    """Find the feed-forward networks of a model, and check each.

    Args:
        model: any model.
        target_modules: patterns as in `CompressionConfig.target_modules`; all that are recognized if absent.
        matrices: names of the two or three layers, (gate,) up, down, for networks with other names.

    Raises:
        TargetError: no network is found, a pattern matches none, or a named module computes something else or
            is an expert of a mixture.
    """
    forms = FORMS if matrices is None else {tuple(matrices): FORMS.get(tuple(matrices), "output")}
    looked_for = (
        f"Looked for modules with linear layers {', '.join('/'.join(form) for form in forms)} and an "
        "activation. For another form name the module with target_modules=[...] and its layers with "
        'matrices=("up", "down").'
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
                raise TargetError(f"{names[0]} is an expert of a mixture already")
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


@torch.no_grad()
def _recognize(
    names: tuple[str, ...], module: nn.Module, paths: tuple[str, ...], place: DropoutPlace
) -> FeedForward:
    """Recognize the network in a module.

    Raises:
        TargetError: the module computes something else, or experts do not have its activation.
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
        except Exception as error:  # an unknown module may raise anything
            raise TargetError(f"it does not take tokens alone: {error}") from error
    wanted = network.compute(x)
    tolerance = 1e-3 if wanted.dtype in (torch.float32, torch.float64) else 0.05
    # Not "smaller than", so that NaN passes here: the decomposition will name the matrix with NaN.
    if (
        not isinstance(got, Tensor)
        or got.shape != wanted.shape
        or float((got - wanted).norm()) > tolerance * float(wanted.norm())
    ):
        raise TargetError(
            f"{names[0]} computes something else than {' and '.join(paths)} alone, and no network inside a "
            f"{type(module).__name__} is known"
        )
    return network


def _activation_name(module: nn.Module, function: Callable[[Tensor], Tensor]) -> str:
    """Recognize an activation by its values."""
    grid = torch.linspace(-6, 6, 97, device=next(module.parameters()).device)
    values = function(grid)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(values, known(grid), atol=1e-6):
            return name
    raise TargetError(f"its activation is none of {', '.join(ACTIVATIONS)}")


# --- upcycling -------------------------------------------------------------------------------------------


@torch.no_grad()
def upcycle(
    model: nn.Module,
    config: MoEConfig | None = None,
    *,
    causal: bool | None = None,
    progress: bool = False,
    **words: Any,
) -> UpcycleReport:
    """Replace dense feed-forward networks by mixtures of experts, in place.

    Every expert starts as the decomposition of its dense network. Without truncation, capacity and noise the
    model therefore computes the same as before, for any routing (except `"expert_choice"`, where tokens that
    no expert chooses pass through the residual). A Hugging Face model saves, loads and trains as before, and
    the auxiliary losses are added to its loss in training. For other models collect them with
    `tensornet_moe.collect_aux_losses`.

    If a network is not a separate module (BERT, OPT, BART), the mixture replaces its first matrix, and
    identities replace the activation and the second matrix. In training, the dropout between them is then
    applied to the output of the mixture.

    Args:
        model: T5, GPT-2, BERT, or any model with networks `W_down act(W_up x)` (gated or not).
        config: options of the mixtures; or give them as `words`.
        causal: whether a token must not depend on later ones. This matters for a router that uses later
            tokens (`"expert_choice"`). If absent, a model is causal, except encoders of encoder-decoder
            models, and classes with masked language models or image classifiers.
        progress: show a progress bar.
        words: options of `MoEConfig` in the words of `tensornet_moe.mixture`: `experts`, `top_k` (2 if
            absent), `share`, `router` (`"topk"` if absent), `balance_coef`; all others by their own names.

    Raises:
        TargetError: no feed-forward network is found, a network computes something else, or the router uses
            later tokens and a network is, or may be, causal; the model is unchanged.
        TopologyError, BudgetError, NonFiniteError: from a decomposition; the model is unchanged.
        ShapeError, ValueError: layers of different sizes cannot use one pool, the size of a group does not
            divide their number, or the pool has fewer experts than its layers choose; the model is unchanged.
        TypeError: `model` or `config` has another type, both `config` and `words` are given, or a word is
            unknown.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path())
        >>> report = th.upcycle(model, share="center", experts=4, top_k=2)
        >>> len(report.layers), report.dense_experts_ratio < 0.4
        (4, True)
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path())
        >>> print(th.upcycle(model, th.MoEConfig(num_experts=4, pool="all")))
        4 feed-forward networks became 4 experts in 1 pool: ...
    """
    if config is None:
        named = {_WORDS.get(name, name): value for name, value in words.items()}
        if len(named) < len(words):
            raise TypeError(f"upcycle got one option by two names: {', '.join(words)}.")
        named.setdefault("router", "topk")
        if isinstance(named["router"], str) and "top_k" in router_kind(named["router"]).options:
            named.setdefault("top_k", 2)
        config = MoEConfig(**named)
    elif words:
        raise TypeError(
            f"upcycle takes a MoEConfig or words, got both: add {', '.join(words)} to the config."
        )
    if not isinstance(model, nn.Module) or not isinstance(config, MoEConfig):
        raise TypeError(
            "upcycle takes a model and a MoEConfig, got a "
            f"{type(model).__name__} and a {type(config).__name__}."
        )
    networks = find_feed_forwards(model, target_modules=config.target_modules, matrices=config.matrices)
    if not router_kind(config.router).causal and causal is not False:
        _refuse_causal(config, model, networks, causal)
    groups = _groups(model, networks, config)
    owners: dict[str, nn.Module] = {}
    banks: Mapping[tuple[int, str], SharedCoreExperts] = {}
    if config.share_across_layers:
        cores, banks = _share_across(model, networks, config, progress)
        owners |= cores
    made: list[SharedCoreMoE] = []
    entries = []
    for number, group in enumerate(tqdm(groups, desc="upcycling", disable=not progress, unit="layer")):
        members = [networks[index] for index in group]
        names = " to ".join(dict.fromkeys((members[0].names[0], members[-1].names[0])))
        own: dict[str, SharedCoreExperts | LowRankDeltaExperts] = {}
        for position, name in enumerate(members[0].matrices):
            if (group[0], name) in banks:
                own[name] = banks[group[0], name]
                continue
            with _errors_name(f"{names}.{name}"):
                own[name] = _bank(members, name, config, seed=(config.seed + group[0]) * 3 + position)
        network = _experts(members, own, config)
        experts: ExpertFFN | ExpertPool = network
        if config.pool is not None:
            label = "pool" if len(groups) == 1 else f"pool{number}"
            owners[label] = experts = ExpertPool(network, label=label, balance=config.balance)
        shared = {id(p): p.numel() for bank in own.values() for p in bank.shared_parameters().values()}
        for place, index in enumerate(group):
            mixture = _mixture(networks[index], experts, config, seed=config.seed + index)
            if config.pool is not None:
                _choose_own(mixture.router, place, len(group))
            made.append(mixture)
            layers = [networks[index].layer(name) for name in own]
            entries.append(
                UpcycledLayer(
                    name=networks[index].names[0],
                    dense_params=sum(p.numel() for layer in layers for p in layer.parameters()),
                    params=sum(p.numel() for p in mixture.parameters()),
                    shared_params=sum(shared.values()),
                    error=max(bank.error or 0.0 for bank in own.values()),
                )
            )
    put_owners(model, owners)
    for dense, mixture in zip(networks, made, strict=True):
        for name, part in dense.replacements(mixture).items():
            if dense.inside is None:  # otherwise the mixture replaces a matrix
                carry_hooks(model.get_submodule(name), part)
            set_submodule(model, name, part)
    structure_changed(model)
    across = sum(p.numel() for owner in owners.values() for p in owner.parameters())
    pools = 0 if config.pool is None else len(groups)
    return UpcycleReport(tuple(entries), config.num_experts, across, pools)


def _groups(model: nn.Module, networks: Sequence[FeedForward], config: MoEConfig) -> list[list[int]]:
    """Group the indices of networks by the pool that they use; each is alone without pools.

    Raises:
        ValueError: the groups do not divide the networks, or a pool has too few experts.
        ShapeError: networks of a group are of different shapes or functions.
        TargetError: the model has no place for pools, or networks of a group are on several devices.
    """
    if config.pool is None:
        return [[index] for index in range(len(networks))]
    size = len(networks) if config.pool == "all" else int(config.pool)
    if len(networks) < 2:
        raise ValueError(
            f"A pool is for several layers, and {networks[0].names[0]} is the only one to replace."
        )
    check_group("pool", size, len(networks), least=2)
    if config.num_experts < size * config.top_k:
        raise ValueError(
            f"num_experts={config.num_experts} for a pool of {size} layers with top_k={config.top_k}: each "
            f"layer starts with top_k experts of its own, so at least {size * config.top_k} are needed. Give "
            "more experts, or choose smaller groups, for example pool=2."
        )
    _owners_place(model, "pool")
    for index, network in enumerate(networks):
        first = networks[index - index % size]
        have, want = _function_of(network), _function_of(first)
        if have != want:
            raise ShapeError(
                f"{first.names[0]} and {network.names[0]} cannot use one pool: they are {want} and {have}. "
                "Choose networks that are alike with target_modules=[...], or smaller groups, as pool=2."
            )
        _same_device([n.matrix(name) for n in (first, network) for name in n.matrices], "pool", "experts")
    return [list(range(k, k + size)) for k in range(0, len(networks), size)]


def _function_of(network: FeedForward) -> dict[str, object]:
    """Describe what a network computes, whatever its weights are."""
    dropout = network.dropout if network.dropout_place == "hidden" else 0.0
    shapes = {name: tuple(network.matrix(name).shape) for name in network.matrices}
    return {"(out, in)": shapes, "activation": network.activation, "dropout": dropout}


def _choose_own(router: Router, place: int, layers: int) -> None:
    """Let a router choose the experts of its layer, `e % layers == place`, whatever the token.

    The others have equal probabilities, so none exceeds one divided by their number. The bias does.
    """
    own = torch.arange(router.num_experts, device=router.weight.device) % layers == place
    router.weight[~own] = 0
    assert router.bias_steps is not None
    router.bias_steps[own] = math.ceil(1 / (int((~own).sum()) * router.bias_rate)) + 1


def _refuse_causal(
    config: MoEConfig, model: nn.Module, networks: Sequence[FeedForward], causal: bool | None
) -> None:
    """Raise TargetError unless every network may use later tokens."""
    found = list(networks)
    if causal is None and isinstance(model, PreTrainedModel):
        if model.config.is_encoder_decoder:
            encoder = {id(module) for module in model.get_encoder().modules()}
            found = [network for network in networks if id(network.module) not in encoder]
        elif not getattr(model.config, "is_decoder", False) and not model.can_generate():
            encoders = (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
            found = [] if any(type(model.config) in kinds for kinds in encoders) else found
    if not found:
        return
    others = [network.names[0] for network in networks if network not in found]
    rest = (
        f" The other {len(others)} networks, such as {others[0]}, may have it: name them with "
        "target_modules=[...] (--target)."
        if others
        else f" If every token of this {type(model).__name__} may see all others, say so by causal=False."
    )
    raise TargetError(
        f"router={config.router!r} looks at later tokens, but {len(found)} of {len(networks)} feed-forward "
        f"networks are causal, or not declared to be of an encoder; the first is {found[0].names[0]}: "
        f'training would leak the tokens to be predicted. Use router="switch" or "topk".{rest}'
    )


def _bank(
    members: Sequence[FeedForward], name: str, config: MoEConfig, *, seed: int
) -> SharedCoreExperts | LowRankDeltaExperts:
    """Build the bank of one matrix, which starts as that of the networks in turn."""
    weights = [network.matrix(name) for network in members]
    if config.share is not None:
        return experts_from(
            torch.stack([weight.to(weights[0]) for weight in weights]),
            experts=config.num_experts,
            share=config.share,
            noise=config.noise,
            seed=seed,
        )
    return SharedCoreExperts.from_dense(
        weights[0],
        seed=seed,
        rel_error=config.rel_error,
        param_ratio=config.param_ratio,
        **_options(members[0], name, config),
    )


def _experts(members: Sequence[FeedForward], banks: Mapping[str, ExpertBank], config: MoEConfig) -> ExpertFFN:
    """Build experts of banks that start as those of the networks in turn, biases included."""
    first = members[0]
    weight = first.matrix(first.matrices[0])
    biases = {name: [network.bias(name) for network in members] for name in first.matrices}
    experts = ExpertFFN(
        banks,
        activation=first.activation,
        bias=any(bias is not None for each in biases.values() for bias in each),
        dropout=first.dropout if first.dropout_place == "hidden" else 0.0,
        device=weight.device,
        dtype=weight.dtype,
    )
    for name, each in biases.items():
        for expert in range(config.num_experts):
            if (bias := each[expert % len(each)]) is not None:
                getattr(experts, f"{name}_bias")[expert] = bias
    for bank in banks.values():
        bank.requires_grad_(True)
    return experts


def _mixture(
    network: FeedForward, experts: ExpertFFN | ExpertPool, config: MoEConfig, *, seed: int
) -> SharedCoreMoE:
    """Build a mixture of these experts; `seed` initializes the router."""
    first = network.matrix(network.matrices[0])
    # With a router that applies the capacity itself, experts choose tokens. The load is balanced by
    # construction, so the balancing loss would be a constant.
    choice = "capacity_factor" in router_kind(config.router).options
    assert config.aux_loss_coef is not None
    return SharedCoreMoE(
        config.make_router(first.shape[1], seed=seed).to(device=first.device, dtype=first.dtype),
        experts,
        capacity_factor=None if choice else config.capacity_factor,
        balance_coef=0.0 if choice else config.aux_loss_coef,
        z_coef=config.z_loss_coef,
        dropout=network.dropout if network.dropout_place == "output" else 0.0,
    )


def _options(network: FeedForward, name: str, config: MoEConfig) -> dict[str, Any]:
    """Select the options of a bank of experts for one matrix; the family raises for invalid dims."""
    options: dict[str, Any] = {
        "num_experts": config.num_experts,
        "topology": config.topology,
        "shared": config.shared,
        "noise": config.noise,
        "max_bond": config.max_bond,
    }
    if isinstance(config.topology, tuple):
        rows, columns = network.matrix(name).shape
        return options | {"topology": topology_of_shape(config.topology, (rows, columns), name)}
    assert isinstance(config.topology, str)
    family = topology_family(config.topology)
    dims = (config.model_dims, config.hidden_dims)
    if {"out_dims", "in_dims"} <= set(family.options):
        out_dims, in_dims = dims if name == network.matrices[-1] else dims[::-1]
        chosen: dict[str, Any] = {"sites": config.sites, "out_dims": out_dims, "in_dims": in_dims}
    else:
        chosen = {"sites": config.sites, "model_dims": dims[0], "hidden_dims": dims[1]}
    if config.sites is None and dims == (None, None):
        chosen |= family.mixture_options
    return options | {key: value for key, value in chosen.items() if value is not None}


# --- cores that layers share ----------------------------------------------------------------------------


def _share_across(
    model: nn.Module, networks: Sequence[FeedForward], config: MoEConfig, progress: bool
) -> tuple[dict[str, SharedCores], dict[tuple[int, str], SharedCoreExperts]]:
    """Build banks whose shared cores serve all layers with a matrix of the same name and shape.

    Returns:
        Owners of the shared cores by label, and the banks by index of the network and name of the matrix. A
        matrix without a match in another layer has no bank.

    Raises:
        TargetError: the model already has shared cores; or it is a plain container, which would run the owner
            as one of its layers; or layers that would share cores are on different devices.
    """
    _owners_place(model, "share_across_layers=True")
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for index, network in enumerate(networks):
        for name in network.matrices:
            groups.setdefault((name, tuple(network.matrix(name).shape)), []).append(index)
    shared = [(*key, users) for key, users in groups.items() if len(users) > 1]
    owners: dict[str, SharedCores] = {}
    banks: dict[tuple[int, str], SharedCoreExperts] = {}
    for name, shape, users in tqdm(
        shared, desc="fitting layers jointly", disable=not progress, unit="matrix"
    ):
        weights = [networks[index].matrix(name) for index in users]
        _same_device(weights, "share_across_layers=True", name)
        label = f"{name}_{shape[0]}x{shape[1]}"
        with _errors_name(f"{name} of {len(weights)} layers"):
            owners[label], made = share_across_layers(
                torch.stack([w.to(weights[0]) for w in weights]),
                label=label,
                seed=config.seed,
                **_options(networks[users[0]], name, config),
            )
        banks |= {(index, name): bank for index, bank in zip(users, made, strict=True)}
    return owners, banks


def _owners_place(model: nn.Module, what: str) -> None:
    """Raise TargetError if there is no place in a model for what its layers share."""
    place = model.base_model if isinstance(model, PreTrainedModel) else model
    if hasattr(place, OWNERS):
        raise TargetError(
            "Layers of this model share cores or experts already; upcycle all that are to share in one call, "
            "with target_modules=[...]."
        )
    if isinstance(place, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise TargetError(
            f"{what} needs a place for what layers share, and a {type(place).__name__} would take it for a "
            "layer. Put the container into a module of its own, and upcycle that."
        )


def _same_device(weights: Sequence[Tensor], what: str, name: str) -> None:
    """Raise TargetError unless weights that are to share are on one device."""
    if len(devices := {str(w.device) for w in weights}) > 1:
        raise TargetError(
            f"{what} keeps what layers share in one place, and {name} of these layers lies on "
            f"{', '.join(sorted(devices))}: put the model on one device, or share within each layer alone."
        )


@contextmanager
def _errors_name(what: str) -> Iterator[None]:
    try:
        yield
    except (BudgetError, NonFiniteError, ShapeError, TopologyError) as error:
        raise type(error)(f"{what}: {error}") from error
