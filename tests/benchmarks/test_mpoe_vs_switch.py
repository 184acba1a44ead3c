"""The rows of the comparison of MPOE and Switch are what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SENTENCE = "every word of this quotation was chosen so that nobody could object to any part of it"


@pytest.fixture
def script(load_benchmark: Any) -> Any:
    return load_benchmark("mpoe_vs_switch")


@pytest.fixture
def quotations(tmp_path: Path) -> Path:
    folder = tmp_path / "fortunes"
    folder.mkdir()
    words = SENTENCE.split()
    texts = [f"{number} {' '.join(words[number % 17 :] + words[: number % 17])}" for number in range(80)]
    (folder / "wisdom").write_text("\n%\n".join(texts))
    (folder / "wisdom.dat").write_bytes(b"an index, not a text\n%\n")
    (folder / "wisdom.u8").symlink_to("wisdom")
    return folder


def test_every_row_starts_as_the_dense_model(script: Any, quotations: Path) -> None:
    text = script.read_quotations(quotations)
    for kind in (script.LanguageModelling, script.VowelRestoration):
        task = kind(text, train_size=200, judge_size=260, batch=2)
        judged = task.judge("test")
        dense = script.judge(script.build(task, script.Row("dense", experts=0), seed=0), judged)
        for options in ({"ends": None}, {"ends": (4, 2)}, {"shared": "none"}):
            mixed = script.judge(script.build(task, script.Row("row", **options), seed=0), judged)
            assert mixed["loss"] == pytest.approx(dense["loss"], rel=1e-4)
            assert mixed["accuracy"] == dense["accuracy"]
        cut = script.judge(script.build(task, script.Row("cut", max_bond=2), seed=0), judged)
        assert cut["loss"] > dense["loss"] * 1.01


def test_masked_centers_move_now_and_then(script: Any, quotations: Path) -> None:
    task = script.VowelRestoration(script.read_quotations(quotations), train_size=20, judge_size=10, batch=2)

    def moves(**options: Any) -> list[int]:
        """Count the centers, of eight, that each of six steps moves."""
        row = script.Row("row", **options)
        model = script.build(task, row, seed=0).train()
        optimizer = script.optimizer_of(model, row, 1e-2, 6)
        step = script.stepper(model, optimizer, task.batches(0))
        centers = [m for name, m in model.named_parameters() if name.endswith("core_1")]
        counts = []
        for _ in range(6):
            before = [c.detach().clone() for c in centers]
            step()
            counts.append(sum(not torch.equal(a, b) for a, b in zip(before, centers, strict=True)))
        return counts

    assert moves() == [8] * 6
    assert moves(mask_p=1.0) == [0] * 6
    assert 8 < sum(moves(mask_p=0.5)) < 40  # 24 on average, standard deviation 3.5
    fading = moves(mask_p=0.999999, mask=(("fade", 0.5),))
    assert (fading[0], fading[3:]) == (0, [8, 8, 8])


def test_shared_centers_count_once(script: Any, quotations: Path) -> None:
    task = script.LanguageModelling(
        script.read_quotations(quotations), train_size=200, judge_size=260, batch=2
    )
    matrix, end, biases = 512 * 128, 16 * 16, 512 + 128

    def count(**options: Any) -> int:
        return script.expert_parameters(script.build(task, script.Row("row", experts=2, **options), seed=0))

    assert count(ends=None) == 4 * (2 * 2 * matrix + 2 * biases)
    assert count() == 4 * (2 * (matrix + 2 * 2 * end) + 2 * biases)
    # One center for all c_fc, another for all c_proj.
    assert count(across=True) == 2 * matrix + 4 * (2 * 2 * 2 * end + 2 * biases)


def test_parts_do_not_overlap(script: Any, quotations: Path) -> None:
    parts = script.read_quotations(quotations)
    assert {name: len(part) for name, part in parts.items()} == {"train": 68, "tune": 4, "test": 8}
    assert len({quotation for part in parts.values() for quotation in part}) == 80
    with pytest.raises(SystemExit, match="0 quotations under"):
        script.read_quotations(quotations.parent)
