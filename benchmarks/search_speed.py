"""How much faster than dense is the layer that the search chooses at 40 % of the parameters?

    python benchmarks/search_speed.py [--toy] [--threads 1 2] [--seconds 1]

For every shape one search with objective time, for all these token counts and without a matrix, then the
chosen layer in eval against `nn.Linear` at each of them, in turn in one process. Asked is a median of 2 and
nowhere under 1.4. With one thread processor time is compared, with more the wall clock. Writes the record
`search_speed.json`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import paired_medians, record
from speed import clock_for, median, options_of, rounds, with_threads

import tensornet as tn
from tensornet.search.result import form

SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 4096), (2048, 2048))
TOKENS = (1, 4, 16, 64, 256, 1024, 2048)
PARAM_RATIO = 0.4


@torch.no_grad()
def measure(
    shape: tuple[int, int], tokens: Sequence[int], threads: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure the rows of one shape."""
    start = time.perf_counter()
    found = tn.search_topology(shape, param_ratio=PARAM_RATIO, tokens=tokens).best("time")
    searched = time.perf_counter() - start
    layer = tn.nn.TensorNetworkLinear(found.topology).eval()
    dense = torch.nn.Linear(shape[1], shape[0])
    rows = []
    for count in tokens:
        x = torch.randn(count, shape[1])
        functions = {"dense": lambda x=x: dense(x), "chosen": lambda x=x: layer(x)}
        times = paired_medians(
            functions, rounds(functions.values(), seconds), warmup=2, clock=clock_for(threads)
        )
        rows.append(
            {
                "shape": list(shape),
                "form": form(found.topology),
                "param_ratio": round(found.params / (shape[0] * shape[1]), 4),
                "search_seconds": round(searched, 2),
                "tokens": count,
                "threads": threads,
                "choice": layer.explain(count).choice,
                "milliseconds": {name: round(1e3 * value.median, 4) for name, value in times.items()},
                "speedup": round(times["dense"].median / times["chosen"].median, 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and write its record."""
    options = options_of(__doc__, arguments)
    shapes, tokens = (((24, 16),), (1, 8)) if options.toy else (SHAPES, TOKENS)

    def work(threads: int) -> list[dict[str, Any]]:
        return [row for shape in shapes for row in measure(shape, tokens, threads, options.seconds)]

    rows = with_threads(options.threads, work)
    speedups = [row["speedup"] for row in rows]
    summary = {"median": median(speedups), "smallest": min(speedups)}
    print(summary)
    return record("search_speed", rows, folder=options.records, summary=summary)


if __name__ == "__main__":
    main()
