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


@pytest.mark.parametrize("name", ["pool with center, 6, root rates", "MPOE, mask 0.5"])
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


def test_refuses_to_resume_with_another_configuration(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    train(start(bench, corpus, "Switch", tmp_path), 1)
    with pytest.raises(SystemExit, match=r"(?s)another configuration.*'row'.*'prob'.*'unit'"):
        start(bench, corpus, "Switch", tmp_path, combine="unit")
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


def test_one_pool_serves_all_layers(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    sizes = replace(bench.toy_sizes(), layers=4)
    run = bench.Run(bench.ROWS["pool, half"], sizes, bench.Recipe(windows=4), corpus, 0, folder=tmp_path)
    (pool,) = run.model.owner
    assert all(block.mlp.experts.pool is pool for block in run.model.transformer.h)
    experts, always = 56 * (2 * 80 * 80 + 80 + 80), 4 * (2 * 160 * 80 + 160 + 80)
    assert sum(p.numel() for p in pool.parameters()) == experts
    assert not any("experts" in name for name, _ in run.model.transformer.named_parameters())
    assert bench.feed_forward_parameters(run.model) == experts + always


def test_rates_of_shared_tensors(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    def rates(name: str) -> list[float]:
        optimizer = start(bench, corpus, name, tmp_path).optimizer
        return sorted({group["peak"] for group in optimizer.param_groups})

    assert rates("pool, quarter, 6") == [3e-3]
    assert rates("pool, quarter, 6, root rates") == pytest.approx([3e-3 / 2**0.5, 3e-3])  # two layers
    assert rates("MPOE, root rates") == pytest.approx([3e-3 / 30**0.5, 3e-3])


def test_seeds_train_at_the_rate_that_was_best(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    command = ["--toy", "--state", str(tmp_path), "--records", str(tmp_path), "--seeds", "3", "4"]
    record = json.loads(bench.main(command).read_text())
    dense = [run for run in record["rows"] if run["row"]["name"] == "dense"]
    tuned = {run["recipe"]["rate"]: run["history"][0]["tune_loss"] for run in dense if run["seed"] == 3}
    (second,) = (run for run in dense if run["seed"] == 4)
    assert len(tuned) == 3
    assert tuned[second["recipe"]["rate"]] == min(tuned.values())


def test_finished_runs_in_few_bits(bench: ModuleType, corpus: Any, tmp_path: Path) -> None:
    run = start(bench, corpus, "pool, half", tmp_path)
    train(run, 1)
    whole, four = bench.in_few_bits(run, [4.25])
    run._exchange()
    assert whole["loss"] == run.evaluate()[0]
    assert whole["bytes"] == 4 * sum(p.numel() for p in run.model.parameters())
    assert 4.25 / 32 < four["bytes"] / whole["bytes"] < 5 / 32
    assert whole["loss"] != four["loss"] == pytest.approx(whole["loss"], rel=0.01)
