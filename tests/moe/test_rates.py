"""Groups of parameters: the sharers of every tensor, counted by hand, and rates for any optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tensornet as tn
import tensornet_moe as tm

E, FEATURES = 4, 8
CHAIN = tn.topologies.mpo(out_dims=(2, 2, 2), in_dims=(2, 2, 2), max_bond=3)
WHOLE = tn.topologies.dense(out_features=8, in_features=8)


def layer(experts: tm.ExpertFFN | tm.ExpertPool) -> tm.SharedCoreMoE:
    return tm.SharedCoreMoE(tm.SwitchRouter(FEATURES, experts.num_experts), experts)


class Model(nn.Module):
    """One of everything that is shared: see `SHARERS`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, FEATURES)
        pooled = tm.LowRankDeltaExperts(tm.SharedCoreExperts(WHOLE, E, share="base"), 2)
        self.pool = tm.ExpertPool(
            tm.ExpertFFN({"up": pooled, "down": tm.SharedCoreExperts(CHAIN, E)}, bias=True)
        )
        own = tm.ExpertFFN(
            {"up": tm.SharedCoreExperts(CHAIN, 3), "down": tm.SharedCoreExperts(CHAIN, 3, share="ends")}
        )
        self.layers = nn.ModuleList([layer(self.pool), layer(own), layer(self.pool), layer(self.pool)])
        self.head = nn.Linear(FEATURES, 10)
        self.head.weight = self.embed.weight


SHARERS = {
    "embed.weight": 1,
    "pool.experts.up.base.core_matrix": 3 * E,
    "pool.experts.up.left": 3,
    "pool.experts.up.right": 3,
    "pool.experts.down.core_0": 3,
    "pool.experts.down.core_1": 3 * E,
    "pool.experts.down.core_2": 3,
    "pool.experts.up_bias": 3,
    "pool.experts.down_bias": 3,
    "layers.1.experts.up.core_0": 1,
    "layers.1.experts.up.core_1": 3,
    "layers.1.experts.up.core_2": 1,
    "layers.1.experts.down.core_0": 3,
    "layers.1.experts.down.core_1": 1,
    "layers.1.experts.down.core_2": 3,
    **{f"layers.{k}.router.weight": 1 for k in range(4)},
    "head.bias": 1,
}


def test_every_parameter_is_once_in_the_group_of_its_sharers() -> None:
    model = Model()
    model.head.bias.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = tm.parameter_groups(model, lr=0.3, weight_decay=0.1)
    found = [(names[id(p)], group["sharers"]) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    assert dict(found) == {name: count for name, count in SHARERS.items() if name != "head.bias"}
    for group in groups:
        assert group["lr"] == pytest.approx(0.3 / math.sqrt(group["sharers"]))
        assert group["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "kind", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Adadelta", "Adafactor", "RMSprop"]
)
def test_any_optimizer_takes_the_groups(kind: str) -> None:
    model = Model()
    optimizer = getattr(torch.optim, kind)(tm.parameter_groups(model, lr=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model.pool.experts.down.core_1.detach().clone()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(model.pool.experts.down.core_1, before)
    rates = {group["sharers"]: group["lr"] for group in optimizer.param_groups}
    assert rates[12] == pytest.approx(0.05 / math.sqrt(12))


def test_the_step_of_plain_descent_is_divided_by_the_root() -> None:
    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(tm.parameter_groups(model, lr=0.1)).step()
    for name, parameter in model.named_parameters():
        want = before[name] - 0.1 / math.sqrt(SHARERS[name])
        assert torch.allclose(parameter, want), name


def test_a_pool_without_layers_and_models_without_mixtures_have_one_group() -> None:
    unused = tm.ExpertPool(tm.ExpertFFN({name: tm.SharedCoreExperts(CHAIN, E) for name in ("up", "down")}))
    for model in (unused, nn.Linear(2, 3)):
        (group,) = tm.parameter_groups(model, lr=0.1)
        assert (group["sharers"], len(group["params"])) == (1, len(list(model.parameters())))
