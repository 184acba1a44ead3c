"""The T5 of moe_from_scratch.py learns to restore spans, which are a function of seed and step."""

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

TEXT = Path(tensornet_hf.__file__).parent / "data" / "heldout.txt"


@pytest.fixture
def script(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("scratch_t5")


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return load_benchmark("moe_from_scratch")


@pytest.mark.parametrize("context", [8, 128])
def test_inputs_and_spans_make_up_the_text(script: ModuleType, context: int) -> None:
    sizes = importlib.import_module("scratch_rows").Sizes(64, 256, 2, 2, context, 300)
    text = torch.randint(300, (50, context + 1), generator=torch.Generator().manual_seed(0))
    cut, spans = script.spans_of(context)
    assert (cut, spans) == {8: (1, 1), 128: (19, 6)}[context]
    found = script.corrupt(text, sizes, script.batch_generator(0, 0)).tolist()
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


def test_spans_lie_anywhere(script: ModuleType) -> None:
    sizes = importlib.import_module("scratch_rows").Sizes(64, 256, 2, 2, 128, 300)
    text = torch.arange(128).repeat(2000, 1)
    inputs = script.corrupt(text, sizes, script.batch_generator(0, 0))[:, : 128 - 19 + 6 + 1]
    kept = torch.bincount(inputs[inputs < 300], minlength=128) / 2000
    assert float(kept[5:120].min()) > 0.7
    assert float(kept[5:120].max()) < 0.95
    assert float(kept.sum()) == pytest.approx(109, abs=1e-3)


def test_batches_are_a_function_of_seed_and_step(bench: ModuleType) -> None:
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
    drawn = importlib.import_module("scratch_t5").batch_generator
    cuts = [t5.examples(text, wide, drawn(*at)) for at in ((0, 1), (0, 2), (1, 1))]
    assert not torch.equal(cuts[0], cuts[1])
    assert not torch.equal(cuts[0], cuts[2])


def test_the_script_trains_a_t5(bench: ModuleType, tmp_path: Path) -> None:
    folders = ["--state", str(tmp_path / "state"), "--out", str(tmp_path), "--name", "t5"]
    rows = ["dense", "fine, MPOE", "fine, tied, 6 of 12, sigmoid"]
    call = [str(TEXT), "--toy", "--architecture", "t5", *folders, "--rows", *rows]
    lines = json.loads(bench.main([*call, "--tokens", "0.0001"]).read_text())["rows"]
    assert {line["row"]["name"] for line in lines} == set(rows)
    assert all(line["architecture"] == "t5" for line in lines)
    parameters = {line["row"]["name"]: line["expert_parameters"] for line in lines}
    assert parameters["dense"] == 4 * (2 * 64 * 256 + 64 + 256)
    assert all(point["loss"] > 0 for line in lines for point in line["history"])
    assert {path.name[:3] for path in (tmp_path / "state").glob("*.pt")} == {"t5-"}


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
