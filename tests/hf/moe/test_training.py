"""Trainer with mixtures: the gradient mask, what the router statistics say, resuming, the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_models import ARCHITECTURES, chains
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import TargetError
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import gpt2_path, t5_path
from tensornet_moe.experimental import parallel

CONFIG = chains(experts=4, sites=3, noise=0.05)


class Sentences(torch.utils.data.Dataset):
    """The inputs of an architecture, row by row."""

    def __init__(self, name: str) -> None:
        self.columns = ARCHITECTURES[name].inputs(labels=True, rows=8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class Watch(TrainerCallback):
    """Which shared cores each step left bit-identical."""

    def __init__(self) -> None:
        self.left: list[list[bool]] = []

    def on_pre_optimizer_step(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        self.before = [p.detach().clone() for p in tm.shared_parameters(model)]

    def on_optimizer_step(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        now = tm.shared_parameters(model)
        self.left.append([torch.equal(a, b) for a, b in zip(self.before, now, strict=True)])


def model_of(*, across: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = ARCHITECTURES["gpt2"].dense
    pool = {"experts": 4, "router": "switch", "share": "center", "pool": "all", "noise": 0.05}
    th.upcycle(model, **(pool if across else CONFIG))
    return model


def trainer_of(
    model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **options: object
) -> Trainer:
    settings: dict[str, object] = {
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "max_steps": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        **options,
    }
    arguments = TrainingArguments(str(folder), **settings)  # type: ignore[arg-type]
    return Trainer(model, arguments, train_dataset=Sentences("gpt2"), callbacks=callbacks)


@pytest.mark.parametrize(("accumulation", "across"), [(1, False), (2, False), (1, True)])
def test_the_callback_masks_one_draw_a_step(accumulation: int, across: bool, tmp_path: Path) -> None:
    model, watch = model_of(across=across), Watch()
    callback = th.GradientMaskCallback(0.5, seed=4)
    trainer_of(model, tmp_path, [callback, watch], gradient_accumulation_steps=accumulation).train()
    twin = torch.Generator().manual_seed(4)
    assert watch.left == [
        (torch.rand(2 if across else 4, generator=twin, dtype=torch.float64) < 0.5).tolist() for _ in range(4)
    ]
    assert callback.mask is not None
    tm.GradientMask(model, p=0.5)  # taken off when training ended


@pytest.mark.slow
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    results = []
    for interrupted in (False, True):
        model, folder = model_of(), tmp_path / str(interrupted)
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        if interrupted:
            first = {**options, "max_steps": 3}
            trainer_of(model, folder, [th.GradientMaskCallback(0.5)], **first).train()
            model = model_of()
        trainer = trainer_of(model, folder, [th.GradientMaskCallback(0.5)], **options)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if interrupted else None)
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_router_statistics_are_measured_and_logged(tmp_path: Path) -> None:
    model, stats = model_of(), th.RouterStatsCallback()
    trainer = trainer_of(model, tmp_path, [th.GradientMaskCallback(1.0), stats])
    trainer.train()
    assert [row["step"] for row in stats.history] == [2, 4]
    for row in stats.history:
        loads = list(row["load"].values())
        assert len(loads) == 2
        share = [max(load) / sum(load) for load in loads]
        entropy = [
            -sum(x / sum(load) * math.log(x / sum(load)) for x in load if x) / math.log(4) for load in loads
        ]
        assert row["moe/load_max"] == pytest.approx(sum(share) / 2)
        assert row["moe/load_entropy"] == pytest.approx(sum(entropy) / 2, abs=1e-5)
        assert row["moe/dropped"] == 0
        assert row["moe/balance_loss"] >= 1 - 1e-5
        assert row["moe/update_shared"] == 0  # p = 1: frozen
        assert row["moe/update_private"] > 0
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["moe/update_private"] for entry in logged] == [
        row["moe/update_private"] for row in stats.history
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_biases_move_once_a_step_towards_an_even_load(accumulation: int, tmp_path: Path) -> None:
    model = ARCHITECTURES["gpt2"].dense
    th.upcycle(model, experts=4, top_k=1, share="none", bias_rate=0.001)
    routers = [m.router for m in model.modules() if isinstance(m, tm.SharedCoreMoE)]
    nn.init.zeros_(routers[0].weight)  # every token goes to one expert, whose bias falls
    steps = {"max_steps": 3, "gradient_accumulation_steps": accumulation, "learning_rate": 0.0}
    trainer_of(model, tmp_path, [th.RouterBiasCallback()], **steps).train()
    alike = torch.stack([router.bias_steps for router in routers])
    assert int(alike.abs().max()) <= 3
    assert sorted(routers[0].bias_steps.tolist()) != [0, 0, 0, 0]
    assert set((routers[0].bias_steps % 2).tolist()) == {1}  # three steps by one


def test_groups_of_parameters_for_trainer(tmp_path: Path) -> None:
    """Rates of shared tensors stay divided by the root of their sharers under the schedule of `Trainer`."""
    model = ARCHITECTURES["gpt2"].dense
    th.upcycle(model, pool="all", experts=4)
    optimizer = torch.optim.AdamW(tm.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    options = {"lr_scheduler_type": "linear", "max_steps": 4}
    settings = trainer_of(model, tmp_path, [], **options).args
    before = [p.detach().clone() for p in model.parameters()]
    callbacks = [th.RouterBiasCallback()]
    trainer = Trainer(
        model, settings, train_dataset=Sentences("gpt2"), callbacks=callbacks, optimizers=(optimizer, None)
    )
    rates = []
    trainer.add_callback(Rates(rates))
    trainer.train()
    assert rates == pytest.approx([1e-2 * (1 - k / 4) for k in range(4)])
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Rates(TrainerCallback):
    """The rate of what has one sharer, before each step; that of others is divided by the root of two."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates

    def on_pre_optimizer_step(
        self, *args: object, optimizer: torch.optim.Optimizer, **kwargs: object
    ) -> None:
        one, two = optimizer.param_groups
        self.rates.append(one["lr"])
        assert two["lr"] == pytest.approx(one["lr"] / math.sqrt(2))


def test_the_trained_loss_holds_the_auxiliary_ones(tmp_path: Path) -> None:
    """Under accumulation the auxiliary losses of all micro-batches make one mean, not a sum."""
    logged = []
    for batch, accumulation in ((4, 1), (2, 2)):
        model = model_of()
        for part in model.modules():
            if isinstance(part, tm.SharedCoreMoE):
                part.balance_coef = 0.0
                part.z_coef = 10.0  # a mean over tokens, so exact under any split
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(model, tmp_path, [], max_steps=1, logging_steps=1, **options)
        trainer.train()
        logged.append(trainer.state.log_history[0]["loss"])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert logged[0] > 10


def test_callbacks_on_a_model_without_mixtures_say_so(tmp_path: Path) -> None:
    for callback, message in (
        (th.GradientMaskCallback(0.5), "has no core that experts share"),
        (th.RouterStatsCallback(), "has no mixture to observe"),
        (th.RouterBiasCallback(), "No router of this GPT2LMHeadModel has biases"),
    ):
        with pytest.raises(TargetError, match=message):
            trainer_of(ARCHITECTURES["gpt2"].dense, tmp_path, [callback]).train()


# --- the command line ----------------------------------------------------------------------------


def test_upcycle_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = tmp_path / "moe"
    command = ["upcycle", str(gpt2_path()), str(destination), "--experts", "4", "--json"]
    assert run([x for x in command if x != str(destination)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not destination.exists()
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["params"] == plan["params"]
    model = th.load(destination)
    assert (
        sum(p.numel() for m in model.modules() if isinstance(m, tm.SharedCoreMoE) for p in m.parameters())
        == report["params"]
    )
    x = torch.arange(40)[None]
    torch.testing.assert_close(model(x).logits, th.load(gpt2_path())(x).logits, atol=1e-4, rtol=1e-4)
    assert (destination / "tokenizer.json").is_file()
    assert run(command) == 1
    assert "exists" in capsys.readouterr().err
    assert run([*command, "--force", "--pool", "2", "--share", "center"]) == 0
    report = json.loads(capsys.readouterr().out)
    loaded = th.load(destination)
    pools = [part for part in loaded.modules() if isinstance(part, tm.ExpertPool)]
    assert report["across_params"] == sum(p.numel() for pool in pools for p in pool.parameters())
    assert [len(tm.shared_parameters(pool)) for pool in pools] == [2, 2]
    words = [
        "--pool",
        "all",
        "--experts",
        "8",
        "--top-k",
        "2",
        "--option",
        "normalize=true",
        "--option",
        "bias_rate=0.01",
        "--force",
    ]
    assert run(["upcycle", str(gpt2_path()), str(destination), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pools"] == 1
    model = th.load(destination)
    torch.testing.assert_close(model(x).logits, th.load(gpt2_path())(x).logits, atol=1e-4, rtol=1e-4)
    routers = [m.router for m in model.modules() if isinstance(m, tm.SharedCoreMoE)]
    assert {(r.experts_per_token, r.normalize, r.bias_rate) for r in routers} == {(2, True, 0.01)}
    choice = ["--experts", "2", "--router", "expert_choice"]
    assert run(["upcycle", str(t5_path()), *choice, "--target", "encoder.*.DenseReluDense"]) == 0
    assert run(["upcycle", str(gpt2_path()), "--option", "bias_rte=0.01"]) == 2
    assert "bias_rate" in capsys.readouterr().err


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_trainer_refuses_experts_that_are_spread(alone: None, tmp_path: Path) -> None:
    model = model_of()
    parallel.shard_experts(model)
    with pytest.raises(TargetError, match=r"distributed over processes.*gather_experts\(model\)"):
        trainer_of(model, tmp_path, [])
    with pytest.raises(TargetError, match="gather_experts"):
        model.save_pretrained(tmp_path / "part")
    parallel.gather_experts(model)
    assert model.hf_quantizer.is_trainable
    model.save_pretrained(tmp_path / "whole")
    th.load(tmp_path / "whole")
