"""Auxiliary losses of routers as pure functions, called once for each layer."""

import torch
from torch import Tensor


def load_balancing_loss(
    router_probs: Tensor, expert_indices: Tensor, *, num_experts: int, mask: Tensor | None = None
) -> Tensor:
    """Compute `E * sum_e f_e P_e`, with the fraction of assignments `f_e` and the mean probability `P_e`.

    It is 1 at uniform load and `E` when every token is sent to one expert with certainty. `f` counts
    assignments before any is dropped for capacity, and carries no gradient.

    Args:
        router_probs: softmax over experts, shape `(tokens, E)`.
        expert_indices: experts chosen for each token, shape `(tokens, k)`.
        num_experts: `E`.
        mask: shape `(tokens,)`, False or 0 for padding, which is excluded from both means.

    Returns:
        A scalar; 0 if there is no token.

    Reference:
        Fedus, Zoph, Shazeer 2021, "Switch Transformers", equations 4 to 6. With k > 1 the fractions sum to
        one, so the value does not grow with k.

    Example:
        >>> probabilities = torch.full((6, 3), 1 / 3)
        >>> even = torch.tensor([[0], [1], [2], [0], [1], [2]])
        >>> tm.load_balancing_loss(probabilities, even, num_experts=3)
        tensor(1.0000)
    """
    real = router_probs.new_ones(len(router_probs)) if mask is None else mask.to(router_probs.dtype)
    chosen = expert_indices.unsqueeze(-1) == torch.arange(num_experts, device=expert_indices.device)
    counts = (chosen.to(router_probs.dtype) * real[:, None, None]).sum((0, 1))  # shape: (E,)
    fractions = counts / counts.sum().clamp_min(1)
    # where, not a product: padding may hold NaN, and 0 * NaN is NaN
    probabilities = torch.where(real[:, None] > 0, router_probs, 0).sum(0) / real.sum().clamp_min(1)
    return num_experts * (fractions * probabilities).sum()


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean of `logsumexp(logits)^2` over tokens, a penalty that keeps router logits small.

    Args:
        logits: shape `(tokens, E)`.
        mask: shape `(tokens,)`, False or 0 for padding, which is left out.

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
