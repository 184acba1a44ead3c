"""The training script of the embedded models runs from end to end, so that it cannot rot unseen."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train_embedded.py"
WORDS = ["in", "the", "beginning", "god", "created", "heaven", "and", "earth"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_embedded", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bible(tmp_path: Path) -> Path:
    """Eighty chapters of six verses; every verse names its chapter, so that a leak can be seen."""
    lines = [
        f"Ge{chapter}:{verse} {chapter} " + " ".join(WORDS[verse:] + WORDS[:verse])
        for chapter in range(1, 81)
        for verse in range(1, 7)
    ]
    path = tmp_path / "bible.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_toy_training_writes_two_loadable_folders(script: ModuleType, bible: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    script.main(["--text", str(bible), "--out", str(out), "--toy"])
    for name, auto in (("gpt2", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)):
        record = json.loads((out / name / "training.json").read_text(encoding="utf-8"))
        assert record["recipe"]["steps"] == 3
        assert math.isfinite(record["final_loss"])
        model = auto.from_pretrained(out / name)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        assert model.num_parameters() == record["parameters"]
        assert model.config.vocab_size == len(tokenizer)
        text = "restored words"
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert sorted(p.name for p in out.glob("*.*")) == [
        "calibration.txt",
        "heldout.txt",
        "t5_calibration.jsonl",
        "t5_heldout.jsonl",
    ]


def test_split_keeps_heldout_chapters_apart(script: ModuleType, bible: Path) -> None:
    chapters = script.read_chapters(bible)
    split = script.split_chapters(chapters)
    assert len(chapters) == 80
    assert len(split.heldout) == 2
    assert len(split.calibration) == 4
    assert not set(split.heldout) & set(split.train)
    assert script.strip_vowels("i am thou lord's eye") == "i m th lrd's y"
    assert set(split.calibration) < set(split.train)
    assert set(split.heldout) | set(split.train) == set(chapters)


def test_unreadable_line_is_named(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    path.write_text("Ge1:1 In the beginning\nCall me Ishmael.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: .*Ishmael"):
        script.read_chapters(path)


def test_windows_cover_the_stream_once_per_pass(script: ModuleType) -> None:
    stream = torch.arange(10 * script.CONTEXT + 5)
    batches = script.window_batches(stream, batch=4, seed=0)
    rows = torch.cat([next(batches)["input_ids"] for _ in range(3)])
    assert rows.shape[1] == script.CONTEXT
    assert rows.unique().numel() == rows.numel()
    assert rows.unique().numel() >= 9 * script.CONTEXT
    assert (rows.diff(dim=1) == 1).all()


def test_perplexity_of_a_uniform_model_is_the_vocabulary(script: ModuleType) -> None:
    config = script.GPT2Config(vocab_size=50, n_positions=script.CONTEXT, n_embd=8, n_layer=1, n_head=1)
    model = script.GPT2LMHeadModel(config).eval()
    torch.nn.init.zeros_(model.transformer.wte.weight)  # tied: every logit is zero
    stream = torch.randint(50, (3 * script.CONTEXT + 7,))
    assert script.perplexity(model, stream) == pytest.approx(50.0, rel=1e-5)
