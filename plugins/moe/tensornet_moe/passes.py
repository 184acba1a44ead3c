"""Depth for no bytes: blocks that run several times, each time with other experts of one pool."""

import copy
from collections.abc import Sequence

from torch import nn

from tensornet._util import check_size
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.pool import ExpertPool, PooledExperts


def unroll(blocks: Sequence[nn.Module], passes: int) -> nn.ModuleList:
    """Unroll blocks that run several times: each pass has modules of its own, which share their parameters.

    The result contains the blocks of pass 0, which are the given modules, then those of pass 1, and so on.
    All passes of a block have the same parameters and buffers, with two exceptions in each mixture
    (`SharedCoreMoE`):

    - its router is copied, so each pass learns to choose for itself;
    - if the mixture of pass 0 uses the experts `range(n)` of an `ExpertPool`, that of pass `k` uses the
      experts `range(k * n, (k + 1) * n)`. With a pool of `share="base"`, the experts of all passes are small
      changes of one matrix. A mixture with experts of its own uses the same experts in every pass.

    A model with unrolled blocks is as large as one with the blocks of a single pass, except for the experts
    and routers. A cache of keys and values has entries for each pass, since each pass is a module.

    Args:
        blocks: the blocks of one pass, in order. The pool belongs to the model, not to a block.
        passes: number of passes, at least 1.

    Raises:
        ValueError: `passes` is not an integer of at least 1.
        IndexError: a pool has fewer experts than the passes need.

    Reference:
        Bae et al. 2025, "Mixture-of-Recursions" (arXiv 2507.10524), and 2024, "Relaxed Recursive
        Transformers" (arXiv 2410.20672), whose passes differ by LoRA; experts for each pass are ours.

    Example:
        >>> experts = tm.mixture(d_model=8, d_ff=16, experts=6, share="base", rank=2).experts
        >>> model = torch.nn.Module()
        >>> model.pool = tm.ExpertPool(experts, balance="layer")
        >>> moe = tm.mixture(d_model=8, pool=model.pool, experts=range(2))
        >>> block = torch.nn.Sequential(torch.nn.Linear(8, 8), moe)
        >>> model.blocks = tm.unroll([block], passes=3)
        >>> [x[1].experts.experts for x in model.blocks]
        [range(0, 2), range(2, 4), range(4, 6)]
        >>> model.blocks[2][0].weight is block[0].weight
        True
    """
    check_size("passes", passes, error=ValueError)
    unrolled = list(blocks)
    for number in range(1, passes):
        for block in blocks:
            parts = list(block.modules())
            mixtures = [part for part in parts if isinstance(part, SharedCoreMoE)]
            own = {id(x) for part in mixtures for x in (*part.router.parameters(), *part.router.buffers())}
            shared = [x for x in (*block.parameters(), *block.buffers()) if id(x) not in own]
            pools: list[ExpertPool] = [
                part.experts.pool for part in mixtures if isinstance(part.experts, PooledExperts)
            ]
            # `deepcopy` puts the objects of this dict in place of copies.
            made = copy.deepcopy(block, {id(x): x for x in (*shared, *pools)})
            for part in made.modules():
                if isinstance(part, SharedCoreMoE) and isinstance(part.experts, PooledExperts):
                    first = part.experts.experts
                    step = number * len(first) * first.step
                    experts = range(first.start + step, first.stop + step, first.step)
                    part.experts = PooledExperts(part.experts.pool, experts)
            unrolled.append(made)
    return nn.ModuleList(unrolled)
