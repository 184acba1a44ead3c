"""Routers, which choose the experts of each token and their combine weights; and the router registry."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tensornet._util import check_size
from tensornet.errors import NonFiniteError, ShapeError
from tensornet.nn import register_module_type
from tensornet.registry import Registry
from tensornet_moe.bank import check_not_negative

Combine = Literal["unit", "prob", "sigmoid"]
COMBINE = ("unit", "prob", "sigmoid")


@dataclass(frozen=True)
class Routing:
    """Routing decision: up to `k` experts, with combine weights, for each token.

    Args:
        expert_indices: shape `(tokens, k)`, integer.
        weights: combine weight of each choice, shape `(tokens, k)`, float32.
        probs: softmax over experts, shape `(tokens, E)`, float32.
        logits: shape `(tokens, E)`, float32.
        mask: shape `(tokens,)`, False for padding; None without padding.
        kept: shape `(tokens, k)`, False if a choice is not computed (the expert is over capacity, or did not
            choose the token); None if all are computed.

    Example:
        >>> routing = tm.TopKRouter(8, 4, top_k=2)(torch.randn(5, 8))
        >>> routing.expert_indices.shape, int(routing.load().sum()), int(routing.dropped())
        (torch.Size([5, 2]), 10, 0)
    """

    expert_indices: Tensor
    weights: Tensor
    probs: Tensor
    logits: Tensor
    mask: Tensor | None = None
    kept: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts `E`."""
        return self.probs.shape[-1]

    def load(self) -> Tensor:
        """Count the tokens that each expert processes, padding excluded, shape `(E,)`."""
        chosen = self.expert_indices.unsqueeze(-1) == torch.arange(self.num_experts, device=self.probs.device)
        counted = chosen & self._real().unsqueeze(-1)
        return counted.sum((0, 1))

    def dropped(self) -> Tensor:
        """Count the tokens that no expert computes, padding excluded."""
        tokens = torch.ones_like(self.probs[:, 0], dtype=torch.bool) if self.mask is None else self.mask
        return (tokens & ~self._real().any(-1)).sum()

    def _real(self) -> Tensor:
        real = torch.ones_like(self.expert_indices, dtype=torch.bool) if self.kept is None else self.kept
        return real if self.mask is None else real & self.mask[:, None]


class Router(nn.Module, ABC):
    """Abstract base class of routers: adds jitter, computes logits and softmax in float32, checks for NaN.

    A subclass defines `select`, and lists its additional arguments in `options`. `register_router` makes the
    subclass known to configurations and checkpoints. A router that uses later tokens must set
    `causal = False`. No router may use the position of a token in the batch, since padding changes this
    position. A router without trained weights, such as a hash of the token, calls
    `self.weight.requires_grad_(False)`. `tensornet_moe.testing.RouterLaws` tests routers.

    Logits are `x @ weight^T`, computed in float32 even in half-precision models and under autocast, since
    routers in half precision are unstable (Switch Transformers, section 2.4).

    Args:
        num_features: number of features of a token.
        num_experts: number of experts.
        jitter: in training, the router's input is multiplied by uniform noise in `[1 - jitter, 1 + jitter]`.
        combine: how the outputs of a token's experts are weighted. `"unit"`: by weights that sum to one, so
            that equal experts act as one. (If a token has one expert, its weight is `p / stop_gradient(p)`,
            which equals 1 but can be differentiated.) `"prob"`: by the probabilities. `"sigmoid"`: by
            `2 sigmoid(logit)`, which is initially about 1 (Csordas et al. 2024, MoEUT, without the factor 2).
            Use `"sigmoid"` for training from scratch, where experts with weights that sum to one learn `k`
            times more slowly than a dense network.
        normalize: divide the logits of a token by their Euclidean norm over the experts, and multiply them by
            `logit_scale`, a trained parameter that starts at `sqrt(num_experts)`. The logits of a token
            of any norm then initially have a root mean square of 1, in every layer that uses a pool. UniPool
            (Huang et al. 2026, NormRouter) normalizes in this way, but applies a ReLU afterwards; softmax and
            `combine` are our choice.
        bias_rate: if above 0, experts are chosen by probability plus bias (`ranked`), and `update_biases`
            changes the bias of each expert by this rate after a training step. Combine weights do not contain
            the bias. Biases balance the load without a loss (set `balance_coef=0`). DeepSeek-V3 uses a rate
            of 0.001, and sigmoids in place of our softmax probabilities.
        device, dtype: device and dtype of the weight `(num_experts, num_features)`, whose initial standard
            deviation is `0.1 / sqrt(num_features)`.

    Raises:
        ValueError: an option is out of its range.

    Reference:
        Bias: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.1.2; Wang et al. 2024,
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts".

    Example:
        >>> class EveryExpertRouter(tm.Router):
        ...     def select(self, logits, probs, mask):
        ...         experts = torch.arange(self.num_experts, device=probs.device).expand_as(probs)
        ...         return tm.Routing(experts, probs, probs, logits, mask)
        >>> tm.register_router("every_expert", EveryExpertRouter)
        >>> EveryExpertRouter(8, 4)(torch.randn(6, 8)).load()
        tensor([6, 6, 6, 6])
    """

    #: Names of the arguments that a subclass adds to those of `Router`; each is also an attribute.
    options: ClassVar[tuple[str, ...]] = ()
    logit_scale: Tensor | None
    bias_steps: Tensor | None
    #: True if the experts of a token do not depend on later tokens. Other routers are only for encoders.
    causal: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        num_experts: int,
        *,
        jitter: float = 0.0,
        combine: Combine = "unit",
        normalize: bool = False,
        bias_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("num_features", num_features, error=ValueError)
        check_size("num_experts", num_experts, error=ValueError)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {jitter}.")
        if combine not in COMBINE:
            raise ValueError(f"Unknown combine={combine!r}; choose one of {', '.join(COMBINE)}.")
        self.num_features, self.num_experts = num_features, num_experts
        check_not_negative(bias_rate=bias_rate)
        self.jitter, self.combine, self.normalize, self.bias_rate = jitter, combine, normalize, bias_rate
        weight = torch.randn(num_experts, num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight * (0.1 / math.sqrt(num_features)))
        # The scale has one dimension, since FSDP cannot shard scalars.
        scale = torch.full((1,), math.sqrt(num_experts), device=device, dtype=dtype) if normalize else None
        self.register_parameter("logit_scale", None if scale is None else nn.Parameter(scale))

        # The biases are stored as integer counts of steps, which stay exact in a half-precision model.
        steps = torch.zeros(num_experts, dtype=torch.int64, device=device) if bias_rate > 0 else None
        self.register_buffer("bias_steps", steps)

    @abstractmethod
    def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> Routing:
        """Choose experts, given float32 `logits` and `probs: (tokens, E)` and a bool `mask: (tokens,)`."""

    @property
    def experts_per_token(self) -> float | None:
        """Mean number of experts that process a token; None if it depends on the tokens (the default)."""
        return None

    def ranked(self, probs: Tensor) -> Tensor:
        """Add the biases of experts to `probs: (tokens, E)`; `select` chooses experts by these sums."""
        return probs if self.bias_steps is None else probs + self.bias_rate * self.bias_steps

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description; see `tensornet.nn.register_module_type`.

        Raises:
            TypeError: the class is not registered.
        """
        name = next((name for name in _ROUTERS if _ROUTERS[name] is type(self)), None)
        if name is None:
            raise TypeError(
                f"{type(self).__name__} cannot be saved: register it, here and where it is loaded, as in "
                f'tensornet_moe.register_router("my_router", {type(self).__name__}).'
            )
        common = ("num_features", "num_experts", "jitter", "combine", "normalize", "bias_rate")
        return {"type": f"{name}_router", **{key: getattr(self, key) for key in (*common, *self.options)}}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens `x: (tokens, features)`; a False or 0 in `mask: (tokens,)` marks padding.

        Raises:
            NonFiniteError: a token that is not padding has NaN or infinite logits. (RuntimeError in compiled
                code, which cannot raise other exceptions.)
            ShapeError: the tokens have another number of features.
        """
        if x.shape[-1] != self.num_features:
            raise ShapeError(
                f"This router takes tokens of size {self.num_features}, got {tuple(x.shape)}: (tokens, size)."
            )
        mask = None if mask is None else mask.to(torch.bool)
        with torch.autocast(x.device.type, enabled=False):
            seen = x.float()
            if self.training and self.jitter > 0:
                seen = seen * torch.empty_like(seen).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = nn.functional.linear(seen, self.weight.float())
            if self.logit_scale is not None:
                logits = nn.functional.normalize(logits, dim=-1) * self.logit_scale.float()
            self._refuse_nonfinite(logits, mask)
            return self.select(logits, logits.softmax(-1), mask)

    def _refuse_nonfinite(self, logits: Tensor, mask: Tensor | None) -> None:
        finite = torch.isfinite(logits).all(-1)
        if mask is not None:
            finite = finite | ~mask
        if torch.compiler.is_compiling():
            # This function is private, but it is the only check of values that causes no graph break.
            torch._assert_async(finite.all(), "a router was fed NaN or infinity")
        elif not bool(finite.all()):
            raise NonFiniteError(
                f"The router was fed NaN or infinity: {int((~finite).sum())} of {len(finite)} tokens have "
                "non-finite logits. Look at the layer before it, the learning rate and, in float16, the loss "
                "scale; mask padding if the values are there."
            )

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        sizes = f"{self.num_features}, {self.num_experts}"
        return f"{sizes}, jitter={self.jitter}, combine={self.combine}, normalize={self.normalize}"


_ROUTERS: Registry[type[Router]] = Registry("router")


def register_router(name: str, kind: type[Router]) -> None:
    """Register a router class under the name that configurations and checkpoints use.

    Args:
        name: name for `mixture(router=name)` and `tensornet_hf.upcycle(model, router=name)`.
        kind: a subclass of `Router` whose constructor takes the arguments of `Router` and its `options`.
            Users pass these options to `mixture` and `upcycle`.

    Raises:
        TypeError: `kind` is not a subclass of `Router`.
        ValueError: the name is taken by another class.

    Example:
        >>> class CalmRouter(tm.SwitchRouter):
        ...     pass
        >>> tm.register_router("calm", CalmRouter)
        >>> CalmRouter(8, 4).spec()["type"]
        'calm_router'
    """
    if not (isinstance(kind, type) and issubclass(kind, Router)):
        raise TypeError(f"register_router takes a subclass of Router, got {kind!r}; give the class itself.")
    if _ROUTERS.get(name) is kind:
        return
    _ROUTERS.add(name, kind)

    def build(
        spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Module:
        return kind(**{key: spec[key] for key in spec if key != "type"}, device=device, dtype=dtype)

    register_module_type(f"{name}_router", build)


def router_kind(name: str) -> type[Router]:
    """Look up a router class by its registered name.

    Raises:
        ValueError: an unknown name; the message lists the registered ones.
    """
    return _ROUTERS[name]


def check_capacity(factor: float | None) -> None:
    """Raise ValueError unless the capacity factor is None or a finite number above 0."""
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ValueError(f"capacity_factor must be above 0, got {factor!r}; None computes every token.")


def limit_capacity(routing: Routing, capacity_factor: float) -> Routing:
    """Drop the choices that exceed the capacity of an expert, `ceil(capacity_factor * choices / E)`.

    If every token has `k` experts, there are `k * tokens` choices. First choices of all tokens are served
    before second choices, earlier tokens before later ones, and padding last. A dropped choice
    contributes nothing, and the weights of the other choices do not change. If all choices of a token are
    dropped, its output is 0, so that only the residual connection remains. Whether a choice is dropped
    depends on later tokens and on other rows of the batch.

    Args:
        routing: the decision of a router.
        capacity_factor: with 1, the capacity of an expert is its load under an even distribution.

    Reference:
        Fedus et al. 2021, equation 3. The order is that of GShard, algorithm 1.
    """
    tokens, k = routing.expert_indices.shape
    experts = torch.arange(routing.num_experts, device=routing.expert_indices.device)
    chosen = routing.expert_indices.T.reshape(-1, 1) == experts  # shape: (k * tokens, E), first choices first
    if routing.kept is not None:
        chosen = chosen & routing.kept.T.reshape(-1, 1)
    queue, choices = chosen.cumsum(0), k * tokens
    if routing.mask is not None:  # padding comes after all real tokens
        real = routing.mask.repeat(k)[:, None]
        tokens_first = (chosen & real).cumsum(0)
        queue = torch.where(real, tokens_first, tokens_first[-1:] + (chosen & ~real).cumsum(0))
    if routing.mask is not None or routing.kept is not None:
        choices = int((chosen if routing.mask is None else chosen & real).sum())
    capacity = math.ceil(capacity_factor * choices / routing.num_experts)
    fits = (chosen & (queue <= capacity)).any(-1)
    return replace(routing, kept=fits.reshape(k, tokens).T)


class TopKRouter(Router):
    """Router that sends each token to its `top_k` most probable experts.

    With `combine="unit"` the weights of the chosen experts are `p_i / sum_j p_j`. For `top_k=1` this would be
    the constant 1, from which the router cannot learn. So the weight is then `p / stop_gradient(p)`.

    Args:
        top_k: number of experts for each token.
        num_features, num_experts, jitter, combine, normalize, bias_rate, device, dtype: see `Router`.

    Raises:
        ValueError: `top_k` is not in `[1, num_experts]`.

    Reference:
        Shazeer et al. 2017 (noisy top-k); Lepikhin et al. 2020 (GShard, k = 2).

    Example:
        >>> routing = tm.TopKRouter(8, 4, top_k=2)(torch.randn(5, 8))
        >>> routing.expert_indices.shape, routing.weights.sum(-1).allclose(torch.ones(5))
        (torch.Size([5, 2]), True)
    """

    options: ClassVar[tuple[str, ...]] = ("top_k",)

    def __init__(self, num_features: int, num_experts: int, *, top_k: int = 2, **common: Any) -> None:
        check_size("num_experts", num_experts, error=ValueError)
        check_size("top_k", top_k, error=ValueError)
        if top_k > num_experts:
            raise ValueError(
                f"top_k={top_k} with num_experts={num_experts}: top_k must be between 1 and num_experts."
            )
        super().__init__(num_features, num_experts, **common)
        self.top_k = top_k

    @property
    def experts_per_token(self) -> float:
        """Number of experts that process a token: `top_k`."""
        return self.top_k

    def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> Routing:
        """Choose the `top_k` experts of every token by probability plus bias; see `Router.select`."""
        indices = self.ranked(probs).topk(self.top_k, dim=-1).indices
        chosen = probs.gather(1, indices)  # the reference runtime of ONNX misreads dimension -1
        if self.combine == "unit":
            total = chosen.sum(-1, keepdim=True)
            chosen = chosen / (total.detach() if self.top_k == 1 else total)
        elif self.combine == "sigmoid":
            chosen = 2 * logits.gather(1, indices).sigmoid()
        return Routing(indices, chosen, probs, logits, mask)


class SwitchRouter(TopKRouter):
    """Router that sends each token to its most probable expert; see `Router` for the arguments.

    Reference:
        Fedus, Zoph, Shazeer 2021, "Switch Transformers", section 2.1.

    Example:
        >>> routing = tm.SwitchRouter(8, 4)(torch.randn(5, 8))
        >>> routing.expert_indices.shape, routing.weights[0].item()
        (torch.Size([5, 1]), 1.0)
    """

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_features: int, num_experts: int, **common: Any) -> None:
        super().__init__(num_features, num_experts, top_k=1, **common)


class ExpertChoiceRouter(Router):
    """Router whose experts choose `ceil(capacity_factor * tokens / E)` tokens each, so the load is even.

    A token may be chosen by several experts or by none. The choice depends on the *other* tokens of the
    batch, including later ones. So this router is for encoders, not for autoregressive decoding, where
    results with and without a cache would differ.

    Args:
        capacity_factor: mean number of experts for each token.
        num_features, num_experts, jitter, combine, normalize, device, dtype: see `Router`. `combine="unit"`
            divides a token's probabilities by their sum over the experts that chose it. This sum is not
            differentiated.

    Raises:
        ValueError: `capacity_factor` is not in `(0, num_experts]`, or `bias_rate` is above 0.

    Reference:
        Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing".

    Example:
        >>> tm.ExpertChoiceRouter(8, 4, capacity_factor=2.0)(torch.randn(6, 8)).load()
        tensor([3, 3, 3, 3])
    """

    options: ClassVar[tuple[str, ...]] = ("capacity_factor",)
    causal: ClassVar[bool] = False

    def __init__(
        self, num_features: int, num_experts: int, *, capacity_factor: float = 1.0, **common: Any
    ) -> None:
        check_size("num_experts", num_experts, error=ValueError)
        if not 0 < capacity_factor <= num_experts:
            raise ValueError(
                f"capacity_factor must lie in (0, num_experts={num_experts}], got {capacity_factor}: it is "
                "the average number of experts for each token."
            )
        super().__init__(num_features, num_experts, **common)
        if self.bias_rate > 0:
            raise ValueError(
                "bias_rate is for routers whose tokens choose experts: here the load is even without biases."
            )
        self.capacity_factor = capacity_factor

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that process a token: the capacity factor."""
        return self.capacity_factor

    def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> Routing:
        """List every expert for every token, and mark the choices in `kept`; see `Router.select`."""
        tokens = len(probs) if mask is None else int(mask.sum())
        slots = min(math.ceil(self.capacity_factor * tokens / self.num_experts), tokens)
        ranked = probs.detach() if mask is None else probs.detach().masked_fill(~mask[:, None], -1.0)
        chosen = ranked.topk(slots, dim=0).indices  # shape: (slots, E)
        kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(0, chosen, True)
        weights = (2 * logits.sigmoid() if self.combine == "sigmoid" else probs) * kept
        if self.combine == "unit":
            weights = weights / weights.detach().sum(-1, keepdim=True).clamp_min(
                torch.finfo(probs.dtype).tiny
            )
        indices = torch.arange(self.num_experts, device=probs.device).expand_as(probs)
        return Routing(indices, weights, probs, logits, mask, kept)


register_router("switch", SwitchRouter)
register_router("topk", TopKRouter)
register_router("expert_choice", ExpertChoiceRouter)
