"""A checkpoint several times larger than the memory that its compression may use."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import fault_tasks
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet as tn

MB = 2**20
#: A weight of 512 x 512 in float32 is 1 MB, in double precision 2 MB, of which a decomposition holds several.
SIZE, BLOCKS, LAYERS = 512, 48, 8
ALLOWED = 64 * MB


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """336 MB in several files: a model whose matrices are all of one size, 7 in each block."""
    folder = tmp_path_factory.mktemp("memory") / "dense"
    config = LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        vocab_size=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40MB")
    return folder


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 50 * MB], ids=["one file", "many files"])
def test_memory_does_not_grow_with_the_checkpoint(source: Path, tmp_path: Path, shard_bytes: int) -> None:
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 4 * ALLOWED
    config = tn.CompressionConfig(target_modules=r"re:.*\.[0-7]\..*q_proj", topology="low_rank", max_bond=16)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensornet_hf.streaming", "transformers.models.llama.modeling_llama"])
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
    assert len(report["layers"]) == LAYERS
    assert report["largest_tensor"] == MB
    assert f"peak memory: {report['peak_memory'] / 1e6:,.0f} MB" in text


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="other systems do not tell")
def test_a_process_counts_nothing_of_the_one_that_started_it() -> None:
    """With vfork getrusage tells a new process the peak of its parent."""
    small = "from tensornet.streaming.worker import peak_memory; print(peak_memory())"
    large = (
        "import subprocess, sys\nheld = bytearray(b'x') * 1_000_000_000\n"
        f"print(subprocess.check_output([sys.executable, '-c', {small!r}]).decode())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.check_output([sys.executable, "-c", large], env=environment)
    assert 10 * MB < int(told) < 800_000_000


def test_the_limit_is_one(tmp_path: Path) -> None:
    """The same limit ends a process that holds the checkpoint as a whole."""
    context = multiprocessing.get_context("forkserver")
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=fault_tasks.allocate_and_tell, args=(theirs, 4 * ALLOWED, ALLOWED))
    process.start()
    assert answer.recv() == "MemoryError"
    process.join()
