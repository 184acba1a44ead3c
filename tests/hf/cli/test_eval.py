"""`tensornet eval` and `compress --held-out`: tasks against a count of their own, and bad input."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text, mixed_text
from tensornet_hf.evaluate import TaskError, run_tasks
from tensornet_hf.text import load_tokenizer

Run = Callable[..., tuple[int, str, str]]
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'tensornet-torch[eval]'"
)
TASK = """task: verses
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [
    ("In the beginning God created the heaven and the", [" earth.", " qx."], 0),
    ("And God said, Let there be light: and there was", [" zzz", " light."], 1),
    ("And the LORD said unto Moses,", [" Jqv", " Go"], 0),
]


def task_folder(folder: Path, data: str | None = None) -> Path:
    """A task of three questions, the last of which has the unlikely answer as the right one."""
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (folder / "verses.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "verses.yaml").write_text(TASK.format(data=data or folder / "verses.jsonl"))
    return folder


@pytest.mark.slow
@needs_harness
def test_a_task_of_ones_own_runs_offline(tmp_path: Path) -> None:
    """As a person runs it: a process of its own, without network, on a compressed model."""
    how = [sys.executable, "-W", "ignore", "-c", "from tensornet._entry import main; main()"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*how, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=1200
        )

    options = ("--topology-option", "rel_error=0.1", "--method", "svd", "--target", "h.0.mlp.c_fc")
    done = call("compress", str(gpt2_path()), "small", *options)
    assert done.returncode == 0, done.stderr
    path = ("--task-path", str(task_folder(tmp_path)))
    done = call("eval", "small", "--tasks", "verses", *path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tasks"]
    assert found["samples"] == {"verses": 3}
    assert found["scores"]["verses"]["acc"] == pytest.approx(2 / 3)


@pytest.mark.slow
@needs_harness
def test_shots_limit_and_the_likelier_answer(tmp_path: Path) -> None:
    model, tokenizer = th.load(gpt2_path()), load_tokenizer(gpt2_path())
    folder = task_folder(tmp_path)
    found = run_tasks(model, tokenizer, ["verses"], task_path=folder / "verses.yaml", limit=2)
    assert found.samples == {"verses": 2}
    right = 0
    for question, choices, answer in QUESTIONS[:2]:
        losses = []
        for choice in choices:
            start = tokenizer(question, return_tensors="pt").input_ids
            ids = tokenizer(question + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                steps = model(ids).logits[0].log_softmax(-1)
            positions = range(start.shape[1], ids.shape[1])
            losses.append(sum(float(steps[k - 1, ids[0, k]]) for k in positions))
        right += int(max(range(2), key=losses.__getitem__) == answer)
    assert found.scores["verses"]["acc"] == right / 2


@pytest.mark.slow
@needs_harness
def test_tasks_that_need_the_network_say_so(tmp_path: Path, encoder: Path) -> None:
    model, tokenizer = th.load(gpt2_path()), load_tokenizer(gpt2_path())
    folder = task_folder(tmp_path, data=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(TaskError, match=r"verses.*JSON"):
        run_tasks(model, tokenizer, ["verses"], task_path=folder)
    with pytest.raises(TaskError, match="Unknown task 'verse'"):
        run_tasks(model, tokenizer, ["verse"], task_path=folder)
    with pytest.raises(TaskError, match="no task file"):
        run_tasks(model, tokenizer, ["verses"], task_path=tmp_path / "no")
    with pytest.raises(TargetError, match="BertModel"):
        run_tasks(th.load(encoder), load_tokenizer(encoder), ["verses"], task_path=folder)


def test_without_the_harness_the_pip_line_is_named(tensornet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensornet._util.find_spec", lambda name: None)
    status, out, err = tensornet("eval", gpt2_path(), "--tasks", "arc_easy")
    assert (status, out) == (1, "")
    assert "tensornet eval --tasks needs lm_eval" in err
    assert "pip install 'tensornet-torch[eval]'" in err


def test_several_texts_are_listed_worst_first(tensornet: Run) -> None:
    Path("verses.txt").write_text(heldout_text()[:6_000])
    Path("mixed.txt").write_text(mixed_text()[:6_000])
    status, _, err = tensornet("compress", gpt2_path(), "small", "--formats", "int4", "--method", "nearest")
    assert status == 0, err
    texts = ("--text", "verses.txt", "--text", "mixed.txt")
    status, out, err = tensornet("eval", "small", "--reference", gpt2_path(), *texts, "--json")
    assert status == 0, err
    found = json.loads(out)["texts"]
    assert [x["text"] for x in found] == ["mixed.txt", "verses.txt"]  # GPT-2 knows verses alone
    alone = json.loads(tensornet("eval", "small", "--reference", gpt2_path(), *texts[:2], "--json")[1])
    assert {name: alone[name] for name in found[1]} == found[1]
    status, out, _ = tensornet("eval", "small", *texts)
    assert status == 0
    header, *rows = out.splitlines()
    assert header.split() == ["text", "loss", "perplexity", "tokens"]
    assert [row.split()[:2] for row in rows] == [[x["text"], f"{x['loss']:.4f}"] for x in found]


@pytest.mark.slow
def test_held_out_text_measures_plain_methods_of_the_same_bytes(tensornet: Run) -> None:
    Path("cal.txt").write_text(calibration_text()[:8_000])
    Path("held.txt").write_text(heldout_text()[:6_000])
    how = ("--bits", 4.25, "--formats", "int5,int4,int3", "--target", "*.h.[01].mlp.c_fc")
    arguments = ("compress", gpt2_path(), "small", *how, "--calibration", "cal.txt", "--held-out", "held.txt")
    status, out, _ = tensornet(*arguments, "--report", "r.html")
    assert status == 0
    measured = {x.split()[2]: x for x in out.splitlines() if x.startswith("held out")}
    assert list(measured) == ["original", "compressed", "round", "GPTQ", "plain"]
    page = Path("r.html").read_text()
    assert "measured</em>" in page
    assert "gpt2, compressed" in page
    assert str(gpt2_path()) not in page
    loss = float(json.loads(tensornet("eval", "small", "--text", "held.txt", "--json")[1])["loss"])
    dense = float(json.loads(tensornet("eval", gpt2_path(), "--text", "held.txt", "--json")[1])["loss"])
    increase = float(measured["compressed"].partition("loss increase ")[2].split(",")[0])
    assert loss - dense == pytest.approx(increase, abs=2e-4)


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_a_text_says_nothing_about_models_that_write_none(
    tensornet: Run, kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    Path("cal.txt").write_text("\n\n".join(["rain falls a cat", "the sun shines warm"] * 8))
    Path("held.txt").write_text("the wet kitten\n\na warm rain shines\n")
    texts = ("--calibration", "cal.txt", "--held-out", "held.txt")
    status, _, err = tensornet("compress", folder, "small", "--bits", 5, *texts)
    assert status == 1
    assert "no loss can be measured on text without labels" in err
    assert not Path("small").exists()
