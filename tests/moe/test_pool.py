"""Pools of experts: the function and gradients of copies in every layer, owned, saved and trained once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import FormatError, TargetError
from tensornet.nn import build_module
from tensornet_moe.grouped_linear import one_group
from tensornet_moe.pool import ExpertPool, PooledExperts, connect_pools, find_pools

E, FEATURES, HIDDEN = 5, 8, 12
LEGS = {8: (2, 2, 2), 12: (2, 3, 2)}

# --- banks that a pool can have ------------------------------------------------------------------


def dense(rows: int, columns: int) -> tm.ExpertBank:
    topology = tn.topologies.dense(out_features=rows, in_features=columns)
    return tm.SharedCoreExperts(topology, E, share="none")


def center(rows: int, columns: int) -> tm.SharedCoreExperts:
    return tm.SharedCoreExperts(tn.topologies.mpo(out_dims=LEGS[rows], in_dims=LEGS[columns], max_bond=3), E)


def deltas(rows: int, columns: int) -> tm.ExpertBank:
    bank = tm.LowRankDeltaExperts.from_dense(torch.randn(rows, columns), num_experts=E, rank=2)
    nn.init.normal_(bank.left)
    return bank


def integers(rows: int, columns: int) -> tm.ExpertBank:
    bank = center(rows, columns)
    bank.quantize("int8")
    return bank


Bank = Callable[[int, int], tm.ExpertBank]
BANKS: dict[str, Bank] = {"dense": dense, "center": center, "deltas": deltas, "integers": integers}


def network(bank: Bank = dense, *, hidden: int = HIDDEN, activation: str = "gelu") -> tm.ExpertFFN:
    banks = {"up": bank(hidden, FEATURES), "down": bank(FEATURES, hidden)}
    made = tm.ExpertFFN(banks, bias=True, activation=activation)
    nn.init.normal_(made.get_parameter("up_bias"))
    return made


def mixture(experts: tm.ExpertFFN | tm.ExpertPool) -> tm.SharedCoreMoE:
    return tm.SharedCoreMoE(tm.TopKRouter(FEATURES, E, top_k=2), experts)


class Pooled(nn.Module):
    """Three layers with one pool; `checkpointed` runs them under gradient checkpointing."""

    def __init__(self, bank: Bank = dense) -> None:
        super().__init__()
        self.pool = tm.ExpertPool(network(bank))
        self.layers = nn.ModuleList(mixture(self.pool) for _ in range(3))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


# --- one owner -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS)
def test_a_pool_is_a_copy_of_its_experts_in_every_layer(bank: Bank, checkpointed: bool) -> None:
    pooled = Pooled(bank).double()
    copies = copy.deepcopy(pooled)
    for layer in copies.layers:
        layer.experts = copy.deepcopy(copies.pool.experts)
    pooled.checkpointed = checkpointed
    x = torch.randn(20, FEATURES, dtype=torch.float64)
    y, want = pooled(x), copies(x)
    assert torch.allclose(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    for name, parameter in pooled.pool.experts.named_parameters():
        each = [layer.experts.get_parameter(name).grad for layer in copies.layers]
        assert torch.allclose(parameter.grad, sum(each)), name
    for layer, other in zip(pooled.layers, copies.layers, strict=True):
        assert torch.allclose(layer.router.weight.grad, other.router.weight.grad)


@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS)
def test_parameters_are_counted_trained_and_saved_once(bank: Bank, tmp_path: Path) -> None:
    model = Pooled(bank)
    own = {f"pool.experts.{name}" for name in model.pool.experts.state_dict()}
    assert set(model.state_dict()) == own | {f"layers.{k}.router.weight" for k in range(3)}
    assert sum(p.numel() for layer in model.layers for p in layer.parameters()) == 3 * E * FEATURES

    optimizer = torch.optim.AdamW(tm.parameter_groups(model, lr=0.01))
    x, target = torch.randn(2, 40, FEATURES)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        (loss + tm.collect_aux_losses(model).total).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]

    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = Pooled(bank)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(again(x), model(x))


def test_descriptions_rebuild_a_pool_and_its_layers() -> None:
    model, x = Pooled(center), torch.randn(6, FEATURES)
    parts = (model.pool, *model.layers)
    specs = json.loads(json.dumps([part.spec() for part in parts]))
    again = nn.ModuleList(build_module(spec) for spec in specs)
    with pytest.raises(RuntimeError, match=r"labelled 'pool'.*connect_pools"):
        again[1](x)
    assert connect_pools(again) == 3
    again.load_state_dict(nn.ModuleList(parts).state_dict())
    assert torch.equal(again[2](x), model.layers[1](x))
    with pytest.raises(FormatError, match=r"'pool'.*has 0"):
        connect_pools(build_module(specs[1]))


def test_copies_and_exported_programs_have_one_pool() -> None:
    model, x = Pooled().eval(), torch.randn(6, FEATURES)
    copied = copy.deepcopy(model)
    assert copied.layers[2].experts.pool is copied.pool is not model.pool
    program = torch.export.export(model, (x,))
    assert sum(name.endswith("up.core_matrix") for name in program.state_dict) == 1
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


# --- ranges of experts ---------------------------------------------------------------------------


class Ranges(nn.Module):
    """Layers with experts of their own, all in one pool, in neighbouring or alternating places."""

    def __init__(self, bank: Bank, places: list[range], label: str = "pool") -> None:
        super().__init__()
        self.pool = tm.ExpertPool(network(bank), label=label)
        self.layers = nn.ModuleList(
            tm.SharedCoreMoE(
                tm.TopKRouter(FEATURES, len(place), top_k=2, bias_rate=0.5), PooledExperts(self.pool, place)
            )
            for place in places
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def by_hand(model: Ranges, x: Tensor) -> Tensor:
    """The model computed expert by expert from the matrices of the pool."""
    experts = model.pool.experts
    up, down = (experts.bank(name).expert_matrices() for name in ("up", "down"))
    for layer in model.layers:
        routing = layer.router(x)
        y = torch.zeros_like(x)
        for choice in range(2):
            for row, expert in enumerate(routing.expert_indices[:, choice].tolist()):
                e = layer.experts.experts[expert]
                hidden = nn.functional.gelu(up[e] @ x[row] + experts.up_bias[e])
                out = down[e] @ hidden + experts.down_bias[e]
                y = y.index_add(0, torch.tensor([row]), (routing.weights[row, choice] * out)[None])
        x = x + y
    return x


PLACES = {"neighbours": [range(3), range(3, 5)], "alternating": [range(0, 5, 2), range(1, 5, 2)]}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS)
def test_a_layer_uses_its_range_of_the_experts(bank: Bank, places: list[range]) -> None:
    torch.manual_seed(0)
    model = Ranges(bank, places).double()
    x = torch.randn(12, FEATURES, dtype=torch.float64)
    y, want = model(x), by_hand(model, x)
    torch.testing.assert_close(y, want)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, truth = (torch.autograd.grad(z.square().sum(), parameters) for z in (y, want))
    for mine, other in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS)
def test_ranges_in_compiled_and_exported_programs(bank: Bank, places: list[range]) -> None:
    model = Ranges(bank, places).double().eval()
    x = torch.randn(12, FEATURES, dtype=torch.float64)
    y = by_hand(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), y)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), y)


def test_a_center_for_all_layers_is_a_pool() -> None:
    """Saved, copied, masked and counted once, though no layer uses the experts of another."""
    model = Ranges(center, PLACES["neighbours"])
    assert sum(name.endswith("up.core_1") for name in model.state_dict()) == 1
    assert len(tm.shared_parameters(model)) == 2
    sharers = {
        id(p): group["sharers"] for group in tm.parameter_groups(model, lr=1.0) for p in group["params"]
    }
    up = model.pool.experts.bank("up")
    assert (sharers[id(up.core_1)], sharers[id(up.core_0)]) == (E, 1)
    copied = copy.deepcopy(model)
    assert copied.layers[1].experts.pool is copied.pool is not model.pool
    specs = json.loads(json.dumps([part.spec() for part in (model.pool, *model.layers)]))
    again = nn.ModuleList(build_module(spec) for spec in specs)
    assert connect_pools(again) == 2
    again.load_state_dict(nn.ModuleList([model.pool, *model.layers]).state_dict())
    x = torch.randn(6, FEATURES)
    torch.testing.assert_close(again[2](x), model.layers[1](x))


def test_layers_with_ranges_are_balanced_alone() -> None:
    """The balancing loss of a pool without overlap is the mean of its layers' own, and so are the biases."""
    torch.manual_seed(0)
    model = Ranges(dense, [range(2), range(2, 4)])
    x = torch.randn(30, FEATURES)
    model(x)
    own = [layer.aux_losses.usage[0] for layer in model.layers]
    alone = [2 * (u.counts / u.counts.sum() * u.probabilities / u.tokens).sum() for u in own]
    losses = tm.collect_aux_losses(model)
    share = 2 / E * 2  # two layers of two experts, in a pool of five of which one is unused
    torch.testing.assert_close(losses.balance * share, torch.stack(alone).mean().expand(2).detach())
    load = tm.expert_load(model)
    assert load["pool"].tolist() == [*load["layers.0"].tolist(), *load["layers.1"].tolist(), 0]
    tm.update_biases(model)
    for name, layer in zip(("layers.0", "layers.1"), model.layers, strict=True):
        counts = load[name].float()
        assert torch.equal(layer.router.bias_steps, (counts.mean() - counts).sign().long())


def test_costs_of_a_range_are_those_of_its_experts() -> None:
    model = Ranges(center, [range(3), range(3, 5)])
    alone = nn.ModuleList()
    for layer in model.layers:
        banks = {}
        for name, legs in (("up", (12, 8)), ("down", (8, 12))):
            topology = tn.topologies.mpo(out_dims=LEGS[legs[0]], in_dims=LEGS[legs[1]], max_bond=3)
            banks[name] = tm.SharedCoreExperts(topology, layer.num_experts)
        alone.append(tm.SharedCoreMoE(layer.router, tm.ExpertFFN(banks, bias=True)))
    found, want = (tm.describe(x, tokens=60).parts["experts"] for x in (model, alone))
    assert (found.active, found.multiply_adds) == pytest.approx((want.active, want.multiply_adds))


# --- bad input -----------------------------------------------------------------------------------


def test_a_pool_on_another_device_is_refused() -> None:
    experts, rows = PooledExperts(tm.ExpertPool(network())), torch.empty(3, FEATURES, device="meta")
    with pytest.raises(RuntimeError, match=r"cpu.*meta"):
        experts(rows, one_group(rows))


def test_a_pool_has_one_owner() -> None:
    model = Pooled()
    assert list(find_pools(model)) == ["pool"]
    model.alias = model.layers  # another name of a module that uses the pool, not another owner
    whole = nn.ModuleDict({"first": model, "second": model})
    assert list(find_pools(whole)) == ["first.pool"]
    model.layers[1].pool = model.pool
    with pytest.raises(TargetError, match="owned twice"):
        tm.parameter_groups(model, lr=1.0)
    del model.layers[1].pool, model.pool
    with pytest.raises(TargetError, match=r"model\.pool = pool"):
        tm.parameter_groups(model, lr=1.0)
    pair = nn.ModuleList(ExpertPool(network()) for _ in range(2))
    with pytest.raises(TargetError, match="same label"):
        find_pools(pair)


def test_a_pool_that_the_model_does_not_own_is_refused(tmp_path: Path) -> None:
    """It would be neither trained nor saved, so whatever sees the whole model says so."""
    whole, x = Pooled(), torch.randn(6, FEATURES)
    tn.save_model(whole, tmp_path / "whole")
    model = nn.Sequential(*whole.layers)
    model.train()(x)
    for use in (
        lambda: tm.collect_aux_losses(model),
        lambda: tm.update_biases(model),
        lambda: tn.save_model(model, tmp_path / "model"),
        lambda: tn.load_model(model, tmp_path / "whole"),
    ):
        with pytest.raises(TargetError, match=r"'pool'.*model\.pool = pool"):
            use()
    assert not (tmp_path / "model").exists()
    tn.load_model(again := Pooled(), tmp_path / "whole")
    torch.testing.assert_close(again(x), whole(x))


def test_a_checkpoint_without_the_pool_is_refused() -> None:
    model = Pooled()
    layers = {name: value for name, value in model.state_dict().items() if name.startswith("layers.")}
    with pytest.raises(RuntimeError, match=r"Missing.*pool\.experts\.up\.core_matrix"):
        model.load_state_dict(layers)
