"""Banks that can do with less than a matrix for each expert give the same results and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.contraction.cost import CPU, machine_with_threads
from tensornet.contraction.plan import RECONSTRUCT
from tensornet_moe import experts as experts_module
from tensornet_moe.grouped_linear import Groups, group_rows

E, OUT, IN = 4, 32, 16


def one_sided() -> tn.Topology:
    """Ends that touch the outputs only, and the inputs only."""
    return tn.topologies.mpo(out_dims=(4, 8, 1), in_dims=(1, 4, 4))


def deltas(base: tm.ExpertBank) -> tm.ExpertBank:
    bank = tm.LowRankDeltaExperts(base, 2, dtype=torch.float64)
    nn.init.normal_(bank.left)
    return bank


def shared(topology: tn.Topology, names: str | tuple[str, ...], experts: int = E) -> tm.SharedCoreExperts:
    return tm.SharedCoreExperts(topology, experts, share=names, dtype=torch.float64)


def tucker(rows: int, columns: int) -> tn.Topology:
    return tn.topologies.tucker(out_dims=(rows,), in_dims=(columns,), max_bond=5)


BANKS = {
    "one-sided ends": lambda: shared(one_sided(), "center"),
    "two-sided ends": lambda: shared(tn.topologies.mpo(out_dims=(2, 8, 2), in_dims=(2, 4, 2)), "center"),
    "block tensor trains": lambda: shared(
        tn.topologies.block_tt(out_dims=(4, 8), in_dims=(4, 4), max_bond=1), "none"
    ),
    "tucker": lambda: shared(tucker(OUT, IN), "center"),
    "all shared": lambda: shared(one_sided(), "base"),
    "padded": lambda: shared(
        tn.topologies.mpo(out_dims=(6, 6), in_dims=(4, 5), out_features=OUT, in_features=IN), ("0",)
    ),
    "base and deltas": lambda: deltas(shared(tn.topologies.dense(out_features=OUT, in_features=IN), "base")),
    "bypass": lambda: deltas(shared(one_sided(), "base")),
    "MPOE and deltas": lambda: deltas(shared(one_sided(), "center")),
}


def rows(counts: tuple[int, ...]) -> tuple[Tensor, Groups]:
    torch.manual_seed(1)
    expert = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    return torch.randn(len(expert), IN, dtype=torch.float64, requires_grad=True), group_rows(expert, E)


@pytest.mark.parametrize("counts", [(3, 0, 1, 2), (40, 30, 20, 10), (0, 0, 5, 0)])
@pytest.mark.parametrize("route", [0, RECONSTRUCT])
@pytest.mark.parametrize("name", BANKS)
def test_equals_the_matrices(
    name: str, route: int, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    bank = BANKS[name]()
    monkeypatch.setattr(experts_module, "choose", lambda *_: route)
    x, groups = rows(counts)
    y = bank.apply_rows(x, groups)
    want = torch.einsum("roi,ri->ro", bank.expert_matrices(groups.expert_of_row), x)
    assert torch.allclose(y, want)
    inputs = [x, *bank.parameters()]
    found, truth = (torch.autograd.grad(z.square().sum(), inputs) for z in (y, want))
    for mine, true in zip(found, truth, strict=True):
        assert torch.allclose(mine, true, atol=1e-9)


def test_core_by_core_where_it_is_cheaper() -> None:
    """At the sizes of a base model one-sided ends cost next to nothing, two-sided ones a matrix each.

    The costs are those of one thread, since with more threads a large product is relatively cheaper.
    """
    x = torch.randn(1, 768)
    cheap, dear = (
        tm.SharedCoreExperts(tn.topologies.mpo(out_dims=out_dims, in_dims=in_dims), 8, device="meta")
        for out_dims, in_dims in (((16, 192, 1), (1, 48, 16)), ((4, 192, 4), (4, 48, 4)))
    )
    cheap.machine = dear.machine = machine_with_threads(CPU, 1)
    assert cheap._route(x, 256) != RECONSTRUCT
    assert dear._route(x, 256) == RECONSTRUCT


def test_deltas_are_not_multiplied_out_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = BANKS["base and deltas"]()
    built: list[object] = []
    monkeypatch.setattr(bank, "expert_matrices", lambda experts=None: built.append(experts))
    x, groups = rows((3, 0, 1, 2))
    bank.apply_rows(x, groups)
    assert built == []


@pytest.mark.parametrize("name", ["base and deltas", "tucker"])
def test_compiled_and_prepared_agree(name: str) -> None:
    torch.manual_seed(0)
    network = tm.ExpertFFN({"up": BANKS[name](), "down": _turned(name)}, bias=True).double().eval()
    moe = tm.SharedCoreMoE(tm.TopKRouter(IN, E), network).eval()
    x = torch.randn(9, IN, dtype=torch.float64)
    with torch.no_grad():
        want = moe(x)
        assert torch.allclose(torch.compile(moe, fullgraph=True, backend="aot_eager")(x), want)
        assert torch.allclose(tn.nn.prepare_for_inference(moe)(x), want)


def _turned(name: str) -> tm.ExpertBank:
    if name == "base and deltas":
        return deltas(shared(tn.topologies.dense(out_features=IN, in_features=OUT), "base"))
    if name == "tucker":
        return shared(tucker(IN, OUT), "center")
    topology = tn.topologies.mpo(out_dims=(4, 4, 1), in_dims=(1, 8, 4))
    return shared(topology, "base" if name == "all shared" else "center")
