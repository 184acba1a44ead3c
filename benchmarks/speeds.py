"""How many bytes of weights does llama.cpp read and compute in a second, in each number format?

    python benchmarks/speeds.py [--toy] [--threads 2] [--formats int4:g32:float16 iq3_s] [--output FILE]

Needs the extra `gguf` and the package `llama-cpp-py-sync`. For each format, llama.cpp generates with two
random Llama models whose blocks have only this format. They differ in the number of blocks, so the difference
of the times of a token is that of the blocks alone; their attention over a few tokens counts as well. All
models take turns, and the fastest token of each counts, since other programs only slow it. The file is for
`tensornet compress MODEL model.gguf --tokens-per-second 30 --speeds FILE`.

The last row tests the result: a model whose blocks have all formats in turn, and the ratio of the time that
the speeds predict to the measured one. Writes `speeds.json` to the records, and the speeds to `--output`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, clock_for, paired_medians, peak_mib, record, table

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.plan import CompressionPlan
from tensornet.quantization.menus import MENUS
from tensornet_hf.embedded import gpt2_path

#: Blocks of the two models of a format, and the sizes of a block.
BLOCKS = (1, 9)
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
TOY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


def model_of(blocks: Sequence[nn.Module], sizes: dict[str, int]) -> LlamaForCausalLM:
    """Make a model that consists of copies of blocks; the embedded tokenizer has 1,024 tokens."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_hidden_layers=len(blocks), **sizes))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.model.layers = nn.ModuleList(copy.deepcopy(block) for block in blocks)
    return model.eval()


def block_of(name: str, sizes: dict[str, int]) -> tuple[nn.Module, CompressionPlan]:
    """Round the matrices of a random block to a number format."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_hidden_layers=1, **sizes)).bfloat16()
    config = tn.CompressionConfig(formats=("gguf", name), target_modules="*_proj", method="nearest")
    report = tn.compress(model, config, progress=False)
    return model.model.layers[0], report.plan


def generator(path: Path, threads: int) -> Callable[[], None]:
    """Load a file, and return a function that computes the next token."""
    from llama_cpp_py_sync import Llama
    from llama_cpp_py_sync._cffi_bindings import get_lib

    lib = get_lib()
    model = Llama(str(path), n_ctx=512, n_threads=threads)
    batch = lib.llama_batch_init(1, 0, 1)
    batch.n_tokens = 1
    place = 0

    def step() -> None:
        nonlocal place
        batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.logits[0] = 5 + place, place, 1, 1
        batch.seq_id[0][0] = 0
        assert lib.llama_decode(model._ctx, batch) == 0
        place += 1

    return step


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the speeds, and write them and a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small blocks, two formats, few tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--formats", nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=60, help="tokens of each model")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    sizes, (few, many) = TOY if given.toy else SIZES, BLOCKS
    threads = 1 if given.toy else given.threads
    every = (*MENUS["gguf"].formats, "int4:g32:s6:min")
    formats = tuple(given.formats or (every[:2] if given.toy else every))
    repeats = 5 if given.toy else given.repeats

    blocks = {name: block_of(name, sizes) for name in formats}
    sizes_of = {name: plan.bytes_after for name, (_, plan) in blocks.items()}
    mixed = [formats[k % len(formats)] for k in range(max(many, len(formats)))]
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for number, (key, names) in enumerate(
            [((name, count), [name] * count) for name in formats for count in (few, many)]
            + [(("mixed", few), mixed[:1]), (("mixed", len(mixed)), mixed)]
        ):
            path = Path(folder) / f"{number}.gguf"
            th.export(model_of([blocks[x][0] for x in names], sizes).bfloat16(), path, source=gpt2_path())
            steps[f"{key[0]} {key[1]}"] = generator(path, threads)
        times = paired_medians(steps, repeats, warmup=3, clock=clock_for(threads))

    speeds: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name in formats:
        seconds = times[f"{name} {many}"].low - times[f"{name} {few}"].low
        size = (many - few) * sizes_of[name]
        if seconds > 0:
            speeds[name] = size / seconds
        rows.append({"format": name, "bytes": size, "seconds": seconds, "bytes_per_second": speeds.get(name)})
    noisy = sorted(set(formats) - speeds.keys())
    seconds = times[f"mixed {len(mixed)}"].low - times[f"mixed {few}"].low
    predicted = None if noisy else sum(sizes_of[name] / speeds[name] for name in mixed[1:])
    size = sum(sizes_of[name] for name in mixed[1:])
    ratio = None if predicted is None else predicted / seconds
    rows.append({"format": "mixed", "bytes": size, "seconds": seconds, "predicted_over_measured": ratio})
    print(table(rows))
    if given.output is not None:
        if noisy:
            sys.exit(f"More blocks took no more time for {', '.join(noisy)}: run this on a quiet machine.")
        given.output.write_text(json.dumps(speeds, indent=2) + "\n", encoding="utf-8")
    facts = {"runtime": "llama.cpp", "generating_threads": threads, "repeats": repeats}
    return record("speeds", rows, folder=given.records, peak_mib=peak_mib(), **facts)


if __name__ == "__main__":
    print(main())
