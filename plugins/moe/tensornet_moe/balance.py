"""Count the load of experts in each layer and pool, and balance it by router biases instead of a loss."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.pool import PooledExperts, find_pools


@torch.no_grad()
def update_biases(model: nn.Module, *, group: dist.ProcessGroup | None = None) -> None:
    """Move each expert's router bias one step towards an even load: `b_e += rate * sign(mean - load_e)`.

    Call this after each `optimizer.step()`. The routers need a `bias_rate` above 0. The load of an expert is
    the number of times that routers chose it in training since the last call. Choices that were then dropped
    for capacity count, padding does not. Loads are balanced in each layer separately or, for an `ExpertPool`
    with `balance="pool"`, after summing over all layers that use the pool. They are also summed over
    processes, so that every process gets the same biases.

    Args:
        model: the model that contains the mixtures.
        group: the processes that train the model together; all processes if absent.

    Raises:
        RuntimeError: no router has biases, or no mixture was trained since the last call.
        TargetError: a layer uses a pool that the model does not contain.

    Reference:
        DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.1.2; Wang et al. 2024,
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1. Balancing
        the load of a pool is our extension.

    Example:
        >>> up, down = (tm.SharedCoreExperts.from_dense(torch.randn(8, 8), num_experts=3) for _ in range(2))
        >>> router = tm.SwitchRouter(8, 3, bias_rate=0.001)
        >>> moe = tm.SharedCoreMoE(router, tm.ExpertFFN({"up": up, "down": down}), balance_coef=0)
        >>> _ = torch.nn.init.zeros_(router.weight)  # sends every token to the first expert
        >>> y = moe(torch.randn(5, 8))
        >>> tm.update_biases(moe)
        >>> router.bias_steps
        tensor([-1,  1,  1])
    """
    find_pools(model)
    layers: list[Any] = []
    biases: list[Tensor] = []
    for layer in model.modules():
        router = layer.router if isinstance(layer, SharedCoreMoE) else None
        if router is not None and router.bias_steps is not None:
            layers.append(layer)
            biases.append(router.bias_steps)
    if not layers:
        raise RuntimeError(
            "update_biases: no router of the model has biases; build them with bias_rate=0.001, for example."
        )
    if all(layer.assigned is None for layer in layers):
        raise RuntimeError(
            "update_biases: no mixture was trained since the last call; call it once after each step."
        )
    loads: list[Tensor] = []
    for layer, bias in zip(layers, biases, strict=True):
        # `all_reduce` waits for all processes, so call it even if the layer did not run in this process.
        load = torch.zeros_like(bias, dtype=torch.float32)
        load += 0 if layer.assigned is None else layer.assigned
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load, group=group)
        loads.append(load)
        layer.assigned = None
    pools = [layer.balanced_pool for layer in layers]
    for layer, pool, load, bias in zip(layers, pools, loads, biases, strict=True):
        if pool is not None:
            each = zip(layers, loads, pools, strict=True)
            spread = [x.experts.in_pool(own) for x, own, other in each if other is pool]
            load = torch.stack(spread).sum(0)[torch.tensor(layer.experts.experts, device=load.device)]
        bias += (load.mean() - load).sign().to(torch.int64)


def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """Count the tokens that each expert processed in the last forward pass, for each layer and each pool.

    Args:
        model: the model that contains the mixtures and their pools.

    Returns:
        A dict from the name of each mixture or pool to the number of tokens that each of its experts
        processed, shape `(E,)`. Padding is excluded. The load of a pool is the sum over the layers that use
        it. Mixtures that have not run are absent.

    Raises:
        TargetError: a pool is missing from the model or contained twice, or two pools have the same label.

    Example:
        >>> up, down = (tm.SharedCoreExperts.from_dense(torch.randn(8, 8), num_experts=4) for _ in range(2))
        >>> model = torch.nn.Module()
        >>> model.pool = tm.ExpertPool(tm.ExpertFFN({"up": up, "down": down}))
        >>> for name in ("first", "second"):
        ...     setattr(model, name, tm.SharedCoreMoE(tm.SwitchRouter(8, 4), model.pool))
        >>> y = model.second(model.first(torch.randn(5, 8)))
        >>> {name: int(load.sum()) for name, load in tm.expert_load(model).items()}
        {'first': 5, 'second': 5, 'pool': 10}
    """
    pools = {id(pool): name for name, pool in find_pools(model).items()}
    loads: dict[str, Tensor] = {}
    over_pools: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SharedCoreMoE) and layer.stats is not None:
            loads[name] = layer.stats.load
            if isinstance(layer.experts, PooledExperts):
                pool = pools[id(layer.experts.pool)]
                over_pools[pool] = over_pools.get(pool, 0) + layer.experts.in_pool(layer.stats.load)
    return {**loads, **over_pools}
