"""Every script of examples/ runs at toy size, offline, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
NUMBER = r"(\d+\.\d+)"
#: How each script is started, and the numbers it prints.
SCRIPTS = {
    "trainer_after_compression": (
        (),
        f"loss: dense {NUMBER}, compressed {NUMBER}, trained {NUMBER}, loaded {NUMBER}",
    ),
    "lora": ((), f"loss: compressed {NUMBER}, with adapters {NUMBER}, merged {NUMBER}"),
    "sentence_encoder": ((), f"mean cosine similarity to the dense model's vectors: {NUMBER}"),
    "fsdp2_accelerate": (
        TORCHRUN,
        f"step 0: loss {NUMBER} on 2 processes\nstep 9: loss {NUMBER} on 2 processes\nsaved GPT2LMHeadModel",
    ),
    "experts_on_disk": (
        (),
        rf"(?s)none: {NUMBER} bytes for a token, logits differ by {NUMBER}.*"
        f"center: {NUMBER} bytes for a token, logits differ by {NUMBER}",
    ),
    "passes": ((), rf"dense: [\d,]+ parameters, loss {NUMBER}\npasses: [\d,]+ parameters, loss {NUMBER}"),
    "image_accuracy": ((), f"accuracy: {NUMBER} on 6 images"),
    "compress_cnn": ((), rf"(?s)dense: {NUMBER}.*healed: {NUMBER}\nloaded: {NUMBER}"),
    "tree_topology": ((), rf"tree: .*, error {NUMBER}\nlow_rank: .*, error {NUMBER}"),
    "search_topology": ((), rf"(?s)low_rank .*? error {NUMBER}, .*smallest error: mpo .*? error {NUMBER}, "),
}


def numbers(name: str, folder: Path) -> list[float]:
    """Run a script and read the numbers that it prints."""
    launcher, pattern = SCRIPTS[name]
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), "--toy", str(folder / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(pattern, done.stdout)
    assert found, done.stdout[-3000:]
    return [float(number) for number in found.groups()]


def test_trainer_after_compression(tmp_path: Path) -> None:
    dense, compressed, trained, loaded = numbers("trainer_after_compression", tmp_path)
    assert dense < trained < compressed
    assert loaded == trained


def test_lora(tmp_path: Path) -> None:
    compressed, adapted, merged = numbers("lora", tmp_path)
    assert adapted < compressed
    assert merged == pytest.approx(adapted, abs=2e-3)


def test_sentence_encoder(tmp_path: Path) -> None:
    (cosine,) = numbers("sentence_encoder", tmp_path)
    assert cosine > 0.99


def test_fsdp2_accelerate(tmp_path: Path) -> None:
    first, last = numbers("fsdp2_accelerate", tmp_path)
    assert last < first


def test_experts_on_disk(tmp_path: Path) -> None:
    private, *differences, shared, last = numbers("experts_on_disk", tmp_path)
    assert max(*differences, last) < 1e-3
    assert shared < private / 10


def test_passes(tmp_path: Path) -> None:
    dense, passes = numbers("passes", tmp_path)
    assert max(dense, passes) < 6.6  # a model of random weights has 6.93


def test_image_accuracy(tmp_path: Path) -> None:
    (accuracy,) = numbers("image_accuracy", tmp_path)
    assert round(6 * accuracy, 2) in range(7)


def test_compress_cnn(tmp_path: Path) -> None:
    dense, healed, loaded = numbers("compress_cnn", tmp_path)
    assert healed > 0.8 * dense
    assert loaded == healed


def test_tree_topology(tmp_path: Path) -> None:
    tree, low_rank = numbers("tree_topology", tmp_path)
    assert tree < 1e-4 < low_rank


def test_search_topology(tmp_path: Path) -> None:
    low_rank, planted = numbers("search_topology", tmp_path)
    assert planted < 1e-4 < low_rank


def test_every_script_is_tested_and_in_the_table() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == SCRIPTS.keys()
    table = (EXAMPLES / "README.md").read_text()
    for name in scripts:
        assert f"[{name}.py]({name}.py)" in table
        assert f"test_{name}" in globals()
