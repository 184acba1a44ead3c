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
from tensornet_hf.embedded import gpt2_path

pytestmark = pytest.mark.slow
PROGRAM = """
import logging
for name in ("torchao", "torch.utils._pytree"):  # it logs which kernels do not load here
    logging.getLogger(name).disabled = True
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
        [sys.executable, "-c", PROGRAM, "demo", "demo_out"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return folder / "demo_out", result.stdout


def row(printed: str, label: str) -> tuple[str, list[float]]:
    """One row of the table: its first words and its numbers, bytes in MB."""
    (line,) = (line for line in printed.splitlines() if line.startswith(label) and " MB " in line)
    words = re.split(r"\s{2,}", line.strip())
    return words[0], [float(re.sub(r"[^\d.+-]", "", word)) for word in words[1:]]


def test_prints_bytes_first_and_baselines_of_the_same_bytes(done: tuple[Path, str]) -> None:
    folder, printed = done
    assert re.match(r"\s+bytes\s+bits a weight\s+parameters\s+perplexity\s+loss increase", printed)
    _, (size, bits, params, perplexity) = row(printed, "original")
    assert (size, bits, params) == (3.77, 32, 940_800)
    recorded = json.loads((gpt2_path() / "training.json").read_text())["heldout_perplexity"]
    assert perplexity == pytest.approx(recorded, rel=0.02)  # the beginning of that text
    _, ours = row(printed, "compressed")
    assert 1e6 * ours[0] == pytest.approx((folder / "model" / "model.safetensors").stat().st_size, rel=0.01)
    assert ours[1] <= 4.25
    for label in ("round to nearest", "GPTQ", "plain SVD"):
        name, plain = row(printed, label)
        assert plain[0] == pytest.approx(ours[0], rel=0.03), "files have headers"
        assert plain[1] <= 1.01 * ours[1]
        assert plain[4] > ours[4] > 0, f"{name} is better"
    assert row(printed, "GPTQ")[0] == "GPTQ, int4"
    assert "tokens scored on heldout.txt in 256 windows of 128" in printed


def test_saved_model_loads_through_transformers_and_writes(done: tuple[Path, str]) -> None:
    folder, printed = done
    assert len(printed.partition("The saved model writes: ")[2].partition("\n\n")[0].split()) > 20
    assert tensornet_hf.TensorNetworkConfig  # the import is what registers the method
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert any(isinstance(module, tn.nn.TensorNetworkLinear) for module in model.modules())


def test_report_says_the_same(done: tuple[Path, str]) -> None:
    folder, printed = done
    html = (folder / "report.html").read_text()
    for label in ("original", "compressed", "GPTQ"):
        assert f"{row(printed, label)[1][3]:.2f}" in html
    rises = {label: row(printed, label)[1][4] for label in ("compressed", "GPTQ", "round to nearest")}
    for rise in rises.values():
        assert f"{rise:+.4f}" in html
    assert "measured</em>" in html
    assert "Comparison with baselines of the same size" in html
    assert "://" not in html
    assert str(folder.parent) not in html
    assert "tensornet demo demo_out" in html
