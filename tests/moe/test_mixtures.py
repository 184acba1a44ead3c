"""A mixture in one line: what its words build, counted by hand, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import ShapeError
from tensornet.nn import build_module
from tensornet_moe.pool import connect_pools
from tensornet_moe.sharing import end_leg

D, F, E = 64, 128, 6  # ends of 16 on both sides


def size_of_experts(share: str) -> int:
    """Numbers of one bank `(F, D)` of E experts."""
    private = {"none": F * D, "base": 4 * (F + D), "center": 2 * 16 * 16}[share]
    return E * private + (0 if share == "none" else F * D)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("share", ["none", "base", "center"])
def test_sizes_are_those_of_the_words(share: str, gated: bool) -> None:
    moe = tm.mixture(d_model=D, d_ff=F, experts=E, share=share, gated=gated)  # type: ignore[arg-type]
    assert sum(p.numel() for p in moe.experts.parameters()) == (3 if gated else 2) * size_of_experts(share)
    assert moe.experts.names == (("gate", "up", "down") if gated else ("up", "down"))
    assert (moe.experts.activation, type(moe.router)) == ("silu", tm.TopKRouter)
    assert (moe.router.top_k, moe.router.combine, moe.balance_coef) == (2, "sigmoid", 0.01)


@pytest.mark.parametrize("share", ["none", "base", "center"])
def test_matrices_start_with_the_variance_of_a_linear_layer(share: str) -> None:
    moe = tm.mixture(d_model=D, d_ff=F, experts=E, share=share)  # type: ignore[arg-type]
    for name in moe.experts.names:
        matrices = moe.experts.bank(name).expert_matrices().detach()
        assert matrices.shape == (E, *((D, F) if name == "down" else (F, D)))
        assert float(matrices.std()) * math.sqrt(matrices.shape[2]) == pytest.approx(1, rel=0.15)


def test_defaults() -> None:
    moe = tm.mixture(d_model=D, dtype=torch.float64)
    assert (moe.num_experts, moe.router.top_k) == (8, 2)
    assert moe.experts.bank("up").out_features == 4 * D
    assert moe.experts.bank("up").shared_parameters().keys() == {"1"}
    assert {p.dtype for p in moe.parameters()} == {torch.float64}


@pytest.mark.parametrize("share", ["none", "base", "center", "pool"])
def test_it_trains_and_is_rebuilt_from_its_description(share: str) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.pool = tm.ExpertPool(tm.mixture(d_model=D, d_ff=F, experts=E, share="center").experts)
    words = {"pool": model.pool} if share == "pool" else {"d_ff": F, "experts": E, "share": share}
    model.moe = tm.mixture(d_model=D, **words)  # type: ignore[arg-type]
    x, target = torch.randn(2, 100, D)
    optimizer = torch.optim.Adam(tm.parameter_groups(model, lr=0.01))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (model.moe(x) - target).square().mean() + tm.collect_aux_losses(model).total
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    again = nn.Module()
    again.pool, again.moe = build_module(model.pool.spec()), build_module(model.moe.spec())
    connect_pools(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.moe(x), model.moe(x))


def test_routers_by_name_and_by_object() -> None:
    switch = tm.mixture(d_model=D, router="switch", bias_rate=0.001, balance_coef=0.0)
    assert (type(switch.router), switch.router.bias_rate, switch.balance_coef) == (tm.SwitchRouter, 0.001, 0)
    choice = tm.mixture(d_model=D, router="expert_choice", capacity_factor=2.0, combine="prob")
    assert (choice.router.capacity_factor, choice.router.combine) == (2.0, "prob")
    own = tm.TopKRouter(D, 8, top_k=3)
    assert tm.mixture(d_model=D, router=own).router is own
    with pytest.raises(TypeError, match="top_k, normalize"):
        tm.mixture(d_model=D, router=own, top_k=2, normalize=True)
    with pytest.raises(TypeError, match="top_k"):
        tm.mixture(d_model=D, router="switch", top_k=2)


def test_the_load_is_balanced_in_one_way_by_default() -> None:
    """The rules that `upcycle` has as well: a loss, or biases, or neither if the experts choose."""
    pool = tm.ExpertPool(tm.mixture(d_model=D, experts=E, share="none").experts)
    found = [
        (layer.router.bias_rate, layer.balance_coef)
        for layer in (
            tm.mixture(d_model=D),
            tm.mixture(d_model=D, bias_rate=0.1),
            tm.mixture(d_model=D, pool=pool),
            tm.mixture(d_model=D, pool=pool, bias_rate=0.0),
            tm.mixture(d_model=D, router="expert_choice"),
            tm.mixture(d_model=D, bias_rate=0.1, balance_coef=0.5),
        )
    ]
    assert found == [(0.0, 0.01), (0.1, 0.0), (0.001, 0.0), (0.0, 0.01), (0.0, 0.0), (0.1, 0.5)]


def test_capacity_losses_rank_and_an_expert_for_every_token() -> None:
    words = {"capacity_factor": 0.5, "z_coef": 0.25, "share": "base", "rank": 3, "shared_expert": 32}
    moe = tm.mixture(d_model=D, d_ff=F, experts=E, **words)  # type: ignore[arg-type]
    assert (moe.capacity_factor, moe.z_coef) == (0.5, 0.25)
    assert moe.experts.bank("up").rank == 3
    shapes = [tuple(moe.shared_expert.bank(name).expert_matrices().shape) for name in moe.experts.names]
    assert shapes == [(1, 32, D), (1, 32, D), (1, D, 32)]
    x = torch.randn(12, D)
    y = moe(x)
    assert int(moe.stats.load.max()) <= math.ceil(0.5 * 2 * 12 / E)
    gate, up, down = (moe.shared_expert.bank(name).expert_matrices()[0] for name in moe.experts.names)
    moe.shared_expert = None
    torch.testing.assert_close(y - moe(x), (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_banks_of_the_callers_own() -> None:
    seen: list[tuple[int, ...]] = []

    def rings(weights: torch.Tensor) -> tm.SharedCoreExperts:
        seen.append(tuple(weights.shape))
        legs = {"out_dims": (8, weights.shape[1] // 8), "in_dims": (8, weights.shape[2] // 8)}
        return tm.SharedCoreExperts(tn.topologies.tensor_ring(**legs, max_bond=2), 5, share=("0",))

    moe = tm.mixture(d_model=D, d_ff=F, experts=rings, gated=False)
    assert seen == [(0, F, D), (0, D, F)]  # there are no matrices that experts could start as
    assert (moe.num_experts, moe.router.num_experts) == (5, 5)
    with pytest.raises(ValueError, match="leave"):
        tm.mixture(d_model=D, experts=rings, share="none")
    with pytest.raises(TypeError, match="ExpertBank"):
        tm.mixture(d_model=D, experts=lambda weights: weights)
    with pytest.raises(ShapeError, match="weights of shape"):
        tm.mixture(d_model=D, experts=lambda weights: tm.mixture(d_model=8, d_ff=8).experts.bank("up"))


@pytest.mark.parametrize(
    ("size", "end"), [(8, 4), (12, 6), (64, 16), (80, 16), (512, 32), (768, 48), (2730, 42), (11008, 64)]
)
def test_an_end_is_short(size: int, end: int) -> None:
    assert end_leg(size) == end


def test_bad_words_are_refused() -> None:
    pool = tm.ExpertPool(tm.mixture(d_model=D, d_ff=F, experts=E, share="none").experts)
    assert tm.mixture(d_model=D, d_ff=F, activation="silu", gated=True, pool=pool).num_experts == E
    for words in ({"d_ff": 4 * F}, {"activation": "gelu"}, {"gated": False}):
        (name,) = words
        with pytest.raises(ShapeError, match=f"{name}=.*'pool'"):
            tm.mixture(d_model=D, pool=pool, **words)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="d_model=32"):
        tm.mixture(d_model=32, pool=pool)
    with pytest.raises(ValueError, match="share= and rank="):
        tm.mixture(d_model=D, pool=pool, share="none")
    with pytest.raises(TypeError, match="range"):
        tm.mixture(d_model=D, pool=pool, experts=8)
    with pytest.raises(IndexError, match="6 experts"):
        tm.mixture(d_model=D, pool=pool, experts=range(4, 7))
    with pytest.raises(ValueError, match="share='all'; choose one of none, center, base"):
        tm.mixture(d_model=D, share="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank="):
        tm.mixture(d_model=D, rank=2)
    for word in ("num_experts", "num_features", "pooled", "name"):
        with pytest.raises(TypeError, match=rf"no option {word}"):
            tm.mixture(d_model=D, **{word: 5})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"num_experts; similar.*'experts'"):
        tm.mixture(d_model=D, num_experts=5)
    with pytest.raises(TypeError, match=r"normalise; similar.*'normalize'"):
        tm.mixture(d_model=D, normalise=True)
    with pytest.raises(ValueError, match="top_k=4 with experts=3"):
        tm.mixture(d_model=D, experts=3, top_k=4)
    with pytest.raises(TypeError, match="top_k"):
        tm.mixture(d_model=D, router="switch", top_k=2)
    with pytest.raises(ValueError, match="d_ff"):
        tm.mixture(d_model=D, d_ff=0)
    with pytest.raises(ValueError, match="Unknown router 'best'"):
        tm.mixture(d_model=D, router="best")
    with pytest.raises(ShapeError, match="37 x 41"):
        tm.mixture(d_model=41, d_ff=37)
