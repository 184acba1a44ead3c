"""Experts that share cores: counts, the dense truth, gradients, bonds that differ, upcycling."""

from __future__ import annotations

import string
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import tensornet as tn
import tensornet_moe as tm
from tensornet.contraction.plan import RECONSTRUCT
from tensornet.topologies import CoreSpec
from tensornet_moe import experts as experts_module
from tensornet_moe.grouped_linear import group_rows

E = 3
CHAIN = tn.topologies.mpo(out_dims=(2, 3, 2), in_dims=(3, 2, 2), max_bond=4)
RING = tn.Topology(
    family="hand_made",
    cores=(
        CoreSpec("a", ("x", "o0", "y")),
        CoreSpec("b", ("y", "i0", "o1", "z")),
        CoreSpec("c", ("z", "i1", "x")),
    ),
    sizes=(("x", 2), ("y", 3), ("z", 2), ("o0", 3), ("o1", 2), ("i0", 4), ("i1", 2)),
    out_labels=("o0", "o1"),
    in_labels=("i0", "i1"),
    out_features=5,  # padded: the legs hold 6
    in_features=7,  # padded: the legs hold 8
)
STAR = tn.Topology(  # one bond in three cores
    family="hand_made",
    cores=(
        CoreSpec("p", ("o", "s")),
        CoreSpec("q", ("i", "s")),
        CoreSpec("scale", ("s",)),
    ),
    sizes=(("o", 5), ("i", 4), ("s", 3)),
    out_labels=("o",),
    in_labels=("i",),
    out_features=5,
    in_features=4,
)
TOPOLOGIES = {
    "chain": CHAIN,
    "ring": RING,
    "star": STAR,
    "low_rank": tn.topologies.low_rank(out_features=6, in_features=5, rank=2),
    "dense": tn.topologies.mpo(out_dims=(6,), in_dims=(5,)),
    "tucker": tn.topologies.tucker(out_dims=(3, 2), in_dims=(2, 3), max_bond=2),
    "tensor_ring": tn.topologies.tensor_ring(out_dims=(3, 2), in_dims=(2, 3), max_bond=2),
    "kronecker": tn.topologies.kronecker(out_dims=(3, 2), in_dims=(2, 3), terms=2),
    "block_tt": tn.topologies.block_tt(out_dims=(3, 2), in_dims=(2, 3), max_bond=2),
}
SHARED = ("center", "ends", "in", "none", "base")


def truth(bank: tm.SharedCoreExperts, expert: int) -> Tensor:
    """One einsum over all cores of one expert, straight from the definition."""
    topology = bank.topologies[expert]
    letters = dict(zip(bank.topology.size_of, string.ascii_letters, strict=False))
    terms, operands = [], []
    for core in topology.cores:
        parameters = dict(bank.named_parameters())
        if core.name in bank.shared:
            tensor = bank.shared_parameters()[core.name]
        elif f"core_{core.name}" in parameters:
            tensor = parameters[f"core_{core.name}"][expert]
        else:
            tensor = parameters[f"core_{core.name}_expert_{expert}"]
        shape = topology.core_shapes[core.name]
        operands.append(tensor[tuple(slice(size) for size in shape)])
        terms.append("".join(letters[x] for x in core.labels))
    output = "".join(letters[x] for x in (*topology.out_labels, *topology.in_labels))
    full = torch.einsum(",".join(terms) + "->" + output, *operands).reshape(topology.padded_shape)
    return full[: topology.out_features, : topology.in_features]


def make(name: str, shared: str | Sequence[str] = "center", num_experts: int = E) -> tm.SharedCoreExperts:
    return tm.SharedCoreExperts(TOPOLOGIES[name], num_experts, share=shared, dtype=torch.float64)


# --- counts --------------------------------------------------------------------------------------

BASE = {"out_dims": (3, 4, 4, 4, 4), "in_dims": (4, 4, 8, 6, 4)}
LARGE = {"out_dims": (4, 4, 4, 4, 4), "in_dims": (4, 4, 8, 8, 4)}


@pytest.mark.parametrize(
    ("num_experts", "parameters", "dense", "ratio"),
    [
        (4, 3_098_176, 9_437_184, 0.328),
        (8, 3_837_056, 18_874_368, 0.203),
        (12, 4_575_936, 28_311_552, 0.162),
        (16, 5_314_816, 37_748_736, 0.141),
    ],
)
def test_parameter_table(num_experts: int, parameters: int, dense: int, ratio: float) -> None:
    bank = tm.SharedCoreExperts(tn.topologies.mpo(**BASE), num_experts, device="meta")
    assert (bank.out_features, bank.in_features) == (768, 3072)
    assert bank.num_params == sum(p.numel() for p in bank.parameters()) == parameters
    assert num_experts * 768 * 3072 == dense
    assert parameters / dense == pytest.approx(ratio, abs=5e-4)


def test_check_values_of_base_and_large() -> None:
    base, large = tn.topologies.mpo(**BASE), tn.topologies.mpo(**LARGE)
    assert [base.bond_dims[f"b{k}"] for k in range(1, 5)] == [12, 192, 384, 16]
    cores = tm.SharedCoreExperts(base, 2, device="meta").named_parameters()
    assert {name: p.numel() // (1 if name == "core_2" else 2) for name, p in cores} == {
        "core_0": 144,
        "core_1": 36_864,
        "core_2": 2_359_296,
        "core_3": 147_456,
        "core_4": 256,
    }
    one = tm.SharedCoreExperts(large, 1, device="meta")
    center = one.shared_parameters()["2"].numel()
    assert (center, one.num_params - center) == (4_194_304, 328_192)


def test_rebuild_costs_what_the_bonds_say() -> None:
    bank = tm.SharedCoreExperts(tn.topologies.mpo(**BASE), 8, device="meta")
    per_expert = bank.plan.multiply_adds(8) / (8 * 768 * 3072)
    assert 576 <= per_expert < 580


# --- the matrices --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_matrices_and_gradients_are_those_of_one_einsum(name: str, shared: str) -> None:
    bank = make(name, shared)
    probe = torch.randn(E, bank.out_features, bank.in_features, dtype=torch.float64)
    ours = bank.expert_matrices()
    theirs = torch.stack([truth(bank, e) for e in range(E)])
    assert torch.allclose(ours, theirs, atol=1e-12)
    parameters = list(bank.parameters())
    for got, want in zip(
        torch.autograd.grad((ours * probe).sum(), parameters),
        torch.autograd.grad((theirs * probe).sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("name", ["chain", "ring", "block_tt"])
def test_large_matrices_are_built_one_by_one(
    name: str, shared: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, first and second derivatives are the same; with many rows backward builds them again."""
    bank = make(name, shared)
    monkeypatch.setattr(experts_module, "choose", lambda *_: RECONSTRUCT)
    monkeypatch.setattr(experts_module, "takes_grouped_mm", lambda *_: False)
    groups = group_rows(torch.arange(E).repeat_interleave(rows)[rows:], E)
    x = torch.randn(len(groups.expert_of_row), bank.in_features, dtype=torch.float64, requires_grad=True)
    inputs = [x, *bank.parameters()]
    results = []
    for limit in (1, 10**9):
        monkeypatch.setattr(experts_module, "BUILT_ALONE", limit)
        y = bank.apply_rows(x, groups)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([y, *first, *second])
    for alone, together in zip(*results, strict=True):
        assert torch.allclose(alone, together, rtol=1e-9, atol=1e-9)


def test_new_experts_differ_and_have_unit_gain() -> None:
    topology = tn.topologies.mpo(out_dims=(8, 8), in_dims=(8, 8))
    matrices = tm.SharedCoreExperts(topology, 8, share=["0"]).expert_matrices().detach()
    assert float(matrices.var() * 64) == pytest.approx(1, rel=0.3)
    assert not torch.allclose(matrices[0], matrices[1])


# --- bonds that differ ---------------------------------------------------------------------------

SMALL = tn.topologies.mpo(out_dims=(2, 3, 2), in_dims=(3, 2, 2), max_bond=2)


@pytest.mark.parametrize("shared", ["center", "ends", "none"])
def test_bonds_may_differ_and_nothing_is_padded_in_storage(shared: str) -> None:
    bank = tm.SharedCoreExperts([CHAIN, SMALL], 2, share=shared, dtype=torch.float64)
    assert torch.allclose(bank.expert_matrices()[1], truth(bank, 1), atol=1e-12)
    assert torch.allclose(bank.expert_matrices([1, 0])[1], truth(bank, 0), atol=1e-12)
    own = [sum(p.numel() for n, p in bank.named_parameters() if n.endswith(f"_expert_{e}")) for e in (0, 1)]
    shared_size = sum(p.numel() for p in bank.shared_parameters().values())
    assert bank.num_params == shared_size + sum(own)
    private = [n for n in CHAIN.core_names if n not in bank.shared]
    expected = sum(torch.Size(SMALL.core_shapes[n]).numel() for n in private)
    assert own[1] == expected < own[0]


def test_a_smaller_expert_keeps_the_leading_singular_values() -> None:
    full = tn.topologies.mpo(out_dims=(2, 3, 2), in_dims=(3, 2, 2))
    weight = torch.randn(12, 12, dtype=torch.float64)
    bank = tm.SharedCoreExperts.from_dense(weight, num_experts=2, topology=[full, SMALL])
    matrices = bank.expert_matrices()
    assert torch.allclose(matrices[0], weight, atol=1e-10)
    error = float((matrices[1] - weight).norm().detach() / weight.norm())
    alone = tn.MPO.from_matrix(weight, out_dims=(2, 3, 2), in_dims=(3, 2, 2), max_bond=2).error
    # The squares of what the two bonds cut add up; alone, the error is at least the larger one.
    assert error <= 2**0.5 * alone + 1e-9


# --- upcycling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARED)
def test_upcycled_experts_are_the_dense_matrix(shared: str) -> None:
    weight = torch.randn(12, 10)
    bank = tm.SharedCoreExperts.from_dense(weight, num_experts=E, share=shared, sites=3)
    assert torch.allclose(bank.expert_matrices(), weight.expand(E, 12, 10), atol=1e-5)
    assert bank.error is not None
    assert bank.error < 1e-6


@pytest.mark.parametrize("family", ["low_rank", "tucker", "tensor_ring", "kronecker", "block_tt"])
def test_any_family_can_be_upcycled(family: str) -> None:
    weight = torch.randn(12, 9)
    bank = tm.SharedCoreExperts.from_dense(weight, num_experts=2, topology=family, max_bond=4)
    got = bank.expert_matrices().detach()
    torch.testing.assert_close(got[0], got[1])
    assert float((got[0] - weight).norm() / weight.norm()) <= float(bank.error or 0) * (1 + 1e-4) + 1e-6


def test_noise_is_relative_private_and_reproducible() -> None:
    weight = 100 * torch.randn(16, 16)
    kwargs = {"num_experts": E, "topology": "mpo", "sites": 3}
    plain = tm.SharedCoreExperts.from_dense(weight, **kwargs)
    noisy = tm.SharedCoreExperts.from_dense(weight, **kwargs, noise=0.1, seed=5)
    assert torch.equal(plain.core_1, noisy.core_1)  # the center
    difference = (noisy.core_0 - plain.core_0).detach()
    assert float(difference.std() / plain.core_0.detach().square().mean().sqrt()) == pytest.approx(
        0.1, rel=0.3
    )
    assert not torch.equal(noisy.core_0[0], noisy.core_0[1])
    again = tm.SharedCoreExperts.from_dense(weight, **kwargs, noise=0.1, seed=5)
    assert torch.equal(noisy.core_0, again.core_0)
    for noise in (-0.1, float("nan"), "much"):
        with pytest.raises(ValueError, match="noise"):
            tm.SharedCoreExperts.from_dense(weight, num_experts=2, noise=noise)


def test_half_precision_weights_give_half_precision_cores() -> None:
    weight = torch.randn(12, 12, dtype=torch.bfloat16)
    bank = tm.SharedCoreExperts.from_dense(weight, num_experts=2)
    assert {p.dtype for p in bank.parameters()} == {torch.bfloat16}
    assert torch.allclose(bank.expert_matrices()[0], weight, atol=0.1)
