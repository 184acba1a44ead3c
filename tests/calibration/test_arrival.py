"""Layers are visited in waves, and what they get is compared with what they get in the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from block_models import text
from hf_models import bert, gpt2, llama
from mixture_models import mixture
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tensornet.calibration.arrival import Mismatch, TwinRecorder, _Additions, inputs_on_arrival
from tensornet.calibration.batches import as_batch, run_model
from tensornet.calibration.calibrate import observed
from tensornet.calibration.walk import Walk
from tensornet.nn.targets import LayerSelection

BATCHES = 3


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    stacks = [name for name, x in model.named_modules() if isinstance(x, nn.ModuleList)]
    return tuple(f"{stacks[0]}.{k}" for k in range(2))


def visit(
    model: nn.Module, change: Callable[[nn.Module], Any] = lambda layer: None
) -> tuple[list[list[str]], dict[str, Mismatch]]:
    """Walk over a model, and change the weights of each wave of layers.

    Returns:
        The waves of the first block, without its name, and all differences.
    """
    names = blocks_of(model)
    batches = [as_batch(text(seed), model, torch.device("cpu")) for seed in range(BATCHES)]
    recorder = TwinRecorder()
    waves: list[list[str]] = []
    found: dict[str, Mismatch] = {}
    with observed(model, recorder, LayerSelection(target_modules="all")):
        walk, twin = (Walk(model, names, batches) for _ in range(2))
        with recorder.paused():
            walk.enter(skip=True)
        twin.follow(walk)
        twin.states.update(walk.states)
        for block, some in inputs_on_arrival(walk, twin, recorder):
            for wave in some:
                if block == names[0]:
                    waves.append(sorted(x.removeprefix(f"{block}.") for x in wave.names))
                found |= wave.mismatch
                with torch.no_grad():
                    for name in wave.names if block else ():
                        change(model.get_submodule(name))
    return waves, found


def gemma3() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    }  # fmt: skip
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


WAVES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (
        llama,
        [
            "self_attn.k_proj self_attn.q_proj self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj mlp.up_proj",
            "mlp.down_proj",
        ],
    ),
    "gpt2": (gpt2, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "bert": (
        bert,
        [
            "attention.self.key attention.self.query attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ],
    ),
}


@pytest.mark.parametrize("name", WAVES)
def test_layers_that_read_the_same_tensor_are_one_wave(name: str) -> None:
    make, expected = WAVES[name]
    assert visit(make().eval())[0] == [wave.split() for wave in expected]


def test_all_experts_of_a_mixture_are_one_wave() -> None:
    waves, found = visit(mixture("mixtral").eval())
    experts = [x for x in waves if any("experts" in name for name in x)]
    assert len(experts) == 2
    assert all("down" in name or "w2" in name for name in experts[1])
    assert not any(".experts." in name for name in found)  # they may get other tokens than in the dense model


def spoil(layer: nn.Module) -> None:
    weight = layer.weight
    generator = torch.Generator().manual_seed(weight.numel())
    weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)


def seen(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Run a model with hooks; return what its modules read, without padding."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: Any, name: str = name) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            found.setdefault(name, []).append(given[mask].double())

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        for seed in range(BATCHES):
            batch = as_batch(text(seed), model, torch.device("cpu"))
            mask = batch["attention_mask"].bool()
            run_model(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(x) for name, x in found.items()}


@pytest.mark.parametrize(
    ("layer", "stream", "before"),
    [
        ("self_attn.q_proj", None, []),
        ("self_attn.o_proj", "", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("mlp.down_proj", "post_attention_layernorm",
         ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj"]),
    ],
)  # fmt: skip
def test_differences_are_those_of_two_whole_models(layer: str, stream: str | None, before: list[str]) -> None:
    """The stream of a layer is what a module reads that is named here: the block itself, or a norm."""
    torch.manual_seed(0)
    dense = llama().eval()
    model = copy.deepcopy(dense)
    _, found = visit(model, spoil)
    small = copy.deepcopy(dense)
    block = blocks_of(dense)[1]
    done = [x for x, module in small.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for name in done:
            if name.startswith(blocks_of(dense)[0]) or name.removeprefix(f"{block}.") in before:
                spoil(small.get_submodule(name))
    names = [f"{block}.{layer}", *([f"{block}.{stream}".rstrip(".")] if stream is not None else [])]
    x, y = (seen(m, names) for m in (dense, small))
    mismatch = found[names[0]]
    tokens = len(y[names[0]])
    assert mismatch.tokens == tokens
    inputs = (x[names[0]] - y[names[0]]).T @ y[names[0]] / tokens
    scale = float(inputs.abs().max())
    assert scale > 0.01 * float(y[names[0]].square().mean())
    torch.testing.assert_close(mismatch.inputs.double(), inputs, rtol=1e-3, atol=1e-3 * scale)
    if stream is None:
        assert mismatch.residual is None
    else:
        residual = (x[names[1]] - y[names[1]]).T @ y[names[0]] / tokens
        assert mismatch.residual is not None
        scale = float(residual.abs().max())
        torch.testing.assert_close(mismatch.residual.double(), residual, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize(
    ("make", "writers"),
    [
        (gpt2, {"attn.c_proj", "mlp.c_proj"}),
        (bert, {"attention.output.dense", "output.dense"}),
        (gemma3, set()),  # norms stand between its layers and the residual stream
    ],
)
def test_layers_whose_output_is_added_to_the_residual_stream_are_found(
    make: Callable[[], nn.Module], writers: set[str]
) -> None:
    model = make().eval()
    _, found = visit(model)
    block = f"{blocks_of(model)[0]}."
    assert {
        x.removeprefix(block) for x, y in found.items() if y.residual is not None and x.startswith(block)
    } == (writers)


def test_a_model_that_does_not_change_differs_nowhere() -> None:
    _, found = visit(llama().eval())
    assert len(found) == 14
    assert not any(float(x.inputs.abs().max()) for x in found.values())
    assert not any(float(x.residual.abs().max()) for x in found.values() if x.residual is not None)


@pytest.mark.parametrize(
    ("add", "found"),
    [
        (lambda out, x: x.view(2, 3) + out, True),
        (lambda out, x: out.add_(x), True),
        (lambda out, x: out + out**3, False),
        (lambda out, x: out + 2 * x, False),  # what is added must have been there before
    ],
)
def test_only_tensors_that_were_there_before_an_output_count(
    add: Callable[[Tensor, Tensor], Tensor], found: bool
) -> None:
    layer, x, names = nn.Linear(3, 3), torch.ones(2, 3), []
    mode = _Additions(lambda name, other: names.append(name))
    layer.register_forward_hook(partial(mode.watch, "layer"))
    with torch.no_grad(), mode:
        add(layer(x), x)
    assert names == ["layer"] * found


def test_a_block_runs_only_up_to_each_wave() -> None:
    model = llama().eval()
    last, calls = model.get_submodule(f"{blocks_of(model)[0]}.mlp.down_proj"), []
    last.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        run_model(model, as_batch(text(0), model, torch.device("cpu")))
    assert len(calls) == 1
    calls.clear()
    visit(model)
    # To enter the walk, in the dense model, in its own wave, and for the next hidden states.
    assert len(calls) == 4 * BATCHES


def test_an_expert_that_gets_all_tokens_stays_with_the_other_experts() -> None:
    recorder = TwinRecorder()
    recorder._modules = {name: nn.Linear(2, 2) for name in ("shared", "experts.0", "experts.1")}
    experts = ["experts.0", "experts.1"]
    recorder.siblings = {"experts.0": experts, "experts.1": experts}
    tokens = torch.ones(3, 2)
    recorder._groups = [(["shared"], tokens), (["experts.1"], tokens[:2]), (["experts.0"], tokens)]
    assert recorder.waves() == [["shared"], experts]
