"""The script of the paper's experiment runs offline on the embedded models and a local file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "paper"))
    return importlib.import_module("finetune")


@pytest.mark.parametrize("model", ["toy-t5", "toy-gpt2"])
@pytest.mark.parametrize("form", ["dense", "switch", "mpoe"])
def test_the_toy_run_writes_its_row(
    script: ModuleType, model: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [model, "--task", "sst2", "--form", form, "--toy", "--out", str(tmp_path)]
    written = json.loads(script.main([*command, *(["--mask", "0.5"] if form == "mpoe" else [])]).read_text())
    assert [len(written["tried"]), len(written["runs"])] == [2, 2]
    assert [run["seed"] for run in written["runs"]] == [0, 1]
    assert all(run["steps"] == 2 and 0 <= run["test"] <= 1 for run in written["runs"])
    assert (written["runs"][0]["expert_parameters"] == 0) == (form == "dense")
    assert sum(written["examples"].values()) == 30
    if form == "mpoe":
        assert written["row"].endswith("mpoe-mask0.5")
    if form == "dense":
        capsys.readouterr()
        script.main(command)
        assert "there already" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["toy-t5", "toy-gpt2"])
def test_the_answer_is_the_likelier_word(script: ModuleType, model: str) -> None:
    dense, tokenizer, decoder_only = script.load(model)
    encoder = script.Encoder(tokenizer, ("no", "yes"), decoder_only=decoder_only, length=64)
    found = script.examples("sst2", script.TOY_DATA)["test"]
    losses = torch.tensor(
        [
            [float(dense(**encoder.batch([(text, label)])).loss.detach()) for label in (0, 1)]
            for text, _ in found
        ]
    )
    lengths = torch.tensor([len(word) for word in encoder.words])  # a loss is the mean over the word
    guess = (losses * lengths).argmin(1)
    want = float((guess == torch.tensor([label for _, label in found])).float().mean())
    assert script.accuracy(dense, encoder, found, 4) == pytest.approx(want)


def test_only_the_word_is_learnt(script: ModuleType) -> None:
    _, tokenizer, decoder_only = script.load("toy-gpt2")
    encoder = script.Encoder(tokenizer, ("no", "yes"), decoder_only=decoder_only, length=3)
    batch = encoder.batch([("a long text that is cut", 1), ("a", 0)])
    first = batch["labels"][0]
    assert first[first != script.IGNORED].tolist() == encoder.words[1]
    assert batch["attention_mask"].sum(1).tolist() == [3 + len(encoder.words[1]), 1 + len(encoder.words[0])]
