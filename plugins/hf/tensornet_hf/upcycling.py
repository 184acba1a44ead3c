"""Upcycling: replace dense feed-forward networks by mixtures of experts that share cores.

Most feed-forward networks are separate modules. To recognize such a network, the output of the module on
random tokens is compared with a computation from its matrices and activation. In BERT, BART and similar
models, the matrices and the activation are parts of a larger layer. For the classes in `INSIDE`, a mixture
replaces the first matrix, and identities replace the activation and the second matrix.
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
from tensornet_hf.aux_losses import join_aux_losses
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

#: Place of the dropout in a feed-forward network, by the names of its matrices in the order (gate,) up, down.
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
#: Layers with a feed-forward network, and the paths of its first matrix, activation and second matrix.
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
#: Options of `MoEConfig` that have another name in `tensornet_moe.mixture`, keyed by that name.
_WORDS = {"experts": "num_experts", "balance_coef": "aux_loss_coef"}


@dataclass(frozen=True)
class MoEConfig:
    """Options of `upcycle`: experts, router, shared cores and auxiliary losses.

    These options give the variants that the MPOE paper (Gao et al. 2022) compares: `shared="center"` is MPOE;
    `shared="none"` gives every expert its own cores; `sites=1, shared="none"` gives every expert its own
    dense matrices (Switch); and `max_bond=` truncates. The option `share=` replaces `shared=` and the
    topology, as in `tensornet_moe.mixture`.

    With `pool=`, several layers use the experts of a single `ExpertPool`, which the model owns. Expert `e` of
    a pool for `g` layers starts as the network of layer `e % g`. With `share="none"` the model then computes
    the same as before, since each router chooses the copies of its own layer's network for every token. The
    router's weights for all other experts are zero, so these have equal probabilities, each at most
    `1 / (number of other experts)`. The router adds a bias to each probability. For the layer's own experts
    this bias alone exceeds the limit, so they are chosen. With `share="center"` or `"base"`, a single center
    or base must fit different networks. Errors are then large (see the report), so the model must be trained.

    Which experts a layer uses after training depends on `balance`. With `"layer"`, the biases decrease by
    `bias_rate` in each step until each layer uses all experts evenly. With `"pool"`, the load is even from
    the start, so a layer uses the experts of another layer only for tokens for which its router prefers these
    experts by more than the bias.

    Args:
        num_experts: number of experts of each network, or of each pool.
        top_k: number of experts that process each token.
        router: type of the routers: switch (one expert per token), topk, expert_choice, or auto, which is
            switch for one expert per token and otherwise topk. `"expert_choice"` is only for encoders, since
            it uses later tokens. Routers of your own have the name given to `tensornet_moe.register_router`.
        shared: cores that all experts share: center, ends, none, all, or names of cores.
        share_across_layers: also share these cores between all layers of the same shape; such a model must be
            trained. A single core cannot fit unrelated layers, so the model starts far from the dense model;
            see `tensornet_moe.share_across_layers`.
        topology: topology family of the decomposition. Or a list of topologies, one for each shape of the
            networks' matrices.
        sites: number of cores of a chain (default: 5, as in the MPOE paper).
        model_dims: factors of the model's width, the same for every matrix.
        hidden_dims: factors of the width of the hidden layer.
        max_bond: largest bond dimension of each matrix (default: no truncation).
        rel_error: largest relative error of each matrix (Frobenius norm).
        param_ratio: fraction of a matrix's parameters that the cores of an expert may have, such as 0.5.
        noise: relative noise on the private cores, which makes the experts differ.
        aux_loss_coef: weight of the load-balancing loss (default: 0.01, or 0 with a bias rate).
        z_loss_coef: weight of the router z-loss.
        capacity_factor: slots of each expert relative to an even load (default: no limit). With
            `"expert_choice"`: average number of experts for each token (default 1).
        jitter: relative noise on the inputs of the routers in training.
        combine: how the outputs of the chosen experts are weighted. Only with `"unit"` does the model
            initially compute the same as the dense model; see `tensornet_moe.Router`.
        target_modules: networks to replace: a name, the end of a name, a glob, or re:REGEX (default: all
            feed-forward networks).
        matrices: names of a network's layers in the order (gate,) up, down; only needed for unusual names.
        seed: seed of the routers and the noise.
        share: what experts share: a core (center), nothing (none) or a dense matrix (base); replaces `shared`
            and the topology. See `tensornet_moe.mixture`. In a pool the default is `"none"`.
        pool: use a single pool of experts for all layers (all), or one for each N neighbouring layers (N).
            `num_experts` is then the size of a pool, at least `N * top_k`.
        balance: balance the load of a pool over all of its layers together, or in each layer. See
            `ExpertPool`.
        bias_rate: step size of router biases, which balance the load without an auxiliary loss (default:
            0.001 with a pool, otherwise 0). Pools need such biases. See `tensornet_moe.update_biases`, and
            `RouterBiasCallback` for `Trainer`.
        normalize: normalize the logits of the routers. See `tensornet_moe.Router`.

    Raises:
        ValueError, BudgetError: an option is out of its range, or two options exclude each other.

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
                    f"topologies, got {self.topology!r:.200}."
                )
            choosing = ("sites", "model_dims", "hidden_dims", "max_bond", "rel_error", "param_ratio")
            if given := [name for name in choosing if getattr(self, name) is not None]:
                raise TopologyError(
                    f"A topology fixes all dims and bonds: leave out {', '.join(given)}, or give the name of "
                    "a family."
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
                f"top_k={self.top_k} with num_experts={self.num_experts}: top_k must be between 1 and "
                "num_experts."
            )
        if self.top_k != 1 and "top_k" not in kind.options:
            raise ValueError(f'top_k={self.top_k} needs router="topk"; {self.router!r} has no top_k.')
        for name in ("aux_loss_coef", "z_loss_coef", "noise", "bias_rate"):
            check_not_negative(**{name: getattr(self, name)})
        check_capacity(self.capacity_factor)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter}.")
        lists = ("model_dims", "hidden_dims", "matrices", "target_modules")
        for name in lists:
            given = getattr(self, name)
            if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
                raise ValueError(f"{name} must be a list, got {given!r}; write {name}=[{given!r}, ...].")
        if self.model_dims and self.hidden_dims and len(self.model_dims) != len(self.hidden_dims):
            raise ValueError(
                f"model_dims={self.model_dims} and hidden_dims={self.hidden_dims} must have the same length, "
                "with a factor for each site (1 for a site without a factor)."
            )
        if self.share_across_layers and self.shared in ("none", (), []):
            raise ValueError(
                'share_across_layers=True needs shared cores, so it cannot be combined with shared="none".'
            )
        if self.share_across_layers and (self.rel_error is not None or self.param_ratio is not None):
            raise ValueError(
                "share_across_layers=True needs the same bonds in all layers: limit them with max_bond, not "
                "with rel_error or param_ratio, which would choose different bonds for each layer."
            )

    def _check_sharing(self, kind: type[Router]) -> None:
        """Raise ValueError if `share` or `pool` cannot be combined with the other options."""
        if self.share not in (None, *SHARES):
            raise ValueError(f"Unknown share={self.share!r}; choose one of {', '.join(SHARES)}.")
        if self.pool is not None and self.share is None:
            object.__setattr__(self, "share", "none")
        if self.share is not None:
            chosen = {"shared": "center", "topology": "mpo", "share_across_layers": False}
            chosen |= dict.fromkeys(("sites", "model_dims", "hidden_dims", *_BUDGETS))
            if given := [name for name, default in chosen.items() if getattr(self, name) != default]:
                raise ValueError(
                    f"share={self.share!r} (in a pool 'none' by default) already chooses cores and dims: "
                    f"leave out {', '.join(f'{name}=' for name in given)}, or leave out share= and pool=."
                )
            if self.share == "base" and self.noise:
                raise ValueError(
                    'noise is added to private cores, but share="base" has none: leave out one of the two.'
                )
        if self.balance not in BALANCES:
            raise ValueError(f"Unknown balance={self.balance!r}; choose one of {', '.join(BALANCES)}.")
        if self.pool is None:
            return
        if self.pool != "all":
            check_size('pool (or "all")', self.pool, least=2, error=ValueError)
        if not issubclass(kind, TopKRouter) or self.bias_rate == 0:
            raise ValueError(
                'A pool needs router="switch" or "topk" and a bias_rate above 0, since biases let each layer '
                "choose its own experts at the start."
            )

    def make_router(self, num_features: int, *, seed: int) -> Router:
        """Build a router in float32 on the CPU, with random weights that depend on `seed`."""
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
        """Number of parameters of the dense networks."""
        return sum(layer.dense_params for layer in self.layers)

    @property
    def params(self) -> int:
        """Number of parameters of the mixtures; cores that several layers share are counted once."""
        return sum(layer.params for layer in self.layers) + self.across_params

    @property
    def dense_experts_ratio(self) -> float:
        """Number of parameters relative to mixtures with dense experts."""
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
        """Return the linear layer with the matrix of this name."""
        return self.module.get_submodule(self.paths[self.matrices.index(name)])

    def matrix(self, name: str) -> Tensor:
        """Return the matrix of this name, shape `(out_features, in_features)`."""
        kind = kind_of(self.layer(name))
        assert kind is not None
        return kind.matrix(self.layer(name)).detach()

    def bias(self, name: str) -> Tensor | None:
        """Return the bias of the layer with the matrix of this name, shape `(out_features,)`, or None."""
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
        weight = self.matrix(last)  # T5 keeps it in float32
        return nn.functional.linear(hidden.to(weight.dtype), weight, self.bias(last))


class DoneBefore(nn.Module):
    """Identity that replaces the later parts of a network; a mixture replaces the first part.

    Unlike `nn.Identity`, this module has a description, so that it is restored when a saved model is loaded.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the input unchanged."""
        return x

    def spec(self) -> dict[str, Any]:
        """Return the description as a dict for JSON, see `tensornet.nn.register_module_type`."""
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
    """Recognize the feed-forward network in a module with the linear layers `paths`.

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
        except Exception as error:  # an unknown module may raise anything
            raise TargetError(f"it cannot be called with hidden states alone: {error}") from error
    wanted = network.compute(x)
    tolerance = 1e-3 if wanted.dtype in (torch.float32, torch.float64) else 0.05
    # The comparison is false for NaN, so NaN passes here: the decomposition raises an error that names the
    # matrix.
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
    """Recognize an activation by its values on a grid, and return its name."""
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
    config: MoEConfig | None = None,
    *,
    causal: bool | None = None,
    progress: bool = False,
    **words: Any,
) -> UpcycleReport:
    """Replace dense feed-forward networks by mixtures of experts, in place.

    Every expert starts as the decomposition of its dense network. So without truncation, capacity and noise
    the model computes the same as before, for any routing. The exception is `"expert_choice"`: tokens that no
    expert chooses only pass through the residual connection. Hugging Face models save, load and train as
    before, and add the auxiliary losses to their loss in training. For other models, use
    `tensornet_moe.collect_aux_losses`.

    If a network is not a separate module (BERT, OPT, BART), the mixture replaces its first matrix, and
    identities replace the activation and the second matrix. In training, dropout between the matrices is then
    applied to the output of the mixture.

    Args:
        model: T5, GPT-2, BERT, or any model with networks `W_down act(W_up x)` (with or without a gate).
        config: options of the mixtures; alternatively, give `words`.
        causal: whether a token must not depend on later tokens, which matters for the router
            `"expert_choice"`. By default, all models count as causal except encoders of encoder-decoder
            models, masked language models, image classifiers, and encoders of the same architectures.
        progress: show a progress bar.
        words: options of `MoEConfig` under the names of `tensornet_moe.mixture`: `experts`, `top_k` (default
            2), `share`, `router` (default `"topk"`), `balance_coef`; all others under their own names.

    Raises:
        TargetError: no feed-forward network is found, a network computes something else, or the router uses
            later tokens and a network is or may be causal; the model is unchanged.
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
        >>> print(th.upcycle(model, th.MoEConfig(num_experts=4, pool="all")))
        4 feed-forward networks became 4 experts in 1 pool: ...
    """
    if config is None:
        named = {_WORDS.get(name, name): value for name, value in words.items()}
        if len(named) < len(words):
            raise TypeError(f"upcycle got the same option under two names: {', '.join(words)}.")
        named.setdefault("router", "topk")
        if isinstance(named["router"], str) and "top_k" in router_kind(named["router"]).options:
            named.setdefault("top_k", 2)
        config = MoEConfig(**named)
    elif words:
        raise TypeError(
            f"upcycle takes either a MoEConfig or words, but got both: add {', '.join(words)} to the config."
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
            if dense.inside is None:  # else the hooks belong to one linear layer, not to the network
                carry_hooks(model.get_submodule(name), part)
            set_submodule(model, name, part)
    join_aux_losses(model)
    structure_changed(model)
    across = sum(p.numel() for owner in owners.values() for p in owner.parameters())
    pools = 0 if config.pool is None else len(groups)
    return UpcycleReport(tuple(entries), config.num_experts, across, pools)


def _groups(model: nn.Module, networks: Sequence[FeedForward], config: MoEConfig) -> list[list[int]]:
    """Group the indices of networks by the pool that they use; without pools each network is a group.

    Raises:
        ValueError: the size of a group does not divide the number of networks, or a pool has too few experts.
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
    check_group("pool", size, len(networks), least=2)
    if config.num_experts < size * config.top_k:
        raise ValueError(
            f"num_experts={config.num_experts} is too small for a pool of {size} layers with "
            f"top_k={config.top_k}: each layer starts with top_k experts of its own, so at least "
            f"{size * config.top_k} are needed. Give more experts, or choose smaller groups, such as pool=2."
        )
    _owners_place(model, "pool")
    for index, network in enumerate(networks):
        first = networks[index - index % size]
        have, want = _function_of(network), _function_of(first)
        if have != want:
            raise ShapeError(
                f"{first.names[0]} and {network.names[0]} cannot use the same pool: they are {want} and "
                f"{have}. Choose equal networks with target_modules=[...], or smaller groups, such as pool=2."
            )
        _same_device([n.matrix(name) for n in (first, network) for name in n.matrices], "pool", "experts")
    return [list(range(k, k + size)) for k in range(0, len(networks), size)]


def _function_of(network: FeedForward) -> dict[str, object]:
    """Describe the shapes, activation and dropout of a network; they must be equal within a pool."""
    dropout = network.dropout if network.dropout_place == "hidden" else 0.0
    shapes = {name: tuple(network.matrix(name).shape) for name in network.matrices}
    return {"(out, in)": shapes, "activation": network.activation, "dropout": dropout}


def _choose_own(router: Router, place: int, layers: int) -> None:
    """For every token, let a router choose its layer's own experts: all `e` with `e % layers == place`.

    All other experts get equal probabilities, at most `1 / (number of other experts)`. The router adds a
    bias to each probability. For the layer's own experts this bias alone exceeds that limit.
    """
    own = torch.arange(router.num_experts, device=router.weight.device) % layers == place
    router.weight[~own] = 0
    assert router.bias_steps is not None
    router.bias_steps[own] = math.ceil(1 / (int((~own).sum()) * router.bias_rate)) + 1


def _refuse_causal(
    config: MoEConfig, model: nn.Module, networks: Sequence[FeedForward], causal: bool | None
) -> None:
    """Raise TargetError if a router that uses later tokens would be in a network that may be causal."""
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
        f" The other {len(others)} networks, such as {others[0]}, can use this router: select them with "
        "target_modules=."
        if others
        else f" If every token of this {type(model).__name__} may depend on all others, set causal=False."
    )
    raise TargetError(
        f"router={config.router!r} looks at later tokens, but {len(found)} of {len(networks)} feed-forward "
        f"networks are not known to be in an encoder (the first is {found[0].names[0]}), so training could "
        f'leak the tokens to be predicted. Use router="switch" or "topk".{rest}'
    )


def _bank(
    members: Sequence[FeedForward], name: str, config: MoEConfig, *, seed: int
) -> SharedCoreExperts | LowRankDeltaExperts:
    """Build the experts of one matrix; expert `e` starts as this matrix of network `e % len(members)`."""
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
        for expert in range(config.num_experts):
            if (bias := each[expert % len(each)]) is not None:
                getattr(experts, f"{name}_bias")[expert] = bias
    for bank in banks.values():
        bank.requires_grad_(True)
    return experts


def _mixture(
    network: FeedForward, experts: ExpertFFN | ExpertPool, config: MoEConfig, *, seed: int
) -> SharedCoreMoE:
    """Build the mixture that replaces a network, with given experts and a new router drawn from `seed`."""
    first = network.matrix(network.matrices[0])
    # If the router itself has a capacity, experts choose tokens, so the load is always balanced and the
    # balancing loss would be constant.
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
    """Select the options of a bank of experts for a matrix; the topology family checks the dims."""
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
    """Build banks whose shared cores are used by all layers that have a matrix of the same name and shape.

    Returns:
        The owners of the shared cores, by label; and the banks, by index of the network and name of the
        matrix. A matrix without a counterpart in another layer has no bank.

    Raises:
        TargetError: the model already has shared cores, or is a container, which would treat the owner as a
            layer; or layers that would share cores are on different devices.
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
    """Raise TargetError if shared cores or experts cannot be added; `what` is the option for the message."""
    place = model.base_model if isinstance(model, PreTrainedModel) else model
    if hasattr(place, OWNERS):
        raise TargetError(
            "Layers of this model already share cores or experts. Upcycle all layers that are to share in a "
            "single call, with target_modules=[...]."
        )
    if isinstance(place, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise TargetError(
            f"{what} adds a submodule for what layers share, but a {type(place).__name__} would treat the "
            "submodule as a layer. Put the container into a module of its own, and upcycle this module."
        )


def _same_device(weights: Sequence[Tensor], what: str, name: str) -> None:
    """Raise TargetError if layers that share cores or experts are on different devices."""
    if len(devices := {str(w.device) for w in weights}) > 1:
        raise TargetError(
            f"{what} keeps what layers share on a single device, but {name} of these layers are on "
            f"{', '.join(sorted(devices))}. Move the model to one device, or share only within each layer."
        )


@contextmanager
def _errors_name(what: str) -> Iterator[None]:
    try:
        yield
    except (BudgetError, NonFiniteError, ShapeError, TopologyError) as error:
        raise type(error)(f"{what}: {error}") from error
