"""Parameter groups, for any optimizer, in which shared tensors have lower learning rates."""

import math
from collections import Counter
from typing import Any

from torch import nn

from tensornet_moe.bank import ExpertBank, check_not_negative
from tensornet_moe.pool import PooledExperts, find_pools
from tensornet_moe.specialist_layers import SpecialistLinear


def parameter_groups(model: nn.Module, *, lr: float, **options: Any) -> list[dict[str, Any]]:
    """Group parameters by the number `n` of experts or layers that share them, with rate `lr / sqrt(n)`.

    In each step, a shared tensor collects the gradients of all experts or layers that share it. The lower
    rate compensates for this. (`GradientMask` instead skips steps of such tensors.) The number of sharers is:

    - for a core that all experts of a bank share, the number of these experts. For a bank in an `ExpertPool`,
      the experts that each layer uses are counted, and summed over the layers;
    - for any other tensor of a pool, the mean number of layers that use an expert;
    - for a core that all specialists of a layer share, the number of specialists, summed over the layers;
    - for every other parameter, 1, even if an output layer and an embedding are tied.

    Args:
        model: a model; build the groups after moving or sharding it, since FSDP replaces parameters.
        lr: learning rate of parameters that are not shared.
        options: further entries of every group, for example `weight_decay=0.1`.

    Returns:
        Groups for a torch optimizer, in ascending order of their additional entry `"sharers"`. They contain
        every trainable parameter exactly once.

    Raises:
        ValueError: `lr` is negative or not a finite number.
        TargetError: a pool is missing from the model or contained twice, or two pools have the same label.

    Reference:
        Dividing by the square root of the number of layers is from "Expert Tying" (arXiv 2606.16825).
        Counting experts as well is our extension.

    Example:
        >>> up, down = (tm.SharedCoreExperts.from_dense(torch.randn(8, 8), num_experts=4) for _ in range(2))
        >>> moe = tm.SharedCoreMoE(tm.SwitchRouter(8, 4), tm.ExpertFFN({"up": up, "down": down}))
        >>> groups = tm.parameter_groups(moe, lr=1e-3, weight_decay=0.1)
        >>> [(group["sharers"], group["lr"], len(group["params"])) for group in groups]
        [(1, 0.001, 5), (4, 0.0005, 2)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_not_negative(lr=lr)
    sharers = count_sharers(model)
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(max(sharers[id(parameter)], 1), []).append(parameter)
    return [
        {"params": groups[count], "lr": lr / math.sqrt(count), "sharers": count, **options}
        for count in sorted(groups)
    ]


def count_sharers(model: nn.Module) -> Counter[int]:
    """Count the experts, specialists or layers that share each parameter, by parameter `id`."""
    pools = find_pools(model).values()
    used: Counter[int] = Counter()  # number of experts that all layers use, by pool id
    for part in model.modules():
        if isinstance(part, PooledExperts):
            used[id(part.pool)] += part.num_experts
    uses = {id(part): used[id(pool)] for pool in pools for part in pool.modules()}
    banks = [part for part in model.modules() if isinstance(part, ExpertBank)]
    # Banks inside another bank, such as the base of low-rank deltas, are counted with the outer one.
    inner = {id(part) for bank in banks for part in bank.modules() if part is not bank}
    sharers: Counter[int] = Counter()
    for bank in banks:
        if id(bank) not in inner:
            for parameter in bank.shared_parameters().values():
                sharers[id(parameter)] += uses.get(id(bank), bank.num_experts)
    for part in model.modules():
        if isinstance(part, SpecialistLinear):
            for parameter in part.shared_parameters().values():
                sharers[id(parameter)] += len(part.specialists)
    for pool in pools:
        for parameter in pool.parameters():
            layers = round(used[id(pool)] / pool.num_experts)
            sharers[id(parameter)] = sharers[id(parameter)] or layers
    return sharers
