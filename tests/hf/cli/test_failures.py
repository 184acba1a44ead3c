"""The program fails as promised: one line on stderr, a status, the source untouched, nothing half-written."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from sharded_folders import contents

import tensornet as tn
from tensornet_hf import CompressOptions, load
from tensornet_hf.compress import estimate
from tensornet_hf.embedded import gpt2_path

Run = Callable[..., tuple[int, str, str]]
# As the console script does, in a process that cannot reach a network.
PROGRAM = """
import logging
for name in ("torchao", "torch.utils._pytree"):  # it logs which kernels do not load here
    logging.getLogger(name).disabled = True
import socket, sys
def offline(*args): raise RuntimeError("the program must not reach for the network")
socket.socket.connect = offline
{before}
from tensornet._entry import main
main()
"""
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
HALF = ("--param-ratio", 0.5, "--objective", "weight")


def in_a_process(*arguments: str, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM.format(before=before), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)


def put_nan(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def scribble(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 30)


def take_place(folder: Path) -> None:
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "precious.txt").write_text("mine")


#: The arguments after `compress source out`, the message, and what happens to the source before.
FAILURES: dict[str, tuple[tuple[object, ...], str, Callable[[Path], object]]] = {
    "destination exists": (HALF, "out exists already", take_place),
    "not a model": (HALF, "has no config.json", lambda folder: (folder / "config.json").unlink()),
    "no such layer": (("--rel-error", 0.5, "--target", "nosuch"), "'nosuch' matches no layer", str),
    "bits without a text": (("--bits", 4.25), "give --calibration FILE.*--calibration default", str),
    "no budget": ((), "says how far", str),
    "no workers": (("--rel-error", 0.5, "--workers", 0), "workers.* must be at least 1", str),
    "impossible budget": (
        ("--param-ratio", 0.0001, "--objective", "weight"),
        "'transformer.h.0.attn.c_attn'.*budget",
        str,
    ),
    "NaN": (HALF, "'transformer.h.1.mlp.c_fc' holds 1 NaN", put_nan),
    "truncated file": (
        HALF,
        "model.safetensors is truncated or damaged",
        lambda folder: os.truncate(folder / "model.safetensors", 1_000_000),
    ),
    "damaged header": (HALF, "model.safetensors is truncated or damaged", scribble),
    "plan and other answers": (
        ("--plan", "plan.json", "--topology", "mpo", "--target", "c_fc"),
        "becomes; leave out --target and --topology",
        str,
    ),
    "a removed option": (("--int8",), "No such option.*--formats int8", str),
    "report of nothing": (
        ("--rel-error", 0.5, "--dry-run", "--report", "page.html"),
        "--report would need",
        str,
    ),
}
WRONG_USAGE = ("plan and other answers", "a removed option", "report of nothing")


@pytest.mark.parametrize("name", FAILURES)
def test_compress_fails_in_one_line(name: str, tensornet: Run, tmp_path: Path) -> None:
    arguments, message, spoil = FAILURES[name]
    spoil(shutil.copytree(gpt2_path(), tmp_path / "source"))
    before = contents(tmp_path)
    status, out, err = tensornet("compress", "source", "out", *arguments)
    assert (status, out) == (2 if name in WRONG_USAGE else 1, "")
    (line,) = err.splitlines()
    assert line.startswith("tensornet: ")
    assert re.search(message, line)
    assert contents(tmp_path) == before  # neither changed nor added, no hidden partial folder either
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "out"}


def test_the_estimate_counts_every_step() -> None:
    model, options = load(gpt2_path()), CompressOptions(calibration="a.txt", held_out="b.txt", heal=3)
    text = estimate(model, tn.CompressionConfig(bits_per_weight=4.25), options)
    for step in ("calibration", "planning", "loss check", "rounding", "plain methods", "without --heal"):
        assert step in text


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    done = in_a_process("compress", str(gpt2_path()), "out", *map(str, HALF), cwd=tmp_path, before=FULL_DISK)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert re.match("tensornet: Writing .*out failed: .*[Nn]othing was left", line)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line(tensornet: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Interrupted in the middle of its work, with and without something to keep."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    plain = ("compress", gpt2_path(), "out", "--rel-error", 0.5)
    monkeypatch.setattr("tensornet_hf.compress.load", stop)
    assert tensornet(*plain) == (130, "", "tensornet: interrupted; nothing was written.\n")
    monkeypatch.setattr("tensornet_hf.streaming._compress_shard", stop)
    status, _, err = tensornet(*plain, "--workers", 1)
    assert status == 130
    assert "what is finished is kept: run the same command again" in err
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


@pytest.mark.slow
def test_hub_id_that_cannot_be_had(tmp_path: Path) -> None:
    done = in_a_process("compress", "nobody/nothing", "out", "--rel-error", "0.5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tensornet: nobody/nothing is not a folder here")
    assert list(tmp_path.iterdir()) == []
