"""A checkpoint several times larger than the memory that its compression may use."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import fault_tasks
import pytest
import torch
from safetensors.torch import save_file

import tensornet as tn

MB = 2**20
#: A weight of 512 x 512 in float32 is 1 MB, in double precision 2 MB, of which a decomposition holds several.
SIZE, LAYERS, SHARDS = 512, 40, 8
ALLOWED = 64 * MB


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 MB in 8 files, of no model in particular."""
    folder = tmp_path_factory.mktemp("memory") / "dense"
    folder.mkdir()
    torch.manual_seed(0)
    index = {}
    for number in range(SHARDS):
        names = [f"layers.{number}.expert{k}.weight" for k in range(LAYERS)]
        tensors = {name: torch.randn(SIZE, SIZE) for name in names}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text('{"model_type": "of_tomorrow"}')
    return folder


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 50 * MB], ids=["one file", "many files"])
def test_memory_does_not_grow_with_the_checkpoint(source: Path, tmp_path: Path, shard_bytes: int) -> None:
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 4 * ALLOWED
    config = tn.CompressionConfig(target_modules="re:.*expert0", topology="low_rank", max_bond=16)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensornet_hf.streaming"])
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=fault_tasks.compress_and_tell,
        args=(
            theirs,
            (source, tmp_path / "out", config),
            {"max_shard_bytes": shard_bytes},
            {"data_growth": ALLOWED},
        ),
    )
    process.start()
    kind, report, text = answer.recv()
    process.join()
    assert kind == "done", text
    assert len(report["layers"]) == SHARDS
    assert report["largest_tensor"] == MB
    assert f"peak memory: {report['peak_memory'] / 1e6:,.0f} MB" in text


def test_the_limit_is_one(tmp_path: Path) -> None:
    """The same limit ends a process that holds the checkpoint as a whole."""
    context = multiprocessing.get_context("forkserver")
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=fault_tasks.allocate_and_tell, args=(theirs, 4 * ALLOWED, ALLOWED))
    process.start()
    assert answer.recv() == "MemoryError"
    process.join()
