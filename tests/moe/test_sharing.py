"""Banks in a model: one center for several layers, matrices kept in eval, state dicts and descriptions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import FormatError, ShapeError, TopologyError
from tensornet.nn import build_module

E = 3
DIMS = {"out_dims": (2, 3, 2), "in_dims": (3, 2, 2)}
CHAIN, SMALL = (tn.topologies.mpo(**DIMS, max_bond=bond) for bond in (4, 2))
RING = tn.topologies.tensor_ring(out_dims=(3, 2, 2), in_dims=(2, 3, 2), max_bond=2)


def make(num_experts: int = E) -> tm.SharedCoreExperts:
    return tm.SharedCoreExperts(CHAIN, num_experts, dtype=torch.float64)


# --- one center for several layers ---------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.center = tm.SharedCores(CHAIN)
        self.layers = nn.ModuleList(tm.SharedCoreExperts(CHAIN, E, shared=self.center) for _ in range(2))


def test_a_borrowed_center_is_owned_once() -> None:
    model = Layers()
    assert [n for n in model.state_dict() if n.endswith("core_1")] == ["center.core_1"]
    assert sum("core_1" in n for n, _ in model.named_parameters()) == 1
    first, second = model.layers
    assert first.shared_parameters()["1"] is second.shared_parameters()["1"] is model.center.core_1
    total = sum(p.numel() for p in model.parameters())
    assert total == model.center.core_1.numel() + first.num_params + second.num_params
    (first.expert_matrices().sum() + second.expert_matrices().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_copies_and_moves_keep_the_center_shared() -> None:
    model = Layers()
    twin = copy.deepcopy(model).to(torch.float64)
    assert twin.layers[0].shared_parameters()["1"] is twin.center.core_1
    assert twin.center.core_1 is not model.center.core_1
    before = twin.layers[1].expert_matrices()
    with torch.no_grad():
        twin.center.core_1.mul_(2)
    assert torch.allclose(twin.layers[1].expert_matrices(), 2 * before)
    other = Layers()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.layers[0].expert_matrices(), model.layers[0].expert_matrices())


def test_a_center_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="borrowed core '1' has shape"):
        tm.SharedCoreExperts(SMALL, E, shared=tm.SharedCores(CHAIN))
    with pytest.raises(TopologyError, match="chooses no core"):
        tm.SharedCores(CHAIN, "none")


# --- storage -------------------------------------------------------------------------------------


def twin_of(model: nn.Module) -> nn.Module:
    """The model built again from the descriptions of its parts."""
    twin = nn.Module()
    twin.center = build_module(model.center.spec())
    twin.layers = nn.ModuleList(build_module(layer.spec()) for layer in model.layers)
    return twin


def test_a_bank_without_its_owner_says_whom_it_misses() -> None:
    twin = twin_of(Layers())
    with pytest.raises(
        RuntimeError, match=r"borrow from the SharedCores labelled 'shared'.*lend_shared_cores"
    ):
        twin.layers[0].expert_matrices()
    twin.second = tm.SharedCores(CHAIN)
    with pytest.raises(
        FormatError, match=r"labelled 'shared', of which Module has 2; its labels are \['shared'\]"
    ):
        tm.bank.lend_shared_cores(twin)
    twin.center.label = twin.second.label = "other"
    with pytest.raises(FormatError, match=r"has 0; its labels are \['other'\]"):
        tm.bank.lend_shared_cores(twin)
    for owner, error, message in (
        (
            tm.SharedCores(CHAIN, "ends"),
            TopologyError,
            r"has the cores \['0', '2'\], these experts share \['1'\]",
        ),
        (tm.SharedCores(SMALL), ShapeError, "borrowed core '1' has shape"),
    ):
        with pytest.raises(error, match=message):
            twin.layers[0].borrow(owner)
    with pytest.raises(RuntimeError, match="owns its shared cores"):
        make().borrow(tm.SharedCores(CHAIN))


# --- upcycling several layers to one center ------------------------------------------------------


def test_layers_with_one_center_are_found_again() -> None:
    """Matrices that were made with a common center have no error."""
    made = tm.SharedCoreExperts(SMALL, 3, dtype=torch.float64)
    weights = made.expert_matrices().detach()
    owner, banks = tm.share_across_layers(weights, num_experts=2, topology=SMALL, label="x", max_sweeps=400)
    assert (owner.label, owner.names, len(banks)) == ("x", ("1",), 3)
    for weight, bank in zip(weights, banks, strict=True):
        assert bank.owner is owner
        assert bank.error < 1e-3
        for matrix in bank.expert_matrices().detach():
            assert float((matrix - weight).norm() / weight.norm()) == pytest.approx(bank.error, rel=1e-4)


def test_unrelated_layers_have_the_error_that_is_reported() -> None:
    weights = torch.randn(3, 12, 12)
    owner, banks = tm.share_across_layers(weights, num_experts=2, noise=0.1, seed=5, max_bond=4, **DIMS)
    assert {name: tuple(p.shape) for name, p in owner.named_parameters()} == {"core_1": (4, 3, 2, 4)}
    again = tm.share_across_layers(weights, num_experts=2, noise=0.1, seed=5, max_bond=4, **DIMS)[1]
    quiet = tm.share_across_layers(weights, num_experts=2, max_bond=4, **DIMS)[1]
    for weight, bank, same, plain in zip(weights, banks, again, quiet, strict=True):
        assert torch.equal(bank.expert_matrices(), same.expert_matrices())
        assert not torch.equal(*bank.expert_matrices())
        first, second = plain.expert_matrices().detach()
        torch.testing.assert_close(first, second)
        error = float((first - weight).norm() / weight.norm())
        assert error == pytest.approx(bank.error, rel=1e-4)
        assert 0.3 < error < 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shared": "none"}, TopologyError, "chooses no core"),
        ({"noise": -1.0}, ValueError, "noise must be at least 0"),
        ({"num_experts": 0}, ValueError, "num_experts must be an integer of at least 1"),
        (
            {"topology": tn.topologies.mpo(out_dims=(2, 2), in_dims=(2, 2))},
            ShapeError,
            r"\(num_experts, 4, 4\)",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tm.share_across_layers(torch.randn(2, 12, 12), **{"num_experts": 2, **options})
    with pytest.raises(ShapeError, match=r"\(layers, out, in\), got \(12, 12\)"):
        tm.share_across_layers(torch.randn(12, 12), num_experts=2)


def test_sums_cannot_be_shared() -> None:
    topology = tn.topologies.residual(out_features=8, in_features=8, rank=2)
    with pytest.raises(TopologyError, match=r"single networks, and 'residual' is a sum; take 'mpo'"):
        tm.SharedCoreExperts(topology, 2)
