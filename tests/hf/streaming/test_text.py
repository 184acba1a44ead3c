"""`tensornet compress --workers N --calibration TEXT`: calibrated, planned and compressed without loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_folders import contents
from transformers import GPT2Config, GPT2LMHeadModel

import tensornet_hf as th
from tensornet_hf import compress as conversion
from tensornet_hf.cli.main import run
from tensornet_hf.compress import SURVEY
from tensornet_hf.embedded import calibration_text, gpt2_path, t5_path
from tensornet_hf.staging import staging_folder
from tensornet_hf.text import load_tokenizer

TOKENS = 600
HALF = ("--param-ratio", "0.5", "--calibration", "text.txt", "--calibration-tokens", str(TOKENS))
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(calibration_text()[:6000])

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small model in several files, with the tokenizer of the embedded one."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(gpt2_path())
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=24, n_layer=2, n_head=4)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    return tmp_path / "dense"


@pytest.mark.slow
def test_same_plan_as_a_loaded_model(call: Call, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("compress", sharded, "whole", *HALF)[0] == 0
    Path("plan.json").write_text(call("plan", sharded, "--json", *HALF)[1])

    def never(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(conversion, "open_dense", never)
    status, out, err = call("compress", sharded, "one", *HALF, "--workers", 1, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["param_ratio"] <= 0.5
    assert call("compress", sharded, "two", *HALF, "--workers", 2)[0] == 0
    assert contents(Path("one")) == contents(Path("two"))
    assert not staging_folder(Path("one").absolute()).exists()
    assert described("one") == described("whole")
    status, _, err = call("compress", sharded, "out", "--plan", "plan.json", "--workers", 1)
    assert status == 1
    assert "tokens of text.txt, which the cores depend on" in err
    assert call("compress", sharded, "out", "--plan", "plan.json", *HALF[2:], "--workers", 1)[0] == 0
    assert described("out") == described("whole")
    blind = (*HALF[:2], "--method", "svd")
    assert call("compress", sharded, "blind", *blind, "--workers", 1)[0] == 0
    assert described("blind") != described("whole")
    x = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(th.load("one")(x).logits, th.load("whole")(x).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_survey_survives_an_interruption(call: Call, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("compress", sharded, "reference", *HALF, "--workers", 1)[0] == 0
    work = staging_folder(Path("out").absolute())
    with monkeypatch.context() as patch:
        patch.setattr("tensornet.compression.road.compress_alone", _interrupt)
        assert call("compress", sharded, "out", *HALF, "--workers", 1)[0] == 130
    assert (work / SURVEY).is_file()
    with monkeypatch.context() as patch:
        patch.setattr("tensornet.compression.surveying.survey_model", _interrupt)
        assert call("compress", sharded, "out", *HALF, "--workers", 1)[0] == 0
    assert contents(Path("out")) == contents(Path("reference"))
    assert not work.exists()


@pytest.mark.slow
def test_two_stacks_and_layers_outside_of_the_blocks(call: Call, sharded: Path) -> None:
    status, _, err = call("compress", t5_path(), "out", *HALF, "--workers", 1)
    assert status == 0, err
    status, _, err = call("compress", sharded, "head", *HALF, "--workers", 1, "--target", "lm_head")
    assert status == 0, err
    assert list(described("head")) == ["transformer.wte"] or "lm_head" in described("head")


def described(folder: str) -> dict[str, Any]:
    """The compressed layers of a folder."""
    return json.loads(Path(folder, "config.json").read_text())["quantization_config"]["layers"]


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt
