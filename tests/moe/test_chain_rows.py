"""Chains that share their middle core, multiplied slice by slice, against their dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tensornet as tn
import tensornet_moe as tm
from tensornet.contraction.plan import RECONSTRUCT
from tensornet_moe import experts as experts_module
from tensornet_moe.experimental import chain_rows as chain_module
from tensornet_moe.experimental.chain_rows import chain_rows, middle_of, use_chain_rows
from tensornet_moe.grouped_linear import group_rows

E = 4
CHAINS = {
    "legs of 16 bytes": ((2, 8, 2), (2, 4, 2)),
    "legs of 24 bytes": ((2, 6, 2), (2, 4, 3)),
    "right end without inputs": ((2, 8, 3), (2, 4, 1)),
    "five cores": ((2, 2, 4, 3, 2), (2, 2, 3, 2, 2)),
    "four cores": ((2, 3, 2, 2), (2, 2, 2, 3)),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count calls of `chain_rows`, which small matrices take as well, in several slices."""
    count: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        count.append(1)
        return chain_rows(*arguments)

    monkeypatch.setattr(chain_module, "chain_rows", counted)
    monkeypatch.setattr(chain_module, "BUILT_ALONE", 1)
    monkeypatch.setattr(experts_module, "choose", lambda *_: RECONSTRUCT)
    monkeypatch.setattr(chain_module, "_SMALL_ENDS", 100)
    monkeypatch.setattr(chain_module, "_SLICE_BYTES", 2**10)
    return count


def in_slices(bank: tm.SharedCoreExperts) -> tm.SharedCoreExperts:
    assert use_chain_rows(bank) == 1
    return bank


def bank_of(name: str, max_bond: int | None = 5) -> tm.SharedCoreExperts:
    torch.manual_seed(0)
    out_dims, in_dims = CHAINS[name]
    topology = tn.topologies.mpo(out_dims=out_dims, in_dims=in_dims, max_bond=max_bond)
    return in_slices(tm.SharedCoreExperts(topology, E, dtype=torch.float64))


def both_ways(
    bank: tm.SharedCoreExperts, counts: tuple[int, ...]
) -> tuple[Tensor, Callable[[], Tensor], Callable[[], Tensor]]:
    torch.manual_seed(1)
    expert = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    x = torch.randn(len(expert), bank.in_features, dtype=torch.float64, requires_grad=True)
    groups = group_rows(expert, E)
    return (
        x,
        lambda: bank.apply_rows(x, groups),
        lambda: torch.einsum("roi,ri->ro", bank.expert_matrices(expert), x),
    )


@pytest.mark.parametrize("counts", [(3, 0, 1, 2), (0, 0, 5, 0), (9, 9, 9, 9)])
@pytest.mark.parametrize("name", CHAINS)
def test_equals_the_matrices(name: str, counts: tuple[int, ...], calls: list[int]) -> None:
    bank = bank_of(name)
    x, ours, dense = both_ways(bank, counts)
    assert torch.allclose(ours(), dense())
    assert calls
    inputs = [x, *bank.parameters()]
    found, truth = (torch.autograd.grad(y().square().sum(), inputs) for y in (ours, dense))
    for mine, true in zip(found, truth, strict=True):
        assert torch.allclose(mine, true, atol=1e-9)


@pytest.mark.parametrize("frozen", ["0", "1", "2", "0 2", "0 1 2", "x", "x 1"])
def test_what_is_frozen_gets_no_gradient(frozen: str, calls: list[int]) -> None:
    bank = bank_of("legs of 16 bytes")
    x, ours, dense = both_ways(bank, (3, 0, 1, 2))
    parts = {"x": x, **{name.removeprefix("core_"): p for name, p in bank.named_parameters()}}
    for name in frozen.split():
        parts[name].requires_grad_(False)
    trained = [tensor for tensor in parts.values() if tensor.requires_grad]
    found, truth = (torch.autograd.grad(y().square().sum(), trained) for y in (ours, dense))
    assert calls
    assert all(torch.allclose(mine, true, atol=1e-9) for mine, true in zip(found, truth, strict=True))


@pytest.mark.parametrize("for_x", [True, False])
def test_only_the_matrices_are_kept_and_only_for_the_rows(for_x: bool, calls: list[int]) -> None:
    bank = bank_of("legs of 16 bytes", None)
    x, ours, _ = both_ways(bank, (3, 0, 1, 2))
    x.requires_grad_(for_x)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours()
    operands = x.nbytes + sum(p.nbytes for p in bank.parameters())
    active = 3 * bank.matrix_bytes // E
    assert calls
    assert sum(kept.values()) == operands + (active if for_x else 0)


def test_a_borrowed_center_is_multiplied_in_slices(calls: list[int]) -> None:
    topology = tn.topologies.mpo(out_dims=(2, 3, 2), in_dims=(2, 2, 2))
    owner = tm.SharedCores(topology, dtype=torch.float64)
    bank = in_slices(tm.SharedCoreExperts(topology, E, shared=owner, dtype=torch.float64))
    x, ours, dense = both_ways(bank, (3, 0, 1, 2))
    found, truth = (
        torch.autograd.grad(y().square().sum(), [x, *bank.stored_tensors()]) for y in (ours, dense)
    )
    assert calls
    assert all(torch.allclose(mine, true, atol=1e-9) for mine, true in zip(found, truth, strict=True))


@pytest.mark.slow
def test_taken_at_the_sizes_of_a_base_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []

    def noted(x: Tensor, *arguments: Any) -> Tensor:
        taken.append(x.dtype)
        return chain_rows(x, *arguments)

    monkeypatch.setattr(chain_module, "chain_rows", noted)
    for size, dtype in ((512, torch.float32), (64, torch.float32), (512, torch.bfloat16)):
        dims = (4, size // 16, 4)
        topology = tn.topologies.mpo(out_dims=dims, in_dims=dims)
        bank = in_slices(tm.SharedCoreExperts(topology, E, dtype=dtype))
        x = torch.randn(E * 64, size, dtype=dtype)
        groups = group_rows(torch.arange(E).repeat_interleave(64), E)
        y = bank.apply_rows(x, groups)
        want = torch.einsum("roi,ri->ro", bank.expert_matrices(groups.expert_of_row).float(), x.float())
        assert torch.allclose(y.float(), want, atol=0.05 if dtype is torch.bfloat16 else 1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert bank.apply_rows(x, groups).dtype is torch.bfloat16
    assert taken == [torch.float32]


CHAIN = tn.topologies.mpo(out_dims=(4, 64, 4), in_dims=(4, 32, 4))


@pytest.mark.parametrize(
    ("topology", "shared", "expected"),
    [
        (CHAIN, ("1",), 1),
        (tn.topologies.mpo(out_dims=(2, 2, 64, 2, 2), in_dims=(2, 2, 32, 4, 1)), ("2",), 2),
        (CHAIN, ("0",), None),
        (CHAIN, ("0", "2"), None),
        (CHAIN, (), None),
        (tn.topologies.mpo(out_dims=(32, 8, 4), in_dims=(16, 8, 4)), ("1",), None),  # a large end
        (tn.topologies.mpo(out_dims=(4, 64, 4), in_dims=(4, 32, 4), out_features=1023), ("1",), None),
        (tn.topologies.tensor_ring(out_dims=(4, 64, 4), in_dims=(4, 32, 4), max_bond=4), ("1",), None),
        (tn.topologies.tucker(out_dims=(8, 8), in_dims=(4, 8)), ("core",), None),
        (tn.topologies.low_rank(out_features=64, in_features=32, rank=4), ("0",), None),
        (tn.topologies.dense(out_features=64, in_features=32), ("matrix",), None),
    ],
)
def test_only_chains_with_a_shared_inner_core_are_taken(
    topology: tn.Topology, shared: tuple[str, ...], expected: int | None
) -> None:
    assert middle_of(topology, shared) == expected
