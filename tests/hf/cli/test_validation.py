"""`tensornet compress --validation`: a second text corrects the forecast, in a process of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hf.cli.test_failures import tensornet

from tensornet_hf.checkpoint import load
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.evaluate import perplexity
from tensornet_hf.text import load_tokenizer, token_ids

LAYERS, RATIO = ("--target", "*.mlp.*"), ("--param-ratio", "0.6")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "own.txt").write_text(calibration_text()[:20_000])
    (folder / "other.txt").write_text(heldout_text()[:20_000])
    (folder / "empty.txt").write_text(" \n")
    (folder / "short.txt").write_text("In the beginning")
    return folder


@pytest.mark.slow
def test_a_second_text_corrects_the_forecast(texts: Path, tmp_path: Path) -> None:
    common = (str(gpt2_path()), *LAYERS, "--calibration", str(texts / "own.txt"), "--json")
    second = ("--validation", str(texts / "other.txt"))
    plans = {}
    for name, more in {"price": (), "measured": second}.items():
        done = tensornet("compress", *common, *RATIO, "--dry-run", *more, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        plans[name] = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []
    assert plans["price"]["forecast"] == {"points": [], "source": None}
    forecast = plans["measured"]["forecast"]
    assert forecast["source"].endswith("tokens of other.txt")
    assert 2 <= len(forecast["points"]) <= 3
    assert plans["measured"]["layers"] == plans["price"]["layers"]
    rise, price = (plans[name]["predicted_loss_increase"] for name in ("measured", "price"))
    assert rise == pytest.approx(forecast["points"][-1][1], rel=1e-6)  # 0.6 is a size that was measured
    assert rise != pytest.approx(price, rel=1e-3)

    allowed = str(rise)  # what was measured is what a budget of the loss buys
    done = tensornet("compress", *common, *second, "--loss-increase", allowed, "out", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["predicted_loss_increase"] <= rise * (1 + 1e-9)
    assert report["param_ratio"] == pytest.approx(0.6, abs=0.01)
    tokens = token_ids(load_tokenizer(gpt2_path()), (texts / "other.txt").read_text())
    losses = [perplexity(load(x), tokens, context=128).loss for x in (tmp_path / "out", gpt2_path())]
    assert losses[0] - losses[1] == pytest.approx(rise, rel=0.1)  # not all of the text was measured on


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("{texts}/nothing.txt", *RATIO), 1, "There is no file .*nothing.txt"),
        (("{texts}/empty.txt", *RATIO), 1, "empty.txt holds no text"),
        (("{texts}/short.txt", *RATIO), 1, "less than one window"),
        (("{texts}/own.txt", *RATIO), 2, "is the text of --calibration"),
        (
            ("{texts}/other.txt", *RATIO, "--objective", "weight"),
            2,
            "which needs --calibration",
        ),
        (("{texts}/other.txt", *RATIO, "--workers", "1"), 2, "which --validation would need"),
    ],
)
def test_what_does_not_go_with_it(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = (option.format(texts=texts) for option in options)
    text = () if "weight" in options else ("--calibration", str(texts / "own.txt"))
    assert run(["compress", str(gpt2_path()), "out", *LAYERS, *text, "--validation", *given]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, " ".join(err.split()))
    assert list(tmp_path.iterdir()) == []
