"""How long would a checkpoint of 7B, 70B or 1T parameters take to compress, and what would it need?

Processor seconds of one worker are measured for weights of several shapes: from file to file, in memory, and
of one `truncated_svd` at the rank that low rank has. Everything else is arithmetic from the shapes of the
models. A weight of shape (m, n), m the smaller, takes `a m^3 + b m^2 n` seconds: eigenvectors of its Gram
matrix, and products. The two constants come from the two largest weights measured, which have the same m.

    python benchmarks/scale_plan.py                 # measure, record, write docs/scale.md
    python benchmarks/scale_plan.py --write-only    # docs/scale.md from the record that is there
    python benchmarks/scale_plan.py --toy           # seconds
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet as tn
import tensornet_hf as th

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, ROOT, paired_medians, record

#: Rows and columns of the measured weights; the last two have as many columns.
SHAPES = ((1024, 1024), (2048, 4096), (4096, 4096), (11008, 4096))
TOY = ((16, 16), (32, 32), (48, 32))
#: The weight that is compressed: the output head of a model that has little else.
HEAD: dict[str, Any] = {"target_modules": "lm_head", "param_ratio": 0.5, "objective": "weight"}
CONFIGS = {
    "auto": tn.CompressionConfig(**HEAD),
    "low rank": tn.CompressionConfig(**HEAD, topology="low_rank"),
}
KEPT = 0.5
CORES = (2, 16, 256, 4096)


@dataclass(frozen=True)
class Model:
    """Shapes of a model: weights to compress, and parameters that are only copied.

    Args:
        name: what it is.
        weights: `(out_features, in_features, how many)`.
        copied: parameters that stay as they are: embeddings, heads, norms, routers.
    """

    name: str
    weights: tuple[tuple[int, int, int], ...]
    copied: int

    @property
    def compressed(self) -> int:
        """Parameters of the weights to compress."""
        return sum(m * n * count for m, n, count in self.weights)

    @property
    def params(self) -> int:
        """All parameters."""
        return self.compressed + self.copied

    def seconds(self, cubed: float, product: float) -> float:
        """Compute the processor seconds of all weights from the constants of `constants`."""
        sides = ((min(m, n), max(m, n), count) for m, n, count in self.weights)
        return sum((cubed * m**3 + product * m**2 * n) * count for m, n, count in sides)

    @property
    def largest(self) -> int:
        """Elements of the largest weight to compress."""
        return max(m * n for m, n, _ in self.weights)


#: Layers times shapes, from the published configurations of Llama 2 7B, Llama 3 70B, and of a mixture with
#: the shapes of Kimi K2 (61 layers of which 60 with 384 experts of 2048, hidden size 7168).
MODELS = (
    Model("7B, dense", ((4096, 4096, 4 * 32), (11008, 4096, 3 * 32)), 2 * 32000 * 4096),
    Model(
        "70B, dense",
        ((8192, 8192, 2 * 80), (1024, 8192, 2 * 80), (28672, 8192, 3 * 80)),
        2 * 128256 * 8192,
    ),
    Model(
        "1T, mixture of 384 experts",
        ((2048, 7168, 3 * 60 * 385), (18432, 7168, 3), (7168, 8192, 61), (12288, 1536, 61), (1536, 7168, 61)),
        2 * 163840 * 7168,
    ),
)


def measure(shapes: Sequence[tuple[int, int]], folder: Path) -> list[dict[str, Any]]:
    """Measure processor seconds by search and shape, beside one truncated SVD."""
    rows = []
    for m, n in shapes:
        source = folder / f"{m}x{n}"
        head = LlamaConfig(hidden_size=n, vocab_size=m, num_hidden_layers=0, num_attention_heads=1)
        LlamaForCausalLM(head).bfloat16().save_pretrained(source)
        for name, config in CONFIGS.items():
            rows.append({"search": name, "rows": m, "columns": n, **measure_one(source, config)})
            print(rows[-1], flush=True)
    return rows


def measure_one(source: Path, config: tn.CompressionConfig) -> dict[str, float]:
    """Measure one head: from file to file, in memory, and one truncated SVD of it at the rank of low rank."""
    loaded = LlamaForCausalLM.from_pretrained(source)
    weight = loaded.lm_head.weight.detach()
    m, n = weight.shape
    rank = int(KEPT * m * n / (m + n))

    def in_memory() -> None:
        tn.compress(copy.deepcopy(loaded), config, progress=False)

    calls = {
        "file": lambda: th.compress_checkpoint(source, source.parent / "out", config, force=True),
        "memory": in_memory,
        "svd": lambda: tn.truncated_svd(weight, max_rank=rank),
    }
    repeats, warmup = (3, 1) if min(m, n) <= 2048 else (1, 0)
    timings = paired_medians(calls, repeats, warmup=warmup, clock=time.process_time)
    times = {name: timing.median for name, timing in timings.items()}
    return {
        "cpu_seconds": round(times["file"], 3),
        "times_svd": round(times["file"] / times["svd"], 2),
        "in_memory_times_svd": round(times["memory"] / times["svd"], 2),
        "gb_a_minute": round(2 * m * n / 1e9 / times["file"] * 60, 4),
    }


def constants(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Fit the seconds `a m^3 + b m^2 n` of each search to its two largest weights."""
    found = {}
    for search in CONFIGS:
        square, long = [row for row in rows if row["search"] == search][-2:]
        m, more = square["columns"], long["rows"] - square["rows"]
        product = max((long["cpu_seconds"] - square["cpu_seconds"]) / (m**2 * more), 0.0)
        found[search] = (square["cpu_seconds"] / m**3 - product, product)
    return found


def memory_factor(shape: tuple[int, int], folder: Path) -> float:
    """Measure the peak memory of a worker above its memory at rest, over its weight in double precision."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensornet_hf"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        source = folder / "{}x{}".format(*shape)
        pool.submit(_peak_of_a_run, source, folder / "once").result()
        before, after = pool.submit(_peak_of_a_run, source, folder / "twice").result()
    return (after - before) / (8 * shape[0] * shape[1])


def _peak_of_a_run(source: Path, out: Path) -> tuple[int, int]:
    resting = psutil.Process().memory_info().rss
    return resting, th.compress_checkpoint(source, out, CONFIGS["auto"]).peak_memory


def extrapolate(rows: Sequence[Mapping[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Estimate what each model needs."""
    made = []
    fitted = constants(rows)
    for model in MODELS:
        before = 2 * model.params
        pieces = 2 * KEPT * model.compressed
        after = pieces + 2 * model.copied
        made.append(
            {
                "model": model.name,
                "checkpoint_gb": round(before / 1e9, 1),
                **{
                    f"core_hours, {search}": round(model.seconds(*pair) / 3600, 1)
                    for search, pair in fitted.items()
                },
                **{
                    f"hours on {cores} cores": round(model.seconds(*fitted["auto"]) / 3600 / cores, 2)
                    for cores in CORES
                },
                "memory_of_a_worker_gb": round(factor * 8 * model.largest / 1e9, 1),
                "read_gb": round((before + pieces) / 1e9, 1),
                "written_gb": round((after + pieces) / 1e9, 1),
                "result_gb": round(after / 1e9, 1),
            }
        )
    return made


PAGE = """# Compressing at scale: a plan on paper

Generated by `python benchmarks/scale_plan.py` from `benchmarks/records/scale_plan.json`; do not edit.

What is measured is the first table, on {device}, one core, load average {load}. The rest is arithmetic from
it and from the shapes of the models, in that script. It was not run at that size.

## Measured: one worker, weights in bfloat16, half of the parameters kept

{measured}

`auto` plans each weight over low rank and chains of three cores and carries the better one out; `low rank`
leaves the search out. Seconds are from file to file; *times svd* compares them with one `truncated_svd` of
the weight at the rank that low rank has. A weight `(m, n)` takes `a m^3 + b m^2 n` seconds, so a checkpoint
of few large weights takes longer than one of many small ones of the same size.

## Extrapolated: bfloat16 checkpoints, all linear layers, half of their parameters kept

{models}

- **Time.** Eigenvectors and products in double precision are nearly all of it: a core works through {rate} GB
  of weights of {size} in a minute, and any disk gives it more than that. With as many workers as
  weights, the largest weight decides.
- **Memory.** A worker holds one weight in double precision about {factor} times over, whatever the size of
  the checkpoint (`benchmarks/scale.py`, question 2). Take as many workers as fit into the machine.
- **Disk.** Every tensor is read once. Cores are written twice, as pieces and into their final file, and
  pieces go as files are finished: what is needed at any time is the result and one file of weights (5 GB).
- **Network.** With workers on many machines the same bytes travel to and from the shared file system: divided
  by the hours above, {network} MB a second for 1T on {cores} cores. Between processes only descriptions of a
  few hundred bytes travel, one each way for each weight.
- **Faults.** A weight is the unit of loss: a machine that dies costs the weights it was working on.
- **GPU.** `device="cuda"` moves the arithmetic of a worker there; nothing else changes. Not measured here.
"""


def write_page(path: Path) -> None:
    """Write docs/scale.md from the record."""
    kept = json.loads((RECORDS / "scale_plan.json").read_text())
    last = next(row for row in kept["rows"] if (row["rows"], row["columns"]) == SHAPES[-1])
    biggest = kept["models"][-1]
    hours = biggest[f"hours on {CORES[-1]} cores"]
    traffic = (biggest["read_gb"] + biggest["written_gb"]) * 1e3 / max(hours * 3600, 1e-9)
    text = PAGE.format(
        device=kept["device"],
        load=kept["load"],
        measured=table(kept["rows"]),
        models=table(
            [{"": key.replace("_", " "), **{m["model"]: m[key] for m in kept["models"]}} for key in biggest][
                1:
            ]
        ),
        rate=last["gb_a_minute"],
        size="{} x {}".format(*SHAPES[-1]),
        factor=round(kept["memory_factor"]),
        network=f"{traffic:,.0f}",
        cores=CORES[-1],
    )
    path.write_text(text)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render rows as a Markdown table."""
    names = list(rows[0])
    cells = [[f"{x:,}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join(f"| {' | '.join(cell.replace('_', ' ') for cell in line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, record, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("--output", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not options.write_only:
        with tempfile.TemporaryDirectory() as folder:
            shapes = TOY if options.toy else SHAPES
            rows = measure(shapes, Path(folder))
            factor = memory_factor(shapes[-1], Path(folder))
        models = extrapolate(rows, factor)
        print(table(models))
        record(
            "scale_plan",
            rows,
            folder=options.output,
            models=models,
            memory_factor=round(factor, 1),
            dtype="bfloat16",
        )
    if not options.toy:
        write_page(ROOT / "docs" / "scale.md")


if __name__ == "__main__":
    main()
