"""The benchmark of training from scratch runs, resumes to the step, and refuses another configuration."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tensornet_hf

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(tensornet_hf.__file__).parent / "data" / "heldout.txt"


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return load_benchmark("moe_from_scratch")


@pytest.fixture
def tasks(bench: ModuleType) -> Any:
    """The module of texts and models that the script has loaded."""
    return importlib.import_module("scratch_tasks")


@pytest.fixture
def corpus(bench: ModuleType) -> Any:
    return bench.corpus_of(TEXT.read_text(encoding="utf-8"), vocabulary=300)


def start(bench: ModuleType, corpus: Any, name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    recipe = bench.Recipe(windows=4, warmup=2, judge_windows=4)
    row = replace(bench.ROWS[name], **changes)
    return bench.Run(row, bench.toy_sizes(), recipe, corpus, seed, folder=folder)


def train(run: Any, steps: int) -> None:
    assert run.train(steps * 4 * 8, deadline=time.monotonic() + 600)


def test_no_run_ends_before_its_deadline(bench: ModuleType, tmp_path: Path) -> None:
    command = ["--toy", "--state", str(tmp_path), "--records", str(tmp_path), "--minutes", "0"]
    assert bench.main(command) is None
    (state,) = tmp_path.glob("*.json")
    assert json.loads(state.read_text())["tokens"] == 32  # one step, on disk


@pytest.mark.parametrize("name", ["MPOE and delta 4", "fine, MPOE, mask 0.5"])
def test_a_resumed_run_repeats_the_uninterrupted_one(
    bench: ModuleType, corpus: Any, tmp_path: Path, name: str
) -> None:
    whole = start(bench, corpus, name, tmp_path / "whole")
    train(whole, 7)
    first = start(bench, corpus, name, tmp_path / "parts")
    train(first, 3)
    torch.manual_seed(99)  # whatever happened in between
    second = start(bench, corpus, name, tmp_path / "parts")
    assert second.step == 3
    train(second, 7)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(whole.mean, second.mean, strict=True))
    assert second.history[-1]["loss"] == whole.history[-1]["loss"]


@pytest.mark.parametrize(
    ("changes", "said"), [({"balance": 0.1}, "'row'.*0.01.*0.1"), ({"private_rate": 0.5}, "private_rate")]
)
def test_refuses_to_resume_with_another_configuration(
    bench: ModuleType, corpus: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    train(start(bench, corpus, "Switch", tmp_path), 1)
    with pytest.raises(SystemExit, match=f"(?s)another configuration.*{said}"):
        start(bench, corpus, "Switch", tmp_path, **changes)
    other = bench.corpus_of(TEXT.read_text(encoding="utf-8")[:20_000], vocabulary=300)
    with pytest.raises(SystemExit, match="corpus"):
        start(bench, other, "Switch", tmp_path)


def test_every_row_trains_all_that_it_has(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    for name in bench.ROWS:
        run = start(bench, corpus, name, tmp_path)
        before = [p.detach().clone() for p in run.model.parameters()]
        run._train_step()
        run._train_step()  # what starts at zero hides its partner from the first
        same = [
            n
            for (n, p), old in zip(run.model.named_parameters(), before, strict=True)
            if torch.equal(p, old) and "router" not in n and not ("mask" in run.row.options and "core_1" in n)
        ]
        assert not same, (name, same)


def test_rows_of_a_seed_start_alike_but_for_their_networks(
    bench: ModuleType, corpus: Any, tmp_path: Path
) -> None:
    first, second = (start(bench, corpus, name, tmp_path).model for name in ("dense", "Switch"))
    for name, value in first.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(second.state_dict()[name], value), name


def test_a_pass_visits_every_window_once(bench: ModuleType, corpus: Any) -> None:
    context, windows = 8, 5
    count = (len(corpus.parts["train"]) - 1) // context
    assert count % windows  # so that a batch lies across two passes
    batches = [
        corpus.batch(step, windows=windows, context=context, seed=0) for step in range(2 * count // windows)
    ]
    seen = torch.cat(batches)
    want = torch.stack([corpus.parts["train"][i * context : (i + 1) * context + 1] for i in range(count)])

    def rows(x: torch.Tensor) -> list[tuple[int, ...]]:
        return sorted(map(tuple, x.tolist()))

    assert rows(seen[:count]) == rows(want)
    assert not torch.equal(seen[:50], seen[count : count + 50])
    again = corpus.batch(3, windows=windows, context=context, seed=0)
    assert torch.equal(again, batches[3])
    assert not torch.equal(corpus.batch(3, windows=windows, context=context, seed=1), again)


def test_paragraphs_are_kept_once(bench: ModuleType) -> None:
    text = importlib.import_module("scratch_tasks")
    long, other = "a" * 300, "b" * 300
    assert list(text._distinct([long, f"{long}\n\n{other}", long])) == [long, other]
    parts = text.split(map(str, range(80)))
    assert (parts["tune"], parts["test"]) == (["3", "43"], ["23", "63"])
    assert len(parts["train"]) == 76


def test_a_mask_leaves_the_centers_alone(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    frozen = start(bench, corpus, "fine, MPOE, mask 0.5", tmp_path, options={"mask": 1.0})
    before = {name: p.detach().clone() for name, p in frozen.model.named_parameters()}
    train(frozen, 2)
    moved = {name for name, p in frozen.model.named_parameters() if not torch.equal(p, before[name])}
    centers = {name for name in before if "mlp.experts" in name and name.endswith("core_1")}
    assert len(centers) == 4
    assert not centers & moved
    assert {name.replace("core_1", "core_0") for name in centers} <= moved


def test_one_pool_serves_all_layers(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    name = "one pool, E = 15, top 4, sigmoid"
    sizes = replace(bench.toy_sizes(), layers=4)
    run = bench.Run(bench.ROWS[name], sizes, bench.Recipe(windows=4), corpus, 0, folder=tmp_path)
    networks = [block.mlp.experts for block in run.model.transformer.h]
    matrices = [network.bank("up").expert_matrices() for network in networks]
    assert all(torch.equal(matrix, matrices[0]) for matrix in matrices)
    assert len(run.model.owner) == 1
    own = sum(p.numel() for n in networks for p in n.parameters())
    pool, biases = 15 * 2 * 32 * 64, 15 * (32 + 64)
    assert sum(p.numel() for p in run.model.owner.parameters()) == pool
    assert own == 4 * biases


def test_the_mask_of_a_row_fades_and_compensates(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    fading = start(bench, corpus, "fine, MPOE, mask 0.9, fading", tmp_path).mask
    assert (fading.current_p, fading.compensate) == (0.9, False)
    fading.steps = bench.ROWS["fine, MPOE, mask 0.9, fading"].options["mask_fade"]
    assert fading.current_p == 0
    compensated = start(bench, corpus, "fine, MPOE, mask 0.5, compensated", tmp_path).mask
    assert (compensated.current_p, compensated.compensate) == (0.5, True)


@pytest.mark.parametrize("context", [8, 128])
def test_inputs_and_spans_make_up_the_text(tasks: ModuleType, context: int) -> None:
    sizes = importlib.import_module("scratch_rows").Sizes(64, 256, 2, 2, context, 300)
    text = torch.randint(300, (50, context + 1), generator=torch.Generator().manual_seed(0))
    cut, spans = tasks.spans_of(context)
    assert (cut, spans) == {8: (1, 1), 128: (19, 6)}[context]
    found = tasks.corrupt(text, sizes, tasks.batch_generator(0, 0)).tolist()
    for row, want in zip(found, text[:, :context].tolist(), strict=True):
        inputs, targets = row[: context - cut + spans + 1], row[context - cut + spans + 1 :]
        assert inputs.pop() == targets.pop() == 300
        pieces = {}
        for k in range(spans):  # what stands behind a marker, up to the next one
            start = targets.index(301 + k) + 1
            stop = targets.index(302 + k) if k + 1 < spans else len(targets)
            pieces[301 + k] = targets[start:stop]
        assert all(pieces.values())
        restored = [token for x in inputs for token in pieces.get(x, [x])]
        assert restored == want
        assert inputs[0] < 300  # a window begins with text


def test_spans_lie_anywhere(tasks: ModuleType) -> None:
    sizes = importlib.import_module("scratch_rows").Sizes(64, 256, 2, 2, 128, 300)
    text = torch.arange(128).repeat(2000, 1)
    inputs = tasks.corrupt(text, sizes, tasks.batch_generator(0, 0))[:, : 128 - 19 + 6 + 1]
    kept = torch.bincount(inputs[inputs < 300], minlength=128) / 2000
    assert float(kept[5:120].min()) > 0.7
    assert float(kept[5:120].max()) < 0.95
    assert float(kept.sum()) == pytest.approx(109, abs=1e-3)


def test_batches_of_the_t5_are_a_function_of_seed_and_step(bench: ModuleType) -> None:
    corpus = bench.corpus_of(TEXT.read_text(encoding="utf-8"), vocabulary=300)
    sizes, t5 = bench.toy_sizes(), bench.ARCHITECTURES["t5"]

    def batch(step: int, seed: int) -> Any:
        return t5.batch(corpus, sizes, step, windows=4, seed=seed)

    first, *others = batch(3, 0), batch(4, 0), batch(3, 1)
    torch.manual_seed(99)  # whatever was drawn in between
    assert torch.equal(batch(3, 0), first)
    assert not any(torch.equal(other, first) for other in others)
    held_out = t5.held_out(corpus, sizes, "test", 4)
    assert torch.equal(t5.held_out(corpus, sizes, "test", 4), held_out)
    # The same text at another step or seed is cut in other places.
    wide = replace(sizes, context=128)
    text = corpus.batch(0, windows=4, context=128, seed=0)
    drawn = importlib.import_module("scratch_tasks").batch_generator
    cuts = [t5.examples(text, wide, drawn(*at)) for at in ((0, 1), (0, 2), (1, 1))]
    assert not torch.equal(cuts[0], cuts[1])
    assert not torch.equal(cuts[0], cuts[2])


def test_a_resumed_t5_repeats_the_uninterrupted_one(bench: ModuleType, tmp_path: Path) -> None:
    corpus = bench.corpus_of(TEXT.read_text(encoding="utf-8"), vocabulary=300)
    recipe = bench.Recipe(windows=4, warmup=2, judge_windows=4)

    def run(folder: str) -> Any:
        row = bench.ROWS["fine, tied, 6 of 12, sigmoid"]
        place = tmp_path / folder
        return bench.Run(row, bench.toy_sizes(), recipe, corpus, 0, folder=place, architecture="t5")

    def train(run: Any, steps: int) -> None:
        assert run.train(steps * 4 * 8, deadline=time.monotonic() + 600)

    whole, first = run("whole"), run("parts")
    train(whole, 5)
    train(first, 2)
    second = run("parts")
    assert second.step == 2
    train(second, 5)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    experts = [network.experts.bank("up") for network in second.architecture.networks(second.model)]
    same = [torch.equal(a.expert_matrices(), experts[0].expert_matrices()) for a in experts]
    assert same == [True, True, False, False]  # two layers of a stack use the same experts
