"""Damaged and hostile sources, killed runs, full disks: one clear error each, and nothing half done."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from safetensors.torch import load_file, save_file
from sharded_folders import HALF, contents, save

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError, FormatError, NonFiniteError, TargetError
from tensornet_hf.checkpoint import RECEIPT
from tensornet_hf.staging import staging, staging_folder

CONFIG = tn.CompressionConfig(**HALF)
INDEX = "model.safetensors.index.json"
SMALL = {"max_shard_bytes": 6_000}
#: A run in a process of its own, whose files may not grow beyond a limit.
SCRIPT = """
import resource, sys
import tensornet as tn, tensornet_hf as th
source, out, workers, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if __name__ == "__main__":
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    print("ready", flush=True)
    config = tn.CompressionConfig(param_ratio=0.5, method="svd")
    th.compress_folder(source, out, config, th.CompressOptions(workers=workers, max_shard_bytes=6_000))
"""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("faults") / "dense")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "dense")


def shard(source: Path) -> Path:
    return min(source.glob("*.safetensors"))


class Meanwhile(ThreadPoolExecutor):
    """Executor that also saves another model at the destination of the run."""

    def __init__(self, destination: Path) -> None:
        super().__init__(1)
        self.destination = destination

    def submit(self, *arguments: Any, **options: Any) -> Future[Any]:
        if not self.destination.exists():
            self.destination.mkdir()
            (self.destination / "config.json").write_text("{}")
        return super().submit(*arguments, **options)


def test_a_model_saved_during_the_run_is_not_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DestinationError, match="exists"):
        compress_files(source, out, CONFIG, executor=Meanwhile(out), **SMALL)
    assert (out / "config.json").read_text() == "{}"
    compress_files(source, out, CONFIG, force=True, **SMALL)
    th.load(out)


def refused(source: Path, match: str, error: type[Exception] = FormatError) -> None:
    """The run ends with this error and leaves neither a destination nor a trace in the source."""
    before, out = contents(source), source.parent / "out"
    with pytest.raises(error, match=match):
        compress_files(source, out, CONFIG)
    assert not out.exists()
    assert contents(source) == before


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_damaged_or_mixed_up_shards(source: Path) -> None:
    """As `read_checkpoint` refuses them everywhere."""
    name, files = shard(source).name, sorted(source.glob("*.safetensors"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-3])
    refused(source, rf"{name} is truncated or damaged")
    files[0].write_bytes(whole)
    edit_json(source / INDEX, lambda x: x["weight_map"].update(ghost=name))
    refused(source, f"{name} contains 'ghost', but it does not")
    shutil.copyfile(files[1], files[0])
    refused(source, "both store|says that .* holds")
    files[0].unlink()
    refused(source, f"lacks {name}")


def test_not_a_number(source: Path) -> None:
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if (name := "model.layers.1.mlp.up_proj.weight") in tensors:
            tensors[name][3, 5] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
    refused(source, r"'model\.layers\.1\.mlp\.up_proj' contains 1 NaN or infinite value", NonFiniteError)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("hidden_size", 10**15, "hidden_size"),
        ("hidden_size", 4096, "stored with shape"),
        ("hidden_size", -24, "hidden_size"),
        ("num_attention_heads", 0, "does not describe"),
        ("hidden_act", "os.system", "does not describe"),
        ("rope_scaling", {"num_layers": 10**12}, "num_layers"),
        ("quantization_config", {"quant_method": "fp8"}, "quantized by 'fp8'"),
        ("model_type", "of_tomorrow", "of_tomorrow"),
        ("architectures", ["LlamaConfig"], "does not have"),
    ],
)
def test_hostile_configuration(source: Path, key: str, value: object, match: str) -> None:
    edit_json(source / "config.json", lambda x: x.update({key: value}))
    refused(source, match)


def test_code_is_never_run_and_pickles_are_not_opened(source: Path) -> None:
    marker = source.parent / "ran"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_json(source / "config.json", lambda x: x.update(model_type="evil", auto_map=auto_map))
    refused(source, "custom code")
    for file in [*source.glob("*.safetensors"), source / INDEX]:
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused(source, r"only pytorch_model\.bin.*never opened")
    assert not marker.exists()


def test_integer_weights(tmp_path: Path) -> None:
    file = save("llama", tmp_path / "dense", shard="1GB") / "model.safetensors"
    name = "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path / "dense", rf"'{name}' is stored as I8.*exclude", TargetError)


def test_destinations_and_options_that_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="source"):
        compress_files(source, source, CONFIG, force=True)
    with pytest.raises(DestinationError, match="inside the source"):
        compress_files(source, source / "out", CONFIG)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    with pytest.raises(DestinationError, match="exists already"):
        compress_files(source, tmp_path / "taken", CONFIG)
    with staging(tmp_path / "locked"), pytest.raises(DestinationError, match="Another run"):
        compress_files(source, tmp_path / "locked", CONFIG)
    with pytest.raises(ValueError, match="workers"):
        compress_files(source, tmp_path / "none", CONFIG, workers=0)
    with pytest.raises(RuntimeError, match="nonsense"):
        compress_files(source, tmp_path / "none", CONFIG, device="nonsense")
    compress_files(source, tmp_path / "taken", CONFIG, force=True)
    with pytest.raises(TargetError, match="compressed already"):
        compress_files(tmp_path / "taken", tmp_path / "again", CONFIG)


def start(folder: Path, *, workers: int = 1, limit: int = 0) -> subprocess.Popen[str]:
    """Start a run, and wait until it has imported the library."""
    (folder / "script.py").write_text(SCRIPT)
    words = [sys.executable, "-W", "ignore", folder / "script.py", folder / "dense", folder / "out"]
    run = subprocess.Popen(
        [*words, str(workers), str(limit)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run


def finished(folder: Path) -> int:
    """Count the tensors that an interrupted run has written, by the lines of its journals."""
    journals = (staging_folder(folder / "out") / "out").glob("*.journal")
    return sum(len(path.read_bytes().splitlines()) - 1 for path in journals)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(source: Path, tmp_path: Path) -> None:
    compress_files(source, tmp_path / "expected", CONFIG, **SMALL)
    draw = random.Random(6)
    for wanted in (0, 1, 12, 30):
        run = start(tmp_path)
        while run.poll() is None and finished(tmp_path) < wanted:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        run.kill()
        run.communicate()
        if (tmp_path / "out").exists():
            break
    expected = contents(tmp_path / "expected")
    if not (tmp_path / "out").exists():
        compress_files(source, tmp_path / "out", CONFIG, **SMALL)
        assert not staging_folder(tmp_path / "out").exists()
    elif not (tmp_path / "out" / RECEIPT).exists():  # killed between the model and its receipt
        del expected[RECEIPT]
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    """Files cannot grow beyond a limit, as on a full disk; the system enforces it for root as well."""
    run = start(tmp_path, limit=7_000)
    _, err = run.communicate()
    assert run.returncode != 0
    assert "DestinationError" in err
    assert "Free some space" in err
    assert not (tmp_path / "out").exists()
    compress_files(source, tmp_path / "out", CONFIG, **SMALL)
    th.load(tmp_path / "out")


@pytest.mark.slow
def test_workers_end_with_their_parent(source: Path, tmp_path: Path) -> None:
    run = start(tmp_path, workers=2)
    children: list[int] = []
    while run.poll() is None and len(children) < 2:
        listed = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        children = [x for x in map(int, listed) if b"spawn_main" in Path(f"/proc/{x}/cmdline").read_bytes()]
        time.sleep(0.001)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{x}") for x in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
