"""Mixture-of-experts layer: a router, experts, and the auxiliary losses of the last forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensornet._util import check_type, is_exporting
from tensornet.errors import ShapeError
from tensornet.nn import build_module, register_module_type
from tensornet_moe.bank import check_not_negative
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.grouped_linear import group_rows, one_group
from tensornet_moe.pool import ExpertPool, PooledExperts, find_pools
from tensornet_moe.routers import Router, Routing, check_capacity, limit_capacity


class Usage(NamedTuple):
    """Usage of each expert by the tokens that are not padding.

    Args:
        counts: number of times that each expert was chosen, dropped choices included, shape `(E,)`.
        probabilities: router probabilities summed over tokens, shape `(E,)`; not detached from the graph.
        tokens: number of tokens, a scalar.
    """

    counts: Tensor
    probabilities: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class AuxLosses:
    """Auxiliary losses of one layer, or of all layers of a model.

    Args:
        total: sum weighted by the coefficients of each layer: a scalar to add to the training loss.
        balance: unweighted load-balancing loss of each layer, shape `(layers,)`.
        z: unweighted router z-loss of each layer, shape `(layers,)`.
        usage: what a layer contributes to the balancing loss of its pool, if the pool is balanced as a whole;
            otherwise empty.
    """

    total: Tensor
    balance: Tensor
    z: Tensor
    usage: tuple[Usage, ...] = ()


@dataclass(frozen=True)
class RoutingStats:
    """Routing statistics of the last forward pass of one layer, detached from the graph.

    Args:
        load: number of tokens computed by each expert, shape `(E,)`.
        dropped: number of tokens computed by no expert, a scalar.
        entropy: entropy of the load in nats: `log(E)` when even, 0 when one expert gets everything.
        router_entropy: mean entropy of a token's router probabilities in nats.
        tokens: number of tokens that are not padding, a scalar.
        balance: load-balancing loss, unweighted.
        z: router z-loss, unweighted.
    """

    load: Tensor
    dropped: Tensor
    entropy: Tensor
    router_entropy: Tensor
    tokens: Tensor
    balance: Tensor
    z: Tensor


class SharedCoreMoE(nn.Module):
    """Mixture-of-experts layer: `y_t = sum_e w_te FFN_e(x_t)` over the experts `e` chosen for token `t`.

    Each pass rebuilds the matrices of all experts that get tokens, or multiplies the tokens by one core after
    another if this is faster.
    `tensornet.nn.prepare_for_inference` replaces the cores by the matrices of all experts. Any `Router`, and
    any `ExpertFFN` with any `ExpertBank`, can be used.

    Args:
        router: chooses the experts of each token.
        experts: the feed-forward networks. Or an `ExpertPool`, which the model owns and several layers use.
            Or a `PooledExperts`, which is a range of the experts of a pool.
        shared_expert: a network of one expert that processes every token, with combine weight 1, in addition
            to the routed ones (DeepSeekMoE, Dai et al. 2024, section 3.2).
        capacity_factor: None keeps every choice (dropless). With a number, each expert drops the choices
            beyond the first `ceil(capacity_factor * k * tokens / E)` (see `limit_capacity`). The output of a
            token without remaining choices is 0, so that only the residual connection remains. A capacity
            makes outputs depend on later tokens and on other rows of the batch, so it is for encoders.
        balance_coef: weight of `load_balancing_loss`.
        z_coef: weight of `router_z_loss`.
        dropout: dropout probability of the result, in training.

    Raises:
        TypeError: `router`, `experts` or `shared_expert` is of the wrong class.
        ShapeError: router and experts differ in their sizes; or the shared expert has other feature sizes
            than the routed ones, or consists of more than one expert.
        ValueError: a capacity factor of at most 0, or a coefficient below 0.

    After a forward pass `.stats` is a `RoutingStats`, and `.aux_losses` has the losses for
    `collect_aux_losses`. The next forward pass replaces both; the recomputation of gradient checkpointing
    does not.

    Example:
        >>> up = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> down = tm.SharedCoreExperts.from_dense(torch.randn(8, 16), num_experts=4)
        >>> moe = tm.SharedCoreMoE(tm.TopKRouter(8, 4, top_k=2), tm.ExpertFFN({"up": up, "down": down}))
        >>> moe(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> int(moe.stats.tokens), int(moe.stats.load.sum()), int(moe.stats.dropped)
        (10, 20, 0)
    """

    def __init__(
        self,
        router: Router,
        experts: ExpertFFN | ExpertPool | PooledExperts,
        *,
        shared_expert: ExpertFFN | None = None,
        capacity_factor: float | None = None,
        balance_coef: float = 0.01,
        z_coef: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_type("router", router, Router, "for example tensornet_moe.TopKRouter(d_model, num_experts)")
        if isinstance(experts, ExpertPool):
            experts = PooledExperts(experts)
        if not isinstance(experts, PooledExperts):
            check_type("experts", experts, ExpertFFN, "build one from 2 or 3 banks, or pass an ExpertPool")
        if shared_expert is not None:
            check_type("shared_expert", shared_expert, ExpertFFN, "build one from banks with one expert each")
        _check_router(router, experts)
        _check_shared_expert(shared_expert, experts)
        check_capacity(capacity_factor)
        check_not_negative(balance_coef=balance_coef, z_coef=z_coef)
        self.router, self.experts, self.shared_expert = router, experts, shared_expert
        self.capacity_factor = capacity_factor
        self.balance_coef, self.z_coef, self.dropout = balance_coef, z_coef, dropout
        #: Padding mask for callers that cannot pass one to `forward`. It remains set until it is replaced,
        #: since gradient checkpointing runs the layer again in the backward pass.
        self.token_mask: Tensor | None = None
        self.aux_losses: AuxLosses | None = None
        self.stats: RoutingStats | None = None
        #: Number of times each expert was chosen since the last `update_biases`, shape `(E,)`.
        self.assigned: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.experts.num_experts

    @property
    def balanced_pool(self) -> ExpertPool | None:
        """Pool over which the load of this layer is balanced; None if the layer is balanced on its own."""
        pool = self.experts.pool if isinstance(self.experts, PooledExperts) else None
        return pool if pool is not None and pool.balance == "pool" else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the mixture to tokens `x: (..., in_features)`; the result has shape `(..., out_features)`.

        Args:
            x: tokens.
            mask: shape `(...)`, False or 0 for padding. Padding gets outputs, too. But losses and statistics
                ignore it, and it never takes a slot from a real token.

        Raises:
            NonFiniteError: the router logits of a real token are NaN or infinite.
            ShapeError: the mask has another shape than the tokens, or the router was replaced by one of
                another size.
        """
        if mask is None and self.token_mask is not None:
            # The model may have reshaped its tokens, but their order is the same.
            fits = self.token_mask.numel() == x[..., 0].numel()
            mask = self.token_mask.reshape(x.shape[:-1]) if fits else self.token_mask
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ShapeError(f"The mask has shape {tuple(mask.shape)}, the tokens {tuple(x.shape[:-1])}.")
            mask = mask.reshape(-1).to(x.device, torch.bool)  # the mask may be on another device
        flat = x.reshape(-1, x.shape[-1])
        _check_router(self.router, self.experts)  # both may have been replaced
        chosen = routing = self.router(flat, mask)
        if self.capacity_factor is not None:
            routing = limit_capacity(chosen, self.capacity_factor)
        if not is_exporting():  # exported programs return only outputs
            self._remember(chosen, routing)
        y = dispatch(flat, routing, self.experts)
        if self.shared_expert is not None:
            y = y + self.shared_expert(flat, one_group(flat))
        y = nn.functional.dropout(y, self.dropout, self.training)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _remember(self, chosen: Routing, routing: Routing) -> None:
        # Routers balance all their choices, including those that are dropped because of the capacity.
        usage = _usage(chosen.probs, chosen.expert_indices, self.num_experts, chosen.mask, chosen.kept)
        balance, z = _balance(usage), router_z_loss(routing.logits, routing.mask)
        pooled = self.balanced_pool is not None
        total = (0 if pooled else self.balance_coef) * balance + self.z_coef * z
        # Do not return earlier: under gradient checkpointing, the forward pass and its recomputation must
        # save the same tensors for backward.
        if _is_recomputing():
            return
        terms = (usage,) if pooled else ()
        self.aux_losses = AuxLosses(total, balance.detach()[None], z.detach()[None], terms)
        self.stats = routing_stats(routing, balance.detach(), z.detach())
        if self.training and self.router.bias_steps is not None:
            self.assigned = usage.counts if self.assigned is None else self.assigned + usage.counts

    def __getstate__(self) -> dict[str, Any]:
        # The losses refer to the graph of the last step, which cannot be copied or pickled.
        transient = ("aux_losses", "stats", "assigned", "token_mask")
        return {**self.__dict__, **dict.fromkeys(transient)}

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description; see `tensornet.nn.register_module_type`."""
        return {
            "type": "shared_core_moe",
            "router": self.router.spec(),
            "experts": self.experts.spec(),
            "shared_expert": None if self.shared_expert is None else self.shared_expert.spec(),
            "capacity_factor": self.capacity_factor,
            "balance_coef": self.balance_coef,
            "z_coef": self.z_coef,
            "dropout": self.dropout,
        }

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return (
            f"capacity_factor={self.capacity_factor}, balance_coef={self.balance_coef}, z_coef={self.z_coef}"
        )


def _build(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> SharedCoreMoE:
    parts: dict[str, Any] = {
        name: None if spec[name] is None else build_module(spec[name], device=device, dtype=dtype)
        for name in ("router", "experts", "shared_expert")
    }
    names = ("capacity_factor", "balance_coef", "z_coef", "dropout")
    return SharedCoreMoE(**parts, **{name: spec[name] for name in names})


register_module_type("shared_core_moe", _build)


def _check_router(router: Router, experts: ExpertFFN | PooledExperts) -> None:
    have, want = (router.num_experts, router.num_features), (experts.num_experts, experts.in_features)
    if have != want:
        raise ShapeError(
            f"The router is for {have[0]} experts and tokens of size {have[1]}, the experts are {want[0]} "
            f"for tokens of size {want[1]}. Build it with num_experts={want[0]} and num_features={want[1]}."
        )


def _check_shared_expert(shared_expert: ExpertFFN | None, experts: ExpertFFN | PooledExperts) -> None:
    if shared_expert is None:
        return
    have = (shared_expert.num_experts, shared_expert.in_features, shared_expert.out_features)
    want = (1, experts.in_features, experts.out_features)
    if have != want:
        raise ShapeError(
            f"The shared expert has (experts, in, out) = {have}, expected {want}: it is one network over the "
            "features of the routed experts. Several shared experts are one with a larger hidden layer."
        )


def dispatch(x: Tensor, routing: Routing, experts: ExpertFFN | PooledExperts) -> Tensor:
    """Send every token to its experts, and sum the weighted outputs of these experts.

    Args:
        x: tokens, shape `(tokens, in_features)`.
        routing: the experts of each token.
        experts: the expert networks.

    Returns:
        Shape `(tokens, out_features)`; 0 for tokens that no expert computes.
    """
    tokens, k = routing.expert_indices.shape
    expert, weight = routing.expert_indices.reshape(-1), routing.weights.reshape(-1)
    if is_exporting():  # every expert computes all rows, so rows need not be sorted
        choice = torch.arange(expert.shape[0], device=expert.device)
        weight = weight if routing.kept is None else weight * routing.kept.reshape(-1)
    elif routing.kept is None:
        choice = expert.argsort(stable=True)
    else:
        kept = routing.kept.reshape(-1).nonzero().squeeze(-1)
        choice = kept[expert[kept].argsort(stable=True)]
    token = torch.div(choice, k, rounding_mode="floor")
    y = experts(x.index_select(0, token), group_rows(expert[choice], routing.num_experts))
    y = y * weight[choice].to(y.dtype).unsqueeze(-1)
    return y.new_zeros(tokens, experts.out_features).index_add(0, token, y)


@torch.no_grad()
def routing_stats(routing: Routing, balance: Tensor, z: Tensor) -> RoutingStats:
    """Compute the statistics of a routing, and add the given auxiliary losses to them."""
    load = routing.load()
    fractions = load / load.sum().clamp_min(1)
    real = torch.ones_like(routing.probs[:, 0]) if routing.mask is None else routing.mask.float()
    uncertainty = torch.where(real > 0, torch.special.entr(routing.probs).sum(-1), 0)
    return RoutingStats(
        load=load,
        dropped=routing.dropped(),
        entropy=torch.special.entr(fractions).sum(),
        router_entropy=uncertainty.sum() / real.sum().clamp_min(1),
        tokens=real.sum(),
        balance=balance,
        z=z,
    )


def collect_aux_losses(model: nn.Module) -> AuxLosses:
    """Collect and clear the auxiliary losses of the last forward pass of every mixture in a model.

    Call this once after each forward pass in training, and add `.total` to the loss. The losses are cleared,
    so that a step cannot count those of an earlier step.

    All layers that use an `ExpertPool` with `balance="pool"` have one common balancing loss. It is computed
    from their summed choices and probabilities, and weighted by the sum of their coefficients. `.balance`
    repeats it for each of these layers.

    Raises:
        RuntimeError: the model has no mixture, or no mixture has run since the last call; or, in training,
            reentrant gradient checkpointing has detached the losses from the graph.
        TargetError: a layer uses a pool that the model does not contain.

    Example:
        >>> up = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> down = tm.SharedCoreExperts.from_dense(torch.randn(8, 16), num_experts=4)
        >>> moe = tm.SharedCoreMoE(tm.TopKRouter(8, 4, top_k=2), tm.ExpertFFN({"up": up, "down": down}))
        >>> loss = moe(torch.randn(5, 8)).square().mean() + tm.collect_aux_losses(moe).total
        >>> loss.backward()
        >>> moe.router.weight.grad is not None
        True
    """
    layers = [module for module in model.modules() if isinstance(module, SharedCoreMoE)]
    if not layers:
        raise RuntimeError(
            "collect_aux_losses: the model has no SharedCoreMoE; pass the model that contains the mixtures."
        )
    find_pools(model)
    layers = [layer for layer in layers if layer.aux_losses is not None]
    if not layers:
        raise RuntimeError(
            "collect_aux_losses: no mixture has run since the last call; call it once after each forward."
        )
    losses = [layer.aux_losses for layer in layers if layer.aux_losses is not None]
    pools: dict[int, list[int]] = {}
    for position, layer in enumerate(layers):
        if layer.balanced_pool is not None:
            pools.setdefault(id(layer.balanced_pool), []).append(position)
        layer.aux_losses = None
    total = torch.stack([loss.total for loss in losses]).sum()
    for members in pools.values():
        usages = [_usage_of_pool(layers[k], usage) for k in members for usage in losses[k].usage]
        balance = _balance(Usage(*(torch.stack(terms).sum(0) for terms in zip(*usages, strict=True))))
        total = total + sum(layers[k].balance_coef for k in members) * balance
        for k in members:
            losses[k] = replace(losses[k], balance=balance.detach()[None])
    trained = any(layer.training and layer.router.weight.requires_grad for layer in layers)
    if trained and torch.is_grad_enabled() and not total.requires_grad:
        raise RuntimeError(
            "The auxiliary losses carry no gradient: reentrant gradient checkpointing runs the forward "
            "without one. Use it with use_reentrant=False (Trainer: gradient_checkpointing_kwargs="
            '{"use_reentrant": False}).'
        )
    return AuxLosses(
        total, torch.cat([loss.balance for loss in losses]), torch.cat([loss.z for loss in losses])
    )


def _usage_of_pool(layer: SharedCoreMoE, usage: Usage) -> Usage:
    assert isinstance(layer.experts, PooledExperts)
    counts, probabilities = map(layer.experts.in_pool, (usage.counts, usage.probabilities))
    return Usage(counts, probabilities, usage.tokens)


def _is_recomputing() -> bool:
    """Return True if gradient checkpointing is recomputing the layer, which it does in the backward pass.

    The routing was already counted in the first forward pass, and the loss does not depend on the
    recomputed graph.
    """
    # No public function tells whether a backward pass is running. Without this private one, the losses of a
    # recomputed layer would be counted twice.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def load_balancing_loss(
    router_probs: Tensor,
    expert_indices: Tensor,
    *,
    num_experts: int,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Compute `E * sum_e f_e P_e` from the fractions of choices `f_e` and the mean probabilities `P_e`.

    The result is 1 if the load is uniform, and `E` if every token is sent to the same expert with probability
    1. `f` includes choices that are dropped for capacity, and is not differentiated.

    Args:
        router_probs: softmax over experts, shape `(tokens, E)`.
        expert_indices: experts chosen for each token, shape `(tokens, k)`.
        num_experts: `E`.
        mask: shape `(tokens,)`, False or 0 for padding, which is excluded from both means.
        kept: shape `(tokens, k)`, False for listed experts that the router did not choose; see `Routing`.

    Returns:
        A scalar; 0 if there is no token.

    Reference:
        Fedus, Zoph, Shazeer 2021, "Switch Transformers", equations 4 to 6. For any k the fractions `f_e` sum
        to one, so the value does not grow with k.

    Example:
        >>> probabilities = torch.full((6, 3), 1 / 3)
        >>> even = torch.tensor([[0], [1], [2], [0], [1], [2]])
        >>> tm.load_balancing_loss(probabilities, even, num_experts=3)
        tensor(1.0000)
    """
    return _balance(_usage(router_probs, expert_indices, num_experts, mask, kept))


def _usage(
    router_probs: Tensor,
    expert_indices: Tensor,
    num_experts: int,
    mask: Tensor | None,
    kept: Tensor | None,
) -> Usage:
    real = router_probs.new_ones(len(router_probs)) if mask is None else mask.to(router_probs.dtype)
    chosen = expert_indices.unsqueeze(-1) == torch.arange(num_experts, device=expert_indices.device)
    if kept is not None:
        chosen = chosen & kept.bool().unsqueeze(-1)
    counts = (chosen.to(router_probs.dtype) * real[:, None, None]).sum((0, 1))
    # Use `where` instead of a product, since padding may be NaN, and 0 * NaN is NaN.
    return Usage(counts, torch.where(real[:, None] > 0, router_probs, 0).sum(0), real.sum())


def _balance(usage: Usage) -> Tensor:
    fractions = usage.counts / usage.counts.sum().clamp_min(1)
    return len(fractions) * (fractions * (usage.probabilities / usage.tokens.clamp_min(1))).sum()


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean of `logsumexp(logits)^2` over tokens, a penalty that keeps router logits small.

    Args:
        logits: shape `(tokens, E)`.
        mask: shape `(tokens,)`, False or 0 for padding, which is excluded.

    Returns:
        A scalar; 0 if there is no token.

    Reference:
        Zoph et al. 2022, "ST-MoE", equation 5.

    Example:
        >>> tm.router_z_loss(torch.tensor([[0.0, 0.0], [5.0, -5.0]]))
        tensor(12.7405)
    """
    squares = torch.logsumexp(logits, dim=-1).square()
    if mask is None:
        return squares.sum() / max(len(squares), 1)
    return torch.where(mask > 0, squares, 0).sum() / mask.to(squares.dtype).sum().clamp_min(1)
