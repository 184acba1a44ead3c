"""Mixtures trained by several processes: the same losses, centers and checkpoints as by one."""

from __future__ import annotations

import functools
from pathlib import Path

import distributed_tasks as tasks
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tensornet.errors import TargetError, TopologyError
from tensornet_moe.experimental import parallel

STEPS = 5
HOW = {
    "ddp": tasks.ddp,
    "fsdp2": tasks.fsdp,
    "experts": tasks.experts,
    "experts in ddp": tasks.experts_in_ddp,
}

HOW_MANY = [("ddp", 2), ("fsdp2", 2), ("experts", 2), ("experts in ddp", 2), ("experts", 4)]

single = functools.cache(tasks.single)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "ranks", "common"),
    [
        *((how, ranks, "nothing") for how, ranks in HOW_MANY),
        *((how, 2, common) for how in ("ddp", "fsdp2") for common in ("center", "pool")),
    ],
)
def test_same_as_one_process(how: str, ranks: int, common: str, tmp_path: Path) -> None:
    records: list[tasks.Record] = tasks.in_processes(HOW[how], ranks, tmp_path, STEPS, common)
    truth = single(ranks, STEPS, common=common)
    first = records[0]
    for record in records:
        assert record.centers == first.centers  # bit for bit, after every step
        assert record.masked == first.masked == truth.masked
    assert {any(x) for x in truth.masked} == {True, False} or len(set(truth.masked)) > 1
    torch.testing.assert_close(first.losses, truth.losses, rtol=1e-5, atol=1e-6)
    assert first.losses[-1] != pytest.approx(first.losses[0], rel=1e-3)  # something is learnt
    assert first.state.keys() == truth.state.keys()
    for key, value in truth.state.items():
        torch.testing.assert_close(
            first.state[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    torch.testing.assert_close(first.outputs, truth.outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_one_checkpoint_for_any_number_of_processes(ranks: int, tmp_path: Path) -> None:
    truth = single(2, STEPS)
    torch.save(truth.state, tmp_path / "state")
    for output in tasks.in_processes(tasks.load_elsewhere, ranks, tmp_path, str(tmp_path / "state")):
        torch.testing.assert_close(output, truth.outputs, rtol=1e-5, atol=1e-6)


def test_no_processes_at_all() -> None:
    with pytest.raises(TargetError, match="torchrun"):
        parallel.shard_experts(tasks.Model())


@pytest.fixture
def alone(tmp_path: Path) -> object:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield None
    dist.destroy_process_group()


def test_sharding_and_gathering_give_the_same_model_back(alone: object) -> None:
    model = tasks.Model()
    model.blocks[0].moe.experts.up.core_0.requires_grad_(False)
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(9, tasks.FEATURES)
    expected = model(x).detach()
    names = parallel.shard_experts(model)
    assert "blocks.0.moe.experts.local.up.core_0" in names
    assert not any("core_1" in name for name in names)  # the center is everybody's
    torch.testing.assert_close(model(x).detach(), expected)
    with pytest.raises(TargetError, match="already"):
        parallel.shard_experts(model)
    with pytest.raises(TargetError, match="gather_experts"):
        model.blocks[0].moe.spec()
    parallel.gather_experts(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not model.blocks[0].moe.experts.up.core_0.requires_grad
    with pytest.raises(TargetError, match="no experts"):
        parallel.gather_experts(model)


def test_what_cannot_be_sharded(alone: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="no SharedCoreMoE"):
        parallel.shard_experts(nn.Linear(2, 2))
    with pytest.raises(TargetError, match="pool"):
        parallel.shard_experts(tasks.Model("pool"))
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 3)
    with pytest.raises(TopologyError, match="evenly over 3"):
        parallel.shard_experts(tasks.Model())
