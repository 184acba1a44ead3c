"""Layers are rounded on the inputs that they get from the rounded layers; the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from block_models import TwoReaders, numbers, perceptron, text
from hf_models import bert, gpt2, llama, qwen2, t5_relu
from mixture_models import mixture
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration.batches import as_batch, run_model
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression import Survey, write
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.sensitivity import input_weighting
from tensornet.compression.tasks import compress_tasks
from tensornet.compression.write import compress_blocks
from tensornet.errors import NonFiniteError, TargetError
from tensornet.nn.targets import Target, list_weights
from tensornet.nn.unfuse import unfused
from tensornet.topologies import low_rank

FORMATS = ("int8:g16:float16", "int3:g16:float16", "int2:g16:float16")
CONFIG = tn.CompressionConfig(bits_per_weight=5.5, formats=FORMATS, target_modules="all")


#: Models, one of their batches, and the names under which their layers come.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], list[str]]] = {
    "llama": (llama, text, ["", "model.layers.0", "model.layers.1", ""]),
    "tied embedding": (qwen2, text, ["", "model.layers.0", "model.layers.1", ""]),
    "gpt2": (gpt2, text, ["", "transformer.h.0", "transformer.h.1", ""]),
    "bert": (bert, text, ["", "bert.encoder.layer.0", "bert.encoder.layer.1", ""]),
    "mixture": (lambda: mixture("mixtral"), text, ["", "model.layers.0", "model.layers.1", ""]),
    "encoder and decoder": (t5_relu, text, [""]),
    "sequence": (perceptron, numbers, ["0", "1", "2", "3", "4", ""]),
    "two readers": (lambda: TwoReaders(False), numbers, ["blocks.0", "blocks.1", "blocks.2", ""]),
    "readers of two blocks": (lambda: TwoReaders(True), numbers, [""]),
}


@cache
def surveyed(name: str) -> tuple[nn.Module, list[Any], Survey]:
    """Do not change this model: it is that of all tests."""
    make, batch, _ = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    batches = [batch(seed) for seed in range(3)]
    return model, batches, tn.survey(model, batches, CONFIG)


def case(name: str) -> tuple[nn.Module, list[Any], CompressionPlan]:
    """A model of its own, batches, and a plan."""
    model, batches, survey = surveyed(name)
    return copy.deepcopy(model), batches, survey.plan()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert all(x.requires_grad for x in model.parameters() if x.is_floating_point())


def true_moments(model: nn.Module, names: set[str], batches: list[Any]) -> dict[str, Tensor]:
    """Hook layers of a model and compute the moments of what they really get, without padding."""
    found: dict[str, list[Tensor]] = {}
    mask: Tensor | None = None

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            tokens = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.flatten(0, -2)
            found.setdefault(name, []).append(tokens.double())

        return hook

    with unfused(model), torch.no_grad():
        handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
        for given in batches:
            batch = as_batch(given, model, torch.device("cpu"))
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            run_model(model, batch)
        for handle in handles:
            handle.remove()
    together = {name: torch.cat(x) for name, x in found.items()}
    return {name: (x.T @ x / len(x)).float() for name, x in together.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in ("gpt2", "bert"))) for x in CASES]
)
def test_layers_are_rounded_on_what_the_rounded_layers_before_them_return(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truth: layers are really replaced in a copy of the model, which is run as a whole with hooks."""
    model, batches, plan = case(name)
    used: list[dict[str, Tensor]] = [{}]  # moments with which the layers were rounded, by call
    rounded: list[set[str]] = [set()]  # layers that were rounded in each call

    def noted(target: Target, stats: CalibrationStats) -> Any:
        reader = next((x for x in target.names if x in stats.columns), None)
        if reader is not None and target.kinds[0].name != "embedding":
            used[-1][reader] = stats.columns[reader].clone()
        return input_weighting(target, stats)

    def rounding(tasks: Any, *args: Any) -> Any:
        rounded[-1] |= {task.layer.name for task in tasks}
        rounded.append(set())
        used.append({})
        return compress_tasks(tasks, *args)

    monkeypatch.setattr(write, "input_weighting", noted)
    monkeypatch.setattr(write, "compress_tasks", rounding)
    schemes = {layer.name: (layer.name, layer.topology, layer.storage) for layer in plan}
    cache: dict[Any, Any] = {}
    order = []
    for block, layers in compress_blocks(model, plan, batches):
        order.append(block)
        cache |= {schemes[x]: new for x, new in layers.items()}
    assert order == CASES[name][2]
    assert cache.keys() == set(schemes.values())
    assert sum(map(len, used)) > 1
    before: set[str] = set()
    for moments, names in zip(used, rounded, strict=True):
        replaced = copy.deepcopy(surveyed(name)[0])
        if done := tuple(x for x in plan if x.name in before):
            tn.apply_plan(replaced, replace(plan, layers=done), cache=copy.deepcopy(cache))
        for reader, moment in true_moments(replaced, set(moments), batches).items():
            if ".experts." in reader:
                continue  # the moments of experts are blended with those of their mixture
            scale = float(moment.abs().max())
            torch.testing.assert_close(moments[reader], moment, rtol=1e-3, atol=1e-4 * scale, msg=reader)
        before |= names
    assert_untouched(model, weights(surveyed(name)[0]))


def test_the_inputs_are_not_those_of_the_dense_model() -> None:
    """Otherwise the test above would show nothing."""
    model, batches, plan = case("llama")
    small = copy.deepcopy(model)
    tn.compress(small, plan, calibration=batches, progress=False)
    name = {"model.layers.1.mlp.down_proj"}
    before = true_moments(model, name, batches)
    after = true_moments(small, name, batches)
    gap = next(iter(after.values())) - next(iter(before.values()))
    assert gap.norm() > 0.05 * next(iter(before.values())).norm()


def test_embeddings_come_first_and_the_head_comes_last() -> None:
    model, batches, plan = case("llama")
    found = [(block, set(layers)) for block, layers in compress_blocks(model, plan, batches)]
    assert found[0] == ("", {"model.embed_tokens"})
    assert found[-1] == ("", {"lm_head"})
    for block, layers in found[1:-1]:
        assert len(layers) == 7
        assert all(name.startswith(f"{block}.") for name in layers)
    model, batches, plan = case("tied embedding")
    found = [(block, set(layers)) for block, layers in compress_blocks(model, plan, batches)]
    assert found[0] == ("", {"model.embed_tokens"})  # with its head: all hidden states begin with it
    assert found[-1] == ("", set())


def test_a_weight_of_two_layers_gets_two_modules_with_the_same_cores() -> None:
    for name, layer in (("two readers", "blocks.1.0"), ("tied embedding", "model.embed_tokens")):
        model, batches, plan = case(name)
        found = {x: new for _, layers in compress_blocks(model, plan, batches) for x, new in layers.items()}
        (first, second), error = found[layer]
        assert first is not second
        assert 0 < error < 1
        assert torch.equal(first.to_matrix(), second.to_matrix())
        tn.compress(model, plan, calibration=batches, progress=False)
        parts = {id(x) for x in model.parameters()}
        assert len(parts) == len(list(model.parameters()))


def test_nothing_but_what_is_planned_is_rounded() -> None:
    model, batches, plan = case("llama")
    part = replace(plan, layers=tuple(x for x in plan if "mlp" in x.name))
    found = [(block, set(layers)) for block, layers in compress_blocks(model, part, batches)]
    assert [block for block, _ in found] == ["model.layers.0", "model.layers.1", ""]
    assert set().union(*(layers for _, layers in found)) == {x.name for x in part}
    dense = tn.survey(model, batches, replace(CONFIG, formats=("float", *FORMATS))).plan(bits_per_weight=32)
    assert [x for _, layers in compress_blocks(model, dense, batches) for x in layers] == []
    report = tn.compress(model, dense, calibration=batches, progress=False)
    assert report.byte_ratio == 1


@pytest.mark.parametrize("items", range(5))
def test_the_weights_are_their_own_again_when_the_generator_is_closed(items: int) -> None:
    model, batches, plan = case("llama")
    before = weights(model)
    blocks = compress_blocks(model, plan, batches)
    for _ in range(items):
        next(blocks, None)
    blocks.close()  # type: ignore[attr-defined]
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied embedding", "mixture", "readers of two blocks"])
def test_the_weights_are_their_own_again_at_the_end(name: str) -> None:
    model, batches, plan = case(name)
    before = weights(model)
    list(compress_blocks(model, plan, batches))
    assert_untouched(model, before)


@pytest.mark.parametrize("items", [1, 2, 3])
def test_the_weights_are_their_own_again_after_an_error(items: int) -> None:
    model, batches, plan = case("gpt2")
    before = weights(model)
    blocks = compress_blocks(model, plan, batches)
    for _ in range(items):
        next(blocks)
    with pytest.raises(KeyError, match="theirs"), closing(blocks):  # type: ignore[type-var]
        raise KeyError("theirs")
    assert_untouched(model, before)
    count = 0

    def fails(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3 * items:
            raise MemoryError("ours")
        return kept(*args)

    kept = write.compress_layer
    with pytest.raises(MemoryError, match="ours"):
        list(compress_blocks(model, plan, batches, compress=fails))
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1])
def test_outputs_that_are_not_finite_are_one_clear_error(place: int, value: float) -> None:
    model, batches, plan = case("llama")
    with torch.no_grad():
        model.model.layers[place].post_attention_layernorm.weight.fill_(value)
    before = weights(model)
    with pytest.raises(NonFiniteError, match=rf"model\.layers\.{place}\.mlp\.(gate|up)_proj"):
        list(compress_blocks(model, plan, batches))
    after = model.state_dict()
    assert all(torch.equal(x, before[name]) or bool(x.isnan().all()) for name, x in after.items())


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf")


def test_a_block_that_overflows_names_the_first_layer_behind_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Overflow(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    sound = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    sound.load_state_dict(model.state_dict())
    plan = tn.survey(sound, [numbers(0)], CONFIG).plan()
    with pytest.raises(NonFiniteError, match="'2'"):
        list(compress_blocks(model, plan, [numbers(0)]))


def test_what_cannot_be_written() -> None:
    model, batches, plan = case("llama")
    with pytest.raises(TargetError, match="No batches"):
        list(compress_blocks(model, plan, []))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1)
    with pytest.raises(TargetError, match=r"another model.*layers\.1\.mlp\.up_proj"):
        list(compress_blocks(other, plan, batches))
    idle = copy.deepcopy(model)
    idle.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.gate_proj.*never ran"):
        list(compress_blocks(idle, plan, batches))


def test_only_so_many_tokens_are_read() -> None:
    def given() -> Iterator[Any]:
        yield batches[0]
        raise AssertionError("enough")

    model, batches, plan = case("llama")
    found, expected = (
        {x: new for _, layers in compress_blocks(model, plan, data, tokens=24) for x, new in layers.items()}
        for data in (given(), batches[:1])
    )
    for name, ((module,), error) in expected.items():
        assert found[name][1] == error
        assert torch.equal(found[name][0][0].to_matrix(), module.to_matrix())


def test_an_executor_rounds_the_same_layers() -> None:
    model, batches, plan = case("llama")
    with ThreadPoolExecutor(2) as executor:
        several = [
            (block, layers) for block, layers in compress_blocks(model, plan, batches, executor=executor)
        ]
    alone = list(compress_blocks(model, plan, batches))
    assert [(block, list(layers)) for block, layers in several] == [
        (block, list(layers)) for block, layers in alone
    ]
    for (_, some), (_, others) in zip(several, alone, strict=True):
        for name, (modules, error) in some.items():
            assert error == pytest.approx(others[name][1])
            torch.testing.assert_close(modules[0].to_matrix(), others[name][0][0].to_matrix())


def test_written_layers_of_a_plan_without_data_are_not_compressed_again() -> None:
    model, _, _ = case("llama")
    plan = tn.plan(model, tn.CompressionConfig(formats=("int4",), bits_per_weight=5, method="nearest"))
    names = [layer.name for layer in plan if layer.topology is not None]
    known = names[::2]
    blocks = compress_blocks(model, plan, [], written=lambda name: name in known)
    assert [name for _, layers in blocks for name in layers] == names[1::2]


class OnDisk(dict[tuple[int, int], torch.Tensor]):
    """Hidden states of an interrupted run."""

    def complete(self, batches: int) -> int:
        found = [block for block, _ in self]
        return max((x for x in found if found.count(x) == batches), default=0)


@pytest.mark.parametrize("lost", [None, "model.embed_tokens", "model.layers.0.mlp.up_proj"])
def test_a_run_goes_on_at_the_first_block_that_was_not_written(lost: str | None) -> None:
    model, batches, plan = case("llama")
    states, whole = OnDisk(), {}
    for block, layers in compress_blocks(model, plan, batches, states=states):
        whole |= layers
        if block.endswith("1"):
            kept = OnDisk({key: x.clone() for key, x in states.items()})
    before = [x for x in whole if "layers.0" in x or "embed" in x]
    written = [x for x in before if x != lost]
    found = {}
    for _, layers in compress_blocks(model, plan, batches, states=kept, written=lambda name: name in written):
        found |= layers
    expected = list(whole) if lost else [x for x in whole if x not in before]
    assert list(found) == expected
    for name, ((module,), _) in found.items():
        assert torch.equal(module.to_matrix(), whole[name][0][0].to_matrix())


def test_compress_puts_these_layers_into_the_model() -> None:
    model, batches, plan = case("llama")
    factors = surveyed("llama")[2].factors
    blocks = compress_blocks(model, plan, batches, factors=factors)
    found = {x: new for _, layers in blocks for x, new in layers.items()}
    report = tn.compress(model, CONFIG, calibration=batches, progress=False)
    assert [(x.name, x.scheme) for x in report.plan] == [(x.name, x.scheme) for x in plan]
    assert report.plan.rounding == "two_sided"
    assert {x.name for x in list_weights(model)}.isdisjoint(found)
    for name, ((module,), _) in found.items():
        assert torch.equal(model.get_submodule(name).to_matrix(), module.to_matrix())
    assert report.measured is not None


def test_networks_are_fitted_to_the_gradients_too() -> None:
    model, batches, plan = case("llama")
    name = "model.layers.0.mlp.up_proj"
    out, size = plan[name].shape
    plan = plan.replace_layer(name, low_rank(out_features=out, in_features=size, rank=3))
    stats = tn.calibrate(model, batches, config=CONFIG)
    dense = model.get_submodule(name).weight.detach().clone()
    losses = []
    for effort in (None, "thorough"):
        survey = effort and tn.survey(model, batches, replace(CONFIG, target_modules=name, effort=effort))
        blocks = compress_blocks(model, plan, batches, factors=survey and survey.factors)
        made = {x: new for _, layers in blocks for x, new in layers.items()}
        error = dense - made[name][0][0].to_matrix()
        losses.append(float(torch.trace(stats.rows[name] @ error @ stats.columns[name] @ error.T)))
    assert losses[1] < 0.95 * losses[0]


def test_a_thorough_plan_with_networks_goes_block_by_block() -> None:
    model, batches, _ = case("llama")
    config = replace(CONFIG, formats=("int4:g16:float16", "int2:g16:float16"), effort="thorough")
    config = replace(config, bits_per_weight=4)
    report = tn.compress(model, config, calibration=batches, progress=False)
    assert any(x.topology is not None and x.topology.family != "dense" for x in report.plan)
    assert report.plan.bits_per_weight <= 4
    assert all(x.baseline_error is not None for x in report.plan)
    assert bool(torch.isfinite(model(**batches[0]).loss))


def test_a_finished_plan_without_its_survey_gets_the_same_layers() -> None:
    model, batches, plan = case("llama")
    found = []
    for given in (None, surveyed("llama")[2]):
        copied = copy.deepcopy(model)
        tn.compress(copied, plan, calibration=batches, survey=given, progress=False)
        found.append(copied)
    for layer in plan:
        first, second = (x.get_submodule(layer.name).to_matrix() for x in found)
        assert (first - second).norm() < 1e-3 * first.norm()


def test_the_error_of_the_weights_needs_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("tensornet.compression.road.survey_or_load", refused)
    monkeypatch.setattr("tensornet.compression.write.inputs_on_arrival", refused)
    options: Any = {"formats": ("int8",), "bits_per_weight": None, "method": "nearest"}
    config = replace(CONFIG, target_modules="*mlp.up_proj", **options)
    torch.manual_seed(0)
    tn.compress(llama().eval(), config, calibration=[text(0)], progress=False)


def test_a_network_of_an_embedding_is_fitted_to_the_rows_that_are_looked_up() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    ids = torch.randint(3, 8, (8, 20))
    batches = [{"input_ids": ids, "labels": ids}]
    name = "model.embed_tokens"
    config = tn.CompressionConfig(param_ratio=0.5, target_modules=[name])
    survey = tn.survey(model, batches, config)
    (_, layers), *_ = compress_blocks(model, survey.plan(), batches, factors=survey.factors)
    table = model.get_submodule(name).weight.detach()
    gap = (layers[name][0][0].to_matrix().detach() - table).norm(dim=1) / table.norm(dim=1)
    assert float(gap[3:8].mean()) < 0.5 * float(gap[8:].mean())


def test_moments_of_gradients_have_their_exact_diagonal() -> None:
    """A survey keeps a factor of low rank, and what it lacks on the diagonal."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(30, 40)), (torch.randn(200, 30), torch.randn(200, 40))
    config = tn.CompressionConfig(bits_per_weight=4, formats=("int4:g16",))
    loss_fn = lambda net, given: (net(given["input"]) - given["labels"]).square().sum(1)  # noqa: E731
    factor = tn.survey(model, [batch], config, loss_fn=loss_fn).factors["0"]
    exact = tn.calibrate(model, [batch], loss_fn=loss_fn).rows["0"]
    found = write.moment_of(factor, torch.device("cpu"))
    assert factor.shape == (40, 17)
    torch.testing.assert_close(found.diagonal(), exact.diagonal(), rtol=0.02, atol=0)
    assert float((found - exact).norm()) < float((exact.diagonal().diag() - exact).norm())
    torch.testing.assert_close(write.moment_of(factor[:, -1:], torch.device("cpu")), factor[:, -1].float())


class TwoOfThree(nn.Module):
    """A mixture of three experts, of which the last one gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, found = x[:, 0] > 0, torch.zeros_like(x)
        found[first], found[~first] = self.experts[0](x[first]), self.experts[1](x[~first])
        return x + found


def test_an_expert_without_tokens_may_be_the_only_one_to_compress() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TwoOfThree(), TwoOfThree(), nn.Linear(16, 4))
    batches = [(torch.randn(200, 16), torch.randint(4, (200,)))]
    config = tn.CompressionConfig(param_ratio=0.5, target_modules="*.experts.*")
    survey = tn.survey(model, batches, config)
    assert set(survey.template.unrouted) == {"0.experts.2", "1.experts.2"}
    plan = survey.plan()
    for name in ("0.experts.0", "0.experts.1", "1.experts.0", "1.experts.1"):
        plan = plan.replace_layer(name, None)
    made = {}
    for _, layers in compress_blocks(model, plan, batches, factors=survey.factors):
        made |= layers
    assert made.keys() == {"0.experts.2", "1.experts.2"}
    for name, ((new,), _) in made.items():
        weight = model.get_submodule(name).weight.detach()
        assert float((new.to_matrix() - weight).norm()) < 0.99 * float(weight.norm())
