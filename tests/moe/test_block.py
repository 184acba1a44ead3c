"""The mixture as a whole: against a loop over tokens, compiled, checkpointed, copied."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import ShapeError
from tensornet.nn import build_module
from tensornet_moe import bank as bank_module
from tensornet_moe.grouped_linear import group_rows, takes_grouped_mm

FEATURES, HIDDEN, E = 8, 16, 4
UP = tn.topologies.mpo(out_dims=(2, 4, 2), in_dims=(2, 2, 2), max_bond=6)
DOWN = tn.topologies.mpo(out_dims=(2, 2, 2), in_dims=(2, 4, 2), max_bond=6)
ROUTERS = ("switch", "top2", "choice")


def make_router(name: str, dtype: torch.dtype) -> tm.Router:
    if name == "switch":
        return tm.SwitchRouter(FEATURES, E, dtype=dtype)
    if name == "top2":
        return tm.TopKRouter(FEATURES, E, top_k=2, dtype=dtype)
    return tm.ExpertChoiceRouter(FEATURES, E, capacity_factor=2, dtype=dtype)


def make_moe(
    router: str = "switch",
    *,
    gated: bool = False,
    always: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> tm.SharedCoreMoE:
    names = {"wi_0": UP, "wi_1": UP, "wo": DOWN} if gated else {"wi": UP, "wo": DOWN}

    def network(experts: int) -> tm.ExpertFFN:
        banks = {name: tm.SharedCoreExperts(t, experts, dtype=dtype) for name, t in names.items()}
        made = tm.ExpertFFN(banks, activation="gelu", bias=True, dtype=dtype)
        for name, parameter in made.named_parameters():
            if name.endswith("_bias"):
                nn.init.normal_(parameter)
        return made

    options["shared_expert"] = network(1) if always else None
    return tm.SharedCoreMoE(make_router(router, dtype), network(E), **options)  # type: ignore[arg-type]


def by_hand(moe: tm.SharedCoreMoE, x: Tensor) -> Tensor:
    """Every expert on every token, weighted by what the router says."""
    routing = moe.router(x)
    weights = torch.zeros(len(x), E, dtype=x.dtype)
    kept = torch.ones_like(routing.weights) if routing.kept is None else routing.kept
    weights = weights.scatter_add(1, routing.expert_indices, (routing.weights * kept).to(x.dtype))

    def run(network: tm.ExpertFFN, expert: int) -> Tensor:
        def linear(name: str, value: Tensor) -> Tensor:
            bias = getattr(network, f"{name}_bias")
            return F.linear(value, network.bank(name).expert_matrices()[expert], bias[expert])

        hidden = F.gelu(linear(network.names[0], x))
        if network.gated:
            hidden = hidden * linear(network.names[1], x)
        return linear(network.names[-1], hidden)

    routed = sum(weights[:, e, None] * run(moe.experts, e) for e in range(E))
    return routed if moe.shared_expert is None else routed + run(moe.shared_expert, 0)  # type: ignore[return-value]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_output_and_gradients_are_those_of_every_expert_on_every_token(router: str, gated: bool) -> None:
    moe = make_moe(router, gated=gated, always=gated)
    x = torch.randn(3, 5, FEATURES, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(x)
    wanted = by_hand(moe, x.reshape(-1, FEATURES)).reshape(x.shape)
    got = moe(x)
    assert torch.allclose(got, wanted, atol=1e-10)
    inputs = [x, *moe.parameters()]
    ours = torch.autograd.grad((got * probe).sum(), inputs)
    theirs = torch.autograd.grad((wanted * probe).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["grouped", "loop", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_multiplying_agrees(
    way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, x = make_moe("top2", dtype=dtype), torch.randn(20, FEATURES, dtype=dtype)
    wanted = by_hand(moe.double(), x.double())
    moe = moe.to(dtype)
    monkeypatch.setattr(bank_module, "takes_grouped_mm", lambda *_: way == "grouped")
    run = torch.compile(moe, backend="eager", fullgraph=True) if way == "compiled" else moe
    got = run(x)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    assert torch.allclose(got.double(), wanted, atol=tolerance, rtol=tolerance)
    got.float().square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in moe.parameters())


def test_grouped_mm_is_used_where_it_is_faster_and_fits() -> None:
    few, many = torch.randn(16, 8), torch.randn(4096, 8)
    groups = {len(x): group_rows(torch.arange(len(x)).sort().values % 1, E) for x in (few, many)}
    assert takes_grouped_mm(few, 8, groups[16])
    assert not takes_grouped_mm(many, 8, groups[4096])
    assert not takes_grouped_mm(few.double(), 8, groups[16])
    assert not takes_grouped_mm(few[:, :7], 8, groups[16])
    assert not takes_grouped_mm(few, 6, groups[16])


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("gated", [False, True])
def test_upcycled_mixture_is_the_dense_network(router: str, gated: bool) -> None:
    names = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    dense = {n: torch.randn(FEATURES, HIDDEN) if n == "wo" else torch.randn(HIDDEN, FEATURES) for n in names}
    banks = {n: tm.SharedCoreExperts.from_dense(w, num_experts=E) for n, w in dense.items()}
    moe = tm.SharedCoreMoE(make_router(router, torch.float32), tm.ExpertFFN(banks, activation="relu"))
    x = torch.randn(40, FEATURES)
    hidden = F.relu(x @ dense[names[0]].T) * (x @ dense["wi_1"].T if gated else 1)
    wanted, got = hidden @ dense["wo"].T, moe(x)
    if router == "choice":  # some tokens are chosen by nobody and pass through the residual
        reached = moe.router(x).kept.any(-1)
        assert not bool(got[~reached].any())
        wanted, got = wanted[reached], got[reached]
    assert torch.allclose(got, wanted, atol=1e-3)


def test_capacity_drops_to_zero_and_counts() -> None:
    moe = make_moe("switch", capacity_factor=0.5)
    nn.init.zeros_(moe.router.weight)
    moe.router.weight.data[2] = 1.0  # positive tokens all go to expert 2
    x = torch.rand(16, FEATURES, dtype=torch.float64) + 0.1
    y = moe(x)
    assert moe.stats is not None
    assert (moe.stats.load.tolist(), int(moe.stats.dropped)) == ([0, 0, 2, 0], 14)
    assert float(moe.stats.entropy) == 0
    assert bool(y[:2].any(1).all())
    assert not bool(y[2:].any())
    y.sum().backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_no_token_at_all_still_gives_every_parameter_a_gradient() -> None:
    moe = make_moe()
    y = moe(torch.empty(0, FEATURES, dtype=torch.float64))
    assert y.shape == (0, FEATURES)
    (y.sum() + tm.collect_aux_losses(moe).total).backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_only_active_experts_are_built_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = make_moe("switch", dtype=torch.float32)
    built: list[object] = []
    original = tm.SharedCoreExperts.cores

    def cores(self: tm.SharedCoreExperts, index: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        built.append(None if index is None else index.tolist())
        return original(self, index)

    monkeypatch.setattr(tm.SharedCoreExperts, "cores", cores)
    x = torch.rand(64, FEATURES) + 0.1
    nn.init.zeros_(moe.router.weight)
    moe.router.weight.data[3] = 1.0
    moe(x)
    assert built == [[3], [3]]
    built.clear()
    moe.eval()
    with torch.no_grad():
        for _ in range(3):
            moe(x)
            moe(x[:2])
    assert built == 12 * [[3]], "nothing is kept unless it is asked for"
    built.clear()
    tn.nn.prepare_for_inference(moe)
    with torch.no_grad():
        for _ in range(3):
            moe(x)
            moe(x[:2])
    assert built == [None, None]


# --- masks and losses ----------------------------------------------------------------------------


def test_padding_changes_no_loss_and_no_statistic() -> None:
    moe = make_moe("top2", z_coef=0.1)
    x = torch.randn(2, 6, FEATURES, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    y = moe(x, mask)
    with_padding, stats = tm.collect_aux_losses(moe), moe.stats
    real = moe(x[mask.bool()])
    without = tm.collect_aux_losses(moe)
    assert torch.allclose(with_padding.total, without.total)
    assert stats is not None
    assert moe.stats is not None
    assert torch.equal(stats.load, moe.stats.load)
    assert int(stats.load.sum()) == 2 * int(mask.sum())
    assert torch.allclose(y[mask.bool()], real)
    moe.token_mask = mask
    moe(x)
    assert torch.allclose(tm.collect_aux_losses(moe).total, with_padding.total)
    with pytest.raises(ShapeError, match=r"\(2, 6\).*\(2, 5\)"):
        moe(x[:, :5])


def test_total_is_weighted_and_summed_over_layers() -> None:
    model = nn.ModuleList([make_moe(balance_coef=0.5, z_coef=0.25), make_moe(balance_coef=2.0)])
    x = torch.randn(10, FEATURES, dtype=torch.float64)
    for layer in model:
        layer(x)
    losses = tm.collect_aux_losses(model)
    assert losses.balance.shape == losses.z.shape == (2,)
    wanted = (0.5 * losses.balance[0] + 0.25 * losses.z[0]) + 2.0 * losses.balance[1]
    assert torch.allclose(losses.total, wanted)
    with pytest.raises(RuntimeError, match="has run since"):
        tm.collect_aux_losses(model)
    with pytest.raises(RuntimeError, match="has no SharedCoreMoE"):
        tm.collect_aux_losses(nn.Linear(2, 2))


# --- checkpointing, compiling, copying -----------------------------------------------------------


def test_checkpointing_counts_each_loss_once_with_its_gradient() -> None:
    x = torch.randn(12, FEATURES, dtype=torch.float64, requires_grad=True)
    moe = make_moe("top2", z_coef=0.1)

    def step(forward: object) -> list[Tensor]:
        moe.zero_grad()
        y = forward(x)  # type: ignore[operator]
        (y.square().sum() + tm.collect_aux_losses(moe).total).backward()
        return [p.grad.clone() for p in moe.parameters() if p.grad is not None]

    plain = step(moe)
    checked = step(lambda x: checkpoint(moe, x, use_reentrant=False))
    for a, b in zip(plain, checked, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert moe.aux_losses is None  # the second forward left nothing to be counted again


def test_reentrant_checkpointing_is_refused() -> None:
    moe = make_moe()
    x = torch.randn(12, FEATURES, dtype=torch.float64, requires_grad=True)
    checkpoint(moe, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        tm.collect_aux_losses(moe)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["switch", "choice"])  # top2 is compiled above
def test_compiles_into_one_graph(router: str) -> None:
    moe = make_moe(router, dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(moe), fullgraph=True, backend="aot_eager")
    for tokens in (12, 7):
        x = torch.randn(tokens, FEATURES)
        for run in (moe, compiled):
            run.zero_grad()
            y = run(x)
            (y.square().sum() + tm.collect_aux_losses(run).total).backward()
        assert torch.allclose(compiled(x), moe(x), atol=1e-5)
        for a, b in zip(moe.parameters(), compiled.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.allclose(a.grad, b.grad, atol=1e-4)


def test_autocast_computes_in_half_and_routes_in_full() -> None:
    moe, x = make_moe(dtype=torch.float32), torch.randn(40, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), moe(x), atol=0.1, rtol=0.1)


def test_a_used_mixture_can_be_copied_and_pickled() -> None:
    moe = make_moe()
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    y = moe(x)
    assert torch.equal(copy.deepcopy(moe)(x), y)
    buffer = io.BytesIO()
    torch.save(moe, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_description_makes_an_empty_twin(router: str) -> None:
    moe = make_moe(router, gated=True, always=True, dropout=0.1, z_coef=0.5)
    twin = build_module(moe.spec(), device="meta", dtype=torch.float64)
    facts = [{name: (x.dtype, x.shape) for name, x in each.state_dict().items()} for each in (twin, moe)]
    assert facts[0] == facts[1]
    twin.to_empty(device="cpu").load_state_dict(moe.state_dict())
    assert twin.spec() == moe.spec()
    x = torch.randn(9, FEATURES, dtype=torch.float64)
    assert torch.equal(twin.eval()(x), moe.eval()(x))


@pytest.mark.parametrize("experts", [E - 1, E + 1])
def test_a_replaced_router_of_another_size_is_refused_when_the_layer_runs(experts: int) -> None:
    moe = make_moe()
    moe.router = tm.SwitchRouter(FEATURES, experts, dtype=torch.float64)
    with pytest.raises(ShapeError, match=f"for {experts} experts"):
        moe(torch.randn(5, FEATURES, dtype=torch.float64))
