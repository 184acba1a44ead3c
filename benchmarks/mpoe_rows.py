"""Rows of mpoe_vs_switch.py: mixtures made from a dense model, their training and evaluation."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tensornet_hf as th
import tensornet_moe as tm

sys.path.insert(0, str(Path(__file__).parent))
from mpoe_tasks import Task


@dataclass(frozen=True)
class Row:
    """One way to build and train the feed-forward networks.

    Args:
        name: in tables.
        experts: number of experts; 0 keeps the dense model.
        ends: `(out, in)` legs of the first and the last of three cores; None: an expert is one dense matrix.
        max_bond: cap on both bonds; None keeps the matrix exact.
        shared: which cores the experts share.
        private_rate: learning rate of the cores that are not shared, in units of the common one.
        mask_p: probability of the gradient mask; 1 freezes the shared cores.
        mask: further options of `GradientMask`; `("fade", share)` fades it out over that share of the steps.
        noise: relative noise by which the experts differ at the start.
        across: whether all layers share one center.
    """

    name: str
    experts: int = 8
    ends: tuple[int, int] | None = (4, 4)
    max_bond: int | None = None
    shared: str | tuple[str, ...] = "center"
    private_rate: float = 1.0
    mask_p: float = 0.0
    mask: tuple[tuple[str, Any], ...] = ()
    noise: float = 0.0
    across: bool = False


@dataclass(frozen=True)
class Recipe:
    """Options of training that all rows share: linear warm-up, cosine decay to 0, gradients clipped at 1.

    Args:
        steps: optimizer steps.
        weight_decay: of everything.
        warmup: share of the steps.
        balance: coefficient of the load-balancing loss.
    """

    steps: int
    weight_decay: float = 0.01
    warmup: float = 0.1
    balance: float = 0.01


def build(task: Task, row: Row, *, seed: int, balance: float = 0.01) -> nn.Module:
    """Build the model of a row; the seed initializes the routers."""
    model = task.model()
    if row.experts == 0:
        return model
    th.upcycle(model, moe_config(row, task, balance))
    torch.manual_seed(seed)
    # From one stream: `upcycle` seeds layer k with seed + k, so that seeds would share some of their routers.
    for layer in mixtures(model):
        layer.router.weight.data = torch.randn(layer.router.weight.shape) * 0.1 / math.sqrt(task.d_model)
    return model


def moe_config(row: Row, task: Task, balance: float) -> th.MoEConfig:
    """Build the upcycling options: a long middle core between two small ends; plain matrices for Switch."""
    common: dict[str, Any] = {"num_experts": row.experts, "aux_loss_coef": balance, "noise": row.noise}
    if row.ends is None:
        return th.MoEConfig(**common, sites=1, shared="none")
    a, b = row.ends
    return th.MoEConfig(
        **common,
        shared=row.shared,
        share_across_layers=row.across,
        model_dims=(a, task.d_model // (a * b), b),
        hidden_dims=(a, task.d_ff // (a * b), b),
        max_bond=row.max_bond,
    )


def mixtures(model: nn.Module) -> list[tm.SharedCoreMoE]:
    """Collect the mixtures of a model in order; none in the dense one."""
    return [m for m in model.modules() if isinstance(m, tm.SharedCoreMoE)]


def expert_parameters(model: nn.Module) -> int:
    """Count the parameters of the feed-forward networks, with biases and shared cores, without routers."""
    names = {"mlp", "DenseReluDense"}  # of GPT-2 and T5, dense or mixed
    sites = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    parts = [getattr(site, "experts", site) for site in sites]
    parts += [m for m in model.modules() if isinstance(m, tm.SharedCores)]
    return sum(p.numel() for part in parts for p in part.parameters())


def optimizer_of(
    model: nn.Module, row: Row, rate: float, recipe: Recipe, *, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the optimizer without frozen cores, with a rate for private cores; attach the mask."""
    banks = [m for m in model.modules() if isinstance(m, tm.SharedCoreExperts)]
    shared = {id(p) for bank in banks for p in bank.shared_parameters().values()}
    private = [p for bank in banks for p in bank.parameters() if id(p) not in shared]
    apart = {id(p) for p in private}
    if row.mask_p == 1:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in shared)
    rest = [p for p in model.parameters() if id(p) not in apart and p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if private:
        groups.append({"params": private, "lr": rate * row.private_rate})
    decay = recipe.weight_decay
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    if 0 < row.mask_p < 1:
        options = dict(row.mask)
        if fade := options.pop("fade", None):
            options["schedule"] = tm.linear_fade(round(fade * recipe.steps))
        # The optimizer keeps the mask alive through its hooks.
        tm.GradientMask(model, p=row.mask_p, seed=seed, **options).attach(optimizer)
    return optimizer


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Tensor]]
) -> Callable[[], float]:
    """Return a function that makes one training step and returns the loss, router losses included."""

    def step() -> float:
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


@torch.no_grad()
def judge(model: nn.Module, batches: list[tuple[dict[str, Tensor], int]]) -> dict[str, float]:
    """Compute mean token loss in nats, token accuracy, and the load entropy of experts over log E."""
    layers = mixtures(model)
    loads: list[Tensor] = [torch.zeros(m.num_experts) for m in layers]
    loss = right = count = 0.0
    model.eval()
    for batch, tokens in batches:
        out = model(**batch)
        loss += float(out.loss) * tokens
        labels, guess = batch["labels"], out.logits.argmax(-1)
        if "attention_mask" not in batch:
            labels, guess = labels[:, 1:], guess[:, :-1]
        right += float((labels == guess).sum())
        count += tokens
        for load, layer in zip(loads, layers, strict=True):
            load += layer.stats.load if layer.stats is not None else 0
    model.train()
    result = {"loss": loss / count, "accuracy": right / count}
    if layers:
        shares = [load / load.sum() for load in loads]
        entropies = [float(torch.special.entr(s).sum()) / math.log(len(s)) for s in shares]
        result["entropy"] = statistics.mean(entropies)
    return result


def train(task: Task, row: Row, *, rate: float, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Build, train and judge one row once.

    Args:
        task, row, recipe: what is trained and how.
        rate: peak learning rate.
        seed: of routers, order of the data and mask.
    """
    model = build(task, row, seed=seed, balance=recipe.balance).train()
    optimizer = optimizer_of(model, row, rate, recipe, seed=seed)
    warmup = max(1, round(recipe.warmup * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * s / recipe.steps))),
    )
    step = stepper(model, optimizer, task.batches(seed))
    losses, started = [], time.process_time()
    for _ in range(recipe.steps):
        losses.append(step())
        schedule.step()
    seconds = time.process_time() - started
    return {
        "row": row.name,
        "rate": rate,
        "seed": seed,
        "tune_loss": judge(model, task.judge("tune"))["loss"],
        **judge(model, task.judge("test")),
        "train_loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "cpu_seconds": seconds,
        "expert_parameters": expert_parameters(model),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
