"""Routers, capacity and auxiliary losses, against their closed forms and against transformers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

import tensornet_moe as tm
from tensornet.errors import ShapeError
from tensornet_moe.routers import limit_capacity

TOKENS, FEATURES, E = 12, 6, 4


def routers(**options: object) -> dict[str, tm.Router]:
    return {
        "switch": tm.SwitchRouter(FEATURES, E, **options),  # type: ignore[arg-type]
        "top2": tm.TopKRouter(FEATURES, E, top_k=2, **options),  # type: ignore[arg-type]
        "choice": tm.ExpertChoiceRouter(FEATURES, E, capacity_factor=2, **options),  # type: ignore[arg-type]
    }


def one_hot_routing(indices: Tensor, mask: Tensor | None = None) -> tm.Routing:
    probs = torch.full((len(indices), E), 1 / E)
    return tm.Routing(indices, torch.ones(indices.shape), probs, probs.log(), mask)


# --- losses --------------------------------------------------------------------------------------


def test_balance_is_one_at_uniform_load_and_e_at_collapse() -> None:
    uniform = torch.full((8, E), 1 / E)
    spread = torch.arange(8).reshape(8, 1) % E
    assert float(tm.load_balancing_loss(uniform, spread, num_experts=E)) == pytest.approx(1)
    collapsed = torch.eye(E)[torch.zeros(8, dtype=torch.long)]
    everything_to_0 = torch.zeros(8, 1, dtype=torch.long)
    assert float(tm.load_balancing_loss(collapsed, everything_to_0, num_experts=E)) == pytest.approx(E)


@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_that_of_transformers(k: int) -> None:
    logits = torch.randn(TOKENS, E)
    probs = logits.softmax(-1)
    ours = tm.load_balancing_loss(probs, probs.topk(k).indices, num_experts=E)
    theirs = load_balancing_loss_func((logits,), num_experts=E, top_k=k)
    assert float(ours) == pytest.approx(float(theirs) / k, rel=1e-5)  # theirs sums the slots
    mask = torch.ones(2, TOKENS // 2, dtype=torch.long)
    mask[0, 4:] = 0
    ours = tm.load_balancing_loss(probs, probs.topk(k).indices, num_experts=E, mask=mask.reshape(-1))
    theirs = load_balancing_loss_func((logits,), num_experts=E, top_k=k, attention_mask=mask)
    assert float(ours) == pytest.approx(float(theirs) / k, rel=1e-5)


def test_balance_has_the_gradient_of_the_probabilities_only() -> None:
    probs = torch.randn(TOKENS, E, dtype=torch.float64).softmax(-1).requires_grad_()
    indices = probs.topk(2).indices
    tm.load_balancing_loss(probs, indices, num_experts=E).backward()
    counts = torch.bincount(indices.reshape(-1), minlength=E).double()
    assert probs.grad is not None
    assert torch.allclose(probs.grad, (E * counts / counts.sum() / TOKENS).expand(TOKENS, E))


def test_z_loss_is_the_mean_square_and_that_of_transformers() -> None:
    logits = torch.randn(TOKENS, E) * 3
    by_hand = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist()) / TOKENS
    assert float(tm.router_z_loss(logits)) == pytest.approx(by_hand, rel=1e-5)
    theirs = router_z_loss_func(logits.reshape(2, TOKENS // 2, E))
    assert float(tm.router_z_loss(logits)) == pytest.approx(float(theirs), rel=1e-5)


def test_padding_counts_in_no_loss_even_if_it_is_nan() -> None:
    logits = torch.randn(TOKENS, E)
    mask = torch.arange(TOKENS) < 8
    poisoned = logits.masked_fill(~mask[:, None], torch.nan)
    indices = logits.topk(2).indices
    for loss in (
        lambda x, i, m: tm.load_balancing_loss(x.softmax(-1), i, num_experts=E, mask=m),
        lambda x, i, m: tm.router_z_loss(x, m),
    ):
        assert float(loss(poisoned, indices, mask)) == pytest.approx(
            float(loss(logits[:8], indices[:8], None))
        )
    nothing = torch.zeros(TOKENS, dtype=torch.bool)
    assert float(tm.router_z_loss(logits, nothing)) == 0
    assert float(tm.load_balancing_loss(logits.softmax(-1), indices, num_experts=E, mask=nothing)) == 0


# --- routers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["switch", "top2", "choice"])
def test_prob_weights_are_the_probabilities(name: str) -> None:
    routing = routers(combine="prob")[name](torch.randn(TOKENS, FEATURES))
    wanted = routing.probs.gather(1, routing.expert_indices)
    if routing.kept is not None:
        wanted = wanted * routing.kept
    assert torch.equal(routing.weights, wanted)


@pytest.mark.parametrize("name", ["switch", "top2", "choice"])
def test_sigmoid_weights_know_no_other_expert(name: str) -> None:
    router, x = routers(combine="sigmoid")[name], torch.randn(TOKENS, FEATURES)
    routing, other = router(x), routers()[name]
    other.load_state_dict(router.state_dict())
    wanted = 2 / (1 + torch.exp(-(x @ router.weight.T))).gather(1, routing.expert_indices)
    if routing.kept is not None:
        wanted = wanted * routing.kept
    assert torch.allclose(routing.weights, wanted)
    assert torch.equal(routing.expert_indices, other(x).expert_indices)  # the choice is that of "unit"
    routing.weights.sum().backward()
    assert router.weight.grad is not None
    assert float(router.weight.grad.norm()) > 0


def test_unit_gradient_of_switch_is_that_of_log_p() -> None:
    """d/dz [p / stop(p)] = d/dz log p."""
    router, x = tm.SwitchRouter(FEATURES, E), torch.randn(TOKENS, FEATURES)
    routing = router(x)
    got = torch.autograd.grad(routing.weights.sum(), router.weight)[0]
    logits = x @ router.weight.T
    wanted = torch.autograd.grad(logits.log_softmax(-1).amax(-1).sum(), router.weight)[0]
    assert torch.allclose(got, wanted, atol=1e-5)


def test_experts_choose_their_most_probable_tokens_and_no_padding() -> None:
    router = tm.ExpertChoiceRouter(FEATURES, E, capacity_factor=1)
    mask = torch.arange(TOKENS) < 10
    routing = router(torch.randn(TOKENS, FEATURES), mask)
    assert routing.kept is not None
    for e in range(E):
        best = routing.probs[:10, e].topk(3).indices  # ceil(10 / 4)
        assert sorted(routing.kept[:, e].nonzero().squeeze(1).tolist()) == sorted(best.tolist())
    assert routing.load().tolist() == [3] * E
    assert int(routing.dropped()) == int((~routing.kept[:10].any(-1)).sum())


@pytest.mark.parametrize("name", ["switch", "top2", "choice"])
def test_jitter_acts_in_training_only(name: str) -> None:
    router, x = routers(jitter=0.3)[name], torch.randn(TOKENS, FEATURES)
    plain = x @ router.weight.T
    noisy = router(x).logits
    assert not torch.allclose(noisy, plain)
    assert torch.allclose(router.eval()(x).logits, plain, atol=1e-6)


def test_tokens_of_another_size_are_refused() -> None:
    with pytest.raises(ShapeError, match=rf"size {FEATURES}, got"):
        routers()["switch"](torch.randn(3, FEATURES + 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tm.TopKRouter(FEATURES, E, top_k=5), "top_k=5 with num_experts=4"),
        (lambda: tm.TopKRouter(FEATURES, E, top_k=0), r"top_k.*got 0"),
        (lambda: tm.ExpertChoiceRouter(FEATURES, E, capacity_factor=5), r"num_experts=4.*got 5"),
        (lambda: tm.SwitchRouter(FEATURES, E, jitter=1.5), "jitter"),
        (lambda: tm.SwitchRouter(FEATURES, E, combine="mean"), "unit, prob"),  # type: ignore[arg-type]
        (lambda: tm.SwitchRouter(FEATURES, 0), "num_experts"),
    ],
)
def test_bad_options_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# --- capacity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.5])
def test_capacity_limits_the_choices_that_a_router_kept(factor: float, masked: bool) -> None:
    routing = tm.TopKRouter(FEATURES, E, top_k=3)(torch.randn(TOKENS, FEATURES))
    kept, mask = torch.rand(TOKENS, 3) > 0.4, torch.rand(TOKENS) > 0.3 if masked else None
    real = torch.ones(TOKENS, dtype=torch.bool) if mask is None else mask
    limited = limit_capacity(replace(routing, kept=kept, mask=mask), factor)
    slots = [math.ceil(factor * int((kept & real[:, None]).sum()) / E)] * E
    want = torch.zeros_like(kept)
    for wanted in (real, ~real):  # padding is served last
        for place in range(3):
            for token in wanted.nonzero().flatten().tolist():
                expert = int(routing.expert_indices[token, place])
                if kept[token, place] and slots[expert] > 0:
                    want[token, place], slots[expert] = True, slots[expert] - 1
    assert limited.kept is not None
    assert torch.equal(limited.kept, want)


def test_capacity_drops_later_tokens() -> None:
    routing = one_hot_routing(torch.tensor([[0], [0], [1], [0], [2], [0], [0], [3]]))
    limited = limit_capacity(routing, 1.0)  # 2 slots each
    assert limited.kept is not None
    assert limited.kept[:, 0].tolist() == [True, True, True, False, True, False, False, True]
    assert (limited.load().tolist(), int(limited.dropped())) == ([2, 1, 1, 1], 3)


def test_first_choices_come_before_second_choices() -> None:
    routing = one_hot_routing(torch.tensor([[1, 0], [0, 1], [0, 2], [2, 3]]))
    limited = limit_capacity(routing, 0.5)  # 1 slot each
    assert limited.kept is not None
    assert limited.kept.tolist() == [[True, False], [True, False], [False, False], [True, True]]
    assert int(limited.dropped()) == 1


def test_padding_never_takes_a_real_tokens_place() -> None:
    mask = torch.tensor([False, False, True, True, True, True, False, True])
    routing = one_hot_routing(torch.tensor([[0], [0], [0], [0], [1], [2], [1], [3]]), mask)
    limited = limit_capacity(routing, 1.6)  # 5 real tokens: ceil(1.6 * 5 / 4) = 2 slots
    assert limited.kept is not None
    assert limited.kept[:, 0].tolist() == [False, False, True, True, True, True, True, True]
    assert (limited.load().tolist(), int(limited.dropped())) == ([2, 1, 1, 1], 0)
