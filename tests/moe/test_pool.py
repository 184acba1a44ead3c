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
from tensornet.errors import FormatError, ShapeError, TargetError
from tensornet.nn import build_module
from tensornet_moe.grouped_linear import one_group
from tensornet_moe.pool import ExpertPool, PooledExperts, find_pools

E, FEATURES, HIDDEN = 5, 8, 12
LEGS = {8: (2, 2, 2), 12: (2, 3, 2)}

# --- banks that a pool can have ------------------------------------------------------------------


def dense(rows: int, columns: int) -> tm.ExpertBank:
    topology = tn.topologies.dense(out_features=rows, in_features=columns)
    return tm.SharedCoreExperts(topology, E, shared="none")


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
    with pytest.raises(RuntimeError, match=r"ExpertPool labelled 'pool'.*lend_shared_cores"):
        again[1](x)
    assert tm.bank.lend_shared_cores(again) == 3
    again.load_state_dict(nn.ModuleList(parts).state_dict())
    assert torch.equal(again[2](x), model.layers[1](x))
    with pytest.raises(FormatError, match="labelled 'pool', of which SharedCoreMoE has 0"):
        tm.bank.lend_shared_cores(build_module(specs[1]))


def test_copies_and_exported_programs_have_one_pool() -> None:
    model, x = Pooled().eval(), torch.randn(6, FEATURES)
    copied = copy.deepcopy(model)
    assert copied.layers[2].experts.owner is copied.pool is not model.pool
    program = torch.export.export(model, (x,))
    assert sum(name.endswith("up.core_matrix") for name in program.state_dict) == 1
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


# --- groups of layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 4, None])
def test_groups_of_layers_use_the_experts_of_their_first(group: int | None) -> None:
    model, size = nn.Module(), group or 4
    model.layers = nn.ModuleList(mixture(network()) for _ in range(4))
    first = [layer.experts for layer in model.layers]
    model.pools = tm.tie_experts(model.layers, group=group)
    owners = [layer.experts.owner for layer in model.layers]
    assert [owner.experts for owner in owners] == [first[k - k % size] for k in range(4)]
    assert list(model.pools) == list(dict.fromkeys(owners))
    assert list(find_pools(model).values()) == list(model.pools)


def test_groups_may_differ_from_one_another() -> None:
    layers = [mixture(network(hidden=hidden)) for hidden in (12, 12, 8, 8)]
    assert [pool.experts.bank("up").out_features for pool in tm.tie_experts(layers, group=2)] == [12, 8]


def test_layers_that_cannot_be_tied_are_refused() -> None:
    layers = [mixture(network()) for _ in range(4)]
    with pytest.raises(ValueError, match=r"group=3 does not divide the 4 layers; choose one of 1, 2, 4"):
        tm.tie_experts(layers, group=3)
    with pytest.raises(ValueError, match="group must be an integer"):
        tm.tie_experts(layers, group=0)
    with pytest.raises(ValueError, match="different layers"):
        tm.tie_experts([layers[0], layers[0]])
    with pytest.raises(ValueError, match="different layers"):
        tm.tie_experts([])
    with pytest.raises(ShapeError, match=r"layers 0 and 1 cannot be tied.*12, 8.*8, 8"):
        tm.tie_experts([layers[0], mixture(network(hidden=8))])
    with pytest.raises(ShapeError, match=r"cannot be tied.*relu"):
        tm.tie_experts([layers[0], mixture(network(activation="relu"))])
    with pytest.raises(TypeError, match="Layer 1 to tie must be a SharedCoreMoE, got Linear"):
        tm.tie_experts([layers[0], nn.Linear(2, 2)])  # type: ignore[list-item]
    assert all(isinstance(layer.experts, tm.ExpertFFN) for layer in layers)  # nothing was changed
    tm.tie_experts(layers[:2])
    with pytest.raises(TypeError, match="layers of a pool are tied already"):
        tm.tie_experts(layers)


# --- bad input -----------------------------------------------------------------------------------


def test_a_pool_of_another_width_or_count_is_refused() -> None:
    pool = tm.ExpertPool(network())
    with pytest.raises(ShapeError, match="for 5 experts and tokens of size 9, the experts are 5"):
        tm.SharedCoreMoE(tm.SwitchRouter(9, E), pool)
    with pytest.raises(ShapeError, match="for 4 experts"):
        tm.SharedCoreMoE(tm.SwitchRouter(FEATURES, 4), pool)
    with pytest.raises(ShapeError, match=r"has .* = \(5, 8, 8\), the layer was built for \(5, 8, 9\)"):
        PooledExperts("pool", num_experts=5, in_features=8, out_features=9).borrow(pool)
    with pytest.raises(TypeError, match="ExpertFFN, got SharedCoreExperts"):
        tm.ExpertPool(center(8, 8))  # type: ignore[arg-type]


def test_a_pool_on_another_device_is_refused() -> None:
    experts, rows = PooledExperts(tm.ExpertPool(network())), torch.empty(3, FEATURES, device="meta")
    with pytest.raises(RuntimeError, match="pool labelled 'pool' is on cpu, a layer that uses it on meta"):
        experts(rows, one_group(rows))


def test_a_pool_has_one_owner() -> None:
    model = Pooled()
    assert list(find_pools(model)) == ["pool"]
    model.alias = model.layers  # another name of a module that uses the pool, not another owner
    whole = nn.ModuleDict({"first": model, "second": model})
    assert list(find_pools(whole)) == ["first.pool"]
    model.layers[1].pool = model.pool
    with pytest.raises(TargetError, match=r"owned twice, as 'pool' and as 'layers\.1\.pool'"):
        tm.parameter_groups(model, lr=1.0)
    del model.layers[1].pool, model.pool
    with pytest.raises(TargetError, match=r"'layers\.0\.experts' uses the pool .*model\.pool = pool"):
        tm.parameter_groups(model, lr=1.0)
    pair = nn.ModuleList(ExpertPool(network()) for _ in range(2))
    with pytest.raises(TargetError, match="'0' and '1' have the same label"):
        find_pools(pair)


def test_a_checkpoint_without_the_pool_is_refused() -> None:
    model = Pooled()
    layers = {name: value for name, value in model.state_dict().items() if name.startswith("layers.")}
    with pytest.raises(RuntimeError, match=r"Missing.*pool\.experts\.up\.core_matrix"):
        model.load_state_dict(layers)
