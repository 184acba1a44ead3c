"""Balance over a layer or over a pool, by a loss and by biases; normalised logits; statistics of the load."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import distributed_tasks as tasks
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import TargetError
from tensornet.nn import build_module

E, FEATURES, TOP = 5, 8, 2


def network(experts: int = E) -> tm.ExpertFFN:
    topology = tn.topologies.dense(out_features=FEATURES, in_features=FEATURES)
    banks = {name: tm.SharedCoreExperts(topology, experts, share="none") for name in ("up", "down")}
    return tm.ExpertFFN(banks)


class Model(nn.Module):
    """Three layers: two use a pool, the last has its own experts."""

    def __init__(self, balance: str = "pool", bias_rate: float = 0.0, **options: float) -> None:
        super().__init__()
        self.pool = tm.ExpertPool(network(), balance=balance)  # type: ignore[arg-type]
        self.layers = nn.ModuleList()
        for experts, coefficient in ((self.pool, 0.1), (self.pool, 0.3), (network(), 0.5)):
            router = tm.TopKRouter(FEATURES, E, top_k=TOP, bias_rate=bias_rate)
            nn.init.normal_(router.weight)
            options["balance_coef"] = coefficient
            self.layers.append(tm.SharedCoreMoE(router, experts, **options))
        self.checkpointed = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, mask, use_reentrant=False) if self.checkpointed else layer(x, mask))
        return x

    def routings(self, x: Tensor, mask: Tensor | None = None) -> Iterator[tm.Routing]:
        for layer in self.layers:
            yield layer.router(x, mask)
            x = x + layer(x, mask)


def balance_by_hand(routings: list[tm.Routing], mask: Tensor) -> Tensor:
    """`E * sum f P` over the tokens of all routings, one at a time."""
    chosen = torch.zeros(E)
    probabilities: list[Tensor] = []
    for routing in routings:
        for token in mask.nonzero().flatten().tolist():
            probabilities.append(routing.probs[token])
            for expert in routing.expert_indices[token].tolist():
                chosen[expert] += 1
    return E * (chosen / chosen.sum() * torch.stack(probabilities).mean(0)).sum()


# --- by a loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("balance", ["pool", "layer"])
def test_the_loss_is_that_of_all_tokens_of_the_pool_or_layer(balance: str, checkpointed: bool) -> None:
    model = Model(balance)
    model.checkpointed = checkpointed
    x, mask = torch.randn(30, FEATURES), torch.rand(30) > 0.3
    first, second, last = model.routings(x, mask)
    groups = [([first, second], 0.4)] if balance == "pool" else [([first], 0.1), ([second], 0.3)]
    losses = [(balance_by_hand(group, mask), weight) for group, weight in [*groups, ([last], 0.5)]]
    want = sum(weight * loss for loss, weight in losses)
    truth = torch.autograd.grad(want, [layer.router.weight for layer in model.layers])

    model(x, mask)
    found = tm.collect_aux_losses(model)
    assert torch.allclose(found.total, want)
    values = [loss.detach() for loss, _ in losses]
    each = torch.stack([values[0], *values] if balance == "pool" else values)
    assert torch.allclose(found.balance, each)
    found.total.backward()
    for layer, gradient in zip(model.layers, truth, strict=True):
        assert torch.allclose(layer.router.weight.grad, gradient, atol=1e-6)
    with pytest.raises(RuntimeError, match="has run"):
        tm.collect_aux_losses(model)


def test_layers_may_prefer_experts_of_an_even_pool() -> None:
    """Two layers that use one half of the experts each: even for the pool, uneven for the layers."""
    found = {}
    for balance in ("pool", "layer"):
        pool = tm.ExpertPool(network(4), balance=balance)  # type: ignore[arg-type]
        layers = [tm.SharedCoreMoE(tm.TopKRouter(FEATURES, 4, top_k=2), pool) for _ in range(2)]
        for layer, half in zip(layers, (slice(0, 2), slice(2, 4)), strict=True):
            with torch.no_grad():
                layer.router.weight.zero_()[half] = 5.0
            layer(torch.ones(6, FEATURES))
        found[balance] = tm.collect_aux_losses(nn.ModuleList([pool, *layers])).balance
    assert torch.allclose(found["pool"], torch.ones(2))
    assert torch.allclose(found["layer"], torch.full((2,), 2.0))


# --- by biases -----------------------------------------------------------------------------------


def test_biases_choose_experts_and_leave_weights_alone() -> None:
    router, x = (
        tm.TopKRouter(FEATURES, E, top_k=TOP, bias_rate=0.1, combine="prob"),
        torch.randn(40, FEATURES),
    )
    nn.init.normal_(router.weight)
    plain = router(x)
    router.bias_steps.copy_(torch.tensor([5, -5, 0, 2, 0]))
    biased = router(x)
    want = (plain.probs + 0.1 * torch.tensor([5, -5, 0, 2, 0])).argsort(-1, descending=True)[:, :TOP]
    assert torch.equal(biased.expert_indices, want)
    assert not torch.equal(want, plain.expert_indices)
    assert torch.equal(biased.weights, plain.probs.gather(-1, want))
    assert torch.equal(biased.probs, plain.probs)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("balance", ["pool", "layer"])
def test_a_step_moves_each_bias_towards_an_even_load(balance: str, checkpointed: bool) -> None:
    model = Model(balance, bias_rate=0.01, capacity_factor=0.5)
    model.checkpointed = checkpointed
    mask, loads = torch.rand(30) > 0.3, [torch.zeros(E) for _ in model.layers]
    for _ in range(2):  # micro-batches of one step
        x = torch.randn(30, FEATURES)
        for load, routing in zip(loads, copy.deepcopy(model).routings(x, mask), strict=True):
            load += torch.bincount(routing.expert_indices[mask].flatten(), minlength=E)
        model(x, mask).sum().backward()
    model.eval()(torch.randn(30, FEATURES))  # not counted
    tm.update_biases(model)
    if balance == "pool":
        loads[0] = loads[1] = loads[0] + loads[1]
    for layer, load in zip(model.layers, loads, strict=True):
        assert layer.router.bias_steps.tolist() == [
            (int(x) < float(load.mean())) - (int(x) > float(load.mean())) for x in load
        ]
    with pytest.raises(RuntimeError, match="trained since"):
        tm.update_biases(model)


def test_the_load_of_one_pool_moves_no_bias_of_another() -> None:
    pools = [tm.ExpertPool(network(), balance="pool", label=f"pool{k}") for k in range(2)]
    layers = []
    for favourite, pool in enumerate(pools):
        router = tm.SwitchRouter(FEATURES, E, bias_rate=0.01)
        nn.init.zeros_(router.weight)
        router.bias_steps[favourite] = 1  # type: ignore[index]
        layers.append(tm.SharedCoreMoE(router, pool, balance_coef=0))
        layers[-1](torch.randn(8, FEATURES))
    tm.update_biases(nn.ModuleList([*pools, *layers]))
    for favourite, layer in enumerate(layers):
        assert layer.router.bias_steps.tolist() == [int(k != favourite) for k in range(E)]


def test_biases_make_the_load_even() -> None:
    torch.manual_seed(0)
    model = Model(bias_rate=0.005).to(torch.bfloat16)  # steps are exact in half precision
    x = (torch.randn(400, FEATURES) + 1).bfloat16()
    for index, layer in enumerate(model.layers):  # the mean of each input is 1, so each layer has a favourite
        nn.init.normal_(layer.router.weight, std=0.1)
        with torch.no_grad():
            layer.router.weight[index] += 0.1

    def unevenness() -> Tensor:
        """Compute by how much the largest load of an expert exceeds the mean, relative to the mean."""
        model(x)
        return torch.stack([load.max() / load.float().mean() - 1 for load in tm.expert_load(model).values()])

    *_, alone_before, pool_before = unevenness()
    for _ in range(80):
        tm.update_biases(model)
        first, second, alone, pool = unevenness()
    assert alone < alone_before / 2  # the layer with experts of its own
    assert pool < pool_before / 2
    assert min(first, second) > 2 * pool  # layers of an even pool still prefer some of its experts


def test_biases_are_saved_and_described() -> None:
    for router in (
        tm.TopKRouter(FEATURES, E, top_k=3, bias_rate=0.1, normalize=True),
        tm.SwitchRouter(FEATURES, E, bias_rate=0.1),
    ):
        router.bias_steps.copy_(torch.arange(E))
        again = build_module(router.spec())
        again.load_state_dict(router.state_dict())
        x = torch.randn(9, FEATURES)
        assert torch.equal(again(x).expert_indices, router(x).expert_indices)
        assert again.bias_steps.tolist() == list(range(E))
    assert list(tm.SwitchRouter(FEATURES, E).state_dict()) == ["weight"]


@pytest.mark.slow
def test_processes_have_the_same_biases(tmp_path: Path) -> None:
    records = tasks.in_processes(tasks.biases, 2, tmp_path)
    loads = sum(load for load, _ in records)
    for _, steps in records:
        assert torch.equal(steps, (loads.mean() - loads).sign().long())
    assert not torch.equal(records[0][1], (records[0][0].mean() - records[0][0]).sign().long())


def test_unknown_balance_is_refused() -> None:
    with pytest.raises(ValueError, match="balance='model'"):
        Model("model")


# --- normalised logits ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tm.SwitchRouter, tm.TopKRouter, tm.ExpertChoiceRouter])
def test_normalised_logits_do_not_depend_on_the_size_of_a_token(kind: type[tm.Router]) -> None:
    router, x = kind(FEATURES, E, normalize=True), torch.randn(20, FEATURES)
    logits = router(x).logits
    raw = x @ router.weight.T
    assert torch.allclose(logits, E**0.5 * raw / raw.square().sum(-1, keepdim=True).sqrt(), atol=1e-5)
    assert torch.allclose(logits.square().mean(-1), torch.ones(20), atol=1e-5)
    assert torch.allclose(router(1000 * x).logits, logits, atol=1e-5)
    logits[:, 0].sum().backward()
    assert torch.allclose(router.logit_scale.grad, logits[:, 0].sum() / E**0.5, atol=1e-4)
    assert bool(router(torch.zeros(3, FEATURES)).probs.isfinite().all())
    assert "logit_scale" not in kind(FEATURES, E).state_dict()


# --- statistics ----------------------------------------------------------------------------------


def test_the_load_of_a_pool_is_that_of_its_layers() -> None:
    model, x = Model(), torch.randn(30, FEATURES)
    assert tm.expert_load(model) == {}
    counts = [torch.bincount(r.expert_indices.flatten(), minlength=E) for r in model.routings(x)]
    model(x)
    found = tm.expert_load(model)
    want = {f"layers.{k}": count for k, count in enumerate(counts)} | {"pool": counts[0] + counts[1]}
    assert list(found) == list(want)
    assert all(torch.equal(found[name], want[name]) for name in want)
    del model.pool
    with pytest.raises(TargetError, match="does not contain"):
        tm.expert_load(model)
