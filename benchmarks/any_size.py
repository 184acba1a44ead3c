"""How much processor time, memory and disk does a GGUF file of a large model take?

    python benchmarks/any_size.py                      # Llama of 1.1 billion weights
    python benchmarks/any_size.py --shapes llama-8b qwen3-30b-a3b
    python benchmarks/any_size.py --shapes llama-1b --workers 1 2
    python benchmarks/any_size.py --toy                # seconds; only tests the script

A checkpoint of random bfloat16 weights has the shapes of a known model, but only some of its blocks. It is
compressed to a GGUF file by a process of its own, as by `tensornet compress`. `block_seconds` are the
processor seconds from the loading of weights of a block to the next loading of others. The seconds of the
whole model are counted from their mean and from the rest, which is the time of both ends (the embedding, the
output head and the start of the program). Random weights say nothing about the loss. `peak_gb` is the largest
resident memory of the process without pages of mapped files, `disk_gb` the largest size of all files beside
the result.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.lazy_model import LazyModel

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, processor_seconds, record

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
#: Configuration of each model, with the number of blocks that it really has.
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        **LLAMA,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    },
    "llama-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
    },
    "llama-8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 48,
        "vocab_size": 151936,
    },
}


def config_of(shape: str, blocks: int, vocab_size: int) -> PreTrainedConfig:
    """Return the configuration of a model with some of its blocks, and at least `vocab_size` tokens."""
    options = {**SHAPES[shape], "num_hidden_layers": blocks}
    options["vocab_size"] = max(options.get("vocab_size", 0), vocab_size)
    return AutoConfig.for_model(options.pop("model_type"), dtype="bfloat16", **options)


def make_checkpoint(folder: Path, config: PreTrainedConfig) -> None:
    """Save a model of random weights with the tokenizer of the embedded GPT-2."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in th.embedded.gpt2_path().glob("*token*"):
        shutil.copy(file, folder)


def compress(source: Path, destination: Path, bits: float, workers: int) -> dict[str, Any]:
    """Compress a folder to a GGUF file in this process, and return seconds, memory and disk."""
    peak, disk, done = [0], [0], threading.Event()
    staging = destination.with_name(f".{destination.name}.partial")

    def watch() -> None:
        while not done.wait(0.1):
            fields = Path("/proc/self/statm").read_text().split()
            peak[0] = max(peak[0], (int(fields[1]) - int(fields[2])) * 4096)
            with suppress(FileNotFoundError):  # a file may vanish meanwhile
                sizes = [x.stat().st_blocks * 512 for x in staging.rglob("*") if x.suffix != ".gguf"]
                disk[0] = max(disk[0], sum(sizes))

    thread = threading.Thread(target=watch)
    thread.start()
    start, wall = processor_seconds(), time.perf_counter()
    try:
        with seconds_by_part() as spent:
            report = th.compress_folder(
                source,
                destination,
                tn.CompressionConfig(bits_per_weight=bits),
                th.CompressOptions(calibration="default", workers=workers),
            )
    finally:
        done.set()
        thread.join()
    return {
        "block_seconds": round(spent["blocks"], 1),
        "processor_seconds": round(processor_seconds() - start, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "peak_gb": round(peak[0] / 1e9, 2),
        "disk_gb": round(disk[0] / 1e9, 3),
        "file_gb": round(report.file_bytes_after / 1e9, 3),
    }


@contextmanager
def seconds_by_part() -> Iterator[Counter[str]]:
    """Count the processor seconds of blocks; a part begins when its weights are loaded."""
    spent, load = Counter[str](), LazyModel.loaded
    last = ["ends", processor_seconds()]

    def switch(part: str) -> None:
        now = processor_seconds()
        spent[last[0]] += now - last[1]
        last[:] = part, now

    def loaded(self: LazyModel, modules: Any, **options: Any) -> Any:
        modules = list(modules)
        names = {id(module): name for name, module in self.model.named_modules()}
        if modules:
            inside = all(re.search(r"\.\d+(\.|$)", names[id(module)]) for module in modules)
            switch("blocks" if inside else "ends")
        return load(self, modules, **options)

    LazyModel.loaded = loaded  # type: ignore[method-assign, assignment]
    try:
        yield spent
    finally:
        LazyModel.loaded = load  # type: ignore[method-assign]
        switch("ends")


def counted(row: dict[str, Any], shape: str) -> dict[str, Any]:
    """Count the processor hours of the whole model from a run with some of its blocks."""
    a_block, ends = row["block_seconds"] / row["blocks"], row["processor_seconds"] - row["block_seconds"]
    blocks = SHAPES[shape]["num_hidden_layers"]
    return {
        "blocks": blocks,
        "seconds_a_block": round(a_block, 1),
        "seconds_of_both_ends": round(ends, 1),
        "processor_hours": round((ends + blocks * a_block) / 3600, 2),
    }


def main(arguments: Sequence[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-1b"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[2], help="numbers of blocks to run")
    parser.add_argument("--workers", nargs="+", type=int, default=[1])
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--folder", type=Path, help="folder for checkpoints, which are kept there")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # a child process: source and destination
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.workers[0] if options.run else 1)  # the walks run in the main process
    if options.run:
        source, destination = map(Path, options.run)
        print(json.dumps(compress(source, destination, options.bits, options.workers[0])))
        return None
    shapes = ["toy"] if options.toy else options.shapes
    rows: list[dict[str, Any]] = []
    counts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for shape in shapes:
            for blocks in sorted(options.blocks):
                source = folder / f"{shape}-{blocks}"
                if not source.is_dir():
                    make_checkpoint(source, config_of(shape, blocks, vocab_size=50257))
                for workers in options.workers:
                    place = [str(source), str(Path(temporary) / f"{shape}-{blocks}-{workers}.gguf")]
                    command = [sys.executable, __file__, "--run", *place, "--workers", str(workers)]
                    command += ["--bits", str(options.bits)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                    row = {"shape": shape, "blocks": blocks, "workers": workers, "bits": options.bits}
                    rows.append({**row, **found})
                    print(rows[-1], flush=True)
                    Path(place[1]).unlink()
            # The seconds of workers are only known when they have ended.
            if alone := [row for row in rows if row["shape"] == shape and row["workers"] == 1]:
                counts[shape] = counted(alone[-1], shape)
                print(shape, counts[shape])
    return record("any_size", rows, folder=options.records, summary=counts, dtype="bfloat16")


if __name__ == "__main__":
    main()
