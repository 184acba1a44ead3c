"""The command that trains specialists: a table, files that later runs keep, and generated text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tensornet_hf as th
from tensornet.errors import DestinationError, TargetError
from tensornet_hf import specializing
from tensornet_hf.specializing import keep_best, mean_loss
from tensornet_hf.text import load_tokenizer, token_ids
from tests.hf.cli.conftest import Run

TRUNK = th.embedded.gpt2_path()
TEXTS = {
    "law": th.embedded.heldout_text()[:8_000].upper(),
    "code": "".join(f"def f{k}(x):\n    return [x + {k} for _ in range({k % 7})]\n" for k in range(120)),
    "sums": "".join(f"{k} + {k * k % 91} = {k + k * k % 91}; " for k in range(400)),
}
SHORT = ("--context", 32, "--rank", 4)


@pytest.fixture(autouse=True)
def _texts(tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)


def own_loss(folder: Path, name: str, which: str | None) -> float:
    """Mean loss of the last tenth of a text, window by window."""
    s = th.load_specialists(folder)
    ids = token_ids(load_tokenizer(TRUNK), TEXTS[name])
    windows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    windows = windows[-max(len(windows) // 10, 2) :]
    with torch.no_grad(), s.use(which):
        losses = [float(s.model.eval()(input_ids=x[None], labels=x[None]).loss) for x in windows]
    return sum(losses) / len(losses)


def test_specialists_are_trained_added_and_used(tensornet: Run, tmp_path: Path) -> None:
    domains = ("--domain", "law=law.txt", "--domain", "code=code.txt")
    status, out, err = tensornet("specialize", TRUNK, "s", *domains, *SHORT, "--steps", 40, "--json")
    assert status == 0, err
    report = json.loads(out)
    losses = report["losses"]
    assert {name: list(values) for name, values in losses.items()} == {
        name: ["trunk", "law", "code"] for name in ("law", "code")
    }
    for name, values in losses.items():
        assert values[name] < values["trunk"] - 0.1
        assert values[name] == min(values.values())
        for which, value in values.items():
            found = own_loss(tmp_path / "s", name, None if which == "trunk" else which)
            assert value == pytest.approx(found, abs=1e-4)
    assert report["steps"].keys() == {"together", "law", "code"}
    assert not (tmp_path / ".s.partial").exists()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "s").glob("*.safetensors")}

    status, out, err = tensornet("specialize", TRUNK, "s", "--domain", "sums=sums.txt", *SHORT, "--steps", 20)
    assert status == 0, err
    assert "held-out loss" in out
    assert {name: (tmp_path / "s" / name).read_bytes() for name in kept} == kept
    assert th.load_specialists(tmp_path / "s").names == ["law", "code", "sums"]

    status, out, err = tensornet("generate", "s", "--specialist", "code", "--prompt", "def f", "--json")
    assert status == 0, err
    s = th.load_specialists(tmp_path / "s")
    with torch.no_grad(), s.use("code"):
        ids = load_tokenizer(TRUNK)("def f", return_tensors="pt").input_ids
        made = s.model.eval().generate(input_ids=ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
    assert json.loads(out)["text"] == load_tokenizer(TRUNK).decode(made[0, ids.shape[1] :])
    status, _, err = tensornet("generate", "s", "--prompt", "def f")
    assert status == 2
    assert "there are law, code, sums" in err
    status, _, err = tensornet("generate", TRUNK, "--prompt", "def f", "--specialist", "code")
    assert (status, "not a folder of specialists" in err) == (2, True)


def test_bad_input_changes_nothing(tensornet: Run, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("x")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("s", "--domain", "law=short.txt"), "too short"),
        (("s", "--domain", "law=law.txt", "--domain", "law=code.txt"), "twice"),
        (("s", "--domain", "law.txt"), "KEY=VALUE"),
        (("s", "--domain", "a.b=law.txt"), "cannot be named"),
        (("s", "--domain", "law=none.txt"), "no file"),
        (("s", "--domain", "law=law.txt", "--rank", 1000), "exceeds the shorter side"),
        (("s", "--domain", "law=law.txt", "--share", "middle"), "Unknown --share"),
        (("mine", "--domain", "law=law.txt"), "not a folder of specialists"),
    ]
    for arguments, word in cases:
        status, _, err = tensornet("specialize", TRUNK, *arguments, *(() if "--rank" in arguments else SHORT))
        assert status != 0
        assert word in err
        assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    with pytest.raises(TargetError, match="at least one domain"):
        th.specialize(TRUNK, tmp_path / "s", {})
    with pytest.raises(DestinationError, match="not a folder of specialists"):
        th.specialize(TRUNK, tmp_path / "mine", {"law": tmp_path / "law.txt"}, context=32, rank=4)


def test_training_that_does_harm_is_undone() -> None:
    s = th.specialists(th.load(TRUNK), rank=4)
    s.add("law")
    ids = token_ids(load_tokenizer(TRUNK), th.embedded.calibration_text()[:2_000])
    held_out = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    trunk = mean_loss(s, None, held_out, 8)
    start = s.snapshot()
    for noisy_start in (False, True):
        for core in s.tensors("law").values():
            torch.nn.init.normal_(core, std=1.0)
        assert mean_loss(s, "law", held_out, 8) > trunk
        keep_best(s, "law", s.snapshot() if noisy_start else start, held_out, 8)
        assert mean_loss(s, "law", held_out, 8) == trunk


def test_shared_cores_are_frozen_before_a_specialist_is_trained_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bool] = {}

    def recorded(s: th.Specialists, names: list[str], folder: Path, *data: Any, **options: Any) -> int:
        seen[folder.name] = s.frozen
        return 0

    monkeypatch.setattr(specializing, "_train", recorded)
    files = {name: tmp_path / f"{name}.txt" for name in ("law", "code")}
    th.specialize(TRUNK, tmp_path / "s", files, context=32, rank=4)
    assert seen == {"phase-together": False, "phase-law": True, "phase-code": True}


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(tmp_path: Path) -> None:
    code = (
        "import sys, tensornet_hf as th; "
        "th.specialize(sys.argv[1], sys.argv[2], {'law': 'law.txt', 'code': 'code.txt'}, "
        "steps=60, context=32, rank=4, lr=0.01)"
    )

    def start(folder: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, str(TRUNK), folder], cwd=tmp_path)

    assert start("whole").wait() == 0
    run = start("killed")
    work = tmp_path / ".killed.partial" / "phase-together"
    while not list(work.glob("checkpoint-*/trainer_state.json")):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed").exists()
    assert start("killed").wait() == 0
    assert not (tmp_path / ".killed.partial").exists()
    for name in ("shared", "law", "code"):
        whole, resumed = (load_file(tmp_path / x / f"{name}.safetensors") for x in ("whole", "killed"))
        for key, core in whole.items():
            torch.testing.assert_close(resumed[key], core, rtol=1e-4, atol=1e-5)
