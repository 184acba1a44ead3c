"""`tensornet compress --validation`: a second text corrects the forecast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tensornet_hf.checkpoint import load
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.evaluate import perplexity
from tensornet_hf.text import load_tokenizer, token_ids

Run = Callable[..., tuple[int, str, str]]
LAYERS, RATIO = ("--target", "*.mlp.*"), ("--param-ratio", 0.6)
TEXTS = {"own": calibration_text()[:20_000], "other": heldout_text()[:20_000]}


@pytest.mark.slow
def test_a_second_text_corrects_the_forecast(tensornet: Run, tmp_path: Path) -> None:
    for name in ("own", "other"):
        (tmp_path / f"{name}.txt").write_text(TEXTS[name])
    common = ("compress", gpt2_path(), *LAYERS, "--calibration", "own.txt", "--json")
    second = ("--validation", "other.txt")
    plans = {}
    for name, more in {"predicted": (), "measured": second}.items():
        status, out, err = tensornet(*common, *RATIO, "--dry-run", *more)
        assert (status, err) == (0, "")
        plans[name] = json.loads(out)
    assert not any(plans["predicted"]["forecast"].values())
    forecast = plans["measured"]["forecast"]
    assert forecast["source"].endswith("tokens of other.txt")
    assert 2 <= len(forecast["points"]) <= 3
    assert plans["measured"]["layers"] == plans["predicted"]["layers"]
    increase, before = (plans[name]["predicted_loss_increase"] for name in ("measured", "predicted"))
    assert increase == pytest.approx(forecast["points"][-1][1], rel=1e-6)  # 0.6 is a size that was measured
    assert increase != pytest.approx(before, rel=1e-3)

    # What was measured is what a budget of the loss buys.
    report = json.loads(tensornet(*common, *second, "--loss-increase", increase, "out")[1])
    assert report["predicted_loss_increase"] <= increase * (1 + 1e-9)
    assert report["param_ratio"] == pytest.approx(0.6, abs=0.01)
    tokens = token_ids(load_tokenizer(gpt2_path()), TEXTS["other"])
    losses = [perplexity(load(x), tokens, context=128).loss for x in ("out", gpt2_path())]
    assert losses[0] - losses[1] == pytest.approx(increase, rel=0.1)  # not all of the text was measured on
