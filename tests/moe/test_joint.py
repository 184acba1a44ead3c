"""Joint decomposition: given, different experts become one shared center and private cores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tensornet as tn
import tensornet_moe as tm
from tensornet_moe.joint_fit import fit_shared
from tensornet_moe.mixtures import experts_from

DIMS = {"out_dims": (2, 3, 2), "in_dims": (3, 2, 2)}
CHAIN = tn.topologies.mpo(**DIMS, max_bond=4)


def relative(bank: tm.SharedCoreExperts, weights: Tensor) -> float:
    return float((bank.expert_matrices().detach() - weights).norm() / weights.norm())


def best_alone(weights: Tensor, parameters: int) -> float:
    """Error of the better of MPO and plain SVD for each expert with an equal share of the parameters."""
    experts, rows, columns = weights.shape
    ratio = parameters / (experts * rows * columns)
    mpo = [tn.MPO.from_matrix(w, **DIMS, param_ratio=ratio).to_matrix() for w in weights]
    rank = max(1, parameters // experts // (rows + columns))
    svd = []
    for w in weights:
        f = tn.truncated_svd(w, max_rank=rank)
        svd.append((f.U * f.S) @ f.Vh)
    errors = [float((torch.stack(fit) - weights).norm() / weights.norm()) for fit in (mpo, svd)]
    return min(errors)


def related(experts: int, spread: float) -> Tensor:
    """Experts that grew apart from one matrix."""
    base = torch.randn(12, 12, dtype=torch.float64)
    return base + spread * torch.randn(experts, 12, 12, dtype=torch.float64)


@pytest.mark.parametrize("shared", [("1",), (), ("0", "2"), ("0", "1", "2")])
@pytest.mark.parametrize("padded", [False, True])
def test_planted_cores_are_found_again(padded: bool, shared: tuple[str, ...]) -> None:
    """The experts are related; unrelated ones often end in a local minimum."""
    chain = tn.topologies.mpo(**DIMS, max_bond=2)
    chain = replace(chain, out_features=11, in_features=10) if padded else chain
    planted = tm.SharedCoreExperts(chain, 3, share=shared, dtype=torch.float64)
    with torch.no_grad():
        for name in {"0", "1", "2"} - set(shared):
            core = planted.core(name)
            core.copy_(core[:1] + 0.3 * core)
    target = planted.expert_matrices().detach()
    fit = fit_shared(target, chain, shared, max_sweeps=400)
    bank = tm.SharedCoreExperts._from_cores((chain,) * 3, shared, fit.cores, fit.error, torch.float64)
    assert relative(bank, target) == pytest.approx(fit.error, rel=1e-6)
    assert fit.error < 1e-2


def test_equal_experts_are_found_exactly() -> None:
    weights = related(1, 0.0).expand(4, 12, 12)
    bank = tm.SharedCoreExperts.from_experts(weights, topology=tn.topologies.mpo(**DIMS))
    assert relative(bank, weights) < 1e-10
    assert bank.fit is not None
    assert not bank.fit.fell_back


@pytest.mark.parametrize(
    ("experts", "spread"), [(2, 0.1), (2, 5.0), pytest.param(5, 0.5, marks=pytest.mark.slow)]
)
def test_never_worse_than_each_expert_alone(experts: int, spread: float) -> None:
    weights = related(experts, spread)
    for shared in ("center", "ends", "in", "base", "none"):
        bank = tm.SharedCoreExperts.from_experts(weights, topology=CHAIN, share=shared)
        budget = tm.SharedCoreExperts(CHAIN, experts, share=shared, device="meta").num_params
        assert bank.fit is not None
        assert bank.num_params <= budget
        assert relative(bank, weights) == pytest.approx(bank.error, rel=1e-6)
        assert bank.error <= best_alone(weights, budget) * (1 + 1e-9)


def test_falling_back_is_said_and_kept() -> None:
    """Nothing is left private, and the experts have nothing in common: sharing all is the mean."""
    weights = torch.randn(2, 12, 12)
    weights[1] = -weights[0]
    bank = tm.SharedCoreExperts.from_experts(weights, topology=CHAIN, share="base")
    assert bank.fit is not None
    assert bank.fit.fell_back
    assert bank.shared == ()
    assert bank.error == bank.fit.alone_error
    assert relative(bank, weights) == pytest.approx(bank.fit.error, rel=1e-5)


def test_sharing_pays_for_related_experts() -> None:
    weights = related(6, 0.2)
    bank = tm.SharedCoreExperts.from_experts(weights, topology=CHAIN)
    assert bank.fit is not None
    assert bank.fit.alone_error is not None
    assert bank.error < 0.9 * bank.fit.alone_error


@pytest.mark.parametrize("shared", ["0", "1"])
def test_low_ranks_that_share_a_factor_are_the_best_ones(shared: str) -> None:
    weights = related(4, 0.5)
    topology = tn.topologies.low_rank(out_features=12, in_features=12, rank=5)
    bank = tm.SharedCoreExperts.from_experts(weights, topology=topology, share=[shared])
    rows = weights.reshape(-1, 12) if shared == "1" else weights.transpose(1, 2).reshape(-1, 12)
    best = float(torch.linalg.svdvals(rows)[5:].norm() / weights.norm())
    assert bank.fit is not None
    assert fit_shared(weights, topology, (shared,)).error == pytest.approx(best, rel=1e-6)
    assert bank.error == pytest.approx(min(best, bank.fit.alone_error or best), rel=1e-6)
    assert relative(bank, weights) == pytest.approx(bank.error, rel=1e-5)


def test_topologies_without_a_family_start_at_random() -> None:
    chain = tn.Topology.from_dict({**CHAIN.to_dict(), "family": "hand_made"})
    weights = related(3, 0.1)
    bank = tm.SharedCoreExperts.from_experts(weights, topology=chain)
    assert relative(bank, weights) == pytest.approx(bank.error)
    assert bank.error < 0.9


def test_names_of_families_are_taken() -> None:
    weights = related(2, 0.1).to(torch.float32)
    bank = tm.SharedCoreExperts.from_experts(weights, topology="mpo", sites=2, max_bond=6)
    assert bank.num_experts == 2
    assert {p.dtype for p in bank.parameters()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e160), (torch.float32, 1e-30)])
def test_errors_know_no_scale(dtype: torch.dtype, scale: float) -> None:
    """Of joint fits, of pools with one center, and of upcycled matrices whose bonds differ."""
    weights = torch.randn(3, 8, 12).to(dtype)

    def gap(bank: tm.SharedCoreExperts, like: Tensor) -> float:
        made = bank.expert_matrices().detach().double() / scale
        return float((made - like.double()).norm() / like.expand_as(made).double().norm())

    bank, plain = (tm.SharedCoreExperts.from_experts(weights * x, max_bond=3) for x in (scale, 1.0))
    assert bank.error == pytest.approx(plain.error, rel=1e-3)
    assert gap(bank, weights) == pytest.approx(bank.error, rel=1e-4)
    chain = tn.topologies.mpo(out_dims=(2, 2, 2), in_dims=(3, 2, 2), max_bond=3)
    pooled = experts_from(weights * scale, 6, chain, ("1",))
    assert gap(pooled, weights.repeat(2, 1, 1)) == pytest.approx(pooled.error, rel=1e-4)
    small = [tn.topologies.mpo(out_dims=(2, 4), in_dims=(4, 3), max_bond=3)] * 2
    grown = tm.SharedCoreExperts.from_dense(weights[0] * scale, num_experts=2, topology=small)
    assert gap(grown, weights[0]) == pytest.approx(grown.error, rel=1e-4)
    noisy = tm.SharedCoreExperts.from_dense(weights[0] * scale, num_experts=2, topology=small, noise=0.1)
    assert gap(noisy, weights[0]) > gap(grown, weights[0])  # noise is relative to the cores
