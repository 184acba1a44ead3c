"""Every pattern of sharing keeps the laws of an expert bank, and refuses what it cannot do."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from page_blocks import python_blocks
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.nn import module as nn_module
from tensornet_moe.testing import BankLaws

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"
E = 4
OUT, IN = BankLaws.shape
DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def chain(shape: tuple[int, int], max_bond: int | None = None) -> tn.Topology:
    legs = {8: (2, 2, 2), 12: (2, 3, 2)}
    return tn.topologies.mpo(out_dims=legs[shape[0]], in_dims=legs[shape[1]], max_bond=max_bond)


class TestMPOE(BankLaws):
    def bank(self, num_experts: int, shape: tuple[int, int]) -> tm.ExpertBank:
        return tm.SharedCoreExperts(chain(shape, 3), num_experts, **DOUBLE)

    def from_dense(self, weight: Tensor, num_experts: int) -> tm.ExpertBank:
        return tm.SharedCoreExperts.from_dense(weight, num_experts=num_experts, topology=chain(self.shape))


class _OfTopology(BankLaws):
    """Banks of a topology in which some cores are shared; `whole` is one that represents any matrix."""

    shared: str | tuple[str, ...] = ("basis",)

    def topology(self, shape: tuple[int, int], *, whole: bool) -> tn.Topology:
        raise NotImplementedError

    def bank(self, num_experts: int, shape: tuple[int, int]) -> tm.ExpertBank:
        topology = self.topology(shape, whole=False)
        return tm.SharedCoreExperts(topology, num_experts, share=self.shared, **DOUBLE)

    def from_dense(self, weight: Tensor, num_experts: int) -> tm.ExpertBank:
        topology = self.topology(self.shape, whole=True)
        return tm.SharedCoreExperts.from_dense(
            weight, num_experts=num_experts, topology=topology, share=self.shared
        )


class TestBlockTensorTrains(_OfTopology):
    shared = "none"

    def topology(self, shape: tuple[int, int], *, whole: bool) -> tn.Topology:
        legs = {8: (2, 4), 12: (3, 4)}
        return tn.topologies.block_tt(out_dims=legs[shape[0]], in_dims=legs[shape[1]], max_bond=2)


class TestMixtureOfBases(_OfTopology):
    """The first topology of docs/guides/mixtures.md."""

    def topology(self, shape: tuple[int, int], *, whole: bool) -> tn.Topology:
        made: tn.Topology = topologies_of_guide()["mixture_of_bases"](shape, 3, None if whole else 5)
        return made


class TestScaledBases(_OfTopology):
    """The second topology of docs/guides/mixtures.md."""

    def topology(self, shape: tuple[int, int], *, whole: bool) -> tn.Topology:
        made: tn.Topology = topologies_of_guide()["scaled_bases"](shape, 1 if whole else 2)
        return made


def topologies_of_guide() -> dict[str, Any]:
    names: dict[str, Any] = {"tn": tn}
    blocks = python_blocks(GUIDES / "mixtures.md")
    (code,) = [block.code for block in blocks if "def mixture_of_bases(" in block.code]
    exec(code, names)
    return names


class TestSharedDown(BankLaws):
    """Every expert has the one matrix of all, as the second matrix of experts that share it."""

    def bank(self, num_experts: int, shape: tuple[int, int]) -> tm.ExpertBank:
        topology = tn.topologies.dense(out_features=shape[0], in_features=shape[1])
        return tm.SharedCoreExperts(topology, num_experts, share="base", **DOUBLE)

    test_starts_as_the_dense_network = None  # type: ignore[assignment]


class TestLowRankDeltas(BankLaws):
    def bank(self, num_experts: int, shape: tuple[int, int]) -> tm.ExpertBank:
        base = tm.SharedCoreExperts(
            tn.topologies.dense(out_features=shape[0], in_features=shape[1]),
            num_experts,
            share="base",
            **DOUBLE,
        )
        bank = tm.LowRankDeltaExperts(base, 2, **DOUBLE)
        nn.init.normal_(bank.left)
        return bank

    def from_dense(self, weight: Tensor, num_experts: int) -> tm.ExpertBank:
        return tm.LowRankDeltaExperts.from_dense(weight, num_experts=num_experts, rank=2)


class TestBypass(BankLaws):
    """Every expert is the network of one shared chain plus a low rank of its own."""

    def bank(self, num_experts: int, shape: tuple[int, int]) -> tm.ExpertBank:
        bank = tm.LowRankDeltaExperts(
            tm.SharedCoreExperts(chain(shape, 3), num_experts, share="base", **DOUBLE), 2, **DOUBLE
        )
        nn.init.normal_(bank.left)
        return bank

    def from_dense(self, weight: Tensor, num_experts: int) -> tm.ExpertBank:
        return tm.LowRankDeltaExperts.from_dense(
            weight, num_experts=num_experts, rank=2, topology=chain(self.shape, 4)
        )


class TestDocstring(BankLaws):
    """The example of `ExpertBank`."""

    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run the code, and take its name for this test only: other tests run it as well."""
        monkeypatch.setattr(nn_module, "_BUILDERS", nn_module._BUILDERS.copy())
        self.names: dict[str, Any] = {"torch": torch, "tn": tn, "tm": tm}
        for example in doctest.DocTestParser().get_examples(tm.ExpertBank.__doc__ or ""):
            exec(example.source, self.names)

    def bank(self, num_experts: int, shape: tuple[int, int]) -> tm.ExpertBank:
        made = self.names["DenseBank"](num_experts, shape).double()
        assert isinstance(made, tm.ExpertBank)
        return made

    def from_dense(self, weight: Tensor, num_experts: int) -> tm.ExpertBank:
        bank = self.bank(num_experts, self.shape)
        with torch.no_grad():
            bank.get_parameter("weight").copy_(weight)
        return bank


class TestGuide(BankLaws):
    """The bank of docs/guides/extend.md."""

    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nn_module, "_BUILDERS", nn_module._BUILDERS.copy())
        self.names: dict[str, Any] = {"torch": torch, "nn": nn, "tn": tn, "tm": tm}
        (code,) = [
            block.code for block in python_blocks(GUIDES / "extend.md") if "(tm.ExpertBank)" in block.code
        ]
        exec(code, self.names)

    def bank(self, num_experts: int, shape: tuple[int, int]) -> tm.ExpertBank:
        made = self.names["DiagonalBank"](num_experts, shape).double()
        assert isinstance(made, tm.ExpertBank)
        return made

    def from_dense(self, weight: Tensor, num_experts: int) -> tm.ExpertBank:
        bank = self.bank(num_experts, self.shape)
        with torch.no_grad():
            bank.get_parameter("matrix").copy_(weight)
            bank.get_parameter("left").fill_(1)
            bank.get_parameter("right").fill_(1)
        return bank


# --- counts --------------------------------------------------------------------------------------


def test_parameter_counts() -> None:
    deltas = tm.LowRankDeltaExperts.from_dense(torch.randn(OUT, IN), num_experts=E, rank=2)
    assert deltas.num_params == OUT * IN + E * 2 * (OUT + IN)


# --- given experts -------------------------------------------------------------------------------


def planted(rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    left = torch.randn(E, OUT, rank, generator=generator, dtype=torch.float64)
    return base + left @ torch.randn(E, rank, IN, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("planted_rank", [1, 3])
def test_deltas_fit_better_than_around_the_mean(planted_rank: int) -> None:
    weights = planted(planted_rank)
    found = tm.LowRankDeltaExperts.from_experts(weights, rank=1)
    rest = float((found.expert_matrices().detach() - weights).norm() / weights.norm())
    assert rest == pytest.approx(found.error, abs=1e-9)
    u, s, vh = torch.linalg.svd(weights - weights.mean(0), full_matrices=False)
    around_the_mean = weights - weights.mean(0) - u[..., :1] * s[..., None, :1] @ vh[..., :1, :]
    assert rest < 0.95 * float(around_the_mean.norm() / weights.norm())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_deltas_fit_at_any_scale(scale: float) -> None:
    weights = planted(1).float() * scale
    found = tm.LowRankDeltaExperts.from_experts(weights, rank=1)
    made = found.expert_matrices().detach() / scale
    assert bool(made.isfinite().all())
    assert float((made - weights / scale).norm() / (weights / scale).norm()) < 0.5


# --- bad input -----------------------------------------------------------------------------------
