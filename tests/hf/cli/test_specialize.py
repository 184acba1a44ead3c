"""The command that trains specialists: a table, files that later runs keep, and generated text."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import copy_with_bos
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import tensornet_hf as th
from tensornet.errors import DestinationError, FormatError, TargetError
from tensornet_hf.specialist_files import PretrainedSpecialists
from tensornet_hf.specializing import _batches_in_turn, mean_loss, undo_harm
from tensornet_hf.text import load_tokenizer, token_ids
from tests.hf.cli.conftest import Run

TRUNK = th.embedded.gpt2_path()
TEXTS = {
    "law": th.embedded.heldout_text()[:4_000].upper(),
    "code": "".join(f"def f{k}(x):\n    return [x + {k} for _ in range({k % 7})]\n" for k in range(60)),
    "sums": "".join(f"{k} + {k * k % 91} = {k + k * k % 91}; " for k in range(200)),
}
SHORT = ("--context", 32, "--rank", 4, "--lr", 0.01)
FEW: dict[str, Any] = {"context": 32, "rank": 4, "lr": 0.01}


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


def test_windows_and_prompts_begin_as_texts_do(
    tensornet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokenizers put a token before every text."""
    bos, seen = copy_with_bos(TRUNK, tmp_path / "trunk"), []

    def measured(s: Any, which: str | None, windows: torch.Tensor, batch_size: int) -> float:
        seen.append(windows)
        return mean_loss(s, which, windows, batch_size)

    monkeypatch.setattr("tensornet_hf.specializing.mean_loss", measured)
    texts = {"law": tmp_path / "law.txt"}
    th.specialize(tmp_path / "trunk", tmp_path / "s", texts, steps=1, **FEW)
    assert seen
    assert all(bool((x[:, 0] == bos).all() and (x[:, 1:] != bos).all()) for x in seen)

    choose, prompts = PretrainedSpecialists.choose, []

    def chosen(self: PretrainedSpecialists, **inputs: Any) -> Any:
        prompts.append(inputs["input_ids"])
        return choose(self, **inputs)

    monkeypatch.setattr(PretrainedSpecialists, "choose", chosen)
    assert tensornet("generate", "s", "def f", "--max-new-tokens", 1)[0] == 0
    assert [int(x[0, 0]) for x in prompts] == [bos]


def test_a_specialist_is_added_to_a_folder_and_used(tensornet: Run, small: Path) -> None:
    how = (*SHORT, "--steps", 4)
    status, out, err = tensornet("specialize", small, "s", "--domain", "law=short.txt", *how, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert (list(report["losses"]["law"]), report["steps"]) == (["trunk", "law"], 4)
    kept = {path.name: path.read_bytes() for path in Path("s").glob("*.safetensors")}
    assert report["losses"]["law"]["law"] < report["losses"]["law"]["trunk"] - 1e-3
    status, out, err = tensornet("specialize", small, "s", "--domain", "sums=sums.txt", *how, "--json")
    assert status == 0, err
    losses = json.loads(out)["losses"]["sums"]
    for which, loss in losses.items():  # shared cores are those of the first run
        assert loss == pytest.approx(
            own_loss(Path("s"), "sums", None if which == "trunk" else which), abs=2e-5
        )
    assert losses["sums"] < losses["trunk"] - 1e-3
    assert not Path(".s.partial").exists()
    assert {name: (Path("s") / name).read_bytes() for name in kept} == kept
    s = th.load_specialists("s")
    assert s.names == ["law", "sums"]
    for core in s.tensors("sums").values():
        core.data *= 30
    s.save("s", force=True)
    tokenizer = load_tokenizer(small)
    ids, texts = tokenizer("def f", return_tensors="pt").input_ids, {}
    for name in (None, "law", "sums"):
        named = ("--specialist", name) if name else ()
        status, out, err = tensornet("generate", "s", "def f", *named, "--max-new-tokens", 8, "--json")
        assert status == 0, err
        texts[name] = json.loads(out)["text"]
        with torch.no_grad(), s.use(name or s.choose(input_ids=ids)[0]):
            made = s.model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert texts[name] == tokenizer.decode(made[0, ids.shape[1] :])
    assert texts["law"] != texts["sums"]
    status, _, err = tensornet("eval", "s", "--text", "sums.txt", "--context", 32)
    assert (status, "with one of law, sums" in err) == (2, True)


@pytest.mark.slow
def test_specialists_are_trained_added_and_used(tensornet: Run, tmp_path: Path) -> None:
    domains = ("--domain", "law=law.txt", "--domain", "code=code.txt")
    status, out, err = tensornet("specialize", TRUNK, "s", *domains, *SHORT, "--steps", 16, "--json")
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
    assert (report["steps"] <= 32, report["rate"], report["rates"]) == (True, 0.01, {})
    assert not (tmp_path / ".s.partial").exists()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "s").glob("*.safetensors")}

    status, out, err = tensornet("specialize", TRUNK, "s", "--domain", "sums=sums.txt", *SHORT, "--steps", 2)
    assert status == 0, err
    assert "held-out loss" in out
    assert {name: (tmp_path / "s" / name).read_bytes() for name in kept} == kept
    assert th.load_specialists(tmp_path / "s").names == ["law", "code", "sums"]

    status, out, err = tensornet("generate", "s", "--specialist", "code", "def f", "--json")
    assert status == 0, err
    s = th.load_specialists(tmp_path / "s")
    with torch.no_grad(), s.use("code"):
        ids = load_tokenizer(TRUNK)("def f", return_tensors="pt").input_ids
        made = s.model.eval().generate(input_ids=ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
    assert json.loads(out)["text"] == load_tokenizer(TRUNK).decode(made[0, ids.shape[1] :])
    # Without a name, the specialist that finds the prompt most likely is used: here the same one.
    assert s.choose(input_ids=ids) == ["code"]
    status, found, err = tensornet("generate", "s", "def f", "--json")
    assert (status, json.loads(found)["text"]) == (0, json.loads(out)["text"])
    status, _, err = tensornet("generate", TRUNK, "def f", "--specialist", "code")
    assert (status, "not a folder of specialists" in err) == (2, True)

    read = ("eval", "s", "--text", "code.txt", "--context", 32, "--json")
    measured = {}
    for name in ("code", "law"):
        status, out, err = tensornet(*read, "--specialist", name)
        assert status == 0, err
        measured[name] = json.loads(out)["loss"]
    assert measured["code"] < measured["law"] - 0.1
    status, _, err = tensornet(*read)
    assert (status, "with one of law, code, sums" in err) == (2, True)


def test_a_folder_is_inspected_and_exported(tensornet: Run, tmp_path: Path) -> None:
    s = th.specialists(th.load(TRUNK), rank=4)
    s.add("law")
    s.save(tmp_path / "s")
    status, out, err = tensornet("export", "s", "law-lora", "--specialist", "law", "--json")
    assert (status, json.loads(out)) == (0, {"adapter": str(tmp_path / "law-lora")}), err
    assert (tmp_path / "law-lora" / "adapter_model.safetensors").is_file()
    for wrong in (("s",), ("s", "--specialist", "law", "--networks", "lora"), (TRUNK, "--specialist", "law")):
        status, _, err = tensornet("export", wrong[0], "x", *wrong[1:])
        assert status != 0
        assert "specialist" in err

    status, out, err = tensornet("inspect", "s", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert {"shared": found["shared"], **found["specialists"], "next": found["next"]} == s.bytes()
    status, out, _ = tensornet("inspect", "s")
    assert status == 0
    assert f"{found['shared']:,} bytes" in out


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Folder of the first block of the trunk, with a short text."""
    folder = tmp_path / "small"
    shutil.copytree(TRUNK, folder)
    config = {**json.loads((folder / "config.json").read_text()), "n_layer": 1}
    model = GPT2LMHeadModel(GPT2Config(**config))
    model.load_state_dict(th.load(TRUNK).state_dict(), strict=False)
    model.save_pretrained(folder)
    (tmp_path / "short.txt").write_text(TEXTS["law"][:1_200])
    return folder


@pytest.mark.slow
def test_the_best_rate_of_short_trials_is_taken(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensornet_hf.specializing.RATES", (1e-8, 5e-3, 1e4))
    options = {"steps": 8, "context": 32, "rank": 4}
    report = th.specialize(small, tmp_path / "s", {"law": tmp_path / "short.txt"}, **options)
    assert report.rates.keys() == {1e-8, 5e-3, 1e4}
    assert report.rate == 5e-3 == min(report.rates, key=report.rates.__getitem__)
    # Trials leave nothing behind: the result is that of this rate.
    given = th.specialize(small, tmp_path / "t", {"law": tmp_path / "short.txt"}, **options, lr=5e-3)
    assert given.losses == report.losses


class Killed(Exception):
    """An interruption before the specialists are saved."""


def interrupt(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PretrainedSpecialists, "save", killed)
        with pytest.raises(Killed):
            th.specialize(*arguments, **options)


@pytest.mark.slow
def test_a_run_resumes_only_what_it_began(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, options = tmp_path / "short.txt", {**FEW, "steps": 2}
    expected = th.specialize(small, tmp_path / "fresh", {"law": text}, **options).losses
    run = small, tmp_path / "s", {"law": text}
    interrupt(monkeypatch, *run, **options)
    for changed in ({"steps": 5}, {"rank": 8}, {"seed": 1}):
        with pytest.raises(FormatError, match=r"other options.*resume=False"):
            th.specialize(*run, **{**options, **changed})
    content = text.read_text()
    text.write_text(content + "more")
    with pytest.raises(FormatError, match="other texts"):
        th.specialize(*run, **options)
    text.write_text(content)
    assert th.specialize(*run, **options).losses == expected
    # With `resume=False`, nothing of the old run is used or left.
    run = small, tmp_path / "t", {"law": text}
    interrupt(monkeypatch, *run, **{**options, "seed": 1})
    assert th.specialize(*run, **options, resume=False).losses == expected
    assert not (tmp_path / ".t.partial").exists()


def test_a_run_does_not_resume_on_another_trunk(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = (small, tmp_path / "s", {"law": tmp_path / "short.txt"}), {**FEW, "steps": 2}
    interrupt(monkeypatch, *run, **options)
    other = th.load(small)
    for p in other.parameters():
        p.data += 0.01 * torch.randn_like(p)
    other.save_pretrained(small)
    with pytest.raises(FormatError, match="changed since"):
        th.specialize(*run, **options)


@pytest.mark.slow
def test_a_run_that_adds_to_a_folder_depends_on_its_cores(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, options = tmp_path / "short.txt", {**FEW, "steps": 2}
    s = th.specialists(th.load(small), rank=4)
    s.add("law")
    s.save(tmp_path / "s")
    run = small, tmp_path / "s", {"code": text}
    interrupt(monkeypatch, *run, **options)
    s.shared_parameters()[0].data += 1
    s.save(tmp_path / "s", force=True)
    with pytest.raises(FormatError, match="other specialists"):
        th.specialize(*run, **options)
    assert th.specialize(*run, **options, resume=False).steps == 2


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
        (("s", "--domain", "law=law.txt", "--lr", -1), "positive"),
        (("s", "--domain", "law=none.txt"), "no file"),
        (("s", "--domain", "law=law.txt", "--rank", 1000), "exceeds the shorter side"),
        (("s", "--domain", "law=law.txt", "--share", "middle"), "Unknown --share"),
        (("mine", "--domain", "law=law.txt"), "not a folder of specialists"),
    ]
    for arguments, word in cases:
        status, _, err = tensornet(
            "specialize", TRUNK, *arguments, *(() if "--rank" in arguments else SHORT[:4])
        )
        assert status != 0
        assert word in err
        assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    with pytest.raises(TargetError, match="at least one domain"):
        th.specialize(TRUNK, tmp_path / "s", {})
    with pytest.raises(DestinationError, match="not a folder of specialists"):
        th.specialize(TRUNK, tmp_path / "mine", {"law": tmp_path / "law.txt"}, **FEW)


def test_training_that_does_harm_is_undone() -> None:
    s = th.specialists(th.load(TRUNK), rank=4)
    s.add("law")
    ids = token_ids(load_tokenizer(TRUNK), th.embedded.calibration_text()[:2_000])
    held_out = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    trunk = mean_loss(s, None, held_out, 8)
    undo_harm(s, "law", held_out, 8)
    for core in s.tensors("law").values():
        torch.nn.init.normal_(core, std=1.0)
    assert mean_loss(s, "law", held_out, 8) > trunk
    undo_harm(s, "law", held_out, 8)
    assert mean_loss(s, "law", held_out, 8) == trunk


def test_a_batch_has_one_domain_and_the_domains_take_turns() -> None:
    windows = [torch.arange(0, 10)[:, None], torch.arange(100, 103)[:, None]]
    found = _batches_in_turn(windows, steps=8, batch_size=4, seed=0)
    for step in range(8):
        batch = found[4 * step : 4 * step + 4]
        assert {int(x["specialist"]) for x in batch} == {step % 2}
        assert all((int(x["input_ids"]) >= 100) == step % 2 for x in batch)
    for number, x in enumerate(windows):
        seen = [int(example["input_ids"]) for example in found if int(example["specialist"]) == number]
        assert len(seen) == 16
        for first in range(0, 16 - len(x), len(x)):  # each window once before any of them again
            assert sorted(seen[first : first + len(x)]) == x.flatten().tolist()
    other = _batches_in_turn(windows, steps=8, batch_size=4, seed=1)
    assert [int(x["input_ids"]) for x in other] != [int(x["input_ids"]) for x in found]


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(small: Path, tmp_path: Path) -> None:
    code = (
        "import sys, tensornet_hf as th; "
        "th.specialize(sys.argv[1], sys.argv[2], {'law': 'law.txt', 'code': 'code.txt'}, "
        "steps=60, context=32, rank=4, lr=0.01)"
    )

    def start(folder: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, str(small), folder], cwd=tmp_path)

    assert start("whole").wait() == 0
    run = start("killed")
    work = tmp_path / ".killed.partial" / "run"
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
