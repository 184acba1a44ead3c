"""Upcycling: replace dense feed-forward networks by mixtures of experts that share cores."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel

from tensornet._util import check_size, check_type
from tensornet.compression.apply import set_submodule
from tensornet.errors import BudgetError, NonFiniteError, ShapeError, TargetError, TopologyError
from tensornet.nn.extension import structure_changed
from tensornet.nn.layer_kinds import carry_hooks
from tensornet_hf.aux_losses import join_aux_losses
from tensornet_hf.feed_forwards import FeedForward, find_feed_forwards
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
from tensornet_moe.mixtures import (
    MakeBank,
    check_options,
    make_bank,
    make_layer,
    make_router,
    new_experts,
)
from tensornet_moe.pool import BALANCES, Balance
from tensornet_moe.routers import Combine, check_capacity, router_kind
from tensornet_moe.sharing import Share


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


@torch.no_grad()
def upcycle(
    model: nn.Module,
    *,
    experts: int | MakeBank = 8,
    top_k: int | None = None,
    share: Share | None = None,
    pool: Literal["all"] | int | None = None,
    rank: int | None = None,
    router: str = "topk",
    shared_expert: int | None = None,
    capacity_factor: float | None = None,
    balance: Balance | None = None,
    balance_coef: float | None = None,
    z_coef: float = 0.0,
    bias_rate: float | None = None,
    combine: Combine | None = None,
    normalize: bool = False,
    jitter: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    target_modules: Sequence[str] | None = None,
    matrices: Sequence[str] | None = None,
    causal: bool | None = None,
    progress: bool = False,
    **router_options: Any,
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

    An argument of `tensornet_moe.mixture` with the same name has the same meaning.

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
        model: T5, GPT-2, BERT, or any model with networks `W_down act(W_up x)` (with or without a gate).
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
        causal: whether tokens must not depend on later tokens; this matters only for the router
            `"expert_choice"` and for `capacity_factor`. By default, four kinds of models count as not causal:
            encoders of encoder-decoder models, masked language models, image classifiers, and bare encoders
            of these architectures.
        progress: show a progress bar.
        router_options: other arguments of a router that you registered.

    Raises:
        TargetError: no feed-forward network is found, a network computes something else, or the router or
            a capacity uses later tokens and a network is or may be causal; the model is unchanged.
        TopologyError, BudgetError, NonFiniteError: a decomposition failed; the model is unchanged.
        ShapeError, ValueError: an option is out of its range, or two options exclude each other; layers of
            different sizes cannot use the same pool, the size of a group does not divide the number of
            layers, or a pool has too few experts; the model is unchanged.
        TypeError: `model` is not a module, or an option is unknown.

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
    check_type("model", model, nn.Module, "pass a model with feed-forward networks")
    check_capacity(capacity_factor)
    check_not_negative(noise=noise, z_coef=z_coef, balance_coef=balance_coef or 0.0)
    for name, given in (("matrices", matrices), ("target_modules", target_modules)):
        if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
            raise ValueError(f"{name} must be a list, got {given!r}; write {name}=[{given!r}, ...].")
    of_router = router_kind(router).options
    known = [name for name in signature(upcycle).parameters if name not in ("model", "router_options")]
    check_options([name for name in router_options if name not in of_router], "upcycle", [*known, *of_router])
    if share is None and pool is not None and not callable(experts):
        share = "none"
    bank_options: dict[str, Any] = {"experts": experts, "share": share, "rank": rank}
    new_router: Callable[[int, int], Router] = partial(
        make_router,
        router,
        pooled=pool is not None,
        top_k=top_k,
        capacity_factor=capacity_factor,
        bias_rate=bias_rate,
        combine=combine or "unit",
        normalize=normalize,
        jitter=jitter,
        device="cpu",
        **router_options,
    )
    # These calls raise errors for options that are out of range, before the model is read.
    tried = new_router(1, 8 * (top_k or 1) if callable(experts) else experts)
    if not callable(experts):
        make_bank(torch.empty(0, 2**16, 2**16, device="meta"), **bank_options)
    _check_pool(pool, balance, tried)

    networks = find_feed_forwards(model, target_modules=target_modules, matrices=matrices)
    if causal is not False:
        _refuse_looking_ahead(router, capacity_factor, model, networks, causal)
    size = _group_size(model, networks, pool)

    # Build everything before the model is changed.
    pools: dict[str, ExpertPool] = {}
    mixtures: list[SharedCoreMoE] = []
    layers: list[UpcycledLayer] = []
    for start in tqdm(range(0, len(networks), size), desc="upcycling", disable=not progress, unit="layer"):
        group = networks[start : start + size]
        network = _experts(group, bank_options, noise, seed=seed + start)
        banks = [network.bank(name) for name in network.names]
        shared = {id(p): p.numel() for bank in banks for p in bank.shared_parameters().values()}
        used: ExpertFFN | ExpertPool = network
        if pool is not None:
            label = "pool" if size == len(networks) else f"pool{start // size}"
            pools[label] = used = ExpertPool(network, label=label, balance=balance or "pool")
        for place, dense in enumerate(group):
            like = dense.matrix(dense.matrices[0])
            made = _random(new_router(like.shape[1], network.num_experts), seed=seed + start + place)
            mixture = make_layer(
                made.to(device=like.device, dtype=like.dtype),
                used,
                shared_expert=None if shared_expert is None else _silent_expert(dense, shared_expert),
                capacity_factor=capacity_factor,
                balance_coef=balance_coef,
                z_coef=z_coef,
                dropout=dense.dropout if dense.dropout_place == "output" else 0.0,
            )
            if pool is not None:
                _choose_own(mixture.router, place, size)
            mixtures.append(mixture)
            layers.append(
                UpcycledLayer(
                    name=dense.names[0],
                    dense_params=dense.num_params,
                    params=sum(p.numel() for p in mixture.parameters()),
                    shared_params=sum(shared.values()),
                    error=max(getattr(bank, "error", None) or 0.0 for bank in banks),
                )
            )

    put_pools(model, pools)
    for dense, mixture in zip(networks, mixtures, strict=True):
        for name, part in dense.replacements(mixture).items():
            if dense.inside is None:  # otherwise the hooks belong to one linear layer, not to the network
                carry_hooks(model.get_submodule(name), part)
            set_submodule(model, name, part)
    join_aux_losses(model)
    structure_changed(model)
    across = sum(p.numel() for pool in pools.values() for p in pool.parameters())
    return UpcycleReport(tuple(layers), network.num_experts, across, len(pools))


def _check_pool(pool: Literal["all"] | int | None, balance: Balance | None, router: Router) -> None:
    """Check the options of a pool.

    Raises:
        ValueError: an option is out of its range, or needs another one.
    """
    if pool is None:
        if balance is not None:
            raise ValueError(
                f"balance={balance!r} needs pool=, since it says whether the load of a pool is balanced over "
                "its layers together. Without a pool, each layer is balanced alone."
            )
        return
    if balance not in (None, *BALANCES):
        raise ValueError(f"Unknown balance={balance!r}; choose one of {', '.join(BALANCES)}.")
    if pool != "all":
        check_size('pool (or "all")', pool, least=2, error=ValueError)
    if not isinstance(router, TopKRouter) or router.bias_rate == 0:
        raise ValueError(
            'A pool needs router="switch" or "topk" and a bias_rate above 0, since biases let each layer '
            "choose its own experts at the start."
        )


def _random(router: Router, *, seed: int) -> Router:
    """Give a router random weights that depend on `seed`."""
    generator = torch.Generator().manual_seed(seed)
    router.weight.normal_(0, 0.1 / router.weight.shape[1] ** 0.5, generator=generator)
    return router


def _group_size(model: nn.Module, networks: Sequence[FeedForward], pool: Literal["all"] | int | None) -> int:
    """Return the number of neighbouring networks that use the same experts; 1 without pools.

    Raises:
        ValueError: the size of a group does not divide the number of networks.
        ShapeError: networks of a group have different shapes or activations.
        TargetError: the model cannot own pools, or networks of a group are on different devices.
    """
    if pool is None:
        return 1
    size = len(networks) if pool == "all" else int(pool)
    if len(networks) < 2:
        raise ValueError(
            f"A pool needs several layers, but {networks[0].names[0]} is the only network to replace."
        )
    if len(networks) % size:
        divisors = [str(n) for n in range(2, len(networks) + 1) if len(networks) % n == 0]
        raise ValueError(
            f"pool={size} does not divide the {len(networks)} layers; choose one of {', '.join(divisors)}."
        )
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
    return size


def _function_of(network: FeedForward) -> dict[str, object]:
    """Describe the shapes, activation and dropout of a network; they must be equal within a pool."""
    dropout = network.dropout if network.dropout_place == "hidden" else 0.0
    shapes = {name: tuple(network.matrix(name).shape) for name in network.matrices}
    return {"(out, in)": shapes, "activation": network.activation, "dropout": dropout}


def _choose_own(router: Router, place: int, layers: int) -> None:
    """Make a router choose its layer's own experts for every token: the experts with `e % layers == place`.

    All other experts get equal probabilities, at most `1 / (number of other experts)`. The router adds a
    bias to each probability. For the layer's own experts this bias alone exceeds that limit.

    Raises:
        ValueError: the pool has fewer than `top_k` experts for each layer.
    """
    assert isinstance(router, TopKRouter)  # as `_check_pool` makes sure
    assert router.bias_steps is not None
    if router.num_experts < layers * router.top_k:
        raise ValueError(
            f"experts={router.num_experts} is too small for a pool of {layers} layers with top_k="
            f"{router.top_k}: each layer starts with top_k experts of its own, so at least "
            f"{layers * router.top_k} are needed. Give more experts, or choose smaller groups, such as "
            "pool=2."
        )
    own = torch.arange(router.num_experts, device=router.weight.device) % layers == place
    router.weight[~own] = 0
    router.bias_steps[own] = math.ceil(1 / (int((~own).sum()) * router.bias_rate)) + 1


def _refuse_looking_ahead(
    router: str,
    capacity_factor: float | None,
    model: nn.Module,
    networks: Sequence[FeedForward],
    causal: bool | None,
) -> None:
    """Raise TargetError if a router or a capacity that uses later tokens would be in a causal network."""
    if router_kind(router).causal and capacity_factor is None:
        return
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
    if not router_kind(router).causal:
        what, instead = f"router={router!r} looks", 'Use router="switch" or "topk".'
    else:
        what = f"capacity_factor={capacity_factor!r} looks"
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


def _experts(
    group: Sequence[FeedForward], bank_options: Mapping[str, Any], noise: float, *, seed: int
) -> ExpertFFN:
    """Build experts; expert `e` starts as the network `group[e % len(group)]`.

    Raises:
        ValueError: noise is requested for low-rank deltas, which start at zero.
    """
    first = group[0]
    banks: dict[str, ExpertBank] = {}
    for position, name in enumerate(first.matrices):
        weights = [network.matrix(name) for network in group]
        stack = torch.stack([w.to(weights[0]) for w in weights])
        try:
            bank = make_bank(stack, **bank_options, seed=3 * seed + position)
        except (BudgetError, NonFiniteError, ShapeError, TopologyError) as error:
            names = " to ".join(dict.fromkeys((first.names[0], group[-1].names[0])))
            raise type(error)(f"{names}.{name}: {error}") from error
        if noise:
            if isinstance(bank, LowRankDeltaExperts):
                raise ValueError(
                    f"noise={noise} is added to private cores, but deltas start at zero: leave out noise=."
                )
            generator = torch.Generator().manual_seed(3 * seed + position)
            for tensor in bank.private_tensors():
                tensor.copy_(with_noise(tensor, noise, generator))
        banks[name] = bank.requires_grad_(True)
    like = first.matrix(first.matrices[0])
    biases = {name: [network.bias(name) for network in group] for name in first.matrices}
    experts = ExpertFFN(
        banks,
        activation=first.activation,
        bias=any(bias is not None for each in biases.values() for bias in each),
        dropout=first.dropout if first.dropout_place == "hidden" else 0.0,
        device=like.device,
        dtype=like.dtype,
    )
    for name, each in biases.items():
        for expert in range(experts.num_experts):
            if (bias := each[expert % len(each)]) is not None:
                getattr(experts, f"{name}_bias")[expert] = bias
    return experts


def _silent_expert(network: FeedForward, features: int) -> ExpertFFN:
    """Build the expert that processes every token, of a layer with this network; its output is zero."""
    like = network.matrix(network.matrices[0])
    made = new_experts(
        network.matrices,
        like.shape[1],
        features,
        experts=1,
        share="none",
        activation=network.activation,
        device=like.device,
        dtype=like.dtype,
    )
    for parameter in made.bank(network.matrices[-1]).parameters():
        parameter.zero_()
    return made
