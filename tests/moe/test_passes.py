"""Unrolled blocks compute what a loop over one block computes, and own their parameters once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensornet_moe as tm

FEATURES, EXPERTS, PASSES = 8, 2, 3


class Block(nn.Module):
    """Norm, a matrix and a mixture, each with a residual connection."""

    def __init__(self, moe: tm.SharedCoreMoE) -> None:
        super().__init__()
        self.norm, self.mix, self.moe = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES), moe

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Two blocks in several passes, with a pool for each block."""

    def __init__(self, passes: int, experts: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pools = nn.ModuleList()
        blocks = []
        for k in range(2):
            made = tm.mixture(d_model=FEATURES, d_ff=12, experts=experts, top_k=1, share="base", rank=2)
            self.pools.append(tm.ExpertPool(made.experts, label=f"pool{k}", balance="layer"))
            for bank in ("gate", "up", "down"):  # deltas start at zero
                nn.init.normal_(made.experts.bank(bank).left, std=0.3)
            blocks.append(
                Block(tm.mixture(d_model=FEATURES, pool=self.pools[-1], experts=range(EXPERTS), top_k=1))
            )
        self.blocks = tm.unroll(blocks, passes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_unrolled_blocks_equal_a_loop_over_one_block() -> None:
    model = Model(PASSES, EXPERTS * PASSES).double()
    assert len(model.blocks) == 2 * PASSES
    for part in model.blocks:  # each pass has a router of its own
        nn.init.normal_(part.moe.router.weight)
    x = torch.randn(20, FEATURES, dtype=torch.float64)
    looped = Model(1, EXPERTS * PASSES).double()
    looped.load_state_dict(model.state_dict(), strict=False)
    routers = [part.moe.router.weight.detach().clone().requires_grad_() for part in model.blocks]
    want = x
    for number in range(PASSES):
        for k, block in enumerate(looped.blocks):
            want = want + block.mix(block.norm(want))
            # Route by hand: the expert with the largest logit, weighted by twice the sigmoid of its logit.
            tokens = block.norm(want)
            logits = tokens @ routers[2 * number + k].T
            chosen = logits.argmax(-1)
            weights = 2 * logits.sigmoid().gather(1, chosen[:, None])
            found = looped.pools[k].experts
            banks = {n: found.bank(n).expert_matrices()[EXPERTS * number + chosen] for n in found.names}
            gate, up = (torch.einsum("nof,nf->no", banks[n], tokens) for n in ("gate", "up"))
            y = torch.einsum("nof,nf->no", banks["down"], nn.functional.silu(gate) * up)
            want = want + weights * y
    got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # routers compute in float32
    got.square().sum().backward()
    want.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in looped.named_parameters():
        if "router" not in name:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-3, msg=name)
    for part, router in zip(model.blocks, routers, strict=True):
        torch.testing.assert_close(part.moe.router.weight.grad, router.grad, rtol=1e-4, atol=1e-3)


def test_only_experts_and_routers_grow_with_passes() -> None:
    model, once = Model(PASSES, EXPERTS * PASSES), Model(1, EXPERTS)

    def count(model: nn.Module, word: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if word in name)

    for word in ("norm", "mix", "base"):
        assert count(model, word) == count(once, word) > 0
    for word in ("left", "right", "router"):
        assert count(model, word) == PASSES * count(once, word)
    used: list[list[int]] = [list(part.moe.experts.experts) for part in model.blocks]
    assert used == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert all(part.moe.experts.pool is model.pools[k % 2] for k, part in enumerate(model.blocks))


def test_steps_and_offsets_of_ranges_are_kept() -> None:
    pool = tm.ExpertPool(tm.mixture(d_model=FEATURES, d_ff=4, experts=9).experts)
    block = tm.mixture(d_model=FEATURES, pool=pool, experts=range(1, 5, 2), top_k=1)
    assert [list(part.experts.experts) for part in tm.unroll([block], 2)] == [[1, 3], [5, 7]]


def test_experts_outside_of_pools_are_used_by_every_pass() -> None:
    block = tm.mixture(d_model=FEATURES, d_ff=12, experts=3, top_k=1, bias_rate=0.1)
    first, second = tm.unroll([block], 2)
    own = dict(second.experts.named_parameters())
    assert all(own[name] is p for name, p in first.experts.named_parameters())
    assert first.router.weight is not second.router.weight
    assert first.router.bias_steps is not second.router.bias_steps


@pytest.mark.parametrize(
    ("passes", "experts", "error"),
    [(0, 6, ValueError), (2.0, 6, ValueError), (4, 6, IndexError)],
)
def test_bad_numbers_are_refused(passes: Any, experts: int, error: type) -> None:
    with pytest.raises(error):
        Model(passes, experts)
