"""The demo, run as a person runs it: a process of its own, offline, from start to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import tensornet as tn
import tensornet_hf
from tensornet_hf.checkpoint.inspection import inspect_folder
from tensornet_hf.embedded import gpt2_path

PROGRAM = """
import socket
def offline(*args): raise RuntimeError("the demo must not reach for the network")
socket.socket.connect = offline
from tensornet._entry import main
main()
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder it wrote and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "demo", "--output", "demo_out"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return folder / "demo_out", result.stdout


def row(printed: str, label: str) -> list[float]:
    """The numbers of one row of the table."""
    (line,) = (line for line in printed.splitlines() if line.startswith(label))
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\d(?:\.\d+)?", line)]


def test_prints_a_table_with_the_right_numbers(done: tuple[Path, str]) -> None:
    folder, printed = done
    parameters = row(printed, "parameters")
    original, compressed, svd = row(printed, "perplexity, held-out text")
    assert parameters[:2] == [940_800, inspect_folder(folder / "model").params]
    assert parameters[2] <= parameters[1]
    recorded = json.loads((gpt2_path() / "training.json").read_text())["heldout_perplexity"]
    assert original == pytest.approx(recorded, rel=2e-3)  # that record drops the last, shorter window
    assert original < compressed < svd
    assert "tokens scored in 265 windows of 128, stride 128" in printed


def test_shows_what_every_model_writes(done: tuple[Path, str]) -> None:
    _, printed = done
    for name in ("original", "compressed", "plain SVD"):
        written = printed.partition(f"{name} writes:\n")[2].partition("\n\n")[0]
        assert len(written.split()) > 20


def test_model_loads_through_transformers(done: tuple[Path, str]) -> None:
    folder, _ = done
    assert tensornet_hf.TensorNetworkConfig  # the import is what registers the method
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert any(isinstance(module, tn.nn.TensorNetworkLinear) for module in model.modules())
    share = (folder / "model" / "model.safetensors").stat().st_size / (
        gpt2_path() / "model.safetensors"
    ).stat().st_size
    assert 0.5 < share < 0.65  # half of the linear layers, all of the embeddings


def test_report_says_the_same(done: tuple[Path, str]) -> None:
    folder, printed = done
    html = (folder / "report.html").read_text()
    for number in re.findall(r"\d+\.\d\d", printed[printed.index("perplexity") :].splitlines()[0]):
        assert number in html
    assert html.count("<svg") == 3
    assert "://" not in html
    assert "tensornet demo --output demo_out" in html or "demo --output demo_out" in html
