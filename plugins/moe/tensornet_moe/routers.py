"""Routers: Switch, top-k, expert choice."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from tensornet_moe.checks import check_whole
from tensornet_moe.router_base import Combine, Router, Routing, register_router


class TopKRouter(Router):
    """Router that sends each token to its `top_k` most probable experts.

    With `combine="unit"` the weights of the chosen are `p_i / sum_j p_j`; for `top_k=1`, where that would be
    a constant without gradient, `p / stop_gradient(p)`.

    Args:
        top_k: experts for each token.
        num_features, num_experts, jitter, combine, device, dtype: see `Router`.

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

    def __init__(
        self,
        num_features: int,
        num_experts: int,
        *,
        top_k: int = 2,
        jitter: float = 0.0,
        combine: Combine = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole(num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise ValueError(
                f"top_k={top_k} with num_experts={num_experts}: a token can go to at least 1 and at most "
                "num_experts experts."
            )
        super().__init__(
            num_features, num_experts, jitter=jitter, combine=combine, device=device, dtype=dtype
        )
        self.top_k = top_k

    def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> Routing:
        """Choose the `top_k` most probable experts of every token; see `Router.select`."""
        chosen, indices = probs.topk(self.top_k, dim=-1)
        if self.combine == "unit":
            total = chosen.sum(-1, keepdim=True)
            chosen = chosen / (total.detach() if self.top_k == 1 else total)
        elif self.combine == "sigmoid":
            chosen = 2 * logits.gather(-1, indices).sigmoid()
        return Routing(indices, chosen, probs, logits, mask)


class SwitchRouter(TopKRouter):
    """Switch router: send each token to its most probable expert. See `Router` for the arguments.

    Reference:
        Fedus, Zoph, Shazeer 2021, "Switch Transformers", section 2.1.

    Example:
        >>> routing = tm.SwitchRouter(8, 4)(torch.randn(5, 8))
        >>> routing.expert_indices.shape, routing.weights[0].item()
        (torch.Size([5, 1]), 1.0)
    """

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        num_features: int,
        num_experts: int,
        *,
        jitter: float = 0.0,
        combine: Combine = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, num_experts, top_k=1, jitter=jitter, combine=combine, device=device, dtype=dtype
        )


class ExpertChoiceRouter(Router):
    """Router whose experts choose `ceil(capacity_factor * tokens / E)` tokens each: the load is even.

    A token may be chosen by several experts or by none. Which tokens are chosen depends on the *other* tokens
    of the batch, later ones included: right for encoders, not for autoregressive decoding, where the result
    with a cache would differ from the one without.

    Args:
        capacity_factor: experts for each token on average.
        num_features, num_experts, jitter, combine, device, dtype: see `Router`. `"unit"` divides by the
            summed probability of the experts that chose a token, without gradient through the sum.

    Raises:
        ValueError: `capacity_factor` is not in `(0, num_experts]`.

    Reference:
        Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing".

    Example:
        >>> tm.ExpertChoiceRouter(8, 4, capacity_factor=2.0)(torch.randn(6, 8)).load()
        tensor([3, 3, 3, 3])
    """

    options: ClassVar[tuple[str, ...]] = ("capacity_factor",)
    causal: ClassVar[bool] = False

    def __init__(
        self,
        num_features: int,
        num_experts: int,
        *,
        capacity_factor: float = 1.0,
        jitter: float = 0.0,
        combine: Combine = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole(num_experts=num_experts)
        if not 0 < capacity_factor <= num_experts:
            raise ValueError(
                f"capacity_factor must lie in (0, num_experts={num_experts}], got {capacity_factor}: it is "
                "the average number of experts for each token."
            )
        super().__init__(
            num_features, num_experts, jitter=jitter, combine=combine, device=device, dtype=dtype
        )
        self.capacity_factor = capacity_factor

    def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> Routing:
        """List every expert for every token, and mark in `kept` the choices made; see `Router.select`."""
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
