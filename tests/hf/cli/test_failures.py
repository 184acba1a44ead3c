"""The program fails as promised: one line on stderr, a status, the source untouched, nothing half-written."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tensornet as tn
from tensornet_hf import CompressOptions, load
from tensornet_hf.compress import estimate
from tensornet_hf.embedded import gpt2_path

# As the console script does, in a process that cannot reach a network.
PROGRAM = """
import socket, sys
def offline(*args): raise RuntimeError("the program must not reach for the network")
socket.socket.connect = offline
{before}
from tensornet._entry import main
main()
"""


def tensornet(*arguments: str, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def put_nan(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


def scribble(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 30)


def take_place(folder: Path) -> None:
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "precious.txt").write_text("mine")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def nothing(folder: Path) -> None:
    """The source is sound."""


@dataclass(frozen=True)
class Failure:
    """A way to fail: what happens before, the arguments after `compress source out`, the message."""

    message: str
    arguments: tuple[str, ...] = ("--param-ratio", "0.5", "--objective", "weight")
    spoil: Callable[[Path], None] = nothing
    before: str = ""
    status: int = 1


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
FAILURES = {
    "destination exists": Failure("out exists already", spoil=take_place),
    "not a model": Failure("is not a model folder: it has no config.json", spoil=no_config),
    "no such layer": Failure(
        "Pattern 'nosuch' matches no layer", ("--rel-error", "0.5", "--target", "nosuch")
    ),
    "plan and other answers": Failure(
        "becomes; leave out --target and --topology",
        ("--plan", "plan.json", "--topology", "mpo", "--target", "c_fc"),
        status=2,
    ),
    "bits without a text": Failure("give --calibration FILE.*--calibration default", ("--bits", "4.25")),
    "no budget": Failure("[Ss]ay how far", ()),
    "a removed option": Failure("No such option.*--formats int8", ("--int8",), status=2),
    "report of nothing": Failure(
        "--report would need", ("--rel-error", "0.5", "--dry-run", "--report", "page.html"), status=2
    ),
    "no workers": Failure("workers.* must be at least 1", ("--rel-error", "0.5", "--workers", "0")),
    "impossible budget": Failure(
        "'transformer.h.0.attn.c_attn'.*budget", ("--param-ratio", "0.0001", "--objective", "weight")
    ),
    "NaN": Failure("'transformer.h.1.mlp.c_fc' holds 1 NaN", spoil=put_nan),
    "truncated file": Failure("model.safetensors is truncated or damaged", spoil=cut_short),
    "damaged header": Failure("model.safetensors is truncated or damaged", spoil=scribble),
    "full disk": Failure("Writing .*out failed: .*[Nn]othing was left", before=FULL_DISK),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_compress_fails_in_one_line(name: str, tmp_path: Path) -> None:
    failure = FAILURES[name]
    source = shutil.copytree(gpt2_path(), tmp_path / "source")
    failure.spoil(source)
    before = contents(tmp_path)
    done = tensornet("compress", "source", "out", *failure.arguments, cwd=tmp_path, before=failure.before)
    assert done.returncode == failure.status
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tensornet: ")
    assert re.search(failure.message, line)
    assert contents(tmp_path) == before  # neither changed nor added, no hidden partial folder either
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "out"}
    assert (tmp_path / "out").exists() == (failure.spoil is take_place)


def test_the_estimate_counts_every_step() -> None:
    model, options = load(gpt2_path()), CompressOptions(calibration="a.txt", held_out="b.txt", heal=3)
    text = estimate(model, tn.CompressionConfig(bits_per_weight=4.25), options)
    for step in ("calibration", "planning", "loss check", "rounding", "plain methods", "without --heal"):
        assert step in text


@pytest.mark.slow
def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """Interrupted in the middle of its work, with and without something to keep."""
    stop = "import {0} as x\ndef stop(_): raise KeyboardInterrupt\nx.{1} = stop"
    before = stop.format("tensornet_hf.compress", "load")
    done = tensornet("compress", str(gpt2_path()), "out", "--rel-error", "0.5", cwd=tmp_path, before=before)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "tensornet: interrupted; nothing was written.\n"
    before = stop.format("tensornet_hf.streaming", "_compress_shard")
    streamed = ("--rel-error", "0.5", "--workers", "1")
    done = tensornet("compress", str(gpt2_path()), "out", *streamed, cwd=tmp_path, before=before)
    assert done.returncode == 130
    assert "what is finished is kept: run the same command again" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


@pytest.mark.slow
def test_hub_id_that_cannot_be_had(tmp_path: Path) -> None:
    done = tensornet("compress", "nobody/nothing", "out", "--rel-error", "0.5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tensornet: nobody/nothing is not a folder here")
    assert list(tmp_path.iterdir()) == []
