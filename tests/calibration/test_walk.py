"""Chains of blocks: found by watching tensors, gone through block by block with the same results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import bert, gpt2, llama, t5_relu, vit
from torch import Tensor, nn

import tensornet as tn
import tensornet_hf  # noqa: F401 - describes compressed models of transformers
from tensornet._util import without_cache
from tensornet.calibration.walk import Walk, find_chains
from tensornet.errors import TargetError
from tensornet.healing.refine import PairedMoments, PairedRun
from tensornet.nn.unfuse import unfused

MASK = torch.ones(3, 9, dtype=torch.long)
MASK[1, 6:] = 0


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (3, 9)), "attention_mask": MASK}


FOUND = {
    llama: ["model.layers"],
    gpt2: ["transformer.h"],
    t5_relu: ["encoder.block", "decoder.block"],
    bert: ["bert.encoder.layer"],
    vit: ["vit.layers"],
}


def batch_of(make: Any) -> dict[str, Tensor]:
    if make is vit:
        return {"pixel_values": torch.randn(3, 3, 16, 16)}
    return {**tokens(), "labels": torch.randint(0, 50, (3, 5))} if make is t5_relu else tokens()


@pytest.mark.parametrize("make", FOUND, ids=lambda make: make.__name__)
@torch.no_grad()
def test_blocks_one_by_one_do_what_the_model_does(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batches = [batch_of(make), batch_of(make)]
    chains = find_chains(model, batches[0])
    assert list(chains) == FOUND[make]
    for blocks in chains.values():
        wanted: list[Tensor] = []
        handle = model.get_submodule(blocks[-1]).register_forward_hook(
            lambda module, args, output, wanted=wanted: wanted.append(
                output if isinstance(output, Tensor) else output[0]
            )
        )
        with without_cache(model):
            for batch in batches:
                model(**batch)
            handle.remove()
            run = Walk(model, blocks, batches)
            run.enter()
            for _ in blocks:
                run.advance()
        assert run.position == len(blocks)
        for made, expected in zip(run.hidden, wanted, strict=True):
            torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("make", [gpt2, pytest.param(t5_relu, marks=pytest.mark.slow)])
@torch.no_grad()
def test_moments_are_those_of_the_whole_models(make: Any) -> None:
    torch.manual_seed(1)
    teacher = make().eval()
    model = copy.deepcopy(teacher)
    tn.compress(
        model, tn.CompressionConfig(param_ratio=0.5, method="svd", topology="low_rank"), progress=False
    )
    names = [name for name, x in model.named_modules() if isinstance(x, tn.nn.TensorNetworkLinear)]
    batches = [batch_of(make), batch_of(make)]
    with without_cache(model), without_cache(teacher), unfused(teacher):
        run, whole = PairedRun(model, teacher, batches), PairedRun(model, teacher, batches)
        whole.chains = {}
        groups = run.groups(names)
        assert sorted(name for group in groups for name in group) == sorted(names)
        assert run.chains
        for group in groups:
            here, there = run.moments(group), whole.moments(group)
            assert isinstance(here, PairedMoments)
            assert isinstance(there, PairedMoments)
            assert here.tokens == there.tokens
            for name in ("dense", "mixed", "real"):
                torch.testing.assert_close(getattr(here, name), getattr(there, name), rtol=1e-4, atol=1e-4)


def test_layers_that_share_an_input_are_one_group() -> None:
    model = llama().eval()
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    small = copy.deepcopy(model)
    tn.compress(
        small, tn.CompressionConfig(target_modules="*_proj", topology_options={"max_bond": 2}), progress=False
    )
    with without_cache(small), without_cache(model), torch.no_grad():
        run = PairedRun(small, model, [tokens()])
        groups = run.groups([f"model.layers.0.{x}" for x in ("self_attn.o_proj", "mlp.up_proj")] + names)
    assert groups == [
        tuple(names),
        ("model.layers.0.self_attn.o_proj",),
        ("model.layers.0.mlp.up_proj",),
    ]


class Stack(nn.Module):
    """Modules in a list, applied in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.parts = way, nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.way == "beside one another":
            return sum((part(input_ids) for part in self.parts), start=input_ids)
        x = input_ids
        for part in [*self.parts, self.parts[0]] if self.way == "twice" else self.parts:
            x = part(x).clone() if self.way == "changed in between" else part(x)
        return x


@pytest.mark.parametrize("way", ["beside one another", "twice", "changed in between", "in order"])
def test_only_blocks_in_order_are_a_chain(way: str) -> None:
    found = find_chains(Stack(way).eval(), {"input_ids": torch.randn(5, 4)})
    assert found == ({"parts": ("parts.0", "parts.1", "parts.2")} if way == "in order" else {})


def test_a_sequential_model_is_a_chain() -> None:
    class Model(nn.Sequential):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids)

    model = Model(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    assert find_chains(model, {"input_ids": torch.randn(5, 4)}) == {"": ("0", "1", "2")}


class Masked(nn.Module):
    """Blocks whose hidden state is not the first tensor that they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        mask, x = (input_ids > 0).float(), input_ids
        for part in self.parts:
            (x,) = part(mask=mask, x=x)
        return 2 * x


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(4, 4), 0

    def forward(self, mask: Tensor, x: Tensor) -> tuple[Tensor]:
        self.runs += 1
        return (self.linear(x * mask),)


@torch.no_grad()
def test_the_hidden_state_is_found_among_other_tensors() -> None:
    model, batches = Masked().eval(), [{"input_ids": torch.randn(5, 4)} for _ in range(2)]
    run = Walk(model, ("parts.0", "parts.1", "parts.2"), batches)
    run.enter()
    assert all(torch.equal(x, batch["input_ids"]) for x, batch in zip(run.hidden, batches, strict=True))
    for _ in model.parts:
        run.advance()
    for x, batch in zip(run.hidden, batches, strict=True):
        torch.testing.assert_close(2 * x, model(**batch))


@torch.no_grad()
def test_a_chain_is_entered_and_left_without_running_all_of_it() -> None:
    model, batch = Masked().eval(), {"input_ids": torch.randn(5, 4)}
    run = Walk(model, ("parts.0", "parts.1", "parts.2"), [batch])
    model.parts[0].forward = model.parts[0].forward  # as others leave it who wrap a module
    run.enter(skip=True)
    assert [part.runs for part in model.parts] == [1, 0, 0]
    for _ in model.parts:
        run.advance()
    seen = [part.runs for part in model.parts]
    with run.leaving(0, torch.ones(5, 4)):
        assert torch.equal(model(**batch), 2 * torch.ones(5, 4))
    assert [part.runs for part in model.parts] == seen
    torch.testing.assert_close(2 * run.hidden[0], model(**batch))
    assert "forward" in vars(model.parts[0])
    assert "forward" not in vars(model.parts[1])


@pytest.mark.parametrize("skip", [False, True])
def test_blocks_that_are_no_chain_are_refused_by_name(skip: bool) -> None:
    run = Walk(
        Stack("changed in between").eval(),
        [f"parts.{k}" for k in range(3)],
        [{"input_ids": torch.ones(5, 4)}],
    )
    with pytest.raises(TargetError, match=r"parts\.1 of Stack"):
        run.enter(skip=skip)
