"""The comparison of MPOE and Switch runs from end to end, resumes, and its rows are what they are called."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "every",
    "word",
    "of",
    "this",
    "quotation",
    "was",
    "chosen",
    "so",
    "that",
    "nobody",
    "could",
    "object",
    "to",
    "any",
    "part",
    "of",
    "it",
]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture
def quotations(tmp_path: Path) -> Path:
    folder = tmp_path / "fortunes"
    folder.mkdir()
    texts = [f"{number} {' '.join(WORDS[number % 17 :] + WORDS[: number % 17])}" for number in range(80)]
    (folder / "wisdom").write_text("\n%\n".join(texts))
    (folder / "wisdom.dat").write_bytes(b"an index, not a text\n%\n")
    (folder / "wisdom.u8").symlink_to("wisdom")
    return folder


def test_toy_run_resumes_and_writes_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("mpoe_vs_switch", monkeypatch)
    threads = torch.get_num_threads()
    command = ["--toy", "--state", str(tmp_path), "--records", str(tmp_path)]
    try:
        path = script.main([*command, "--tables", "gpt2", "t5"])
        capsys.readouterr()
        script.main([*command, "--tables", "t5"])
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out == ""  # every run was there

    rows = json.loads(path.read_text())["rows"]
    assert [row["table"] for row in rows] == ["t5"] * 3 + ["gpt2"] * 3  # what was not asked for is kept
    by_name = {row["row"]: row for row in rows if row["table"] == "t5"}
    assert all(math.isfinite(row["loss"]) and row["seconds_per_step"] > 0 for row in rows)
    assert by_name["dense"]["entropy"] is None
    assert 0 <= by_name["MPOE"]["entropy"] <= 1
    matrix, end = 384 * 96, 16 * 16
    assert by_name["dense"]["expert_parameters"] == 4 * 2 * matrix
    assert by_name["Switch"]["expert_parameters"] == 8 * 4 * 2 * matrix
    assert by_name["MPOE"]["expert_parameters"] == 4 * 2 * (matrix + 8 * 2 * end)
    assert 7 * by_name["MPOE"]["expert_parameters"] < by_name["Switch"]["expert_parameters"]


def test_every_row_starts_as_the_dense_model(quotations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tasks = load("mpoe_rows", monkeypatch), load("mpoe_tasks", monkeypatch)
    text = tasks.read_quotations(quotations)
    for kind in (tasks.LanguageModelling, tasks.VowelRestoration):
        task = kind(text, train_size=200, judge_size=260, batch=2)
        judged = task.judge("test")
        dense = rows.judge(rows.build(task, rows.Row("dense", experts=0), seed=0), judged)
        for row in (
            rows.Row("Switch", ends=None),
            rows.Row("MPOE", ends=(4, 2)),
            rows.Row("private", shared="none"),
        ):
            mixed = rows.judge(rows.build(task, row, seed=0), judged)
            assert mixed["loss"] == pytest.approx(dense["loss"], rel=1e-4)
            assert mixed["accuracy"] == dense["accuracy"]
        cut = rows.judge(rows.build(task, rows.Row("cut", max_bond=2), seed=0), judged)
        assert cut["loss"] > dense["loss"] * 1.01


def test_frozen_centers_stay_and_masked_ones_move_now_and_then(
    quotations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tasks = load("mpoe_rows", monkeypatch), load("mpoe_tasks", monkeypatch)
    task = tasks.VowelRestoration(tasks.read_quotations(quotations), train_size=20, judge_size=10, batch=2)
    moves = {}
    for p in (0.0, 0.5, 1.0):
        row = rows.Row("row", mask_p=p)
        model = rows.build(task, row, seed=0).train()
        optimizer = rows.optimizer_of(model, row, 1e-2, rows.Recipe(steps=6))
        step = rows.stepper(model, optimizer, task.batches(0))
        centers = [m for name, m in model.named_parameters() if name.endswith("core_1")]
        assert len(centers) == 8
        count = 0
        for _ in range(6):
            before = [c.detach().clone() for c in centers]
            step()
            count += sum(not torch.equal(a, b) for a, b in zip(before, centers, strict=True))
        moves[p] = count
    assert moves[0.0] == 48
    assert moves[1.0] == 0
    assert 8 < moves[0.5] < 40  # 24 on average, standard deviation 3.5


def test_a_center_of_all_layers_counts_once(quotations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tasks = load("mpoe_rows", monkeypatch), load("mpoe_tasks", monkeypatch)
    task = tasks.LanguageModelling(tasks.read_quotations(quotations), train_size=200, judge_size=260, batch=2)
    matrix, end, biases = 512 * 128, 16 * 16, 512 + 128
    counts = {
        across: rows.expert_parameters(rows.build(task, rows.Row("row", experts=2, across=across), seed=0))
        for across in (False, True)
    }
    assert counts[False] == 4 * (2 * (matrix + 2 * 2 * end) + 2 * biases)
    # One center for all c_fc, another for all c_proj.
    assert counts[True] == 2 * matrix + 4 * (2 * 2 * 2 * end + 2 * biases)


def test_a_fading_mask_ends_where_the_row_says(quotations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tasks = load("mpoe_rows", monkeypatch), load("mpoe_tasks", monkeypatch)
    task = tasks.VowelRestoration(tasks.read_quotations(quotations), train_size=20, judge_size=10, batch=2)
    row = rows.Row("row", mask_p=0.999999, mask=(("fade", 0.5),))
    recipe = rows.Recipe(steps=4)
    model = rows.build(task, row, seed=0).train()
    held = rows.optimizer_of(model, row, 1e-2, recipe)
    step = rows.stepper(model, held, task.batches(0))
    centers = [m for name, m in model.named_parameters() if name.endswith("core_1")]
    moved = []
    for _ in range(4):
        before = [c.detach().clone() for c in centers]
        step()
        moved.append(sum(not torch.equal(a, b) for a, b in zip(before, centers, strict=True)))
    assert moved[0] == 0
    assert moved[2:] == [8, 8]  # faded to none after two of four steps


def test_parts_do_not_overlap(quotations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = load("mpoe_tasks", monkeypatch)
    parts = tasks.read_quotations(quotations)
    assert [len(parts.train), len(parts.tune), len(parts.test)] == [68, 4, 8]
    assert len({*parts.train, *parts.tune, *parts.test}) == 80
    with pytest.raises(SystemExit, match="0 quotations under"):
        tasks.read_quotations(quotations.parent)
