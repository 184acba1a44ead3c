"""Upcycling: replace dense feed-forward networks by mixtures of experts that share cores.

Most feed-forward networks are separate modules. A module is recognized as such a network by its output on
random tokens, which must equal the output that is computed from its matrices and its activation. In BERT,
BART and similar models, the matrices and the activation are parts of a larger layer. For the classes in
`INSIDE`, a mixture replaces the first matrix, and identities replace the activation and the second matrix.
"""

# ruff: noqa: RUF009 (`option` returns a `dataclasses.field`)

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel

from tensornet._util import check_size, in_eval_mode
from tensornet.compression.apply import set_submodule
from tensornet.compression.config import option
from tensornet.errors import BudgetError, NonFiniteError, ShapeError, TargetError, TopologyError
from tensornet.nn import register_module_type
from tensornet.nn.extension import structure_changed
from tensornet.nn.layer_kinds import carry_hooks, kind_of, layer_bias
from tensornet.nn.targets import PATTERN_RULES, matches
from tensornet_hf.aux_losses import join_aux_losses
from tensornet_hf.quantizer import POOLS, put_pools
from tensornet_moe import (
    ExpertBank,
    ExpertFFN,
    ExpertPool,
    LowRankDeltaExperts,
    Router,
    SharedCoreMoE,
    TopKRouter,
)
from tensornet_moe.bank import check_not_negative
from tensornet_moe.experts import with_noise
from tensornet_moe.ffn import ACTIVATIONS
from tensornet_moe.mixtures import (
    SHARES_OF_MIXTURES,
    MakeBank,
    check_options,
    make_bank,
    make_layer,
    make_router,
    new_experts,
)
from tensornet_moe.pool import BALANCES, Balance
from tensornet_moe.routers import COMBINE, Combine, check_capacity, router_kind
from tensornet_moe.sharing import Share

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
class UpcycleOptions:
    """Options of `upcycle`; an option of `tensornet_moe.mixture` with the same name has the same meaning.

    With `pool=`, several layers use the experts of a single `ExpertPool`, which the model owns. Expert `e` of
    a pool for `g` layers starts as a copy of the network of layer `e % g`. At the start, each router chooses
    only copies of its own layer's network. To achieve this, the router's weights for all other experts are
    zero, so the probability of each of these is at most `1 / (number of other experts)`. A bias that exceeds
    this limit is added to the probabilities of the layer's own experts. So the layers share nothing at the
    start. Each token is computed by `top_k` copies of one network, which takes `top_k` times the arithmetic
    of the dense model.

    What the layers share later depends on `balance`. With `"layer"`, the biases decrease by `bias_rate` in
    each step until each layer uses all experts evenly. With `"pool"`, the load is even from the start. A
    layer then uses the experts of another layer only for tokens for which its router prefers these experts
    by more than the bias.

    In a pool, `share="none"` is the default, and the model initially computes the same as before. With
    `"center"` or `"base"`, a single center or base must fit the different networks of the pool. The errors
    are then large (see the report), so the model must be trained.

    Args:
        experts: number of experts of each network, or of each pool. A pool of `g` layers needs at least
            `g * top_k`. In Python, this can also be a function that makes the bank of one matrix, as in
            `tensornet_moe.mixture`. In a pool, the function gets the matrices of all layers.
        top_k: number of experts for each token (default: 2 for the router topk).
        share: what the experts share: a core (center), nothing (none) or a dense matrix (base) (default:
            center, or none in a pool). See `tensornet_moe.mixture`.
        pool: use a single pool of experts for all layers (all), or one pool for each group of N neighbouring
            layers (N).
        rank: rank of the matrix that each expert adds to a shared base (default: a sixteenth of the shorter
            side of a matrix).
        router: type of the routers: topk, switch (one expert per token) or expert_choice. `"expert_choice"`
            is only for encoders, since it uses later tokens. To use a router of your own, give the name under
            which you registered it with `tensornet_moe.register_router`.
        shared_expert: number of hidden features of a new expert that processes every token (default: no such
            expert). Its output is zero at the start.
        capacity_factor: largest number of tokens of an expert, relative to an even load (default: no limit).
            Only for encoders, since what an expert drops depends on later tokens.
            With `"expert_choice"`: average number of experts for each token (default 1).
        balance: balance the load of a pool over all of its layers together (pool), or in each layer (layer)
            (default: pool). See `ExpertPool`.
        balance_coef: weight of the load-balancing loss (default: 0.01, or 0 with a bias rate).
        z_coef: weight of the router z-loss.
        bias_rate: step size of router biases, which balance the load without an auxiliary loss (default:
            0.001 with a pool, otherwise 0). Pools need such biases. See `tensornet_moe.update_biases`, and
            `RouterBiasCallback` for `Trainer`.
        combine: how the outputs of the chosen experts are weighted (default: unit). Only with `"unit"` does
            the model initially compute the same as the dense model; see `tensornet_moe.Router`.
        normalize: normalize the logits of the routers. See `tensornet_moe.Router`.
        jitter: relative noise on the inputs of the routers in training.
        noise: relative noise that is added to private parameters to make the experts differ.
        seed: seed of the initial router weights and the noise.
        target_modules: networks to replace: a name, the end of a name, a glob, or re:REGEX (default: all
            feed-forward networks).
        matrices: names of a network's layers in the order (gate,) up, down; only needed for unusual names.
        router_options: other arguments of a router that you registered.

    Raises:
        ValueError, TypeError: an option is out of its range or unknown, or two options exclude each other.

    Example:
        >>> th.UpcycleOptions(experts=4, share="none").router
        'topk'
    """

    experts: int | MakeBank = option(8, "experts", "integer")
    top_k: int | None = option(None, "experts", "integer")
    share: Share | None = option(None, "experts", choices=SHARES_OF_MIXTURES)
    pool: Literal["all"] | int | None = option(None, "experts", "pool")
    rank: int | None = option(None, "experts", "integer")
    router: str = option("topk", "routing", "text")
    shared_expert: int | None = option(None, "experts", "integer")
    capacity_factor: float | None = option(None, "routing", "number")
    balance: Balance | None = option(None, "routing", choices=BALANCES)
    balance_coef: float | None = option(None, "routing", "number")
    z_coef: float = option(0.0, "routing", "number")
    bias_rate: float | None = option(None, "routing", "number")
    combine: Combine | None = option(None, "advanced", choices=COMBINE)
    normalize: bool = option(False, "routing", "flag")
    jitter: float = option(0.0, "routing", "number")
    noise: float = option(0.0, "experts", "number")
    seed: int = option(0, "experts", "integer")
    target_modules: Sequence[str] | None = option(None, "layers", "patterns", name="target")
    matrices: Sequence[str] | None = None
    router_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_capacity(self.capacity_factor)
        check_not_negative(noise=self.noise, z_coef=self.z_coef, balance_coef=self.balance_coef or 0.0)
        for name in ("matrices", "target_modules"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
                raise ValueError(f"{name} must be a list, got {given!r}; write {name}=[{given!r}, ...].")
        # These calls raise errors for options that are out of range, before a model is changed.
        router = self.make_router(
            1, 8 * (self.top_k or 1) if callable(self.experts) else self.experts, seed=0
        )
        if not callable(self.experts):
            make_bank(torch.empty(0, 2**16, 2**16, device="meta"), **self._words())
        if self.pool is None:
            if self.balance is not None:
                raise ValueError(
                    f"balance={self.balance!r} needs pool=, since it says whether the load of a pool is "
                    "balanced over its layers together. Without a pool, each layer is balanced alone."
                )
            return
        if self.balance not in (None, *BALANCES):
            raise ValueError(f"Unknown balance={self.balance!r}; choose one of {', '.join(BALANCES)}.")
        if self.pool != "all":
            check_size('pool (or "all")', self.pool, least=2, error=ValueError)
        if not isinstance(router, TopKRouter) or router.bias_rate == 0:
            raise ValueError(
                'A pool needs router="switch" or "topk" and a bias_rate above 0, since biases let each layer '
                "choose its own experts at the start."
            )

    def _words(self) -> dict[str, Any]:
        """Return the options that are arguments of `tensornet_moe.mixtures.make_bank`."""
        share = self.share
        if callable(self.experts):
            return {"experts": self.experts, "share": share, "rank": self.rank}
        if share is None and self.pool is not None:
            share = "none"
        return {"experts": self.experts, "share": share, "rank": self.rank}

    def make_router(self, num_features: int, num_experts: int, *, seed: int) -> Router:
        """Build a router in float32 on the CPU, with random weights that depend on `seed`."""
        router = make_router(
            self.router,
            num_features,
            num_experts,
            pooled=self.pool is not None,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            bias_rate=self.bias_rate,
            combine=self.combine or "unit",
            normalize=self.normalize,
            jitter=self.jitter,
            device="cpu",
            **self.router_options,
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            router.weight.normal_(0, 0.1 / num_features**0.5, generator=generator)
        return router


@dataclass(frozen=True)
class UpcycledLayer:
    """Entry of the report for a network that was replaced by a mixture.

    Args:
        name: name of the network's module.
        dense_params: number of parameters of the dense network.
        params: number of parameters of the mixture, including the router, but without parameters that several
            layers share.
        shared_params: number of parameters that all experts share.
        error: largest relative Frobenius error of a matrix, over all experts of the mixture or pool.
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
        layers: an entry for each network that was replaced.
        num_experts: number of experts of each network, or of each pool.
        across_params: number of parameters that several layers share, including those of pools.
        pools: number of pools.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path())
        >>> report = th.upcycle(model, experts=2)
        >>> report.num_experts, report.dense_experts_ratio < 1
        (2, True)
    """

    layers: tuple[UpcycledLayer, ...]
    num_experts: int
    across_params: int = 0
    pools: int = 0

    @property
    def dense_params(self) -> int:
        """Number of parameters of the dense networks."""
        return sum(layer.dense_params for layer in self.layers)

    @property
    def params(self) -> int:
        """Number of parameters of the mixtures; cores that several layers share are counted once."""
        return sum(layer.params for layer in self.layers) + self.across_params

    @property
    def dense_experts_ratio(self) -> float:
        """Number of parameters, relative to `num_experts` dense experts in every layer."""
        return self.params / (self.num_experts * self.dense_params)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
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


# --- upcycling -------------------------------------------------------------------------------------------


@torch.no_grad()
def upcycle(
    model: nn.Module,
    config: UpcycleOptions | None = None,
    *,
    causal: bool | None = None,
    progress: bool = False,
    **words: Any,
) -> UpcycleReport:
    """Replace dense feed-forward networks by mixtures of experts, in place.

    Every expert starts as a decomposition of its dense network. So without truncation, capacity limits and
    noise, the model initially computes the same as before, for any routing. The exception is
    `"expert_choice"`: tokens that no expert chooses only pass through the residual connection. Hugging Face
    models are saved, loaded and trained as before, and their loss in training includes the auxiliary losses.
    For other models, use `tensornet_moe.collect_aux_losses`.

    If a network is not a separate module (BERT, OPT, BART), the mixture replaces its first matrix, and
    identities replace the activation and the second matrix. In training, dropout between the matrices is then
    applied to the output of the mixture.

    Args:
        model: T5, GPT-2, BERT, or any model with networks `W_down act(W_up x)` (with or without a gate).
        config: options of the mixtures; alternatively, give `words`.
        causal: whether tokens must not depend on later tokens; this matters only for the router
            `"expert_choice"` and for `capacity_factor`. By default, four kinds of models count as not causal:
            encoders of encoder-decoder models, masked language models, image classifiers, and bare encoders
            of these architectures.
        progress: show a progress bar.
        words: the options themselves: `experts`, `top_k`, `share`, `pool`, `router` and all others of
            `UpcycleOptions`, or arguments of a router that you registered.

    Raises:
        TargetError: no feed-forward network is found, a network computes something else, or the router or
            a capacity uses later tokens and a network is or may be causal; the model is unchanged.
        TopologyError, BudgetError, NonFiniteError: a decomposition failed; the model is unchanged.
        ShapeError, ValueError: layers of different sizes cannot use the same pool, the size of a group does
            not divide the number of layers, or a pool has too few experts; the model is unchanged.
        TypeError: `model` or `config` has another type, both `config` and `words` are given, or a word is
            unknown.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path())
        >>> report = th.upcycle(model, share="center", experts=4, top_k=2)
        >>> len(report.layers), report.dense_experts_ratio < 0.4
        (4, True)
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path())
        >>> print(th.upcycle(model, experts=8, pool="all"))
        4 feed-forward networks became 8 experts in 1 pool: ...
    """
    if config is None:
        config = _options(words)
    elif words:
        raise TypeError(
            f"upcycle takes either a config or words, but got both: add {', '.join(words)} to the config."
        )
    if not isinstance(model, nn.Module) or not isinstance(config, UpcycleOptions):
        raise TypeError(
            "upcycle takes a model and UpcycleOptions, got a "
            f"{type(model).__name__} and a {type(config).__name__}."
        )
    networks = find_feed_forwards(model, target_modules=config.target_modules, matrices=config.matrices)
    looks_ahead = not router_kind(config.router).causal or config.capacity_factor is not None
    if looks_ahead and causal is not False:
        _refuse_causal(config, model, networks, causal)
    groups = _groups(model, networks, config)
    pools: dict[str, ExpertPool] = {}
    made: list[SharedCoreMoE] = []
    entries = []
    count = 0
    for number, group in enumerate(tqdm(groups, desc="upcycling", disable=not progress, unit="layer")):
        members = [networks[index] for index in group]
        banks = _banks(members, config, seed=config.seed + group[0])
        network = _experts(members, banks)
        count = network.num_experts
        experts: ExpertFFN | ExpertPool = network
        if config.pool is not None:
            _check_number(count, len(group), config)
            label = "pool" if len(groups) == 1 else f"pool{number}"
            pools[label] = experts = ExpertPool(network, label=label, balance=config.balance or "pool")
        shared = {id(p): p.numel() for bank in banks.values() for p in bank.shared_parameters().values()}
        for place, index in enumerate(group):
            mixture = _mixture(networks[index], experts, config, seed=config.seed + index)
            if config.pool is not None:
                _choose_own(mixture.router, place, len(group))
            made.append(mixture)
            layers = [networks[index].layer(name) for name in banks]
            entries.append(
                UpcycledLayer(
                    name=networks[index].names[0],
                    dense_params=sum(p.numel() for layer in layers for p in layer.parameters()),
                    params=sum(p.numel() for p in mixture.parameters()),
                    shared_params=sum(shared.values()),
                    error=max(getattr(bank, "error", None) or 0.0 for bank in banks.values()),
                )
            )
    put_pools(model, pools)
    for dense, mixture in zip(networks, made, strict=True):
        for name, part in dense.replacements(mixture).items():
            if dense.inside is None:  # else the hooks belong to one linear layer, not to the network
                carry_hooks(model.get_submodule(name), part)
            set_submodule(model, name, part)
    join_aux_losses(model)
    structure_changed(model)
    across = sum(p.numel() for pool in pools.values() for p in pool.parameters())
    return UpcycleReport(tuple(entries), count, across, len(pools))


def _options(words: Mapping[str, Any]) -> UpcycleOptions:
    """Build `UpcycleOptions` from keyword arguments; all other arguments must be those of the router."""
    known = [field.name for field in fields(UpcycleOptions)]
    own = {name: value for name, value in words.items() if name not in known}
    options = UpcycleOptions(**{name: value for name, value in words.items() if name in known})
    router = router_kind(options.router)
    check_options([name for name in own if name not in router.options], "upcycle", [*known, *router.options])
    return replace(options, router_options={**options.router_options, **own})


def _groups(model: nn.Module, networks: Sequence[FeedForward], config: UpcycleOptions) -> list[list[int]]:
    """Group the indices of networks by the pool that they use; without pools each network is a group.

    Raises:
        ValueError: the size of a group does not divide the number of networks.
        ShapeError: networks of a group have different shapes or activations.
        TargetError: the model cannot own pools, or networks of a group are on different devices.
    """
    if config.pool is None:
        return [[index] for index in range(len(networks))]
    size = len(networks) if config.pool == "all" else int(config.pool)
    if len(networks) < 2:
        raise ValueError(
            f"A pool needs several layers, but {networks[0].names[0]} is the only network to replace."
        )
    if len(networks) % size:
        divisors = [str(n) for n in range(2, len(networks) + 1) if len(networks) % n == 0]
        raise ValueError(
            f"pool={size} does not divide the {len(networks)} layers; choose one of {', '.join(divisors)}."
        )
    _check_place(model)
    for index, network in enumerate(networks):
        first = networks[index - index % size]
        have, want = _function_of(network), _function_of(first)
        if have != want:
            raise ShapeError(
                f"{first.names[0]} and {network.names[0]} cannot use the same pool: they are {want} and "
                f"{have}. Choose equal networks with target_modules=[...], or smaller groups, such as pool=2."
            )
        weights = [n.matrix(name) for n in (first, network) for name in n.matrices]
        if len(devices := {str(w.device) for w in weights}) > 1:
            raise TargetError(
                f"The experts of a pool are on a single device, but {first.names[0]} and {network.names[0]} "
                f"are on {', '.join(sorted(devices))}. Move the model to one device, or leave out pool=."
            )
    return [list(range(k, k + size)) for k in range(0, len(networks), size)]


def _check_place(model: nn.Module) -> None:
    """Raise TargetError if pools cannot be added to a model."""
    place = model.base_model if isinstance(model, PreTrainedModel) else model
    if hasattr(place, POOLS):
        raise TargetError(
            "Layers of this model already use a pool of experts. Upcycle all layers that are to use pools in "
            "a single call, with target_modules=[...]."
        )
    if isinstance(place, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise TargetError(
            f"pool= adds a submodule for the experts, but a {type(place).__name__} would treat it as a "
            "layer. Put the container into a module of its own, and upcycle this module."
        )


def _function_of(network: FeedForward) -> dict[str, object]:
    """Describe the shapes, activation and dropout of a network; they must be equal within a pool."""
    dropout = network.dropout if network.dropout_place == "hidden" else 0.0
    shapes = {name: tuple(network.matrix(name).shape) for name in network.matrices}
    return {"(out, in)": shapes, "activation": network.activation, "dropout": dropout}


def _check_number(experts: int, layers: int, config: UpcycleOptions) -> None:
    """Raise ValueError unless the pool has at least `top_k` experts for each layer.

    Every layer starts with `top_k` experts that no other layer uses.
    """
    router = config.make_router(1, experts, seed=0)
    assert isinstance(router, TopKRouter)  # as `UpcycleOptions` checks for pools
    top_k = router.top_k
    if experts < layers * top_k:
        raise ValueError(
            f"experts={experts} is too small for a pool of {layers} layers with top_k={top_k}: each layer "
            f"starts with top_k experts of its own, so at least {layers * top_k} are needed. Give more "
            "experts, or choose smaller groups, such as pool=2."
        )


def _choose_own(router: Router, place: int, layers: int) -> None:
    """Make a router choose its layer's own experts for every token: the experts with `e % layers == place`.

    All other experts get equal probabilities, at most `1 / (number of other experts)`. The router adds a
    bias to each probability. For the layer's own experts this bias alone exceeds that limit.
    """
    own = torch.arange(router.num_experts, device=router.weight.device) % layers == place
    router.weight[~own] = 0
    assert router.bias_steps is not None
    router.bias_steps[own] = math.ceil(1 / (int((~own).sum()) * router.bias_rate)) + 1


def _refuse_causal(
    config: UpcycleOptions, model: nn.Module, networks: Sequence[FeedForward], causal: bool | None
) -> None:
    """Raise TargetError if a router or a capacity that uses later tokens would be in a causal network."""
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
    if not router_kind(config.router).causal:
        what, instead = f"router={config.router!r} looks", 'Use router="switch" or "topk".'
    else:
        what = f"capacity_factor={config.capacity_factor!r} looks"
        instead = "Leave out capacity_factor=, so that no token is dropped."
    rest = (
        f" The other {len(others)} networks, such as {others[0]}, can use it: select them with "
        "target_modules=."
        if others
        else f" If every token of this {type(model).__name__} may depend on all others, set causal=False."
    )
    raise TargetError(
        f"{what} at later tokens, but {len(found)} of {len(networks)} feed-forward "
        f"networks are not known to be in an encoder (the first is {found[0].names[0]}), so training could "
        f"leak the tokens to be predicted. {instead}{rest}"
    )


def _banks(members: Sequence[FeedForward], config: UpcycleOptions, *, seed: int) -> dict[str, ExpertBank]:
    """Build the expert bank of each matrix; expert `e` starts as the matrix of `members[e % len(members)]`.

    Raises:
        ValueError: noise is requested for low-rank deltas, which start at zero.
    """
    names = " to ".join(dict.fromkeys((members[0].names[0], members[-1].names[0])))
    banks: dict[str, ExpertBank] = {}
    for position, name in enumerate(members[0].matrices):
        weights = [network.matrix(name) for network in members]
        with _errors_name(f"{names}.{name}"):
            bank = make_bank(
                torch.stack([w.to(weights[0]) for w in weights]), **config._words(), seed=3 * seed + position
            )
        if config.noise:
            if isinstance(bank, LowRankDeltaExperts):
                raise ValueError(
                    f"noise={config.noise} is added to private cores, but deltas start at zero: leave out "
                    "noise=."
                )
            shared = {id(p) for p in bank.shared_parameters().values()}
            generator = torch.Generator().manual_seed(3 * seed + position)
            for parameter in bank.parameters():
                if id(parameter) not in shared:
                    parameter.copy_(with_noise(parameter, config.noise, generator))
        banks[name] = bank.requires_grad_(True)
    return banks


def _experts(members: Sequence[FeedForward], banks: Mapping[str, ExpertBank]) -> ExpertFFN:
    """Build experts from their banks, and give expert `e` the biases of `members[e % len(members)]`."""
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
        for expert in range(experts.num_experts):
            if (bias := each[expert % len(each)]) is not None:
                getattr(experts, f"{name}_bias")[expert] = bias
    return experts


def _mixture(
    network: FeedForward,
    experts: ExpertFFN | ExpertPool,
    config: UpcycleOptions,
    *,
    seed: int,
) -> SharedCoreMoE:
    """Build the mixture that replaces a network from its experts and a new router with random weights."""
    first = network.matrix(network.matrices[0])
    where: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
    always = None
    if config.shared_expert is not None:
        always = new_experts(
            network.matrices,
            first.shape[1],
            config.shared_expert,
            experts=1,
            share="none",
            activation=network.activation,
            **where,
        )
        for parameter in always.bank(network.matrices[-1]).parameters():
            parameter.zero_()
    return make_layer(
        config.make_router(first.shape[1], experts.num_experts, seed=seed).to(**where),
        experts,
        shared_expert=always,
        capacity_factor=config.capacity_factor,
        balance_coef=config.balance_coef,
        z_coef=config.z_coef,
        dropout=network.dropout if network.dropout_place == "output" else 0.0,
    )


@contextmanager
def _errors_name(what: str) -> Iterator[None]:
    try:
        yield
    except (BudgetError, NonFiniteError, ShapeError, TopologyError) as error:
        raise type(error)(f"{what}: {error}") from error
