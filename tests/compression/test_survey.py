"""A survey block by block equals one from statistics of the whole model, also after it was saved."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from block_models import TwoReaders, numbers, perceptron, text
from hf_models import bert, gpt2, llama, qwen2, t5_relu
from mixture_models import mixture
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration import sampled_losses
from tensornet.calibration.batches import as_batch
from tensornet.calibration.calibrate import MomentRecorder, observed
from tensornet.calibration.losses import default_losses
from tensornet.compression import Survey, survey_from_stats
from tensornet.compression.candidates import find_candidates
from tensornet.compression.survey import content_digest, untargeted_sizes
from tensornet.compression.write import moment_of
from tensornet.errors import BudgetError, FormatError, NonFiniteError, TargetError, WorkerError
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import unfused

FORMATS = ("float", "int8:g16:float16", "int4:g16:float16", "int3:g16:float16", "int2:g16:float16")
CONFIG = tn.CompressionConfig(bits_per_weight=9, formats=FORMATS, target_modules="all")


def window(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 101, (1, 20), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


MODELS: dict[Callable[[], nn.Module], Callable[[int], Any]] = {
    llama: text,
    gpt2: text,
    qwen2: text,
    bert: text,
    t5_relu: text,
    perceptron: numbers,
    TwoReaders: numbers,
}


@cache
def surveyed() -> tuple[nn.Module, Survey]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llama().eval()
    return model, tn.survey(model, [text(1), text(2)], CONFIG)


def statistics(model: nn.Module, batches: list[Any], *, diagonal: bool = True) -> tn.CalibrationStats:
    """Run the whole model at once, with the moments that a survey collects."""
    recorder, total, scored = MomentRecorder(diagonal_gradients=diagonal), 0.0, 0
    with observed(model, recorder, CONFIG):
        given = [as_batch(x, model, torch.device("cpu")) for x in batches]
        with recorder.paused():
            loss_fn, _ = default_losses(model, given[0])
        for batch in given:
            recorder.expect(batch)
            losses = loss_fn(model, batch)
            with recorder.differentiating():
                losses.sum().backward()
            total, scored = total + float(losses.detach().sum()), scored + losses.numel()
    return recorder.finish(scored, total / scored, "calibration data")


@pytest.mark.parametrize(
    ("make", "effort"),
    [
        *((x, "fast") for x in MODELS if x not in (t5_relu, bert)),
        ("mixtral", "fast"),
        (llama, "thorough"),
        (TwoReaders, "thorough"),
        *(pytest.param(x, "fast", marks=pytest.mark.slow) for x in (t5_relu, bert)),
        pytest.param(bert, "thorough", marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_survey_equals_that_from_statistics_of_the_whole_model(make: Any, effort: Any) -> None:
    torch.manual_seed(0)
    model = mixture(make) if isinstance(make, str) else make().eval()
    batches = [MODELS.get(make, text)(seed) for seed in range(3)]
    survey = tn.survey(model, batches, replace(CONFIG, effort=effort))
    stats = statistics(model, batches, diagonal=effort == "fast")
    with unfused(model):
        targets = {x.name: x for x in list_weights(model)}
        chosen = [targets[layer.name] for layer in survey.layers]
        families = () if effort == "fast" else None
        expected = list(find_candidates(chosen, CONFIG, "curvature", stats, families))
    assert {x.name for x in chosen} == {x.name for x in targets.values() if x.kinds}
    assert survey.template.dense_loss == pytest.approx(stats.loss, rel=1e-5)
    for layer, candidates in zip(survey.layers, expected, strict=True):
        assert [(x.topology, x.storage) for x in layer.candidates] == [
            (x.topology, x.storage) for x in candidates
        ]
        for mine, theirs in zip(layer.candidates, candidates, strict=True):
            assert (mine.num_bytes, mine.params, mine.tensors) == (
                theirs.num_bytes,
                theirs.params,
                theirs.tensors,
            )
            assert mine.predicted_loss == pytest.approx(theirs.predicted_loss, rel=2e-2, abs=1e-9)
            assert mine.cost == pytest.approx(theirs.cost, rel=2e-2, abs=1e-9)
            assert mine.error == pytest.approx(theirs.error, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "effort", "workers"), [(llama, "fast", 1), (llama, "fast", 3), (perceptron, "thorough", 3)]
)
def test_prices_do_not_depend_on_workers(make: Any, effort: Any, workers: int) -> None:
    torch.manual_seed(0)
    model, batches = make().eval(), [MODELS[make](seed) for seed in range(2)]
    config = replace(CONFIG, effort=effort)
    with ThreadPoolExecutor(workers) as executor:
        found = tn.survey(model, batches, config, executor=executor)
    expected = tn.survey(model, batches, config)
    assert found.layers == expected.layers
    assert found.plan() == expected.plan()


class Later(Executor):
    """Executor that calls a function when its result is asked for, and counts the calls that wait."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.waiting, self.most = fault, 0, 0
        self.futures: list[Future[Any]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        executor = self

        class Asked(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                executor.waiting -= 1
                if executor.fault is not None:
                    raise executor.fault
                return function(*args, **kwargs)

        self.waiting += 1
        self.most = max(self.most, self.waiting)
        self.futures.append(Asked())
        return self.futures[-1]


def test_candidates_of_at_most_two_blocks_wait() -> None:
    """Each of the three blocks has four groups of layers with the same inputs."""
    torch.manual_seed(0)
    executor, model = Later(), llama().eval()
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers = 3
    survey = tn.survey(model, [text(1)], CONFIG, executor=executor)
    assert len(executor.futures) == 3 * 4 + 2  # and the embedding, and the head
    assert executor.most == 2 * 4
    assert survey.layers == tn.survey(model, [text(1)], CONFIG).layers


def test_a_survey_whose_worker_dies_says_so() -> None:
    executor = Later(BrokenExecutor("it was killed"))
    with pytest.raises(WorkerError, match=r"A worker died .*it was killed.*Use fewer workers"):
        tn.survey(llama().eval(), [text(1)], CONFIG, executor=executor)
    assert all(future.cancelled() for future in executor.futures)


class Interrupted(dict[tuple[int, int], Tensor]):
    """Hidden states of a survey that is interrupted when the last of two blocks has been visited."""

    def __delitem__(self, key: tuple[int, int]) -> None:
        if key[0] == 1:
            raise KeyboardInterrupt
        super().__delitem__(key)


def test_a_survey_that_is_interrupted_cancels_what_waits() -> None:
    executor = Later()
    with pytest.raises(KeyboardInterrupt):
        tn.survey(llama().eval(), [text(1)], CONFIG, executor=executor, states=Interrupted())
    assert len(executor.futures) == 4
    assert all(future.cancelled() for future in executor.futures)


def test_plan_equals_that_from_statistics() -> None:
    """A menu has no networks, so that `survey_from_stats` finds the same candidates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    batches = [(torch.randn(40, 64), torch.randint(8, (40,))) for _ in range(3)]
    config = tn.CompressionConfig(bits_per_weight=5, formats="compressed-tensors", method="gptq")
    mine = tn.survey(model, batches, config)
    theirs = survey_from_stats(model, config, statistics(model, batches))
    for bits in (4.6, 5.0, 7.0, 9.0):
        plans = [x.plan(bits_per_weight=bits) for x in (mine, theirs)]
        schemes = [[layer.scheme for layer in plan] for plan in plans]
        assert schemes[0] == schemes[1]
        assert plans[0].predicted_loss_increase == pytest.approx(plans[1].predicted_loss_increase, rel=1e-2)


def test_weights_of_two_blocks_are_surveyed() -> None:
    torch.manual_seed(0)
    survey = tn.survey(TwoReaders(), [numbers(0)], CONFIG)
    assert [layer.names for layer in survey.layers] == [
        ("blocks.0.0", "blocks.2.0"),
        ("blocks.0.2",),
        ("blocks.1.0", "blocks.1.2"),
        ("blocks.2.2",),
        ("head",),
    ]
    assert survey.template.unseen == ()
    assert all(x.predicted_loss > 0 for layer in survey.layers for x in layer.candidates if x.topology)


def test_a_survey_changes_nothing() -> None:
    torch.manual_seed(0)
    model = llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    generator = torch.get_rng_state()
    config = replace(CONFIG, formats=("int8:g16:float16",))
    first = tn.survey(model, [text(0)], config)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    with torch.inference_mode():
        assert tn.survey(model, [text(0)], config).layers == first.layers


def test_it_reads_its_tokens_only_once_and_no_more() -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(2):
            yield window(seed)
        raise AssertionError("enough")

    model, _ = surveyed()
    config = replace(CONFIG, target_modules="lm_head")
    survey = tn.survey(model, batches(), config, tokens=32)
    assert survey.key["tokens"] == "32"
    assert tn.survey(model, [window(0), window(1)], config, tokens=32) == survey
    assert tn.survey(model, [window(0), window(2)], config, tokens=32).key["text"] != survey.key["text"]


def test_another_loss_gives_another_survey() -> None:
    model, survey = surveyed()
    other = tn.survey(model, [text(1), text(2)], CONFIG, loss_fn=sampled_losses, source="the manual")
    assert other.layers != survey.layers
    assert other.plan().calibration == "the manual"


def test_what_cannot_be_surveyed() -> None:
    model, _ = surveyed()
    with pytest.raises(TargetError, match="no batches"):
        tn.survey(model, [], CONFIG)
    with pytest.raises(TargetError, match="nothing_like_it"):
        tn.survey(model, [text(0)], replace(CONFIG, target_modules="nothing_like_it"))
    with pytest.raises(FormatError, match="multiple"):
        tn.survey(model, [text(0)], replace(CONFIG, formats=("int6:g16:s8",)))
    with pytest.raises(TypeError):
        tn.survey(model, [text(0)], {"bits_per_weight": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.mlp.down_proj", "lm_head"])
def test_weights_that_are_not_finite_name_a_layer(name: str) -> None:
    """Also where no token looks at them: row 0 of the table is never used."""
    model = copy.deepcopy(surveyed()[0])
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=rf"{name}|lm_head|layers\.[01]"):
        tn.survey(model, [text(0)], CONFIG)


class Unused(nn.Module):
    """A layer that never runs, inside of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Part() for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, input: Tensor) -> Tensor:
        for block in self.blocks:
            input = block(input)
        return self.head(input)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


def test_layers_that_never_run_stay_dense_with_a_warning() -> None:
    with pytest.warns(tn.errors.CalibrationWarning, match=r"blocks\.0\.idle"):
        survey = tn.survey(Unused(), [numbers(0)], CONFIG)
    assert survey.template.unseen == ("blocks.0.idle", "blocks.1.idle")
    assert [x.name for x in survey.layers] == ["blocks.0.used", "blocks.1.used", "head"]


# --- plans and files ------------------------------------------------------------------------------


def test_more_bits_never_cost_more() -> None:
    _, survey = surveyed()
    plans = [survey.plan(bits_per_weight=bits) for bits in (5, 8, 10, 20, 32)]
    losses = [plan.predicted_loss_increase for plan in plans]
    assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]
    assert losses[-1] == 0
    for bits, plan in zip((5, 8, 10, 20, 32), plans, strict=True):
        assert plan.bits_per_weight <= bits


def test_saved_survey_gives_the_same_plans(tmp_path: Path) -> None:
    model, survey = surveyed()
    for k, given in enumerate((survey, survey_of_networks())):
        given.save(tmp_path / f"{k}.safetensors")
        loaded = Survey.load(tmp_path / f"{k}.safetensors")
        assert loaded == given
        assert loaded.factors.keys() == given.factors.keys()
        assert all(torch.equal(x, given.factors[name]) for name, x in loaded.factors.items())
    loaded = Survey.load(tmp_path / "0.safetensors")
    assert (tmp_path / "0.safetensors").stat().st_size < 200_000
    budgets = ({"bits_per_weight": 6}, {"max_bytes": 30_000}, {"loss_increase": 0.01}, {"max_bytes": 20_000})
    for budget in (*budgets, {}):
        assert loaded.plan(**budget) == survey.plan(**budget)
    loaded.check_model(model)


def test_damaged_survey_is_refused(tmp_path: Path) -> None:
    _, survey = surveyed()
    path = tmp_path / "survey.safetensors"
    survey.save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes(100))  # as a crash of the file system leaves it
    with pytest.raises(FormatError, match="checksum"):
        Survey.load(path)
    wide = replace(survey, layers=(replace(survey.layers[0], shape=(10**30, 1)), *survey.layers[1:]))
    wide.save(path)
    with pytest.raises(FormatError, match="two sizes"):
        Survey.load(path)


@cache
def survey_of_networks() -> Survey:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = perceptron()
    batches = [numbers(seed) for seed in range(3)]
    return survey_from_stats(model, tn.CompressionConfig(param_ratio=0.5), tn.calibrate(model, batches))


def test_a_file_replaces_another_as_a_whole(tmp_path: Path) -> None:
    _, survey = surveyed()
    file = tmp_path / "survey.safetensors"
    file.write_text("before")
    survey.save(file)
    assert Survey.load(file) == survey
    assert [x.name for x in tmp_path.iterdir()] == ["survey.safetensors"]
    with pytest.raises(tn.errors.DestinationError):
        survey.save(tmp_path / "nowhere" / "survey.safetensors")


def damaged() -> Iterator[tuple[str, str]]:
    """Texts in a file of a survey with one fault each."""
    data = as_data()
    whole = json.dumps(data)
    yield from ((f"cut at {k}", whole[:k]) for k in (0, 1, len(whole) // 3, len(whole) - 1))
    yield from ((repr(x), json.dumps(x)) for x in (None, 3, "text", [], {}, [1, 2]))
    yield "a bomb", "[" * 100_000
    for key in data:
        for bad in (MISSING, None, -1, "x", [3], {"x": 1}):
            yield f"{key}={bad!r}", changed(data, [key], bad)
    for key in data["layers"][0]:
        for bad in (MISSING, None, -1, "x", [], {"x": 1}):
            if key in ("sample", "spectrum") and bad == []:
                continue  # unknown
            if key == "stack" and bad == "x":
                continue  # any name
            yield f"layers.0.{key}={bad!r}", changed(data, ["layers", 0, key], bad)
    row = data["layers"][0]["candidates"][1]
    for place in range(len(row)):
        for bad in (None, [], {}, 10_000 if place == 0 else 7 if isinstance(row[place], str) else "x"):
            yield f"candidate[{place}]={bad!r}", changed(data, ["layers", 0, "candidates", 1, place], bad)
    yield "negative scheme", changed(data, ["layers", 0, "candidates", 1, 0], -1)
    for bad in (row[:-1], [*row, 1], "row", 7):
        yield f"candidate={bad!r}", changed(data, ["layers", 0, "candidates", 1], bad)
    for bad in ([1], "x", None, [{"family": "braid"}, {}]):
        yield f"scheme={bad!r}", changed(data, ["schemes", 1], bad)
    for bad in ("nn", "float33", "Tensor"):
        yield f"dtype={bad}", changed(data, ["layers", 0, "dtype"], bad)
    for bad in ([24], [24, 24, 24], ["a", "b"], [0, 24]):
        yield f"shape={bad}", changed(data, ["layers", 0, "shape"], bad)
    for bad in ([1, 2], [1, 2, "x"], [1, 2, 3, 4]):
        yield f"untargeted={bad}", changed(data, ["untargeted"], bad)
    yield "two layers of one name", changed(data, ["layers", 1], data["layers"][0])


def test_inputs_are_mean_squares_and_may_be_given() -> None:
    model, survey = surveyed()
    name, seen = "model.layers.1.mlp.down_proj", []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for seed in (1, 2):
        batch = text(seed)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        seen[-1] = seen[-1][batch["attention_mask"] == 1]
    handle.remove()
    vectors = torch.cat(seen).detach()
    squares, count = survey.inputs[name]
    assert count == len(vectors)
    assert torch.allclose(squares, vectors.square().mean(0), rtol=1e-4, atol=1e-6)
    assert "model.embed_tokens" not in survey.inputs
    config = replace(CONFIG, formats=("int4:g16:float16",))
    once, twice = (
        tn.survey(model, [text(1), text(2)], config, inputs={name: factor * squares}) for factor in (1, 2)
    )
    for a, b in zip(once.layers, twice.layers, strict=True):
        factor = 2 if a.name == name else 1
        for x, y in zip(a.candidates, b.candidates, strict=True):
            assert y.cost == pytest.approx(factor * x.cost, rel=1e-4)
    assert torch.equal(twice.inputs[name][0], 2 * squares)


MISSING = object()


@cache
def saved() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        surveyed()[1].save(Path(folder) / "survey.safetensors")
        return (Path(folder) / "survey.safetensors").read_bytes()


def as_data() -> Any:
    header = saved()[8 : 8 + int.from_bytes(saved()[:8], "little")]
    return json.loads(json.loads(header)["__metadata__"]["survey"])


def with_text(text: str, factors: dict[str, Tensor] | None = None) -> bytes:
    tensors = factors or load_bytes(saved())
    return safetensors.torch.save(tensors, {"survey": text, "sha256": content_digest(text, tensors)})


def changed(data: Any, path: list[Any], value: Any) -> str:
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(data)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file, accepted = tmp_path / "survey.safetensors", []
    contents = [(fault, with_text(text)) for fault, text in damaged()]
    contents += [(f"cut at {k}", saved()[:k]) for k in (0, 7, 100, len(saved()) // 2, len(saved()) - 1)]
    contents += [
        ("plain", b"{}"),
        ("no text", safetensors.torch.save({"factor.lm_head": torch.ones(101, 2)})),
    ]
    whole = json.dumps(as_data())
    for factor in (torch.ones(3, 2), torch.ones(101), torch.full((101, 2), float("nan"))):
        contents.append((f"factor {factor.shape}", with_text(whole, {"factor.lm_head": factor})))
    size = surveyed()[1].inputs["lm_head"][0].shape[0]
    for inputs in (torch.ones(size + 1), torch.ones(size, 1), torch.full((size,), float("nan"))):
        contents.append((f"inputs {inputs.shape}", with_text(whole, {"inputs.lm_head": inputs})))
    for name in ("factor.lm_foot", "inputs.lm_foot", "lm_head"):
        contents.append((name, with_text(whole, {name: torch.ones(101, 2)})))
    file.write_bytes(with_text(whole, {"factor.lm_head": torch.ones(101, 2)}))
    Survey.load(file)
    for fault, content in contents:
        file.write_bytes(content)
        try:
            Survey.load(file)
        except FormatError as error:
            assert str(file) in str(error)  # noqa: PT017
        else:
            accepted.append(fault)
    assert accepted == []
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path, tmp_path / "missing"):
        with pytest.raises(FormatError, match=r"survey.*Survey\.save"):
            Survey.load(path)


def test_survey_of_another_model_is_refused() -> None:
    model, survey = surveyed()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1.0)
    fewer = copy.deepcopy(model)
    fewer.model.layers[1].mlp = nn.Identity()
    wider = copy.deepcopy(model)
    wider.lm_head = nn.Linear(24, 7)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.model.embed_tokens.weight.mul_(1.3)  # not surveyed
    resized = copy.deepcopy(model)
    resized.model.embed_tokens = nn.Embedding(200, 24)
    with torch.no_grad():
        resized.model.embed_tokens.weight[torch.arange(97)] = model.model.embed_tokens.weight[:97]
    half = copy.deepcopy(model).bfloat16()
    names = {"differs": other, "mlp": fewer, "lm_head": wider, "embed_tokens": scaled}
    names |= {"": resized, "bytes": half}
    survey.check_model(model)
    survey.check_model(copy.deepcopy(model))
    for named, changed_model in names.items():
        with pytest.raises(TargetError, match=rf"another model.*{named}"):
            survey.check_model(changed_model)


def test_only_budgets_can_be_changed_later() -> None:
    _, survey = surveyed()
    with pytest.raises(BudgetError, match="got max_bond"):
        survey.plan(max_bond=3)
    with pytest.raises(BudgetError, match="smallest"):
        survey.plan(bits_per_weight=1)


def test_compress_takes_a_loaded_survey(tmp_path: Path) -> None:
    model, survey = surveyed()
    survey.save(tmp_path / "survey.safetensors")
    loaded = Survey.load(tmp_path / "survey.safetensors")
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    batches = [text(1), text(2)]
    config = replace(CONFIG, bits_per_weight=8)
    report = tn.compress(
        first, config, calibration=batches, survey=loaded.with_config(config), progress=False
    )
    direct = tn.compress(second, config, calibration=batches, progress=False)
    assert [layer.scheme for layer in report.plan] == [layer.scheme for layer in direct.plan]
    found, expected = first.state_dict(), second.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_saved_survey_knows_the_layers_that_were_left_out(tmp_path: Path) -> None:
    """A file has lists where the configuration had tuples; both mean the same layers."""
    model, _ = surveyed()
    config = replace(CONFIG, exclude_modules=("lm_head", "*.q_proj"))
    tn.survey(model, [text(1)], config).save(tmp_path / "survey.safetensors")
    loaded = Survey.load(tmp_path / "survey.safetensors")
    for names in (("lm_head", "*.q_proj"), ["lm_head", "*.q_proj"]):
        again = replace(config, bits_per_weight=8, exclude_modules=names)
        assert loaded.with_config(again).plan().bits_per_weight <= 8
    with pytest.raises(BudgetError, match="exclude_modules"):
        loaded.with_config(replace(config, exclude_modules=("lm_head",)))


def test_survey_only_serves_plans_that_use_it() -> None:
    model, survey = surveyed()
    config = replace(CONFIG, formats=None, bits_per_weight=None, param_ratio=0.5)
    with pytest.raises(BudgetError, match="made with formats"):
        tn.compress(model, config, calibration=[text(1)], survey=survey)
    with pytest.raises(TargetError, match="needs calibration"):
        tn.compress(model, replace(config, method="svd"), calibration=[text(1)], survey=survey)
    with pytest.raises(BudgetError, match="effort='fast', not 'thorough'"):
        survey.with_config(replace(CONFIG, effort="thorough"))


@pytest.mark.parametrize("effort", ["fast", "thorough"])
def test_a_factor_and_a_diagonal_make_up_the_moment(effort: Any) -> None:
    """The layers have fewer outputs than the rank, so nothing is lost."""
    torch.manual_seed(0)
    model, batches = perceptron(), [numbers(seed) for seed in range(3)]
    survey = tn.survey(model, batches, replace(CONFIG, effort=effort))
    stats = statistics(model, batches, diagonal=False)
    assert survey.factors.keys() == stats.rows.keys()
    for name, factor in survey.factors.items():
        moment = stats.rows[name]
        found = moment_of(factor, moment.device)
        torch.testing.assert_close(found, moment, rtol=0.05, atol=0.05 * float(moment.diagonal().mean()))


def test_the_budget_is_that_of_the_configuration() -> None:
    """A survey has a budget of its own, which must not win."""
    model, survey = surveyed()
    config = replace(CONFIG, bits_per_weight=7)
    report = tn.compress(copy.deepcopy(model), config, calibration=[text(1)], survey=survey)
    expected = survey.with_config(config).plan()
    assert [x.storage for x in report.plan.layers] == [x.storage for x in expected.layers]
    assert report.plan.bytes_after < survey.plan().bytes_after


def test_an_embedding_may_be_the_first_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50))
    ids = torch.randint(50, (4, 20))
    loss_fn = lambda net, batch: nn.functional.cross_entropy(  # noqa: E731
        net(batch["input"]).flatten(0, 1), ids.flatten(), reduction="none"
    )
    survey = tn.survey(model, [ids], CONFIG, loss_fn=loss_fn)
    assert [x.name for x in survey.layers] == ["0", "1", "2"]
    assert all(min(x.predicted_loss for x in layer.candidates) >= 0 for layer in survey.layers)


def test_what_is_not_targeted_is_at_least_the_rest_of_the_file() -> None:
    """Budgets of the whole model count buffers and the header, too."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(1000))
    with unfused(model):
        targets = [x for x in list_weights(model) if x.name == "0"]
    params, parameter_bytes, others = untargeted_sizes(model, targets)
    file = len(safetensors.torch.save(model.state_dict()))
    assert (params, parameter_bytes) == (8 + 2 * 1000, 4 * (8 + 2 * 1000))
    assert file - 4 * 64 <= parameter_bytes + others <= file + 1000
