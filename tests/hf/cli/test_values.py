"""Values of options of the command line: sizes, shares, devices, versions, chat templates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import typer

from tensornet_hf.checkpoint import load
from tensornet_hf.cli.main import run
from tensornet_hf.cli.options import parse_device, parse_share, parse_size
from tensornet_hf.embedded import gpt2_path, heldout_text
from tensornet_hf.text import continue_text, load_tokenizer

TEMPLATE = "In the {{ messages[0].content }} {% if add_generation_prompt %}and{% endif %}"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60000", 60_000),
        ("60_000", 60_000),
        (60_000, 60_000),
        ("60kb", 60_000),
        ("60MB", 60_000_000),
        (" 1.5 GiB ", 3 * 2**29),
        ("2M", 2_000_000),
        ("1TiB", 2**40),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5", "6XB", "1e9", "nan", "1..5MB", "60 MB MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a size"):
        parse_size(text)
    with pytest.raises(typer.BadParameter, match="one byte"):
        parse_size("0.2B")


def test_shares() -> None:
    assert (parse_share("1"), parse_share(0.25)) == (1.0, 0.25)
    with pytest.raises(typer.BadParameter, match=r"write 0\.5"):
        parse_share("50")
    for text in ("0", "-1", "nan", "1000"):
        with pytest.raises(typer.BadParameter, match=r"\(0, 1\]"):
            parse_share(text)
    with pytest.raises(typer.BadParameter, match="not a number"):
        parse_share("half")


def test_devices() -> None:
    assert parse_device("cpu") == torch.device("cpu")
    for text in ("gpu", "meta", "cuda:99", "cpu:x"):
        with pytest.raises(typer.BadParameter, match=rf"{text} is not available"):
            parse_device(text)


def test_a_size_with_a_unit_is_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(heldout_text()[:5_000])
    layers = [
        "--target",
        "h.0.mlp.c_fc",
        "--calibration",
        str(tmp_path / "text.txt"),
        "--json",
    ]
    plans = []
    for size in ("3550000", "3550KB"):
        assert run(["plan", str(gpt2_path()), "--max-bytes", size, *layers]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tensornet-torch ")


def test_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2_path(), folder)
    command = ["generate", str(folder), "beginning", "--max-new-tokens", "4"]
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model, tokenizer = load(folder), load_tokenizer(folder)
    plain = continue_text(model, tokenizer, "In the beginning and", max_new_tokens=4)
    assert run(command) == 0
    assert capsys.readouterr().out == plain + "\n"
    assert run([*command, "--no-chat"]) == 0
    assert capsys.readouterr().out.startswith("beginning")
